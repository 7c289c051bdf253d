r"""The text and bytes of single tokens, as log probabilities name them.

A token alone is not what it is in a text: decoders drop a space at the very beginning, and a
character may be spread over several tokens. So each token is decoded behind an anchor, and where
that gives no whole characters its bytes are read from the tokenizer's own name for it:

    decode(anchor, token)  =  "a" + " time"      -> " time"
    byte-level             "âĿ"                  -> e2 9d, shown as \xe2\x9d
    byte fallback          "<0xE2>"              -> e2, shown as \xe2
"""

import functools
import re
from typing import Any, Final

from transformers.convert_slow_tokenizer import bytes_to_unicode

from services.gpu_agent.engine.detokenize import REPLACEMENT

_BYTE_LEVEL: Final = {char: byte for byte, char in bytes_to_unicode().items()}
_BYTE_FALLBACK: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CACHED: Final = 1 << 16


class Pieces:
    """What each token of one tokenizer stands for."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # Not a method's own cache, which would keep every tokenizer for ever.
        self.of = functools.lru_cache(_CACHED)(self._of)

    def _of(self, token_id: int) -> tuple[str, bytes]:
        """(text, bytes): the bytes are empty where they are just those of the text."""
        text = self._decode([*self._anchor, token_id])[len(self._anchor_text) :]
        if REPLACEMENT not in text:
            return text, b""
        raw = _bytes_of(self._tokenizer.convert_ids_to_tokens(token_id))
        if not raw or raw == text.encode():  # nothing better is known, or it does say U+FFFD
            return text, b""
        return "".join(f"\\x{byte:02x}" for byte in raw), raw

    @functools.cached_property
    def _anchor(self) -> list[int]:
        return list(self._tokenizer.encode("a", add_special_tokens=False))

    @functools.cached_property
    def _anchor_text(self) -> str:
        return self._decode(self._anchor)

    def _decode(self, ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )


def _bytes_of(name: str | None) -> bytes:
    """What the vocabulary's entry ``name`` stands for; empty where its form is not known."""
    if name is None:
        return b""
    if found := _BYTE_FALLBACK.fullmatch(name):
        return bytes.fromhex(found[1])
    if all(char in _BYTE_LEVEL for char in name):
        return bytes(_BYTE_LEVEL[char] for char in name)
    return b""
