"""What swaps and tokens cost, as far as events have told: the numbers that decisions weigh.

    swap-in of n bytes     Link: fixed + n / rate            from the traces of swap-ins there
    load of n bytes        Disk: n / rate                    from the loads there
    time per token         Tempo, per model                  from how requests ended
    requests per second    Tempo, per model                  from when they came
    slack of a replica     tokens sent x target - elapsed    what its requests can be kept waiting

All of it is a moving average, and all of it starts out unknown.
"""

import math

from schemas.state import SwapTrace

_WEIGHT = 0.2  # of the newest figure
_MEMORY_S = 30.0  # of how often a model is asked for


class Link:
    """The way into one GPU, as its swap-ins measured it."""

    __slots__ = ("fixed_s", "s_per_byte")

    def __init__(self) -> None:
        self.fixed_s = 0.0
        self.s_per_byte = 0.0

    def note(self, trace: SwapTrace) -> None:
        """A swap-in took this long."""
        if trace.total_s <= 0:
            return
        fixed_s = max(0.0, trace.total_s - trace.copy_s)
        self.fixed_s += (fixed_s - self.fixed_s) * (_WEIGHT if self.fixed_s else 1.0)
        if trace.num_bytes > 0 and trace.copy_s > 0:
            s_per_byte = trace.copy_s / trace.num_bytes
            weight = _WEIGHT if self.s_per_byte else 1.0
            self.s_per_byte += (s_per_byte - self.s_per_byte) * weight

    @property
    def is_known(self) -> bool:
        """Whether a swap-in has been measured."""
        return self.fixed_s > 0 or self.s_per_byte > 0

    def swap_in_s(self, num_bytes: int) -> float:
        """For a swap-in that copies ``num_bytes``; 0 while nothing is known."""
        return self.fixed_s + max(0, num_bytes) * self.s_per_byte


class Disk:
    """Where host images of one GPU come from, as its loads measured it."""

    __slots__ = ("s_per_byte",)

    def __init__(self) -> None:
        self.s_per_byte = 0.0  # 0: unknown

    def note(self, num_bytes: int, load_s: float) -> None:
        """A load of ``num_bytes`` took ``load_s``."""
        if num_bytes > 0 and load_s > 0:
            s_per_byte = load_s / num_bytes
            weight = _WEIGHT if self.s_per_byte else 1.0
            self.s_per_byte += (s_per_byte - self.s_per_byte) * weight

    def load_s(self, num_bytes: int) -> float | None:
        """For a load of ``num_bytes``; None while nothing is known."""
        return num_bytes * self.s_per_byte if self.s_per_byte else None


class Tempo:
    """How fast one model writes, how soon it begins, and how often it is asked to."""

    __slots__ = ("_asked_at", "_num_asked", "first_s", "token_s")

    def __init__(self) -> None:
        self._asked_at = 0.0
        self._num_asked = 0.0  # at `_asked_at`; earlier ones count ever less
        self.token_s = 0.0  # 0: unknown
        self.first_s = 0.0  # from the start of a request to its first token

    def note_demand(self, at: float) -> None:
        """A request for it came (unix seconds)."""
        self._num_asked = self._num_asked * math.exp((self._asked_at - at) / _MEMORY_S) + 1.0
        self._asked_at = at

    def asked_per_s(self, now: float) -> float:
        """Requests per second, lately."""
        passed_s = max(0.0, now - self._asked_at)
        return self._num_asked * math.exp(-passed_s / _MEMORY_S) / _MEMORY_S

    def note(self, prefill_s: float, decode_s: float, num_tokens: int) -> None:
        """A request got its first token after ``prefill_s``, and ``num_tokens`` more in
        ``decode_s``.
        """
        self.first_s += (prefill_s - self.first_s) * _WEIGHT
        if num_tokens < 4 or decode_s <= 0:
            return
        token_s = decode_s / num_tokens
        self.token_s += (token_s - self.token_s) * (_WEIGHT if self.token_s else 1.0)

    def slack_per_s(self, target_s: float) -> float:
        """Seconds that a running request gets ahead of its target in a second.

        While the tempo is unknown: one, as if tokens came twice as fast as they have to.
        """
        return target_s / self.token_s - 1.0 if self.token_s else 1.0
