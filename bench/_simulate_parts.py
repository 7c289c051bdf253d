"""What `bench.simulate` runs: workloads under policies, each run once."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console

from bench.harness import Bench
from services.scheduler.simulate import report
from services.scheduler.simulate.cost import H100, CostModel
from services.scheduler.simulate.policies import Policy, config_with, policy, run_policy
from services.scheduler.simulate.presets import preset
from services.scheduler.simulate.run import Gpus
from services.scheduler.simulate.workload import GB, ModelSize, Workload, poisson, together

QUICK_S: Final = 600.0  # of every workload
WORSE_AT_MOST: Final = 0.5  # points of the share of first tokens within 2 s, against LRU

# Promised of first tokens within 2 s.
SHARES: Final = {"poisson100": 0.995, "market87": 0.994, "arena27": 0.989, "mixed": 0.99}
GAP_CLOSED: Final = 0.85
KNEE_GPUS: Final = 5

# The grid: one thing at a time differs from these.
GRID_S: Final = 400.0
GRID_SEEDS: Final = (1, 2, 3)
GRID_MODELS: Final = 40
GRID_GPUS: Final = 3
GRID_RATE_PER_S: Final = 2.0
FIXED_S: Final = (0.05, 0.2, 0.5, 1.0, 1.5)
LINK_GB_PER_S: Final = (6, 16, 32, 64)
SIZES_GB: Final = (4, 8, 16, 32)
LOADS: Final = (0.25, 0.5, 1.5, 2.0)
QUANTA_S: Final = (0.25, 0.5, 2.0, 4.0)

# One tenant floods two GPUs with many models, another wants no more than one of the two could do.
FAIR_S: Final = 600.0
FAIR_GPUS: Final = 2
POLITE_MODELS: Final = 8
POLITE_RATE_PER_S: Final = 0.5
FLOOD_MODELS: Final = 24
FLOOD_TIMES: Final = (4, 8)  # the rate of the polite one
FAIR_OF_ALONE: Final = 0.95  # of what the polite one gets alone on its part of the GPUs
FAIR_OVER_WITHOUT: Final = 1.5


class Lab:
    """Makes workloads, runs them, prints what came of it. ``folder``: of the traces."""

    def __init__(self, bench: Bench, folder: Path | None) -> None:
        self.bench = bench
        self.folder = folder
        self._console = Console()
        self._workloads: dict[str, Workload] = {}

    def workload(self, name: str) -> Workload:
        if name not in self._workloads:
            duration_s = QUICK_S if self.bench.quick else math.inf
            self._workloads[name] = preset(name).make(self.folder, 0, duration_s)
        return self._workloads[name]

    def compare(
        self, workload: Workload, num_gpus: int, policies: list[Policy]
    ) -> dict[str, report.Summary]:
        """Summaries by policy."""
        found = {}
        for one in policies:
            result = run_policy(workload, Gpus(num_gpus), one)
            found[one.name] = report.summarize(result, one.name)
        self._console.print(report.table(list(found.values())))
        return found


def tail(lab: Lab) -> None:
    """A day of 115 models on 6 GPUs."""
    policies = [policy(name, H100) for name in ("hotswap", "lru", "gdsf", "belady")]
    found = lab.compare(lab.workload("tail115"), 6, policies)
    ours, bench = found["hotswap"], lab.bench
    bench.target("tail115 on 6: first token < 1 s", ours.share_ttft_1s, at_least=0.99)
    bench.target("tail115 on 6: first token < 2 s", ours.share_ttft_2s, at_least=0.995)
    bench.target("tail115 on 6: and < 100 ms per token", ours.share_joint, at_least=0.99)
    for name, one in found.items():
        bench.value(f"tail115 on 6, {name}: weights moved", one.bytes_moved / 1e12, "TB")


def share(lab: Lab, name: str) -> None:
    """A workload with one promise."""
    num_gpus = preset(name).num_gpus
    policies = [policy(one, H100) for one in ("hotswap", "lru", "hotswap-infinite-link")]
    found = lab.compare(lab.workload(name), num_gpus, policies)
    ours = found["hotswap"].share_ttft_2s
    what = f"{name} on {num_gpus}: first token < 2 s"
    lab.bench.target(what, ours, at_least=SHARES[name])
    lab.bench.value(f"{what}, lru", found["lru"].share_ttft_2s)
    lab.bench.value(f"{what}, free swaps", found["hotswap-infinite-link"].share_ttft_2s)


def knee(lab: Lab) -> None:
    """Where GPUs are just too few, how much of what LRU loses is gained back."""
    policies = [policy(one, H100) for one in ("hotswap", "lru", "hotswap-infinite-link")]
    found = lab.compare(lab.workload("tail115"), KNEE_GPUS, policies)
    name = f"tail115 on {KNEE_GPUS}: gap closed"
    lab.bench.target(name, report.gap_of(found), at_least=GAP_CLOSED)


def fairness(lab: Lab) -> None:
    """First tokens of a polite tenant beside one that floods, with fair shares and without."""
    duration_s = FAIR_S / 4 if lab.bench.quick else FAIR_S
    size = ModelSize(16 * GB)
    mine = {f"polite{number}": size for number in range(POLITE_MODELS)}
    theirs = {f"flood{number:02}": size for number in range(FLOOD_MODELS)}
    polite = poisson(mine, POLITE_RATE_PER_S, duration_s, seed=1, tenant="polite")
    part = run_policy(polite, Gpus(FAIR_GPUS // 2), policy("hotswap", H100))
    alone = report.share_below(part, report.TTFT_S)
    lab.bench.value("fairness: polite tenant alone on half of the GPUs", alone)
    for times in FLOOD_TIMES:
        rate = times * POLITE_RATE_PER_S
        flood = poisson(theirs, rate, duration_s, seed=2, tenant="flood")
        both = together(f"fairness, flood of {times} x", polite, flood)
        policies = [policy(name, H100) for name in ("hotswap", "hotswap-no-shares", "lru")]
        found = lab.compare(both, FAIR_GPUS, policies)
        ours, without, _ = (one.tenants["polite"].share_ttft_2s for one in found.values())
        for name, one in found.items():
            figure = one.tenants["flood"].share_ttft_2s
            lab.bench.value(f"flood of {times} x, {name}: flood's first token < 2 s", figure)
        what = f"flood of {times} x: polite tenant's first token < 2 s"
        lab.bench.value(what, ours)
        lab.bench.value(f"{what}, without shares", without)
        lab.bench.target(f"{what}, of alone", ours / alone, at_least=FAIR_OF_ALONE, unit="x")
        over = ours / without
        lab.bench.target(f"{what}, over without", over, at_least=FAIR_OVER_WITHOUT, unit="x")


# -- sensitivity ---------------------------------------------------------------------------


class Cell(msgspec.Struct, frozen=True):
    """One place of the grid."""

    group: str
    name: str
    cost: CostModel = H100
    weight_gb: int = 16
    load: float = 1.0
    quantum_s: float = 1.0


def cells() -> Iterator[Cell]:
    """The grid: along each axis, the others at their usual value."""
    for fixed_s in FIXED_S:
        cost = msgspec.structs.replace(H100, swap_fixed_s=fixed_s)
        yield Cell("fixed cost", f"{fixed_s:g} s", cost)
    for rate in LINK_GB_PER_S:
        cost = msgspec.structs.replace(H100, link_bytes_per_s=float(rate * GB))
        yield Cell("link", f"{rate} GB/s", cost)
    for size in SIZES_GB:
        yield Cell("size", f"{size} GB", weight_gb=size)
    for load in LOADS:
        yield Cell("load", f"{load:g} x", load=load)
    for quantum_s in QUANTA_S:
        yield Cell("quantum", f"{quantum_s:g} s", quantum_s=quantum_s)


def sensitivity(lab: Lab) -> None:
    """Never worse than LRU by more than a little, wherever on the grid."""
    worst: dict[str, float] = {}
    for cell in cells():
        size = ModelSize(cell.weight_gb * GB)
        models = {f"m{number:02}": size for number in range(GRID_MODELS)}
        duration_s = GRID_S / 4 if lab.bench.quick else GRID_S
        rivals = (
            Policy("hotswap", config_with(run_quantum_s=cell.quantum_s), cell.cost),
            policy("lru", cell.cost),
        )
        shares = [0.0, 0.0]
        for seed in GRID_SEEDS:
            workload = poisson(models, GRID_RATE_PER_S * cell.load, duration_s, seed=seed)
            for number, rival in enumerate(rivals):
                result = run_policy(workload, Gpus(GRID_GPUS), rival)
                shares[number] += report.share_below(result, report.TTFT_S) / len(GRID_SEEDS)
        lab.bench.value(f"{cell.group} {cell.name}: first token < 2 s", shares[0])
        lab.bench.value(f"{cell.group} {cell.name}: first token < 2 s, lru", shares[1])
        behind = 100 * (shares[1] - shares[0])
        worst[cell.group] = max(behind, worst.get(cell.group, -math.inf))
    for group, behind in worst.items():
        lab.bench.target(f"{group}: points behind LRU, at worst", behind, at_most=WORSE_AT_MOST)
