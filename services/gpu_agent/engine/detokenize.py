"""Token ids to text, piece by piece.

Two things hold text back. A character may be spread over several tokens: nothing is given
out that ends inside one. A stop string may begin at the end of what is known: its possible
beginning waits until it is the stop string, or can no longer be.

    tokens ──> Detokenizer ── whole characters ──> StopFinder ── text that is certain ──>
"""

from collections.abc import Sequence
from typing import Any, Final

REPLACEMENT: Final = "\ufffd"  # what decoders put for bytes that are no whole character

# Context for the first tokens: a decoder may drop the space before the first token it sees.
PROMPT_TAIL: Final = 5

# A character has at most 4 bytes and each token at least one, so an unfinished one is in the
# last 3 tokens. If more than this many tokens wait, those before are garbage and may go out.
MAX_PENDING: Final = 8
UNFINISHED: Final = 3


class Detokenizer:
    """Text of a growing token sequence.

    Only a short window is decoded each time:

        ids:   ... already given out ... | pending |
                        ^ _window         ^ _given

    The new text is what decode(window + pending) has more than decode(window). Everything
    given out plus `flush` equals the decoded completion.
    """

    def __init__(
        self, tokenizer: Any, prompt_ids: Sequence[int], skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._ids = list(prompt_ids[-PROMPT_TAIL:])
        self._window = 0
        self._given = len(self._ids)
        self.num_chars = 0  # given out so far

    def push(self, token_id: int) -> str:
        """Whole characters that ``token_id`` completes; often "", never half a character."""
        self._ids.append(token_id)
        return self._advance(is_last=False)

    def flush(self) -> str:
        """What was still held back; an unfinished character becomes U+FFFD."""
        return self._advance(is_last=True)

    def _advance(self, is_last: bool) -> str:
        known = self._decode(self._ids[self._window : self._given])
        text = self._decode(self._ids[self._window :])
        end = len(self._ids)
        if text.endswith(REPLACEMENT) and not is_last:
            if end - self._given <= MAX_PENDING:
                return ""
            end -= UNFINISHED
            text = self._decode(self._ids[self._window : end])
        self._window, self._given = self._given, end
        new = text[len(known) :]
        self.num_chars += len(new)
        return new

    def _decode(self, ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                ids,
                skip_special_tokens=self._skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )
        )


class StopFinder:
    """Finds the first stop string in a stream of text, also across pieces."""

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._include_stop = include_stop
        self._held = ""

    def push(self, text: str, may_stop: bool = True) -> tuple[str, bool]:
        """(text that may go out now, whether a stop string was reached).

        The text ends before the stop string, or with it where it is to be included. With
        ``may_stop`` False (too few tokens yet) everything goes out and nothing is looked for.
        """
        if not self._stops:
            return text, False
        text, self._held = self._held + text, ""
        if not may_stop:
            return text, False
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, stop = min(found)
            return text[: at + len(stop) if self._include_stop else at], True
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back, now that no stop string can come."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` with which ``stop`` begins (not all of it)."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


class TextStream:
    """One request's way from token ids to text: detokeniser, then stop strings."""

    def __init__(
        self,
        tokenizer: Any,
        prompt_ids: Sequence[int],
        stops: Sequence[str],
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt_ids, skip_special_tokens)
        self._stops = StopFinder(stops, include_stop)

    @property
    def num_chars(self) -> int:
        """Characters of the completion so far, those that wait for a stop string included."""
        return self._detokenizer.num_chars

    def push(self, token_id: int, may_stop: bool = True) -> tuple[str, bool]:
        """(text that ``token_id`` adds, whether a stop string was reached)."""
        return self._stops.push(self._detokenizer.push(token_id), may_stop)

    def flush(self, may_stop: bool = True) -> tuple[str, bool]:
        """The rest, at the end of the completion: (text, whether a stop string was in it)."""
        text, stopped = self._stops.push(self._detokenizer.flush(), may_stop)
        return (text, True) if stopped else (text + self._stops.flush(), False)
