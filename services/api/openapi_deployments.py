"""The part of the OpenAPI document that is about ``/v1/deployments``."""

from typing import Any, Final, TypeAlias

import msgspec

from services.api.deployment_settings import ActionResult, DeploymentInfo, DeploymentList
from services.api.deployments import ACTIONS, FromTo, Where
from services.api.errors import ErrorBody
from services.settings import ModelSettings

Json: TypeAlias = dict[str, Any]

KINDS: Final = (DeploymentList, DeploymentInfo, ActionResult, Where, FromTo, ModelSettings)

_REF = "#/components/schemas/{name}"
_PATH = "/v1/deployments/{name}"
_ERRORS: Final = {
    400: "The request is wrong: an unknown key, a wrong type or value.",
    404: "No such deployment, or no such action.",
    409: "It can not be done; the message says why.",
    412: "If-Match names another version, or If-None-Match one that is there; see ETag.",
    503: "No scheduler leads, or no agent is up; see Retry-After.",
}
_BODIES: Final[dict[str, type[msgspec.Struct]]] = {
    "swap-in": Where,
    "swap-out": Where,
    "move": FromTo,
}
_WAITS: Final = ("swap-in", "swap-out", "move", "drain")


def paths() -> Json:
    """All of them."""
    name = _parameter("name", "path", "The deployment's name; it may hold slashes.", required=True)
    etag = {"etag": {"description": "The version.", "schema": {"type": "string"}}}
    if_match = _parameter("If-Match", "header", "Only if this is the version: an ETag, or *.")
    if_none = _parameter("If-None-Match", "header", "*: only if there is none yet.")
    info = _answer("The deployment.", DeploymentInfo, etag)
    put_body = _body(ModelSettings, "All settings, those of [models.NAME] in hotswap.toml.")
    patch_body = {
        "required": True,
        "description": "The settings to change; null: the default again.",
        "content": {"application/json": {"schema": {"type": "object"}}},
    }
    found: Json = {
        "/v1/deployments": {
            "get": {
                "operationId": "list_deployments",
                "summary": "Every deployment, with its settings and where it is",
                "responses": {"200": _answer("All of them, by name.", DeploymentList)},
            }
        },
        _PATH: {
            "parameters": [name],
            "get": {
                "operationId": "get_deployment",
                "summary": "One deployment",
                "responses": {"200": info, **_errors(404)},
            },
            "put": {
                "operationId": "put_deployment",
                "summary": "Create a deployment, or replace all of its settings",
                "parameters": [if_match, if_none],
                "requestBody": put_body,
                "responses": {"200": info, "201": info, **_errors(400, 409, 412, 503)},
            },
            "patch": {
                "operationId": "patch_deployment",
                "summary": "Change some settings",
                "parameters": [if_match],
                "requestBody": patch_body,
                "responses": {"200": info, **_errors(400, 404, 409, 412, 503)},
            },
            "delete": {
                "operationId": "delete_deployment",
                "summary": "Remove a deployment",
                "parameters": [
                    if_match,
                    _flag("drain", "false: end running requests with an error.", True),
                    *_waiting(),
                ],
                "responses": {**_results(), **_errors(400, 404, 412, 503)},
            },
        },
    }
    for action, words in ACTIONS.items():
        operation: Json = {
            "operationId": action.replace("-", "_"),
            "summary": words,
            "responses": {**_results(), **_errors(*_ERRORS)},
        }
        if action in _WAITS:
            operation["parameters"] = _waiting()
        else:
            operation["parameters"] = [if_match]
        if action in _BODIES:
            operation["requestBody"] = _body(_BODIES[action], words, required=action == "move")
        found[f"{_PATH}/{action}"] = {"parameters": [name], "post": operation}
    return found


def _waiting() -> list[Json]:
    seconds = {"type": "number", "minimum": 0, "maximum": 600, "default": 30}
    return [
        _flag("wait", "false: answer at once, with 202 if it is not done.", True),
        _parameter("timeout_s", "query", "How long to wait until it is done.", schema=seconds),
    ]


def _flag(name: str, words: str, default: bool) -> Json:
    return _parameter(name, "query", words, schema={"type": "boolean", "default": default})


def _parameter(
    name: str, where: str, words: str, *, required: bool = False, schema: Json | None = None
) -> Json:
    return {
        "name": name,
        "in": where,
        "required": required,
        "description": words,
        "schema": schema or {"type": "string"},
    }


def _body(kind: type[msgspec.Struct], words: str, *, required: bool = True) -> Json:
    return {"required": required, "description": words, "content": _content(kind)}


def _content(kind: type[msgspec.Struct]) -> Json:
    return {"application/json": {"schema": {"$ref": _REF.format(name=kind.__name__)}}}


def _answer(words: str, kind: type[msgspec.Struct], headers: Json | None = None) -> Json:
    answer: Json = {"description": words, "content": _content(kind)}
    return answer | ({"headers": headers} if headers else {})


def _results() -> Json:
    return {
        "200": _answer("It is done.", ActionResult),
        "202": _answer("It goes on.", ActionResult),
    }


def _errors(*statuses: int) -> Json:
    return {str(status): _answer(_ERRORS[status], ErrorBody) for status in statuses}
