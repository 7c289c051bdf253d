"""How much of the machine others used meanwhile: a run beside a busy neighbour shows the neighbour.

Runs are chosen by that alone, never by what they measured.
"""

import time
from collections.abc import Iterable
from typing import NamedTuple, Protocol, TypeVar

import psutil


class Trial(Protocol):
    """One run of one seed. ``others``: share of the machine's CPU time that went elsewhere."""

    @property
    def seed(self) -> int: ...

    @property
    def others(self) -> float: ...


T = TypeVar("T", bound=Trial)


class CpuClock(NamedTuple):
    """CPU seconds since the machine began: of everybody, and of this process and its children."""

    at: float  # monotonic seconds
    all_s: float
    own_s: float


def read_cpu() -> CpuClock:
    times = psutil.cpu_times()
    stolen_s = getattr(times, "steal", 0.0)
    all_s = times.user + times.system + getattr(times, "nice", 0.0) + stolen_s
    this = psutil.Process()
    own_s = 0.0
    for process in (this, *this.children(recursive=True)):
        try:
            used = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        own_s += used.user + used.system
    return CpuClock(time.monotonic(), all_s, own_s)


def share_of_others(before: CpuClock, after: CpuClock, num_cores: int) -> float:
    """What others used between the two, of all that there was: 0 to 1."""
    used_s = (after.all_s - before.all_s) - (after.own_s - before.own_s)
    return min(1.0, max(0.0, used_s / ((after.at - before.at) * num_cores)))


def quietest(trials: Iterable[T]) -> dict[int, T]:
    """Of each seed the trial during which others used least, in the order of the seeds."""
    best: dict[int, T] = {}
    for trial in trials:
        if trial.seed not in best or trial.others < best[trial.seed].others:
            best[trial.seed] = trial
    return dict(sorted(best.items()))


def loudest(trials: Iterable[T]) -> T:
    """Of the quietest of each seed, the one that is worth running again."""
    return max(quietest(trials).values(), key=lambda trial: trial.others)
