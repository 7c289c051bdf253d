"""Request fields that are known by name but not implemented, and those nobody knows.

A field that asks for something we do not do is refused by name, never ignored in silence;
the same field set to "no such thing please" is fine, since many clients send defaults.
Fields that nobody here knows are accepted, and named in a response header.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias
from urllib.parse import quote

from services.api.errors import ApiError

Endpoint: TypeAlias = Literal["chat", "completion", "embedding"]

IGNORED_HEADER = "x-hotswap-ignored-fields"
_MAX_NAMED = 20
_MAX_NAME = 64

# Accepted whatever they say: they ask for no behaviour of this server.
HARMLESS = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "user",
    }
)

# field -> the values, besides null, that ask for nothing
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "store": (False,),
    # vLLM's extensions
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "logits_processors": ([],),
    "guided_whitespace_pattern": (),
    "guided_decoding_backend": (),
    "structural_tag": (),
    "priority": (0,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "kv_transfer_params": (),
}

_NEUTRAL_OF: dict[Endpoint, dict[str, tuple[Any, ...]]] = {
    "chat": _NEUTRAL
    | {
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
        "web_search_options": (),
        "echo": (False,),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "add_special_tokens": (False,),
        "documents": ([],),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "mm_processor_kwargs": ({},),
    },
    "completion": _NEUTRAL
    | {
        "echo": (False,),
        "suffix": ("",),
        "add_special_tokens": (True,),
        "prompt_embeds": (),
    },
    # vLLM's extensions
    "embedding": {
        "add_special_tokens": (True,),
        "truncate_prompt_tokens": (),
        "priority": (0,),
    },
}


def unsupported(endpoint: Endpoint) -> Mapping[str, tuple[Any, ...]]:
    """Known fields that are not implemented, with the values that are let through."""
    return _NEUTRAL_OF[endpoint]


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


def ignored(body: Mapping[str, Any], endpoint: Endpoint, implemented: Iterable[str]) -> list[str]:
    """Names in ``body`` that mean nothing to this server, in the client's order."""
    known = {*implemented, *_NEUTRAL_OF[endpoint], *HARMLESS}
    return [key for key in body if key not in known]


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
