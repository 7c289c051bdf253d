"""The inputs that wait for their vectors, and which of them share a forward pass.

    by length   3 4 4 6 6 7 7 | 11 11 12 13 14 16 18 | 60 61 64 ...
                                `-- window around ---'
                                    the oldest input

A window holds the input that waits longest and its neighbours in length: so little of the forward
is padding, and nobody waits for ever.
"""

from bisect import insort
from collections import Counter
from dataclasses import dataclass
from itertools import count
from typing import Final

import torch

from schemas.requests import EmbedRequest

_SHORT_TOKENS: Final = 32  # up to here padding costs less than a forward of its own


@dataclass(eq=False)
class Job:
    """One request. ``vectors``: (inputs, width) float32, from the first step on.

    ``num_left``: inputs without a vector. Times are `time.perf_counter` seconds.
    """

    request: EmbedRequest
    num_tokens: int
    num_left: int
    vectors: torch.Tensor | None = None
    begun_at: float = 0.0


@dataclass(eq=False)
class Input:
    """One input of ``job``, number ``index`` of it; ``number``: its place in order of arrival."""

    job: Job
    index: int
    ids: list[int]
    number: int


def _by_length(one: Input) -> tuple[int, int]:
    return len(one.ids), one.number


class Line:
    """See the module. ``step_tokens``: of one window, padding included."""

    def __init__(self, step_tokens: int) -> None:
        self._step_tokens = step_tokens
        self._inputs: list[Input] = []  # ascending `_by_length`
        self._numbers = count()

    def add(self, job: Job, index: int, ids: list[int]) -> None:
        insort(self._inputs, Input(job, index, ids, next(self._numbers)), key=_by_length)

    def remove(self, job: Job) -> None:
        """Drop what waits of ``job``."""
        self._inputs = [one for one in self._inputs if one.job is not job]

    def window(self) -> list[Input]:
        """Who is next, [] where nobody waits: grown to shorter ones first, they add no padding.

        A single input may be longer than a window's tokens.
        """
        line = self._inputs
        if not line:
            return []
        low = min(range(len(line)), key=lambda at: line[at].number)
        high = low + 1
        while True:
            if low > 0 and self._fits(low - 1, high):
                low -= 1
            elif high < len(line) and self._fits(low, high + 1):
                high += 1
            else:
                return line[low:high]

    def _fits(self, low: int, high: int) -> bool:
        shortest, longest = len(self._inputs[low].ids), len(self._inputs[high - 1].ids)
        is_alike = longest <= max(2 * shortest, _SHORT_TOKENS)
        return is_alike and (high - low) * longest <= self._step_tokens

    def take(self, window: list[Input]) -> None:
        """Its vectors are there: ``window``, as `window` gave it just now, leaves the line."""
        first = self._inputs.index(window[0])
        assert self._inputs[first : first + len(window)] == window, "not a window of this line"
        del self._inputs[first : first + len(window)]

    def counts(self) -> Counter[Job]:
        """How many inputs of each request wait."""
        return Counter(one.job for one in self._inputs)

    def validate(self) -> None:
        """Raise AssertionError where the line is out of order."""
        assert self._inputs == sorted(self._inputs, key=_by_length), "the line is out of order"
