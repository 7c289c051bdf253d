"""Pictures of a run, by matplotlib: an optional extra."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.scheduler.simulate.errors import SimulateError
from services.scheduler.simulate.plan import Plan
from services.scheduler.simulate.run import Result


def check() -> None:
    """Raise SimulateError unless pictures can be made: best known before a long run."""
    _figure()


def ttft_cdf(results: Mapping[str, Result], file: Path) -> None:
    """Share of requests over time to first token, a line for each policy."""
    figure, axes = _figure()
    for policy, result in results.items():
        ordered = sorted(value for value in result.ttft_s if not math.isnan(value))
        step = max(1, len(ordered) // 2000)
        points = range(0, len(ordered), step)
        shares = [(point + 1) / len(result.ttft_s) for point in points]
        axes.plot([ordered[point] for point in points], shares, label=policy)
    axes.set_xscale("log")
    axes.set_xlabel("time to first token (s)")
    axes.set_ylabel("share of requests")
    axes.set_title(next(iter(results.values())).workload)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, file)


def share_by_gpus(made: Plan, workload: str, file: Path) -> None:
    """What each number of GPUs gives, and the target."""
    figure, axes = _figure()
    tries = made.tries
    axes.plot([one.num_gpus for one in tries], [one.share for one in tries], marker="o")
    axes.axhline(made.target.share, linestyle="--", color="grey")
    axes.set_xlabel("GPUs")
    axes.set_ylabel(f"share of first tokens within {made.target.ttft_s:g} s")
    axes.set_title(workload)
    axes.grid(alpha=0.3)
    _save(figure, file)


def _figure() -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SimulateError(
            "pictures need matplotlib: install it with pip install 'hotswap[plots]'"
        ) from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    return figure, figure.add_subplot()


def _save(figure: Any, file: Path) -> None:
    try:
        figure.savefig(file)
    except (OSError, ValueError) as error:  # a suffix that is no picture's
        raise SimulateError(f"{file}: {error}") from error
