"""Medians, spread and ratios of what was measured."""

import math
import statistics

import msgspec


class Samples(msgspec.Struct, frozen=True):
    """One variant's figures, in the order of the rounds they were taken in."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("no samples: at least one round has to run")

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def p10(self) -> float:
        return percentile(self.values, 10)

    @property
    def p90(self) -> float:
        return percentile(self.values, 90)

    def over(self, other: "Samples") -> "Samples":
        """Ratios to ``other``, round by round.

        Both sides of a ratio come from the same round, so that a slow spell of the
        machine falls on both and cancels out. Raises ValueError where rounds differ.
        """
        if len(self.values) != len(other.values):
            raise ValueError(
                f"ratios need the same rounds: {len(self.values)} against {len(other.values)}"
            )
        return Samples(
            tuple(
                mine / theirs if theirs else math.inf
                for mine, theirs in zip(self.values, other.values, strict=True)
            )
        )


def percentile(values: tuple[float, ...], percent: float) -> float:
    """The ``percent``-th percentile, linear between neighbours."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def show(value: float, unit: str = "") -> str:
    """``value`` to four digits with its unit: ``1.234 ms``, ``3.5x``, ``81 %``.

    Seconds are scaled to s, ms, us or ns.
    """
    if unit == "s" and math.isfinite(value) and value != 0:
        for scale, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
            if abs(value) >= scale:
                return f"{value / scale:.4g} {name}"
        return f"{value / 1e-9:.4g} ns"
    return f"{value:.4g}{unit}" if unit == "x" else f"{value:.4g} {unit}".rstrip()
