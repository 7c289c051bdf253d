"""The OpenAPI 3.1 document, made from the wire structs and the table of unsupported fields.

Only which path takes and gives what is stated here; field schemas come from msgspec.
"""

import functools
import inspect
from importlib.metadata import version
from typing import Any, TypeAlias

import msgspec

from services.api import constraints, fields, keys_routes, openai, openapi_deployments
from services.api.batches import described
from services.api.errors import ErrorBody
from services.api.fields import Endpoint
from services.api.timeouts import TIMEOUT_HEADER

Json: TypeAlias = dict[str, Any]

_REF = "#/components/schemas/{name}"

_ERRORS = {
    400: "The request is wrong: malformed JSON, a wrong type or value, an unsupported field.",
    401: "No API key, or one that is not right, has expired or is switched off.",
    403: "The API key does not allow it: another role is needed, or the model is not among its.",
    404: "No such model, file, batch or key, or no such endpoint.",
    408: "The request body did not come in time.",
    409: "Not as things stand: it is in use or has ended, or somebody else changed it meanwhile.",
    413: "The request body is too large.",
    429: "The model's queue is full, or the API key is over a limit of its own; see Retry-After.",
    500: "The engine failed.",
    503: "The model can not be served, or the service is not ready or has too much to do; see "
    "Retry-After.",
    504: "No complete answer in time.",
    507: "No room for the file.",
}

_ANSWER_ERRORS = (400, 401, 403, 404, 408, 413, 429, 500, 503, 504)
_ANSWER_HEADERS = {
    "x-request-id": "The request's id, as in events and traces.",
    "x-trace-id": "The trace's id.",
    "x-hotswap-start": "warm, switch or cold: whether the model was on the GPU already.",
    "x-hotswap-gpu": "The GPU that answered.",
    "x-hotswap-wait-seconds": "How long the request waited until its model began with it.",
    "x-hotswap-swap-bytes": "Bytes moved by the swap-in that was waited for, if any.",
    "x-hotswap-swap-seconds": "How long that swap-in took.",
    # Of streams that began before their first token, the last chunk tells instead: `hotswap`.
    fields.IGNORED_HEADER: "Request fields that this server does not know.",
    "x-ratelimit-limit-requests": "Of the API key, per minute, if it has such a limit.",
    "x-ratelimit-remaining-requests": "How many are left.",
    "x-ratelimit-reset-requests": "Until all of them are there again, as in 1.5s or 6m0s.",
    "x-ratelimit-limit-tokens": "Likewise, of prompts and answers together.",
    "x-ratelimit-remaining-tokens": "How many are left; this answer's are charged when it ends.",
    "x-ratelimit-reset-tokens": "Until all of them are there again.",
}


def build() -> Json:
    """The whole document, as plain JSON values."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "hotswap",
            "version": version("hotswap"),
            "description": "Many models, few GPUs, one OpenAI API.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": {
            "/v1/chat/completions": {
                "post": _generate(
                    "chat_completions",
                    "Continue a chat",
                    openai.ChatCompletionRequest,
                    openai.ChatCompletion,
                    openai.ChatCompletionChunk,
                )
            },
            "/v1/completions": {
                "post": _generate(
                    "completions",
                    "Continue a text",
                    openai.CompletionRequest,
                    openai.Completion,
                    openai.Completion,
                )
            },
            "/v1/embeddings": {
                "post": _answer(
                    "embeddings",
                    "Texts or token ids as vectors",
                    openai.EmbeddingRequest,
                    "The answer.",
                    {"application/json": _of(openai.EmbeddingList)},
                )
            },
            "/tokenize": {"post": _tokenize("tokenize")},
            "/v1/tokenize": {"post": _tokenize("tokenize_v1")},
            "/detokenize": {"post": _detokenize("detokenize")},
            "/v1/detokenize": {"post": _detokenize("detokenize_v1")},
            "/v1/models": {
                "get": _get(
                    "list_models", "Every deployment, with where it is", openai.ModelList, 401
                )
            },
            "/v1/models/{model_id}": {
                "get": _get("get_model", "One deployment, with where it is", openai.Model, 401, 404)
                | {
                    "parameters": [
                        {
                            "name": "model_id",
                            "in": "path",
                            "required": True,
                            "description": "The model's name; it may hold slashes.",
                            "schema": {"type": "string", "minLength": 1},
                        }
                    ]
                }
            },
            **openapi_deployments.paths(),
            **described.paths(_of, _errors),
            **_key_paths(),
            "/healthz": {"get": _health("healthz", "Is the process alive?")},
            "/health": {"get": _health("health", "As /healthz, where vLLM has it")},
            "/ping": {"get": _health("ping", "As /healthz")},
            "/version": {"get": _version()},
            "/readyz": {
                "get": _health("readyz", "Could a request be answered?", "What is missing.")
            },
        },
        # Where the server asks for keys at all; health and this document are open.
        "security": [{"apiKey": []}, {}],
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {
                "apiKey": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API key, as OpenAI's. `hotswap keys create NAME` makes one.",
                }
            },
        },
    }


@functools.cache
def document() -> bytes:
    """The document as JSON text."""
    return msgspec.json.format(msgspec.json.encode(build()), indent=2)


def _generate(
    operation: str,
    summary: str,
    request: type[msgspec.Struct],
    answer: type[msgspec.Struct],
    chunk: type[msgspec.Struct],
) -> Json:
    events = (
        f"Server-sent events, each `data:` one {chunk.__name__}; the last is `data: [DONE]`. While "
        "nothing comes, comments (lines that begin with a colon) say why: "
        '`: hotswap {"state": "waiting", "position": 2, "predicted_wait_s": 1.3, ...}`. '
        "What goes wrong after the begin is one `data:` with an error, and no `[DONE]`."
    )
    content = {
        "application/json": _of(answer),
        "text/event-stream": {"schema": _event_of(chunk)},
    }
    return _answer(operation, summary, request, f"The answer. With `stream`: {events}", content)


def _event_of(chunk: type[msgspec.Struct]) -> Json:
    """One event, as JSON Schema describes those of a stream before OpenAPI 3.2."""
    told = {"anyOf": [_of(chunk)["schema"], _of(ErrorBody)["schema"]]}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": told}
    return {
        "type": "object",
        "properties": {"data": {"anyOf": [{"const": "[DONE]"}, data]}},
        "required": ["data"],
    }


def _answer(
    operation: str, summary: str, request: type[msgspec.Struct], words: str, content: Json
) -> Json:
    """A POST that a model answers."""
    return {
        "operationId": operation,
        "summary": summary,
        "parameters": [
            {
                "name": TIMEOUT_HEADER,
                "in": "header",
                "required": False,
                "description": "Seconds that the client waits for the whole answer; as `timeout` "
                "in the body, and the shorter one counts.",
                "schema": {"type": "number", "exclusiveMinimum": 0},
            }
        ],
        "requestBody": {"required": True, "content": {"application/json": _of(request)}},
        "responses": {
            "200": {
                "description": words,
                "headers": {
                    name: {"description": words, "schema": {"type": "string"}}
                    for name, words in _ANSWER_HEADERS.items()
                },
                "content": content,
            },
            **_errors(*_ANSWER_ERRORS),
        },
    }


def _tokenize(operation: str) -> Json:
    words = "The tokens of a text or a chat"
    return _of_tokens(operation, words, openai.TokenizeRequest, openai.Tokenization)


def _detokenize(operation: str) -> Json:
    words = "The text of tokens"
    return _of_tokens(operation, words, openai.DetokenizeRequest, openai.Detokenization)


def _of_tokens(
    operation: str, words: str, request: type[msgspec.Struct], answer: type[msgspec.Struct]
) -> Json:
    """A POST that a model's tokenizer answers: no queue, no GPU, so no deadline."""
    content = {"application/json": _of(answer)}
    doc = _answer(operation, words, request, words, content)
    for status in ("429", "504"):
        del doc["responses"][status]
    for name in [name for name in _ANSWER_HEADERS if name.startswith("x-hotswap-s")]:
        del doc["responses"]["200"]["headers"][name]
    del doc["responses"]["200"]["headers"]["x-hotswap-gpu"]
    return doc


def _get(operation: str, summary: str, answer: type[msgspec.Struct], *statuses: int) -> Json:
    return {
        "operationId": operation,
        "summary": summary,
        "responses": {
            "200": {"description": summary, "content": {"application/json": _of(answer)}},
            **_errors(*statuses),
        },
    }


def _key_paths() -> Json:
    """API keys, for admins."""
    info, deleted = keys_routes.KeyInfo, keys_routes.KeyDeleted
    key_id = {"name": "key_id", "in": "path", "required": True, "schema": {"type": "string"}}
    make = _get(
        "create_key", "Make an API key; the answer alone ever shows it", info, 400, 401, 403
    )
    make["responses"] = {"201": make["responses"].pop("200"), **make["responses"]}
    change = _get(
        "change_key", "Change what is named in the body", info, 400, 401, 403, 404, 409, 503
    )
    for operation, body in ((make, keys_routes.NewKey), (change, keys_routes.KeyFields)):
        content = {"application/json": _of(body)}
        operation["requestBody"] = {"required": True, "content": content}
    one = {
        "get": _get("get_key", "One API key", info, 401, 403, 404),
        "patch": change,
        "delete": _get("delete_key", "Withdraw an API key", deleted, 401, 403, 404, 409, 503),
    }
    return {
        "/v1/keys": {
            "get": _get("list_keys", "All API keys", keys_routes.KeyList, 401, 403),
            "post": make,
        },
        "/v1/keys/{key_id}": {
            method: {**operation, "parameters": [key_id]} for method, operation in one.items()
        },
    }


def _health(operation: str, summary: str, problem: str = "") -> Json:
    schema = {
        "type": "object",
        "properties": {
            "status": {"type": "string"},
            "missing": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["status"],
    }
    content = {"application/json": {"schema": schema}}
    responses = {"200": {"description": "Yes.", "content": content}}
    if problem:
        responses["503"] = {"description": problem, "content": content}
    return {"operationId": operation, "summary": summary, "security": [], "responses": responses}


def _version() -> Json:
    text = {"type": "object", "properties": {"version": {"type": "string"}}}
    content = {"application/json": {"schema": text | {"required": ["version"]}}}
    words = "The version of this server"
    responses = {"200": {"description": words, "content": content}}
    return {"operationId": "version", "summary": words, "responses": responses}


def _errors(*statuses: int) -> Json:
    return {
        str(status): {
            "description": _ERRORS[status],
            "content": {"application/json": _of(ErrorBody)},
        }
        for status in statuses
    }


def _of(kind: type[msgspec.Struct]) -> Json:
    return {"schema": {"$ref": _REF.format(name=kind.__name__)}}


def _schemas() -> Json:
    kinds: tuple[type[msgspec.Struct], ...] = (
        openai.ChatCompletionRequest,
        openai.ChatCompletion,
        openai.ChatCompletionChunk,
        openai.CompletionRequest,
        openai.Completion,
        openai.EmbeddingRequest,
        openai.EmbeddingList,
        openai.TokenizeRequest,
        openai.Tokenization,
        openai.DetokenizeRequest,
        openai.Detokenization,
        openai.ModelList,
        *described.KINDS,
        keys_routes.NewKey,
        keys_routes.KeyFields,
        keys_routes.KeyList,
        keys_routes.KeyDeleted,
        ErrorBody,
        *openapi_deployments.KINDS,
    )
    _, schemas = msgspec.json.schema_components(kinds, ref_template=_REF)
    for kind in kinds:
        schemas[kind.__name__]["description"] = inspect.cleandoc(kind.__doc__ or "")
    constraints.apply(schemas)
    _add_known_fields(schemas["ChatCompletionRequest"], "chat")
    _add_known_fields(schemas["CompletionRequest"], "completion")
    _add_known_fields(schemas["EmbeddingRequest"], "embedding")
    _add_known_fields(schemas["TokenizeRequest"], "tokenize")
    _add_known_fields(schemas["DetokenizeRequest"], "detokenize")
    return dict(sorted(schemas.items()))


def _add_known_fields(schema: Json, endpoint: Endpoint) -> None:
    properties = schema["properties"]
    for name, neutral in sorted(fields.unsupported(endpoint).items()):
        properties[name] = {
            "enum": [*neutral, None],
            "description": "Not implemented: other values are refused.",
        }
    for name in sorted(fields.harmless(endpoint)):
        properties[name] = {"description": "Accepted; changes nothing."}
