"""These models, this traffic, this target: how many GPUs?"""

from collections.abc import Callable

import msgspec
from rich.table import Table

from services.scheduler.simulate.policies import Policy, run_policy
from services.scheduler.simulate.report import Summary, share_below, summarize
from services.scheduler.simulate.run import Gpus, Options
from services.scheduler.simulate.workload import Workload


class Target(msgspec.Struct, frozen=True):
    """``share`` of all requests get their first token in less than ``ttft_s``."""

    share: float = 0.995
    ttft_s: float = 2.0


class Try(msgspec.Struct, frozen=True):
    """What a number of GPUs gives."""

    num_gpus: int
    share: float
    is_enough: bool
    summary: Summary


class Plan(msgspec.Struct, frozen=True):
    """``num_gpus``: the fewest that are enough; None: not even one for each model is."""

    target: Target
    num_gpus: int | None
    tries: list[Try]  # by number of GPUs


def plan(
    workload: Workload,
    memory_bytes: int,
    policy: Policy,
    target: Target,
    options: Options | None = None,
    *,
    on_try: Callable[[Try], None] | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Plan:
    """Gallop up from one GPU until it is enough, then halve what is in between.

    More GPUs are taken to be no worse. Stops at one for each model, and one more.
    """
    tries: dict[int, Try] = {}

    def is_enough(num_gpus: int) -> bool:
        result = run_policy(workload, Gpus(num_gpus, memory_bytes), policy, options, on_progress)
        share = share_below(result, target.ttft_s)
        summary = summarize(result, policy.name)
        tries[num_gpus] = Try(num_gpus, share, share >= target.share, summary)
        if on_try:
            on_try(tries[num_gpus])
        return tries[num_gpus].is_enough

    most = max(2, len(workload.models) + 1)
    too_few, enough = 0, 1
    while not is_enough(enough):
        too_few = enough
        if enough == most:
            return _made(target, None, tries)
        enough = min(2 * enough, most)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if is_enough(middle):
            enough = middle
        else:
            too_few = middle
    return _made(target, enough, tries)


def _made(target: Target, num_gpus: int | None, tries: dict[int, Try]) -> Plan:
    return Plan(target, num_gpus, [tries[number] for number in sorted(tries)])


def table(workload: Workload, made: Plan) -> Table:
    """What each number of GPUs gives."""
    target = made.target
    shown = Table(title=f"{workload.name}: {target.share:.2%} within {target.ttft_s:g} s")
    for column in ("GPUs", f"TTFT<{target.ttft_s:g}s", "p50", "p99", "swaps", ""):
        shown.add_column(column, justify="right", no_wrap=True)
    for one in made.tries:
        shown.add_row(
            str(one.num_gpus),
            f"{one.share:.2%}",
            f"{one.summary.ttft_p50_s:.2f} s",
            f"{one.summary.ttft_p99_s:.2f} s",
            str(one.summary.num_swap_ins),
            "enough" if one.is_enough else "too few",
        )
    return shown
