"""What request fields may hold beyond their types, for the OpenAPI document.

The same rules that `services.api.parsing` and its kin apply, as JSON Schema: a request that the
document allows is one that the server takes, but for rules about several fields at once, which are
in words in the descriptions. tests/conformance holds the document against the server, both ways.
"""

from collections.abc import Mapping
from typing import Any, Final, TypeAlias

from schemas.requests import LOGIT_BIAS_RANGE, MAX_LOGPROBS, SAMPLING_RANGES
from services.api.embeddings import MAX_INPUTS
from services.api.form import MAX_ID, MAX_N
from services.api.parsing import MAX_STOPS
from services.api.prompts import MAX_PROMPTS, MAX_SALT, RESERVED

Json: TypeAlias = dict[str, Any]

MAX_COUNT: Final = (1 << 31) - 1
MIN_SEED: Final = -(1 << 63)
MAX_SEED: Final = (1 << 63) - 1
_TOKEN_ID: Final[Json] = {"type": "integer", "minimum": 0, "maximum": MAX_COUNT}
_TOKEN_IDS: Final[Json] = {"type": "array", "items": _TOKEN_ID, "minItems": 1}
_TEXT: Final[Json] = {"type": "string"}
_WORDS: Final[Json] = {"type": "string", "minLength": 1}


def _number(kind: str, low: float, high: float) -> Json:
    return {"type": kind, "minimum": low, "maximum": high}


def _or_null(*schemas: Json) -> Json:
    return {"anyOf": [*schemas, {"type": "null"}]}


_SECONDS: Final = _or_null({"type": "number", "exclusiveMinimum": 0})

_SAMPLING: Final[dict[str, Json]] = {
    **{
        key: _or_null(_number("number", low, high))
        for key, (low, high) in SAMPLING_RANGES.items()
        if key != "logprobs"
    },
    "top_p": _or_null({"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
    "top_k": _or_null(_number("integer", -1, MAX_COUNT)),
    "max_tokens": _or_null(_number("integer", 1, MAX_COUNT)),
    "max_completion_tokens": _or_null(_number("integer", 1, MAX_COUNT)),
    "min_tokens": _or_null(_number("integer", 0, MAX_COUNT)),
    "seed": _or_null(_number("integer", MIN_SEED, MAX_SEED)),
    "stop": _or_null(_WORDS, {"type": "array", "items": _WORDS, "maxItems": MAX_STOPS}),
    "stop_token_ids": _or_null({"type": "array", "items": _TOKEN_ID}),
    "allowed_token_ids": _or_null({"type": "array", "items": _TOKEN_ID}),
    "bad_words": _or_null({"type": "array", "items": {"type": "string", "pattern": r"\S"}}),
    "n": _or_null(_number("integer", 1, MAX_N)),
    "best_of": _or_null(_number("integer", 1, MAX_N)),
    "truncate_prompt_tokens": _or_null({"const": -1}, _number("integer", 1, MAX_COUNT)),
    "cache_salt": _or_null({"type": "string", "minLength": 1, "maxLength": MAX_SALT}),
    "request_id": _or_null({"type": "string", "minLength": 1, "maxLength": MAX_ID}),
    "timeout": _SECONDS,
    "logit_bias": _or_null(
        {
            "type": "object",
            "propertyNames": {"pattern": r"^(0|[1-9][0-9]{0,8})$"},
            "additionalProperties": _number("number", *LOGIT_BIAS_RANGE),
        }
    ),
}

# schema -> field -> what it may hold, in the place of what its type says
_FIELDS: Final[dict[str, dict[str, Json]]] = {
    "ChatCompletionRequest": {
        **_SAMPLING,
        "top_logprobs": _or_null(_number("integer", 0, MAX_LOGPROBS)),
        "chat_template_kwargs": _or_null(
            {"type": "object", "propertyNames": {"not": {"enum": sorted(RESERVED)}}}
        ),
    },
    "CompletionRequest": {
        **_SAMPLING,
        "logprobs": _or_null(_number("integer", 0, MAX_LOGPROBS), {"const": False}),
        "prompt": {
            "anyOf": [
                _TEXT,
                _TOKEN_IDS,
                {"type": "array", "items": {"anyOf": [_TEXT, _TOKEN_IDS]}}
                | {"minItems": 1, "maxItems": MAX_PROMPTS},
            ]
        },
    },
    "Message": {
        "content": {
            "anyOf": [
                _TEXT,
                {"type": "array", "items": {"$ref": "#/components/schemas/ContentPart"}},
            ]
        },
        "tool_calls": _or_null({"type": "array", "maxItems": 0}),
        "function_call": {"type": "null"},
    },
    "ContentPart": {"type": {"const": "text"}, "text": _TEXT},
    "EmbeddingRequest": {
        "input": {
            "anyOf": [
                _WORDS,
                _TOKEN_IDS,
                {"type": "array", "items": _WORDS, "minItems": 1, "maxItems": MAX_INPUTS},
                {"type": "array", "items": _TOKEN_IDS, "minItems": 1, "maxItems": MAX_INPUTS},
            ]
        },
        "dimensions": _or_null({"type": "integer", "minimum": 1}),
        "timeout": _SECONDS,
    },
}

_N_WORDS: Final = "Times prompts, no more than the model's queue holds."

# schema -> fields that must be there, whatever their default
_REQUIRED: Final[dict[str, list[str]]] = {"Message": ["content"], "ContentPart": ["text"]}

# schema -> field -> JSON Schema keywords beside those of its type
_MORE: Final[dict[str, dict[str, Json]]] = {
    "ChatCompletionRequest": {
        "messages": {"minItems": 1},
        "stream_options": {"description": "Only where stream is true."},
        "min_tokens": {"description": "Not more than max_tokens."},
        "top_logprobs": {"description": "Above 0 only where logprobs is true."},
        "n": {"description": _N_WORDS},
        "continue_final_message": {"description": "Not with add_generation_prompt."},
    },
    "CompletionRequest": {
        "stream_options": {"description": "Only where stream is true."},
        "min_tokens": {"description": "Not more than max_tokens."},
        "n": {"description": _N_WORDS},
        "best_of": {"description": "As n."},
        "echo": {"description": "Not with logprobs."},
    },
}


def apply(schemas: Mapping[str, Json]) -> None:
    """Write them into ``schemas``, those of the document by name."""
    for name, fields in _FIELDS.items():
        properties = schemas[name]["properties"]
        for field, constraint in fields.items():
            if field in properties:
                told = properties[field]
                kept = {key: told[key] for key in ("default", "description") if key in told}
                properties[field] = constraint | kept
    for name, more in _MORE.items():
        for field, keywords in more.items():
            schemas[name]["properties"][field] |= keywords
    for name, required in _REQUIRED.items():
        schemas[name]["required"] += required
