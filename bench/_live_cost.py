"""From what a live system took, unloaded, to the simulator's constants: arithmetic alone.

Every figure is the median of what was seen for the same number of tokens, rows or bytes, and a
line through these. Nothing here knows how long requests took under load.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from services.scheduler.simulate.cost import CostModel

_LEAST = 1e-6  # seconds, and seconds per token: a line through noisy points may go below zero


class Line(NamedTuple):
    """y = fixed + slope * x."""

    fixed: float
    slope: float


class Warm(NamedTuple):
    """A request that found its model resident and idle. ``prefill_s``: as the engine says."""

    num_tokens: int
    prefill_s: float
    ttft_s: float


class Switch(NamedTuple):
    """A request whose model came in for it. Seconds, each from one message to the next:

    ``swap_out_s``   SwapOut -> SwapOutCompleted
    ``reaction_s``   SwapOutCompleted -> SwapIn: the scheduler's answer, and the bus
    ``swap_in_s``    SwapIn -> the last byte is there
    ``tail_s``       the last byte is there -> first token
    """

    num_tokens: int
    num_bytes: int
    swap_out_s: float
    reaction_s: float
    swap_in_s: float
    tail_s: float
    ttft_s: float

    @property
    def unexplained_s(self) -> float:
        """What of the first token's time none of the parts accounts for."""
        return self.ttft_s - self.swap_out_s - self.reaction_s - self.swap_in_s - self.tail_s


class Samples(msgspec.Struct):
    """What was measured. ``rounds``: rows that decode together, seconds per token."""

    warm: list[Warm] = []
    rounds: list[tuple[int, float]] = []
    switches: list[Switch] = []

    def __add__(self, other: "Samples") -> "Samples":
        return Samples(
            self.warm + other.warm, self.rounds + other.rounds, self.switches + other.switches
        )


def line(points: Iterable[tuple[float, float]]) -> Line:
    """Least squares through the median of each x, neither part below zero.

    One x alone gives a line through the origin.
    """
    by_x: dict[float, list[float]] = defaultdict(list)
    for x, y in points:
        by_x[x].append(y)
    if not by_x:
        raise ValueError("a line needs points")
    xs = sorted(by_x)
    ys = [statistics.median(by_x[x]) for x in xs]
    if len(xs) == 1:
        return Line(0.0, max(_LEAST, ys[0]) / xs[0])
    mean_x, mean_y = statistics.fmean(xs), statistics.fmean(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
    if slope <= 0:
        return Line(mean_y, 0.0)
    fixed = mean_y - slope * mean_x
    if fixed < 0:
        return Line(0.0, mean_y / mean_x)
    return Line(fixed, slope)


def cost_model(samples: Samples, suspend_s: float, chunk_tokens: int) -> CostModel:
    """The constants of the simulator. ``suspend_s``: as there; ``chunk_tokens``: of a prompt
    between decode rounds.
    """
    prefill = line((one.num_tokens, one.prefill_s) for one in samples.warm)
    decode = line(samples.rounds)
    swap = line((one.num_bytes, one.swap_in_s) for one in samples.switches)
    tails = [
        one.tail_s / (prefill.fixed + prefill.slope * one.num_tokens) for one in samples.switches
    ]
    return CostModel(
        link_bytes_per_s=1 / max(swap.slope, 1e-15),
        swap_fixed_s=swap.fixed,
        swap_out_s=statistics.median(one.swap_out_s for one in samples.switches),
        suspend_s=suspend_s,
        prefill_fixed_s=max(_LEAST, prefill.fixed),
        prefill_s_per_token=prefill.slope,
        prefill_chunk_tokens=chunk_tokens,
        prefill_tail=min(1.0, max(0.0, statistics.median(tails))),
        decode_fixed_s=max(_LEAST, decode.fixed),
        decode_s_per_row=decode.slope,
        kv_bytes_per_token=0,  # of suspended rows it moves beside the link, by plain copies
        swaps_wait=True,
        request_s=max(0.0, statistics.median(one.ttft_s - one.prefill_s for one in samples.warm)),
    )


def reaction_s(samples: Samples) -> float:
    """From an event to the command that answers it."""
    return max(0.0, statistics.median(one.reaction_s for one in samples.switches))
