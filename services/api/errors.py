"""Errors as the client sees them: always OpenAI's form, never a traceback.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

| status | code                                                 | when                            |
| 400    | invalid_json, missing_field, invalid_type,           | the request itself is wrong     |
|        | invalid_value, unsupported_parameter,                |                                 |
|        | context_length_exceeded, prompt_too_long,            |                                 |
|        | invalid_prompt, model_not_supported, client_left,    |                                 |
|        | invalid_http, bad_request, invalid_grammar,          |                                 |
|        | tools_not_supported, invalid_form                    |                                 |
| 401    | missing_api_key, invalid_api_key, expired_api_key,   | with WWW-Authenticate           |
|        | disabled_api_key                                     |                                 |
| 403    | insufficient_role, model_not_allowed                 | the key does not allow it       |
| 404    | model_not_found, deployment_not_found,               |                                 |
|        | key_not_found, unknown_url, unknown_action,          |                                 |
|        | file_not_found, batch_not_found                      |                                 |
| 405    | method_not_allowed                                   | with Allow                      |
| 408    | request_timeout                                      | its head or body did not come   |
| 409    | key_conflict, conflict, file_in_use,                 | not as things stand             |
|        | batch_not_cancellable                                |                                 |
| 412    | precondition_failed                                  | If-Match names another version  |
| 413    | request_too_large, file_too_large                    |                                 |
| 429    | queue_full, rate_limit_exceeded,                     | with Retry-After                |
|        | concurrency_limit_exceeded                           |                                 |
| 431    | headers_too_large                                    |                                 |
| 500    | engine_failed, internal_error                        |                                 |
| 503    | model_unavailable, bus_unavailable, shutting_down,   | with Retry-After                |
|        | server_overloaded, cancelled, scheduler_unavailable, |                                 |
|        | tokenizer_unavailable                                |                                 |
|        | slow_reader                                          | only inside a stream            |
| 504    | deadline_exceeded                                    |                                 |
| 507    | no_room                                              | for a file                      |
"""

import http
import logging
from collections.abc import Sequence

import msgspec
from litestar import Request, Response
from litestar.datastructures import State
from litestar.exceptions import HTTPException
from litestar.types import ExceptionHandlersMap

from schemas.state import Runner
from schemas.stream import ErrorCode

log = logging.getLogger(__name__)

# A queue drains and a service restarts within this order of time: where nobody knows better.
RETRY_AFTER_S = 2
_MAX_LISTED = 20
_MAX_NAME = 200

_INVALID = "invalid_request_error"
_SERVER = "server_error"

# What an agent's `Failed` is over HTTP.
_STATUS_OF_FAILURE: dict[ErrorCode, int] = {
    "context_length_exceeded": 400,
    "invalid_prompt": 400,
    "invalid_grammar": 400,
    "tools_not_supported": 400,
    "model_not_supported": 400,
    "model_unavailable": 503,
    "engine_failed": 500,
    "deadline_exceeded": 504,
    "cancelled": 503,  # not by us: the agent is going away
}


class ErrorInfo(msgspec.Struct):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct):
    error: ErrorInfo


class ApiError(Exception):
    """Ends one HTTP request with ``status`` and an error in OpenAI's form."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        kind: str = "",
        retry_after_s: int | None = None,
        allow: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.info = ErrorInfo(
            message, kind or (_SERVER if status >= 500 else _INVALID), param, code
        )
        self.headers: dict[str, str] = {}
        if retry_after_s is not None:
            self.headers["retry-after"] = str(retry_after_s)
        if allow is not None:
            self.headers["allow"] = allow

    @property
    def body(self) -> bytes:
        return msgspec.json.encode(ErrorBody(self.info))


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, code, message, param=param)


def model_not_found(model: str, existing: Sequence[str]) -> ApiError:
    listed = ", ".join(existing[:_MAX_LISTED]) or "none yet"
    if len(existing) > _MAX_LISTED:
        listed += f", ... ({len(existing)} in all, see GET /v1/models)"
    name = repr(model if len(model) <= _MAX_NAME else f"{model[:_MAX_NAME]}...")
    message = f"The model {name} does not exist. Models here: {listed}."
    return ApiError(404, "model_not_found", message, param="model")


def deployment_not_found(name: str, existing: Sequence[str]) -> ApiError:
    listed = ", ".join(existing[:_MAX_LISTED]) or "none yet"
    if len(existing) > _MAX_LISTED:
        listed += f", ... ({len(existing)} in all, see GET /v1/deployments)"
    message = f"There is no deployment {name[:_MAX_NAME]!r}. Deployments here: {listed}."
    return ApiError(404, "deployment_not_found", message, param="name")


def model_not_supported(model: str, runner: Runner) -> ApiError:
    """``runner``: what the model is for."""
    message = f"The model {model!r} makes embeddings and generates no text: use /v1/embeddings."
    if runner == "generate":
        message = (
            f"The model {model!r} generates text and makes no embeddings: use /v1/chat/completions "
            'or /v1/completions, or deploy it with runner = "embed".'
        )
    return ApiError(400, "model_not_supported", message, param="model")


def tools_not_supported(model: str) -> ApiError:
    message = f"The chat template of model {model!r} does not know tools: leave tools out."
    return ApiError(400, "tools_not_supported", message, param="tools")


def model_unavailable(model: str, reason: str, retry_after_s: int | None = None) -> ApiError:
    """``retry_after_s``: when the model is expected; None: not known."""
    message = f"The model {model!r} can not be served: {reason or 'no reason given'}"
    retry_after_s = retry_after_s or RETRY_AFTER_S * 5
    return ApiError(503, "model_unavailable", message, retry_after_s=retry_after_s)


def queue_full(model: str, limit: int, retry_after_s: int | None = None) -> ApiError:
    """``retry_after_s``: when the model is expected; None: not known."""
    message = f"The queue of model {model!r} is full ({limit} requests); try again later."
    retry_after_s = retry_after_s or RETRY_AFTER_S
    return ApiError(
        429, "queue_full", message, kind="rate_limit_error", retry_after_s=retry_after_s
    )


def bus_unavailable() -> ApiError:
    message = "The message bus does not answer, so the request could not be queued; try again."
    return ApiError(503, "bus_unavailable", message, retry_after_s=RETRY_AFTER_S)


def tokenizer_unavailable(model: str, why: str) -> ApiError:
    message = f"The tokenizer of model {model!r} can not be asked now: {why}; try again."
    return ApiError(503, "tokenizer_unavailable", message, retry_after_s=RETRY_AFTER_S)


def shutting_down() -> ApiError:
    message = "This server is shutting down; try again."
    return ApiError(503, "shutting_down", message, retry_after_s=RETRY_AFTER_S)


def deadline_exceeded(timeout_s: float, whose: str, stage: str) -> ApiError:
    """``whose``: which limit it was. ``stage``: where the request was."""
    message = f"No complete answer within {timeout_s:g} s ({whose}); it was {stage}."
    return ApiError(504, "deadline_exceeded", message)


def engine_failed(message: str) -> ApiError:
    return ApiError(500, "engine_failed", message)


def slow_reader(num_tokens: int) -> ApiError:
    message = f"The stream was ended: {num_tokens} tokens were waiting for the client to read them."
    return ApiError(503, "slow_reader", message, retry_after_s=RETRY_AFTER_S)


def from_failure(
    code: ErrorCode, message: str, prompt_param: str, retry_after_s: int | None = None
) -> ApiError:
    """An agent's ``Failed`` chunk as an error. ``prompt_param``: the field with the prompt.

    ``retry_after_s``: when the model is expected; None: not known.
    """
    status = _STATUS_OF_FAILURE[code]
    param = prompt_param if status == 400 else None
    if code == "model_not_supported":
        param = "model"
    elif code == "tools_not_supported":
        param = "tools"
    if status != 503:
        retry_after_s = None
    elif code != "model_unavailable" or retry_after_s is None:
        retry_after_s = RETRY_AFTER_S
    return ApiError(status, code, message, param=param, retry_after_s=retry_after_s)


# -- Litestar's exception handlers ---------------------------------------------------------


def _respond(request: Request[object, object, State], error: ApiError) -> Response[bytes]:
    if error.status >= 500:
        path = request.scope["path"]
        log.error("%s %s: %d %s", request.method, path, error.status, error)
    return Response(
        error.body, status_code=error.status, headers=error.headers, media_type="application/json"
    )


def _on_api_error(request: Request[object, object, State], error: ApiError) -> Response[bytes]:
    return _respond(request, error)


def _on_http_error(
    request: Request[object, object, State], error: HTTPException
) -> Response[bytes]:
    """What the framework refuses: unknown routes, wrong methods, bodies too large."""
    status, path = error.status_code, request.scope["path"]
    if status == 404:
        message = f"No such endpoint: {request.method} {path}. GET /schema lists what there is."
        return _respond(request, ApiError(404, "unknown_url", message))
    if status == 405:
        allow = (error.headers or {}).get("Allow") or (error.headers or {}).get("allow")
        message = f"{request.method} is not allowed on {path}"
        message += f"; use {allow}." if allow else "."
        return _respond(request, ApiError(405, "method_not_allowed", message, allow=allow))
    if status == 413:
        limit = request.scope["litestar_app"].request_max_body_size
        message = f"The request body is larger than {limit} bytes, the limit of this server."
        return _respond(request, ApiError(413, "request_too_large", message))
    code = http.HTTPStatus(status).phrase.lower().replace(" ", "_")
    return _respond(request, ApiError(status, code, error.detail or code))


def _on_bug(request: Request[object, object, State], error: Exception) -> Response[bytes]:
    path = request.scope["path"]
    log.error("%s %s failed", request.method, path, exc_info=error)
    message = "Something went wrong inside the server; its log has the details."
    return Response(
        ApiError(500, "internal_error", message).body,
        status_code=500,
        media_type="application/json",
    )


EXCEPTION_HANDLERS: ExceptionHandlersMap = {
    ApiError: _on_api_error,
    HTTPException: _on_http_error,
    Exception: _on_bug,
}
