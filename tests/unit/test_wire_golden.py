"""The JSON bytes of every message are frozen: services of different versions share one bus.

`golden/messages.jsonl` holds the bytes of `EXAMPLES`, one per line. A new message gets an
example here and a line there, by ``python tests/unit/test_wire_golden.py``. An old line
that changes means that running services would misread each other: give the message a new
version in its tag instead, unless the field is new and has a default.
"""

import importlib
import inspect
import json
import pkgutil
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import schemas
from schemas import (
    admin,
    batches,
    commands,
    decisions,
    events,
    keys,
    requests,
    state,
    stream,
    tokenize,
)

GOLDEN = Path(__file__).parent / "golden" / "messages.jsonl"

SPEC = state.ModelSpec(
    name="Qwen/Qwen2.5-7B",
    source="/models/qwen",
    dtype="bfloat16",
    max_model_len=4096,
    max_batch=16,
    kv_tokens=8192,
    preload=False,
    trust_remote_code=True,
    runner="embed",
    preemption="recompute",
    prefix_caching=False,
    pinned=True,
    gpus=("gpu0", "gpu1"),
    priority=-7,
    ttft_target_s=0.5,
    token_target_s=0.0625,
    exclusive_group="large",
    ttl_s=600.5,
    min_residency_s=5.5,
    drained=True,
    aliases=("gpt-4o",),
    defaults={"temperature": 0.5},
    overrides={"seed": None, "stop": ["\n"]},
)
FACTS = state.ModelFacts(
    architecture="LlamaForCausalLM",
    dtype="bfloat16",
    num_parameters=123_456_789,
    weight_bytes=247_463_936,
    kv_bytes=33_554_432,
    max_model_len=4096,
    max_batch=16,
    runner="embed",
    dimensions=1024,
    tool_format="hermes",
)
TRACE = state.SwapTrace(
    started_at=1767225600.25,
    drain_s=0.5,
    map_s=0.001,
    copy_s=0.02,
    total_s=0.521,
    num_bytes=247_463_936,
    layers=(state.LayerCopy(name="model.layers.0", num_bytes=2_097_152, copy_s=0.0002),),
    decision_s=0.25,
    first_layer_s=0.002,
    kept_bytes=2_097_152,
    verify_s=0.125,
    ceiling_gb_per_s=12.5,
    link=state.PcieLink(generation=4, width=16, replays=7),
    suspend_s=0.0625,
    kv_bytes=1_048_576,
)
TIMING = stream.RequestTiming(queue_wait_s=0.75, prefill_s=0.125, decode_s=2.5)
REPLICA = state.ReplicaStatus(
    model="m",
    state="failed",
    generation=3,
    in_flight=2,
    facts=FACTS,
    reason="checksum",
    cached_bytes=4_194_304,
    settings="246270781ae129ef",
    batch_in_flight=1,
)
SAMPLING = requests.SamplingParams(
    seed=42,
    max_tokens=64,
    min_tokens=1,
    temperature=0.7,
    top_p=0.9,
    top_k=40,
    stop=("\n\n", "é"),
    ignore_eos=True,
    min_p=0.05,
    presence_penalty=0.5,
    frequency_penalty=-0.25,
    repetition_penalty=1.125,
    stop_token_ids=(2, 32000),
    logit_bias={50256: -100.0},
    logprobs=3,
    allowed_token_ids=(7, 8),
    bad_words=("never",),
    include_stop=True,
    skip_special_tokens=False,
    truncate_prompt_tokens=-1,
    truncation_side="right",
    cache_salt="pinch",
    tell_prompt_ids=True,
    tell_prompt_text=True,
    grammar=requests.Grammar(
        kind="json_schema",
        text='{"type":"object"}',
        field="response_format.json_schema.schema",
    ),
)
TOKEN = stream.TokenLogprob(token_id=11, logprob=-0.5, text="\\xe2", raw=b"\xe2")
TOLD = stream.TokenLogprobs(chosen=TOKEN, offset=21, top=(TOKEN,))
AT = 1767225600.5
TENANT = "2c70e12b7a0646f9"


def _generate(prompt: requests.Prompt) -> requests.GenerateRequest:
    return requests.GenerateRequest(
        request_id="req-1",
        model="m",
        klass="interactive",
        prompt=prompt,
        sampling=SAMPLING,
        reply_to="_INBOX_api.abc.req-1",
        created_at=AT,
        deadline_at=AT + 60,
        tenant=TENANT,
        prefix_token_ids=(11, 12),
        attempts_before=1,
    )


_COMMAND: dict[str, Any] = {"gpu": "gpu0", "model": "m", "epoch": 5, "generation": 3}
_EVENT: dict[str, Any] = {"gpu": "gpu0", "model": "m", "generation": 3, "at": AT}
_CHUNK: dict[str, Any] = {"request_id": "req-1", "attempt": 2}

EXAMPLES: tuple[msgspec.Struct, ...] = (
    commands.Register(**_COMMAND, spec=SPEC, settings="246270781ae129ef"),
    commands.Load(**_COMMAND, request_id="req-1"),
    commands.SwapIn(**_COMMAND, request_id="req-1", waiting_since=AT - 1, decided_at=AT - 0.75),
    commands.SwapOut(**_COMMAND, request_id="req-1", preempt=True, end_requests="removed"),
    events.AgentStarted(
        gpu="gpu0",
        instance="i1",
        at=AT,
        device="cpu",
        device_name="Some CPU",
        budget_bytes=402_653_184,
    ),
    events.AgentStopped(gpu="gpu0", instance="i1", at=AT),
    events.WorkerDied(gpu="gpu0", at=AT, reason="exit status -9"),
    events.ModelRegistered(**_EVENT, facts=FACTS),
    events.ModelLoaded(**_EVENT, num_bytes=247_463_936, load_s=1.5),
    events.ModelUnloaded(**_EVENT, num_bytes=247_463_936),
    events.LoadProgressed(
        gpu="gpu0", model="m", at=AT, done_bytes=1024, total_bytes=4096, gb_per_s=1.5
    ),
    events.SwapInCompleted(**_EVENT, trace=TRACE),
    events.SwapInCancelled(**_EVENT, trace=TRACE),
    events.FirstTokenSent(
        **_EVENT, request_id="req-1", prompt_tokens=12, first_token_s=0.5, swap_s=0.25
    ),
    events.SwapOutCompleted(**_EVENT, trace=TRACE, num_suspended=2),
    events.VerificationFailed(**_EVENT, check="page", reason="page 7 of 118 differs"),
    events.ModelVerified(
        gpu="gpu0", model="m", at=AT, num_pages=118, num_bytes=247_463_936, verify_s=0.5
    ),
    events.CommandFailed(**_EVENT, command="load", reason="model.safetensors is missing"),
    events.CommandRejected(**_EVENT, command="swap_in", reason="epoch 4 is older than 5"),
    events.RequestStarted(
        gpu="gpu0",
        model="m",
        request_id="req-1",
        at=AT,
        attempt=1,
        queue_wait_s=0.75,
        tenant=TENANT,
        klass="batch",
    ),
    events.RequestEnded(
        gpu="gpu0",
        model="m",
        request_id="req-1",
        at=AT,
        outcome="failed",
        prompt_tokens=12,
        completion_tokens=34,
        timing=TIMING,
        error="engine_failed",
        tenant=TENANT,
        prefix_tokens=11,
        klass="batch",
    ),
    events.RequestWithdrawn(model="m", request_id="req-1", at=AT, reason="client_left"),
    events.LeaderElected(holder="scheduler-1", epoch=5, at=AT),
    state.AgentStatus(
        gpu="gpu0",
        instance="i1",
        worker_pid=4321,
        device="cpu",
        device_name="Some CPU",
        budget_bytes=402_653_184,
        used_bytes=281_018_368,
        page_bytes=2_097_152,
        replicas=(REPLICA,),
        host_budget_bytes=8_589_934_592,
        host_used_bytes=247_463_936,
    ),
    state.DeploymentRecord(
        spec=SPEC,
        status="failed",
        reason="no config.json",
        facts=FACTS,
        created_at=1767225600,
        revision=42,
        origin="api",
        updated_at=AT,
        updated_by="key 2c70e12b7a0646f9",
    ),
    state.PlacementRecord(gpu="gpu0", model="m", desired="resident", generation=3, epoch=5),
    state.ResidencyRecord(
        gpu="gpu0", model="m", state="failed", generation=3, changed_at=AT, reason="checksum"
    ),
    state.LeaseRecord(holder="scheduler-1", epoch=5),
    _generate(
        requests.ChatPrompt(
            messages=(
                requests.ChatMessage(
                    role="user",
                    content="Grüße",
                    name="ada",
                    tool_calls=(requests.ToolCall(id="call_1", name="f", arguments="{}"),),
                    tool_call_id="call_0",
                ),
            ),
            tools=(
                requests.Tool(
                    name="f",
                    description="does it",
                    parameters={"type": "object", "properties": {}},
                    strict=True,
                ),
            ),
            add_generation_prompt=False,
            continue_final_message=True,
            add_special_tokens=True,
            template_kwargs={"enable_thinking": False},
            documents=({"title": "t", "text": "x"},),
            reasoning_effort="low",
        )
    ),
    _generate(requests.TextPrompt(text="Once upon a time", add_special_tokens=False)),
    _generate(requests.TokenPrompt(token_ids=(1, 2, 3))),
    requests.EmbedRequest(
        request_id="req-1",
        model="m",
        klass="interactive",
        inputs=("Grüße", (1, 2, 3)),
        reply_to="_INBOX_api.abc.req-1",
        created_at=AT,
        deadline_at=AT + 60,
        dimensions=256,
        tenant=TENANT,
        attempts_before=1,
    ),
    requests.CancelRequest(request_id="req-1", model="m", gpu="gpu0"),
    requests.VerifyRequest(model="m"),
    events.DeploymentFailed(model="m", at=1.5, reason="needs 9 MiB of device memory"),
    stream.Started(**_CHUNK, gpu="gpu0", start="switch", swap=TRACE),
    stream.Tokens(
        **_CHUNK,
        index=7,
        token_ids=(11, 12),
        text=" a time",
        logprobs=(TOLD, TOLD),
        prompt=stream.PromptTold(num_tokens=3, token_ids=(1, 2, 3), text="Once upon"),
    ),
    stream.Vectors(**_CHUNK, index=7, dimensions=2, data=b"\x00\x00\x80?\x00\x00\x00\x00"),
    stream.Finished(
        **_CHUNK,
        finish_reason="stop",
        prompt_tokens=12,
        completion_tokens=34,
        timing=TIMING,
        text="…",
        cached_tokens=8,
    ),
    stream.Failed(**_CHUNK, code="engine_failed", message="the engine worker died"),
    stream.Resuming(**_CHUNK, gpu="gpu0"),
    stream.ResumeFrom(request_id="req-1", verdict="run", token_ids=(11, 12)),
    events.DecisionMade(
        model="m",
        gpu="gpu0",
        action="evict",
        at=AT,
        reason="idle models on gpu0 make room",
        request_id="req-1",
        waited_s=0.25,
        due_at=AT - 1,
        urgency="late",
        priority=-7,
        num_waiters=3,
        num_suspended=2,
        predicted_wait_s=0.5,
        victims=(decisions.Victim(model="o", how="preempted", idle_s=1.5, slack_s=2.5),),
        candidates=(
            decisions.Candidate(
                gpu="gpu0",
                action="evict",
                rank=3,
                cost_s=0.75,
                missing_bytes=247_463_936,
                victims=("o",),
            ),
        ),
        num_candidates=1,
    ),
    state.PredictedWait(
        model="m", at=AT, wait_s=0.5, num_waiters=3, num_suspended=2, since=AT - 1, place=1
    ),
    commands.Unload(**_COMMAND, end_requests="removed"),
    events.DeploymentChanged(
        model="m",
        at=AT,
        action="move",
        who="key 2c70e12b7a0646f9",
        detail="gpu0 -> gpu1",
        revision=7,
    ),
    state.DesiredDeployment(
        spec=SPEC,
        declared=SPEC,
        removed=True,
        created_at=1767225600,
        updated_at=AT,
        updated_by="hotswap.toml",
    ),
    admin.PutDeployment(spec=SPEC, who="http", if_match=(42, 43), must_be_new=True),
    admin.DeleteDeployment(model="m", who="http", if_match=(42,), drain=False),
    admin.SwapInDeployment(model="m", until=AT, who="http", gpu="gpu0"),
    admin.SwapOutDeployment(model="m", who="http", gpu="gpu0"),
    admin.MoveDeployment(model="m", source="gpu0", gpu="gpu1", until=AT, who="http"),
    admin.AdminAnswer(outcome="conflict", reason="no room", revision=42, created=True),
    batches.FileRecord(
        file="file-1",
        filename="in.jsonl",
        purpose="batch",
        num_bytes=4096,
        created_at=1767225600,
        expires_at=1769817600,
        tenant=TENANT,
    ),
    batches.BatchRecord(
        batch="batch_1",
        endpoint="/v1/chat/completions",
        input_file="file-1",
        completion_window="24h",
        created_at=1767225600,
        expires_at=1767312000,
        status="completed",
        reached={"in_progress": 1767225601, "completed": 1767229200},
        metadata={"night": "1"},
        tenant=TENANT,
        num_requests=3,
        num_completed=2,
        num_failed=1,
        output_file="file-2",
        error_file="file-3",
        errors=(batches.BatchError("invalid_url", "url must be ...", line=2, param="url"),),
    ),
    keys.KeyRecord(
        id=TENANT,
        name="ada",
        hash="9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        role="admin",
        models=("m", "llama-*"),
        requests_per_minute=60,
        tokens_per_minute=100_000,
        max_concurrent=4,
        created_at=1767225600,
        expires_at=1767312000,
        disabled=True,
    ),
    tokenize.TokenizeRequest(
        model="m", prompt=requests.TextPrompt("Grüße", add_special_tokens=False), token_strs=True
    ),
    tokenize.DetokenizeRequest(model="m", token_ids=(1, 2, 3)),
    tokenize.Tokenized(token_ids=(1, 2), max_model_len=4096, token_strs=("Gr", "Ã¼ÃŁe")),
    tokenize.Detokenized(text="Grüße"),
    tokenize.TokenizeFailed(code="invalid_prompt", message="the chat has no messages"),
)


def _structs() -> list[type[msgspec.Struct]]:
    """Every struct defined anywhere in schemas/."""
    modules = [
        importlib.import_module(f"schemas.{module.name}")
        for module in pkgutil.iter_modules(schemas.__path__)
    ]
    return [
        cls
        for module in modules
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, msgspec.Struct) and cls.__module__ == module.__name__
    ]


def _inside(value: object) -> Iterator[msgspec.Struct]:
    """``value`` and every struct in it."""
    if isinstance(value, msgspec.Struct):
        yield value
        for name in value.__struct_fields__:
            yield from _inside(getattr(value, name))
    elif isinstance(value, tuple):
        for item in value:
            yield from _inside(item)


def _tag(cls: type[msgspec.Struct]) -> str | int | None:
    return cls.__struct_config__.tag


SHOWN = [struct for example in EXAMPLES for struct in _inside(example)]
GOLDEN_LINES = GOLDEN.read_bytes().splitlines() if GOLDEN.exists() else []


def test_there_is_one_golden_line_for_each_example() -> None:
    assert len(GOLDEN_LINES) == len(EXAMPLES)


@pytest.mark.parametrize(
    ("example", "line"),
    list(zip(EXAMPLES, GOLDEN_LINES, strict=False)),
    ids=lambda value: type(value).__name__ if isinstance(value, msgspec.Struct) else "",
)
def test_the_bytes_are_frozen_and_decode_back(example: msgspec.Struct, line: bytes) -> None:
    assert msgspec.json.encode(example) == line
    assert msgspec.json.decode(line, type=type(example)) == example
    assert json.loads(line)["type"] == _tag(type(example))


def test_tokens_of_those_who_ask_for_no_log_probabilities_do_not_grow() -> None:
    plain = stream.Tokens("r", 1, 0, (7,), "x")
    assert set(json.loads(msgspec.json.encode(plain))) == {
        "type",
        "request_id",
        "attempt",
        "index",
        "token_ids",
        "text",
    }


def test_requests_and_events_of_those_who_know_no_tenants_still_decode() -> None:
    told = [example for example in EXAMPLES if getattr(example, "tenant", "")]
    assert len({type(example) for example in told}) == 6
    for example in told:
        fields = json.loads(msgspec.json.encode(example))
        del fields["tenant"]
        old = msgspec.json.decode(json.dumps(fields), type=type(example))
        assert old == msgspec.structs.replace(example, tenant="")


def test_requests_without_grammar_and_tools_do_not_grow() -> None:
    plain = requests.SamplingParams(seed=1)
    assert msgspec.json.encode(plain) == b'{"seed":1}'
    prompt = requests.ChatPrompt((requests.ChatMessage("user", "x"),))
    assert set(json.loads(msgspec.json.encode(prompt))) == {"type", "messages"}


@pytest.mark.parametrize("cls", _structs(), ids=lambda cls: cls.__name__)
def test_every_struct_has_a_golden_example(cls: type[msgspec.Struct]) -> None:
    assert any(type(struct) is cls for struct in SHOWN), f"give {cls.__name__} an example here"


@pytest.mark.parametrize("struct", SHOWN, ids=lambda struct: type(struct).__name__)
def test_examples_are_fully_populated(struct: msgspec.Struct) -> None:
    for info in msgspec.structs.fields(struct):
        assert getattr(struct, info.name) != info.default, f"{info.name} is left at its default"


def test_tags_are_explicit_and_unique() -> None:
    tags = [tag for cls in _structs() if (tag := _tag(cls)) is not None]
    assert [tag for tag, count in Counter(tags).items() if count > 1] == []
    messages = [_tag(type(example)) for example in EXAMPLES]
    for tag in messages:
        assert re.fullmatch(r"hotswap\.[a-z]+\.v1\.[a-z_]+", str(tag)), tag
    # Only alternatives inside a message may have a short tag.
    assert set(tags) - set(messages) == {"chat", "text", "tokens"}


def test_the_kind_of_every_event_is_unique_and_one_token() -> None:
    kinds = {}
    for example in EXAMPLES:
        if isinstance(example, events.event_types()):
            event = msgspec.json.decode(msgspec.json.encode(example), type=events.Event)
            kinds[events.kind_of(event)] = type(event)
    assert list(kinds.values()) == list(events.event_types())
    assert all(re.fullmatch("[a-z_]+", kind) for kind in kinds)
    assert kinds["swap_in_completed"] is events.SwapInCompleted
    assert kinds["request_started"] is events.RequestStarted


if __name__ == "__main__":
    GOLDEN.write_bytes(b"".join(msgspec.json.encode(example) + b"\n" for example in EXAMPLES))
