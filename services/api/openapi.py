"""The OpenAPI 3.1 document, made from the wire structs and the table of unsupported fields.

Only which path takes and gives what is stated here; field schemas come from msgspec.
"""

import functools
import inspect
from importlib.metadata import version
from typing import Any, TypeAlias

import msgspec

from services.api import constraints, fields, openai, openapi_deployments
from services.api.errors import ErrorBody
from services.api.fields import Endpoint

Json: TypeAlias = dict[str, Any]

_REF = "#/components/schemas/{name}"

_ERRORS = {
    400: "The request is wrong: malformed JSON, a wrong type or value, an unsupported field.",
    404: "No such model, or no such endpoint.",
    413: "The request body is too large.",
    429: "The model's queue is full; see Retry-After.",
    500: "The engine failed.",
    503: "The model can not be served, or the service is not ready; see Retry-After.",
    504: "No complete answer in time.",
}

_ANSWER_HEADERS = {
    "x-request-id": "The request's id, as in events and traces.",
    "x-trace-id": "The trace's id.",
    "x-hotswap-start": "warm, switch or cold: whether the model was on the GPU already.",
    "x-hotswap-gpu": "The GPU that answered.",
    "x-hotswap-swap-bytes": "Bytes moved by the swap-in that was waited for, if any.",
    "x-hotswap-swap-seconds": "How long that swap-in took.",
    fields.IGNORED_HEADER: "Request fields that this server does not know.",
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
            "/v1/models": {
                "get": _get("list_models", "Every deployment, with where it is", openai.ModelList)
            },
            "/v1/models/{model_id}": {
                "get": _get("get_model", "One deployment, with where it is", openai.Model, 404)
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
            "/healthz": {"get": _health("healthz", "Is the process alive?")},
            "/health": {"get": _health("health", "As /healthz, where vLLM has it")},
            "/ping": {"get": _health("ping", "As /healthz")},
            "/version": {"get": _version()},
            "/readyz": {
                "get": _health("readyz", "Could a request be answered?", "What is missing.")
            },
        },
        "components": {"schemas": _schemas()},
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
    events = f"Server-sent events, each `data:` one {chunk.__name__}; the last is `data: [DONE]`."
    events += " A stream that breaks ends with one ErrorBody."
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
            **_errors(*_ERRORS),
        },
    }


def _get(operation: str, summary: str, answer: type[msgspec.Struct], *statuses: int) -> Json:
    return {
        "operationId": operation,
        "summary": summary,
        "responses": {
            "200": {"description": summary, "content": {"application/json": _of(answer)}},
            **_errors(*statuses),
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
    return {"operationId": operation, "summary": summary, "responses": responses}


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
    kinds = (
        openai.ChatCompletionRequest,
        openai.ChatCompletion,
        openai.ChatCompletionChunk,
        openai.CompletionRequest,
        openai.Completion,
        openai.EmbeddingRequest,
        openai.EmbeddingList,
        openai.ModelList,
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
