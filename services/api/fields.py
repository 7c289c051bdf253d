"""Request fields that are known by name but not implemented, and those nobody knows.

A field that asks for something we do not do is refused by name, never ignored in silence;
the same field set to "no such thing please" is fine, since many clients send defaults.
Fields that nobody here knows are accepted, and named in a response header.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias
from urllib.parse import quote

from services.api.errors import ApiError

Endpoint: TypeAlias = Literal["chat", "completion", "embedding", "tokenize", "detokenize"]

IGNORED_HEADER = "x-hotswap-ignored-fields"
_MAX_NAMED = 20
_MAX_NAME = 64

STREAM_OPTIONS = frozenset({"include_usage", "include_obfuscation", "continuous_usage_stats"})

# Accepted whatever they say: they ask for no behaviour of this server.
HARMLESS = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "return_mm_kwargs",  # of an endpoint that is not here
        "safety_identifier",
        "service_tier",
        "session_id",
        "user",
    }
)

_HARMLESS_OF: dict[Endpoint, frozenset[str]] = {
    "embedding": frozenset({"cache_salt", "request_id"}),  # no cache, and no id in the answer
}

# field -> the values, besides null, that ask for nothing
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "store": (False,),
    "logprob_token_ids": (),
    "prompt_logprobs": (),
    # vLLM's extensions
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "spaces_between_special_tokens": (True, False),  # means something to slow tokenizers only
    "logits_processors": ([],),
    "guided_whitespace_pattern": (),
    "guided_decoding_backend": (),
    "structural_tag": (),
    "priority": (0,),
    "watermarking": (False,),
    "repetition_detection": (),
    "thinking_token_budget": (-1,),
    "stream_interval": (1,),
    "routed_experts_prompt_start": (0,),
    "return_token_offsets": (False,),
    "kv_transfer_params": (),
    "ec_transfer_params": (),
    "vllm_xargs": ({},),
}

_NEUTRAL_OF: dict[Endpoint, dict[str, tuple[Any, ...]]] = {
    "chat": _NEUTRAL
    | {
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "verbosity": ("medium",),
        "web_search_options": (),
        "moderation": (),
        # vLLM's extensions
        "chat_template": (),  # one from a client would be code from a client
        "include_reasoning": (True,),
        "return_prompt_text": (False,),
        "mm_processor_kwargs": ({},),
        "media_io_kwargs": ({},),
    },
    "completion": _NEUTRAL
    | {
        "suffix": ("",),
        "prompt_embeds": (),
    },
    # vLLM's extensions
    "embedding": {
        "messages": (),
        "add_special_tokens": (True,),
        "truncate_prompt_tokens": (),
        "truncation_side": (),
        "padding": ("do_not_pad",),
        "priority": (0,),
        "embed_dtype": ("float32",),
        "endianness": ("native", "little"),
        "use_activation": (),
        "normalize": (True,),
        "mm_processor_kwargs": ({},),
    },
    "tokenize": {
        "chat_template": (),
        "tools": ([],),
        "mm_processor_kwargs": ({},),
        "media_io_kwargs": ({},),
    },
    "detokenize": {},
}


def unsupported(endpoint: Endpoint) -> Mapping[str, tuple[Any, ...]]:
    """Known fields that are not implemented, with the values that are let through."""
    return _NEUTRAL_OF[endpoint]


def harmless(endpoint: Endpoint) -> frozenset[str]:
    """Known fields that change nothing, whatever they say."""
    return HARMLESS | _HARMLESS_OF.get(endpoint, frozenset())


def refuse_unsupported(body: Mapping[str, Any], endpoint: Endpoint) -> None:
    """Raise ApiError (400) for the first field that asks for something we do not do."""
    neutral = _NEUTRAL_OF[endpoint]
    for key, value in body.items():
        allowed = neutral.get(key)
        if allowed is None or value is None or any(_same(value, one) for one in allowed):
            continue
        fine = " or ".join(["leave it out", *(f"send {show(one)}" for one in allowed)])
        message = f"{key} = {show(value)} is not supported by this server; {fine}."
        raise ApiError(400, "unsupported_parameter", message, param=key)


@functools.cache
def _known(endpoint: Endpoint, implemented: tuple[str, ...]) -> frozenset[str]:
    return frozenset((*implemented, *_NEUTRAL_OF[endpoint], *harmless(endpoint)))


def ignored(body: Mapping[str, Any], endpoint: Endpoint, implemented: Iterable[str]) -> list[str]:
    """Names in ``body`` that mean nothing to this server, in the client's order."""
    known = _known(endpoint, tuple(implemented))
    found = [key for key in body if key not in known]
    options = body.get("stream_options")
    if "stream_options" in known and isinstance(options, dict):
        found += [f"stream_options.{key}" for key in options if key not in STREAM_OPTIONS]
    return found


def ignored_header(names: list[str]) -> dict[str, str]:
    """The response header that names ``names``; percent-encoded, since clients choose them."""
    if not names:
        return {}
    shown = [quote(name[:_MAX_NAME], safe="[]$@:") or '""' for name in names[:_MAX_NAMED]]
    if len(names) > _MAX_NAMED:
        shown.append("...")
    return {IGNORED_HEADER: ", ".join(shown)}


def show(value: Any) -> str:
    """``value`` for an error message: JSON-like, and short."""
    words = {True: "true", False: "false", None: "null"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _same(value: Any, neutral: Any) -> bool:
    # In Python 0 == False and 1 == True; a client that mixes them up asks for something else.
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)
