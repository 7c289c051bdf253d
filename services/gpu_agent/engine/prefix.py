"""Keys for KV blocks: what a block holds is a function of all tokens up to its end.

    tokens   | t0 .. t15 | t16 .. t31 | t32 .. t36
    key        k0 = h(t0..15)
                           k1 = h(k0, t16..31)      none yet: not full

Equal keys mean equal tokens from the first one on, so K and V can be shared between requests and
found again after a swap. The hash is cryptographic: a client that could make two prompts collide
would read answers to another client's prompt.
"""

from array import array
from collections.abc import Sequence
from hashlib import sha256
from typing import Any, Final

_SIZE: Final = 16
# These stretch their rotary frequencies with the length of the sequence at hand: what a position
# holds depends on tokens after it, so it is nobody else's.
_LENGTH_DEPENDENT: Final = ("dynamic", "longrope")


def extend_keys(
    keys: list[bytes], ids: Sequence[int], block_tokens: int, salt: bytes = b""
) -> None:
    """Append to ``keys`` those of all full blocks of ``ids`` that it lacks.

    Under different ``salt`` no keys are equal.
    """
    for number in range(len(keys), len(ids) // block_tokens):
        start = number * block_tokens
        tokens = array("q", ids[start : start + block_tokens]).tobytes()
        keys.append(sha256((keys[-1] if keys else salt) + tokens).digest()[:_SIZE])


def are_prefixes_shareable(config: Any) -> bool:
    """Whether K and V of a token depend on nothing but the tokens up to it."""
    rope: Any = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = rope.values() if all(isinstance(v, dict) for v in rope.values()) else [rope]
    return not any(kind.get("rope_type") in _LENGTH_DEPENDENT for kind in kinds)
