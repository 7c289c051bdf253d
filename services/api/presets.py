"""Fields that a deployment sets in request bodies: ``defaults``, and ``overrides`` that always win.

They go into the body before it is parsed, so what a client may send is what they may say, and the
same code refuses the rest: when they are set (`check`), not when a request comes. A field that one
endpoint does not know is left out there. An override of null takes the client's value out.
"""

import difflib
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from services.api import fields, openai
from services.api.embeddings import parse_embeddings
from services.api.errors import ApiError, invalid
from services.api.fields import Endpoint
from services.api.parsing import parse_chat, parse_completion

# What a request is about, and how it is answered, is the client's to say.
_CLIENTS_OWN: Final = frozenset(
    {"model", "messages", "prompt", "input", "stream", "stream_options", "encoding_format"}
)
_FIELDS: Final[dict[Endpoint, frozenset[str]]] = {
    "chat": frozenset(openai.ChatCompletionRequest.__struct_fields__) - _CLIENTS_OWN,
    "completion": frozenset(openai.CompletionRequest.__struct_fields__) - _CLIENTS_OWN,
    "embedding": frozenset(openai.EmbeddingRequest.__struct_fields__) - _CLIENTS_OWN,
}
# Two names of one thing: whoever says one has said both.
_SAME: Final = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
_SAMPLES: Final[dict[Endpoint, dict[str, Any]]] = {
    "chat": {"model": "m", "messages": [{"role": "user", "content": "x"}]},
    "completion": {"model": "m", "prompt": "x"},
    "embedding": {"model": "m", "input": "x"},
}


def apply(
    raw: dict[str, Any],
    endpoint: Endpoint,
    defaults: Mapping[str, Any],
    overrides: Mapping[str, Any],
) -> dict[str, Any]:
    """The body ``raw`` as the deployment wants it. ``raw`` is changed."""
    known = _FIELDS[endpoint]
    for key, value in defaults.items():
        same = _SAME.get(key, key)
        if key in known and raw.get(key) is None and raw.get(same) is None:
            raw[key] = value
    for key, value in overrides.items():
        if key not in known:
            continue
        raw.pop(_SAME.get(key, key), None)
        if value is None:
            raw.pop(key, None)
        else:
            raw[key] = value
    return raw


def check(defaults: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """Raise ApiError (400), naming the field, unless requests can be made with these."""
    for where, preset in (("defaults", defaults), ("overrides", overrides)):
        for key in preset:
            _check_name(where, key)
    for endpoint, sample in _SAMPLES.items():
        body = msgspec.json.encode(apply(dict(sample), endpoint, defaults, overrides))
        try:
            match endpoint:
                case "chat":
                    parse_chat(body)
                case "completion":
                    parse_completion(body)
                case "embedding":
                    parse_embeddings(body)
        except ApiError as error:
            param = error.info.param or ""
            where = "overrides" if param.split(".")[0] in overrides else "defaults"
            words = f"{where}: {error.info.message}"
            raise ApiError(400, error.info.code or "", words, param=f"{where}.{param}") from error


def _check_name(where: str, key: str) -> None:
    param = f"{where}.{key}"
    if key in _CLIENTS_OWN:
        raise invalid(param, f"{param} can not be set here: it is for the client to say.")
    known = sorted(frozenset().union(*_FIELDS.values()))
    if key in known:
        return
    if any(key in fields.unsupported(endpoint) for endpoint in _FIELDS):
        raise ApiError(
            400, "unsupported_parameter", f"{param} is not supported by this server.", param=param
        )
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known fields: {', '.join(known)}."
    raise invalid(param, f"{param}: requests have no such field; {hint}")
