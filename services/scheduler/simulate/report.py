"""What users get of a run: shares that met a target, percentiles, bytes; tables and JSON."""

import math
from collections.abc import Callable, Mapping, Sequence

import msgspec
from rich.table import Table

from services.scheduler.simulate.run import Result
from services.scheduler.simulate.workload import GB

TTFT_S = 2.0
TPOT_S = 0.1


class TenantFigures(msgspec.Struct, frozen=True):
    """What one tenant got of a run."""

    num_requests: int
    share_ttft_2s: float
    ttft_p50_s: float
    ttft_p99_s: float


class Summary(msgspec.Struct, frozen=True):
    """One run in figures. Shares are of all requests; those that did not end met nothing."""

    workload: str
    policy: str
    num_gpus: int
    num_requests: int
    num_failed: int
    share_ttft_1s: float
    share_ttft_2s: float
    share_joint: float  # first token within 2 s, and 100 ms per further token at most
    ttft_p50_s: float  # of those that ended, like all percentiles
    ttft_p90_s: float
    ttft_p99_s: float
    tpot_p99_s: float
    bytes_moved: int
    num_swap_ins: int
    num_preemptions: int
    num_called_off: int
    commands: dict[str, int]
    inputs: dict[str, int]
    decide_s: dict[str, float]
    simulated_s: float
    took_s: float
    tenants: dict[str, TenantFigures] = {}  # by name, where the workload has any


def summarize(result: Result, policy: str) -> Summary:
    """The figures of one run under ``policy``."""
    ttft = sorted(value for value in result.ttft_s if not math.isnan(value))
    tpot = sorted(value for value in result.tpot_s if not math.isnan(value))
    num = len(result.ttft_s)
    pairs = zip(result.ttft_s, result.tpot_s, strict=True)
    joint = sum(first < TTFT_S and each < TPOT_S for first, each in pairs)
    return Summary(
        workload=result.workload,
        policy=policy,
        num_gpus=result.gpus.count,
        num_requests=num,
        num_failed=result.num_failed,
        share_ttft_1s=share_below(result, 1.0),
        share_ttft_2s=share_below(result, TTFT_S),
        share_joint=joint / num if num else 0.0,
        ttft_p50_s=percentile(ttft, 0.5),
        ttft_p90_s=percentile(ttft, 0.9),
        ttft_p99_s=percentile(ttft, 0.99),
        tpot_p99_s=percentile(tpot, 0.99),
        bytes_moved=result.bytes_moved,
        num_swap_ins=result.num_swap_ins,
        num_preemptions=result.num_preemptions,
        num_called_off=result.num_called_off,
        commands=result.commands,
        inputs=result.inputs,
        decide_s=result.decide_s,
        simulated_s=result.simulated_s,
        took_s=result.took_s,
        tenants=tenants(result),
    )


def tenants(result: Result) -> dict[str, TenantFigures]:
    """By name; empty where the workload names none."""
    times: dict[str, list[float]] = {name: [] for name in sorted(set(result.tenants))}
    for name, ttft_s in zip(result.tenants, result.ttft_s, strict=False):
        times[name].append(ttft_s)
    figures = {}
    for name, all_s in times.items():
        ended = sorted(ttft_s for ttft_s in all_s if not math.isnan(ttft_s))
        share = sum(ttft_s < TTFT_S for ttft_s in ended) / len(all_s)
        p50_s, p99_s = percentile(ended, 0.5), percentile(ended, 0.99)
        figures[name] = TenantFigures(len(all_s), share, p50_s, p99_s)
    return figures


def share_below(result: Result, ttft_s: float) -> float:
    """Share of all requests whose first token came in less than ``ttft_s``."""
    num = len(result.ttft_s)
    return sum(value < ttft_s for value in result.ttft_s) / num if num else 0.0


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest of ``ordered`` that ``share`` of them do not exceed; nan of nothing."""
    if not ordered:
        return math.nan
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def gap_closed(ours: float, lru: float, at_best: float) -> float:
    """Of what LRU loses to free swaps, the share that ours does not; nan: it loses nothing."""
    return (ours - lru) / (at_best - lru) if at_best > lru else math.nan


def gap_of(summaries: Mapping[str, Summary]) -> float:
    """`gap_closed` by first tokens within 2 s, where the three policies were run; else nan."""
    try:
        ours, lru, best = (summaries[p] for p in ("hotswap", "lru", "hotswap-infinite-link"))
    except KeyError:
        return math.nan
    return gap_closed(ours.share_ttft_2s, lru.share_ttft_2s, best.share_ttft_2s)


def table(summaries: Sequence[Summary]) -> Table:
    """Policies side by side."""
    made = Table(title=f"{summaries[0].workload}: {summaries[0].num_requests} requests")
    made.add_column("", no_wrap=True)
    for one in summaries:
        made.add_column(one.policy, justify="right")
    rows: dict[str, Callable[[Summary], str]] = {
        "GPUs": lambda one: str(one.num_gpus),
        "first token < 1 s": lambda one: f"{one.share_ttft_1s:.2%}",
        "first token < 2 s": lambda one: f"{one.share_ttft_2s:.2%}",
        "... and < 100 ms per token": lambda one: f"{one.share_joint:.2%}",
        "first token, p50": lambda one: f"{one.ttft_p50_s:.3f} s",
        "first token, p90": lambda one: f"{one.ttft_p90_s:.3f} s",
        "first token, p99": lambda one: f"{one.ttft_p99_s:.3f} s",
        "per token, p99": lambda one: f"{one.tpot_p99_s * 1000:.0f} ms",
        "weights moved": lambda one: f"{one.bytes_moved / GB / 1000:.1f} TB",
        "swap-ins": lambda one: str(one.num_swap_ins),
        "preemptions": lambda one: str(one.num_preemptions),
        "did not end": lambda one: str(one.num_failed),
    }
    for name, figure in rows.items():
        made.add_row(name, *(figure(one) for one in summaries))
    for tenant in summaries[0].tenants:
        made.add_section()
        of = [one.tenants[tenant] for one in summaries]
        name = f"tenant {tenant or '(none)'}"
        made.add_row(f"{name}: requests", *(str(one.num_requests) for one in of))
        made.add_row(f"{name}: < 2 s", *(f"{one.share_ttft_2s:.2%}" for one in of))
        made.add_row(f"{name}: p99", *(f"{one.ttft_p99_s:.3f} s" for one in of))
    return made


def to_json(reports: object) -> bytes:
    """Indented, with a last line break; nan and infinity become null."""
    return msgspec.json.format(msgspec.json.encode(reports)) + b"\n"
