"""The AsyncAPI 3.0 document of the bus, generated from the message types and `schemas.names`.

    python -m schemas.asyncapi docs/asyncapi.json            write it
    python -m schemas.asyncapi --check docs/asyncapi.json    exit 1 if it is not up to date

Nothing about the wire is written twice: payload schemas come from the msgspec types, texts
from their docstrings, and addresses from the functions that build the real subjects, called
with placeholder names. Only who sends what (`CHANNELS`, `OPERATIONS`) is stated here.
The document is plain JSON in a fixed order, so a change of the wire shows as a small diff.
"""

import argparse
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import msgspec

from schemas import (
    admin,
    batches,
    commands,
    events,
    keys,
    names,
    requests,
    state,
    stream,
    tokenize,
)

Json: TypeAlias = dict[str, Any]
MessageType: TypeAlias = type[msgspec.Struct]

ASYNCAPI_VERSION = "3.0.0"
WIRE_VERSION = "1.0.0"  # the "v1" of every subject and tag
DEMAND = "Demand"  # the one message without a payload, so without a type

_PARAMETERS: dict[str, Json] = {
    "class": {
        "enum": list(get_args(names.RequestClass)),
        "description": "How long the client is willing to wait.",
    },
    "model": {"description": "Model name; every byte outside [A-Za-z0-9_-] is written =HH."},
    "gpu": {"description": "GPU name, escaped like a model name."},
    "action": {"description": "What is wanted: the last part of the message's `type`."},
    "batch": {"description": "The batch's id."},
    "line": {"description": "Number of a line of its input file, from 1."},
    "file": {"description": "The file's id."},
    "kind": {"description": "What happened: the last part of the message's `type`."},
}


class Channel(NamedTuple):
    """One family of subjects. ``address`` is None where it is only known at run time."""

    name: str
    address: str | None
    description: str
    messages: tuple[MessageType, ...]


class Operation(NamedTuple):
    """One thing that one service does on one channel; no ``messages`` means all of them."""

    service: Literal["api", "scheduler", "agent", "admin"]
    action: Literal["send", "receive"]
    channel: str
    summary: str
    messages: tuple[MessageType, ...] = ()


def _template(subject: str) -> str:
    """A subject built with placeholder names, as an address with parameters."""
    for parameter in _PARAMETERS:
        subject = subject.replace(parameter.upper(), f"{{{parameter}}}")
    return subject


def _bucket(bucket: str, keys: str, record: MessageType) -> Channel:
    name = bucket.rsplit("_", 1)[1].lower()
    return Channel(name, f"$KV.{bucket}.>", f"KV bucket {bucket}; keys {keys}.", (record,))


CHANNELS = (
    Channel(
        "requests",
        _template(names.request_subject("batch", "MODEL").replace("batch", "CLASS")),
        f"Work queue of a model (stream {names.STREAM_REQUESTS}, in memory; of class batch "
        f"{names.STREAM_BATCH}, in files). Agents that hold the model pull "
        "as many as their batch has free slots; the message is acknowledged when its request ends.",
        get_args(requests.Request),
    ),
    Channel(
        "demand",
        _template(names.demand_subject("CLASS", "MODEL")),
        "Republished by the request stream, headers only: prompts never reach the scheduler.",
        (),
    ),
    Channel(
        "cancel",
        _template(names.cancel_subject("MODEL")),
        "Core NATS. A running request stops within one decode step.",
        (requests.CancelRequest,),
    ),
    Channel(
        "reply",
        None,
        "Core NATS. One subject per request, named in the request's `reply_to`: "
        "Started, Tokens* or Vectors*, then exactly one of Finished and Failed; Resuming before a "
        "further attempt.",
        get_args(stream.Chunk),
    ),
    Channel(
        "resume",
        None,
        "Core NATS. On the reply subject of a Resuming chunk: where an agent is to go on with a "
        "request that it was given again.",
        (stream.ResumeFrom,),
    ),
    Channel(
        "results",
        _template(names.result_subject("BATCH", "LINE")),
        f"The `reply_to` of requests of class batch, kept in stream {names.STREAM_RESULTS} until "
        "their batch has ended. The tokens of an answer come as one.",
        get_args(stream.Chunk),
    ),
    Channel(
        "commands",
        _template(names.command_subject("GPU")),
        "Core NATS. Idempotent; answered by events that echo the `generation`.",
        get_args(commands.Command),
    ),
    Channel(
        "verify",
        _template(names.verify_subject("GPU")),
        "Core NATS. Answered by a ModelVerified or VerificationFailed event, if the agent holds "
        "the model's weights.",
        (requests.VerifyRequest,),
    ),
    Channel(
        "tokenize",
        _template(names.tokenize_subject("MODEL")),
        "Core NATS, request and reply. One of the agents that have registered the model answers, "
        "wherever its weights are.",
        get_args(tokenize.TokenizeAsk),
    ),
    Channel(
        "tokenized",
        None,
        "Core NATS. The one answer to a message on `tokenize`, on its reply subject.",
        get_args(tokenize.TokenizeAnswer),
    ),
    Channel(
        "status",
        _template(names.status_subject("GPU")),
        "Core NATS. An agent's heartbeat, also sent at once after every change.",
        (state.AgentStatus,),
    ),
    Channel(
        "waits",
        _template(names.wait_subject("MODEL")),
        "Core NATS. How long a model is expected to be waited for, about once a second while "
        "somebody waits.",
        (state.PredictedWait,),
    ),
    Channel(
        "events",
        _template(names.event_subject("KIND", "GPU", "MODEL")),
        f"What happened, each published once and kept in stream {names.STREAM_EVENTS}. "
        f"A gpu or model that does not apply is {names.NO_TOKEN!r}.",
        events.event_types(),
    ),
    Channel(
        "admin",
        _template(names.admin_subject("ACTION", "MODEL")),
        "Core NATS request and reply, to the scheduler that leads: one AdminAnswer each.",
        admin.message_types(),
    ),
    Channel(
        "admin_reply",
        None,
        "Core NATS. The reply subject of the request.",
        (admin.AdminAnswer,),
    ),
    _bucket(
        names.BUCKET_DEPLOYMENTS,
        "<model>: the deployments that are wanted; an entry's revision is its version",
        state.DesiredDeployment,
    ),
    _bucket(names.BUCKET_MODELS, "<model>: the deployments that exist", state.DeploymentRecord),
    _bucket(names.BUCKET_PLACEMENT, "<gpu>.<model>: what is desired", state.PlacementRecord),
    _bucket(names.BUCKET_RESIDENCY, "<gpu>.<model>: what is", state.ResidencyRecord),
    _bucket(
        names.BUCKET_LEASES,
        f"{names.LEADER_KEY}, {names.BATCHES_KEY} and {_template(names.agent_lease_key('GPU'))}: "
        "who leads, who lives. "
        "An entry expires unless its holder renews it",
        state.LeaseRecord,
    ),
    _bucket(
        names.BUCKET_FILES,
        f"<file>: what was uploaded, or written by batches; the bytes are on "
        f"{_template(names.file_subject('FILE'))} (stream {names.STREAM_FILES}), in chunks",
        batches.FileRecord,
    ),
    _bucket(names.BUCKET_BATCHES, "<batch>: what became of it", batches.BatchRecord),
    _bucket(names.BUCKET_KEYS, "<id>: API keys, each as a hash and what it may do", keys.KeyRecord),
)

OPERATIONS = (
    Operation("admin", "send", "verify", "Check a model's weights on demand."),
    Operation("admin", "send", "keys", "Make, change and withdraw API keys: `hotswap keys`."),
    Operation("api", "send", "requests", "Queue a request for its model."),
    Operation("api", "receive", "reply", "Relay the answer to the HTTP client."),
    Operation("api", "send", "resume", "Say what is known of the answer."),
    Operation("api", "send", "cancel", "Give up a request: the client left or nobody waits."),
    Operation("api", "send", "tokenize", "Ask for a text's tokens, or the text of tokens."),
    Operation("api", "receive", "tokenized", "Answer the HTTP client."),
    Operation("api", "send", "events", "Report requests taken back.", (events.RequestWithdrawn,)),
    Operation(
        "api", "receive", "events", "Tell streams how far a load is.", (events.LoadProgressed,)
    ),
    Operation("api", "send", "admin", "Ask for changes of deployments."),
    Operation("api", "receive", "admin_reply", "Learn what became of it."),
    Operation("api", "receive", "results", "Collect what batches were answered."),
    Operation("api", "send", "files", "Record files."),
    Operation("api", "receive", "files", "Show files."),
    Operation("api", "send", "batches", "Record what became of batches."),
    Operation("api", "receive", "batches", "Show batches, and go on with them."),
    Operation("api", "send", "leases", "Hold the lease of whoever drives batches."),
    Operation("api", "receive", "models", "Know which models exist."),
    Operation("api", "receive", "residency", "Show each model's state."),
    Operation("api", "receive", "leases", "Know whether a leader and agents are there."),
    Operation("api", "receive", "waits", "Tell clients when to try again."),
    Operation("api", "receive", "keys", "Know whose request it is, and what that key may do."),
    Operation("api", "send", "keys", "Make, change and withdraw API keys: /v1/keys."),
    Operation("scheduler", "send", "waits", "Tell how long models are waited for."),
    Operation("scheduler", "receive", "demand", "See that a model is wanted."),
    Operation("scheduler", "send", "commands", "Load, swap in and swap out replicas."),
    Operation("scheduler", "receive", "status", "Follow memory, residency and load."),
    Operation("scheduler", "receive", "events", "Follow what became of commands and requests."),
    Operation(
        "scheduler",
        "send",
        "events",
        "Report changes of leader and deployments, models that nobody can serve, and decisions "
        "with their reasons.",
        get_args(events.SchedulerEvent),
    ),
    Operation("scheduler", "receive", "admin", "Change deployments, and what is where."),
    Operation("scheduler", "send", "admin_reply", "Say what became of it."),
    Operation("scheduler", "send", "deployments", "Record what is wanted."),
    Operation("scheduler", "receive", "deployments", "Know what earlier leaders recorded."),
    Operation("scheduler", "send", "models", "Record deployments."),
    Operation("scheduler", "send", "placement", "Record what is desired."),
    Operation("scheduler", "send", "leases", "Hold the leader's lease."),
    Operation("scheduler", "receive", "leases", "Notice that an agent is gone."),
    Operation("agent", "receive", "requests", "Pull requests for resident models."),
    Operation("agent", "send", "reply", "Stream the answer."),
    Operation("agent", "receive", "resume", "Go on behind the tokens that the api has."),
    Operation("agent", "send", "results", "Answer a request of class batch."),
    Operation("agent", "receive", "cancel", "Stop a running request."),
    Operation("agent", "receive", "commands", "Carry out the leader's commands."),
    Operation("agent", "receive", "verify", "Check a model's weights."),
    Operation("agent", "receive", "tokenize", "Ask the model's tokenizer."),
    Operation("agent", "send", "tokenized", "Say what it said."),
    Operation("agent", "send", "status", "Report memory and replicas."),
    Operation("agent", "send", "events", "Report what it did.", get_args(events.AgentEvent)),
    Operation("agent", "send", "residency", "Record what is."),
    Operation("agent", "send", "leases", "Hold the agent's lease."),
)


def build() -> Json:
    """The whole document, as plain JSON values."""
    return {
        "asyncapi": ASYNCAPI_VERSION,
        "info": {
            "title": "hotswap bus",
            "version": WIRE_VERSION,
            "description": "What hotswap's services say to each other over NATS, as JSON.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "channels": {channel.name: _channel(channel) for channel in CHANNELS},
        "operations": dict(_operation(operation) for operation in OPERATIONS),
        "components": {"messages": _messages(), "schemas": _schemas()},
    }


def _channel(channel: Channel) -> Json:
    doc: Json = {
        "address": channel.address,
        "description": channel.description,
        "messages": {
            name: {"$ref": f"#/components/messages/{name}"} for name in _message_names(channel)
        },
    }
    used = [name for name in _PARAMETERS if f"{{{name}}}" in (channel.address or "")]
    if used:
        doc["parameters"] = {name: dict(_PARAMETERS[name]) for name in used}
    if "kind" in used:
        doc["parameters"]["kind"]["enum"] = [_kind(event) for event in channel.messages]
    return doc


def _message_names(channel: Channel) -> list[str]:
    return [message.__name__ for message in channel.messages] or [DEMAND]


def _kind(event: MessageType) -> str:
    # kind_of looks at the type only, and msgspec constructors do not check values.
    hollow: Any = event(*(None for _ in event.__struct_fields__))
    return events.kind_of(hollow)


def _operation(operation: Operation) -> tuple[str, Json]:
    channel = next(one for one in CHANNELS if one.name == operation.channel)
    chosen = [message.__name__ for message in operation.messages] or _message_names(channel)
    doc: Json = {
        "action": operation.action,
        "channel": {"$ref": f"#/channels/{channel.name}"},
        "summary": operation.summary,
        "tags": [{"name": operation.service}],
        "messages": [{"$ref": f"#/channels/{channel.name}/messages/{name}"} for name in chosen],
    }
    if operation.action == "send" and channel.name == "requests":
        doc["reply"] = {
            "address": {"location": "$message.payload#/reply_to"},
            "channel": {"$ref": "#/channels/reply"},
        }
    return f"{operation.service}_{operation.action}s_{channel.name}", doc


def _messages() -> Json:
    docs: Json = {}
    for channel in CHANNELS:
        for message in channel.messages:
            docs[message.__name__] = _message(message)
    # Only the header that identifies the request is promised; NATS adds its own (Nats-Subject).
    docs[DEMAND] = {
        "name": DEMAND,
        "title": DEMAND,
        "summary": "The headers of a queued request, without its body.",
        "headers": _headers("The request's id."),
        "payload": {"type": "string", "maxLength": 0},
    }
    for request in get_args(requests.Request):
        docs[request.__name__]["headers"] = _headers(
            "The request's id: the queue drops a second message with the same one."
        )
    return dict(sorted(docs.items()))


def _message(message: MessageType) -> Json:
    doc: Json = {"name": str(message.__struct_config__.tag), "title": message.__name__}
    if message.__doc__:
        summary, _, rest = inspect.cleandoc(message.__doc__).partition("\n\n")
        doc["summary"] = " ".join(summary.split())
        if rest:
            doc["description"] = rest
    doc["payload"] = {"$ref": f"#/components/schemas/{message.__name__}"}
    return doc


def _headers(msg_id: str) -> Json:
    return {
        "type": "object",
        "properties": {
            "Nats-Msg-Id": {"type": "string", "description": msg_id},
            "traceparent": {"type": "string", "description": "W3C trace context."},
            names.HEADER_TENANT: {
                "type": "string",
                "description": "Who the request is for: the id of the client's API key.",
            },
        },
        "required": ["Nats-Msg-Id"],
    }


def _schemas() -> Json:
    types = dict.fromkeys(message for channel in CHANNELS for message in channel.messages)
    _, components = msgspec.json.schema_components(
        tuple(types), ref_template="#/components/schemas/{name}"
    )
    for node in _objects(components):
        # msgspec writes OpenAPI's object; AsyncAPI's `discriminator` is a string that picks by
        # schema name. The tags' enums tell the alternatives apart without either.
        if isinstance(node.get("discriminator"), dict):
            del node["discriminator"]
    return dict(sorted(components.items()))


def _objects(node: object) -> Iterator[Json]:
    """Every JSON object in ``node``, itself included."""
    if isinstance(node, dict):
        yield node
        for child in node.values():
            yield from _objects(child)
    elif isinstance(node, list):
        for child in node:
            yield from _objects(child)


def render() -> str:
    """The document as the text of its file."""
    return json.dumps(build(), indent=2, ensure_ascii=False) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Write the document, or with ``--check`` only compare it. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m schemas.asyncapi", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 when stale")
    parser.add_argument("file", type=Path, help="the document, docs/asyncapi.json")
    args = parser.parse_args(argv)
    file: Path = args.file
    wanted = render()
    if not args.check:
        file.write_text(wanted, encoding="utf-8")
        return 0
    found = file.read_text(encoding="utf-8") if file.exists() else None
    if found == wanted:
        return 0
    problem = "does not exist" if found is None else "does not match schemas/"
    print(f"{file} {problem}; write it: python -m schemas.asyncapi {file}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
