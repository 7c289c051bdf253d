"""Errors about who asks, how much at once, and how long. `errors` has their form, and a table."""

import math
import time

from schemas.keys import KeyRecord, Role
from services.api.errors import RETRY_AFTER_S, ApiError
from services.keys import describe

_RATE = "rate_limit_error"
_CHALLENGE = {"www-authenticate": "Bearer"}
_HOW = "send it as the header `Authorization: Bearer KEY`"


def _unauthorized(code: str, message: str) -> ApiError:
    error = ApiError(401, code, message)
    error.headers |= _CHALLENGE
    return error


def missing_api_key() -> ApiError:
    message = f"This server asks for an API key: {_HOW}. `hotswap keys create NAME` makes one."
    return _unauthorized("missing_api_key", message)


def invalid_api_key() -> ApiError:
    message = "The API key is not one of this server's: it is mistyped, or was withdrawn."
    return _unauthorized("invalid_api_key", message)


def expired_api_key(record: KeyRecord) -> ApiError:
    at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(record.expires_at))
    return _unauthorized("expired_api_key", f"The API key {describe(record)} expired at {at}.")


def disabled_api_key(record: KeyRecord) -> ApiError:
    message = f"The API key {describe(record)} is switched off for now."
    return _unauthorized("disabled_api_key", message)


def insufficient_role(record: KeyRecord, needed: Role, method: str, path: str) -> ApiError:
    message = f"{method} {path} needs a key with the role {needed!r}; "
    message += f"the API key {describe(record)} has the role {record.role!r}."
    return ApiError(403, "insufficient_role", message)


def model_not_allowed(record: KeyRecord | None, model: str) -> ApiError:
    """``record``: the key; None where it is not known any more."""
    message = f"The model {model[:200]!r} may not be used with this API key."
    if record:
        message = f"The API key {describe(record)} may not use the model {model[:200]!r}; "
        message += f"it may use: {', '.join(record.models)}."
    return ApiError(403, "model_not_allowed", message, param="model")


def rate_limited(record: KeyRecord, what: str, limit: int, wait_s: float) -> ApiError:
    """``what``: requests or tokens; ``wait_s``: until there is room again."""
    message = f"The API key {describe(record)} is over its limit of {limit} {what} per minute; "
    message += f"try again in {_seconds(wait_s)} s."
    retry_after_s = _seconds(wait_s)
    return ApiError(429, "rate_limit_exceeded", message, kind=_RATE, retry_after_s=retry_after_s)


def too_many_concurrent(record: KeyRecord, limit: int) -> ApiError:
    message = f"The API key {describe(record)} has {limit} requests under way, as many as it may "
    message += "have at once; wait for one of them to end."
    return ApiError(
        429, "concurrency_limit_exceeded", message, kind=_RATE, retry_after_s=RETRY_AFTER_S
    )


def overloaded(what: str, setting: str) -> ApiError:
    """``what`` there is too much of, and the ``setting`` that says so."""
    message = f"This server has {what} ({setting}); try again."
    return ApiError(503, "server_overloaded", message, retry_after_s=RETRY_AFTER_S)


def body_timeout(num_bytes: int) -> ApiError:
    message = f"The request body did not come in time (api.read_timeout_s): {num_bytes} bytes of "
    message += "it are here."
    error = ApiError(408, "request_timeout", message)
    error.headers["connection"] = "close"  # the rest of it would be read as another request
    return error


def prompt_too_long(param: str, num_chars: int, limit: int) -> ApiError:
    message = (
        f"{param} has {num_chars} characters; this server takes {limit} (api.max_prompt_chars)."
    )
    return ApiError(400, "prompt_too_long", message, param=param)


def context_length_exceeded(param: str, num_tokens: int, limit: int) -> ApiError:
    message = (
        f"{param} has {num_tokens} tokens; this model's context length is {limit}: shorten it."
    )
    return ApiError(400, "context_length_exceeded", message, param=param)


def _seconds(wait_s: float) -> int:
    return max(1, math.ceil(wait_s))
