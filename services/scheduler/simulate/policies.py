"""Policies to run side by side, by name."""

import math
from array import array
from collections.abc import Callable, Iterable
from typing import TypeVar

import msgspec

from services.scheduler.simulate.cost import CostModel
from services.scheduler.simulate.errors import SimulateError
from services.scheduler.simulate.run import Gpus, Options, Result, simulate
from services.scheduler.simulate.workload import Workload
from services.scheduler.state import PolicyConfig

_BASELINE = {
    "placement": "memory",
    "order": "arrival",
    "preemption": "off",
    "replicate": False,
    "fair_shares": False,
    "keep_large": False,
}

ABOUT = {
    "hotswap": "as shipped",
    "hotswap-prefetch": "as shipped, and models come in before anybody asks (prefetch = true)",
    "hotswap-no-shares": "as shipped, but tenants do not matter",
    "hotswap-infinite-link": "as shipped, swaps cost nothing: the most that can be reached",
    "lru": "who was used longest ago leaves; first come, first served; no preemption",
    "gdsf": "who is least worth its bytes leaves; else as lru",
    "belady": "who is needed last leaves, which only a simulator knows; else as lru",
    "dedicated": "a GPU for each model",
}


class Policy(msgspec.Struct, frozen=True):
    """``is_dedicated``: every model has a GPU of its own, however many there are."""

    name: str
    config: PolicyConfig
    cost: CostModel
    is_dedicated: bool = False


def policy(name: str, cost: CostModel) -> Policy:
    """What `ABOUT` describes, on GPUs that cost ``cost``. Raises SimulateError."""
    match name:
        case "hotswap" | "dedicated":
            return Policy(name, PolicyConfig(), cost, name == "dedicated")
        case "hotswap-no-shares":
            return Policy(name, config_with(fair_shares=False), cost)
        case "hotswap-prefetch":
            return Policy(name, config_with(prefetch=True), cost)
        case "hotswap-infinite-link":
            return Policy(name, PolicyConfig(), cost.infinite_link())
        case "lru" | "gdsf" | "belady":
            return Policy(name, config_with(eviction=name, **_BASELINE), cost)
        case _:
            raise SimulateError(f"no policy {name!r}; there are: {', '.join(ABOUT)}")


def config_with(**wanted: object) -> PolicyConfig:
    """The default policy with these settings."""
    return msgspec.convert(wanted, PolicyConfig)


def run_policy(
    workload: Workload,
    gpus: Gpus,
    chosen: Policy,
    options: Options | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Result:
    """`simulate` under a policy."""
    if chosen.is_dedicated:
        return _dedicated(workload, gpus, chosen, options, on_progress)
    return simulate(workload, gpus, chosen.cost, chosen.config, options, on_progress=on_progress)


def _dedicated(
    workload: Workload,
    gpus: Gpus,
    chosen: Policy,
    options: Options | None,
    on_progress: Callable[[float], None] | None,
) -> Result:
    """Models that share nothing: one run each, put together."""
    num = len(workload.requests)
    ttft_s, tpot_s = array("d", [math.nan]) * num, array("d", [math.nan]) * num
    indices: dict[str, list[int]] = {model: [] for model in workload.models}
    for index, request in enumerate(workload.requests):
        indices[request.model].append(index)
    results: list[Result] = []
    for done, (model, mine) in enumerate(indices.items(), start=1):
        requests = [workload.requests[index] for index in mine]
        alone = Workload(workload.name, {model: workload.models[model]}, requests)
        one = Gpus(1, gpus.memory_bytes)
        result = simulate(alone, one, chosen.cost, chosen.config, options)
        for index, ttft, tpot in zip(mine, result.ttft_s, result.tpot_s, strict=True):
            ttft_s[index], tpot_s[index] = ttft, tpot
        results.append(result)
        if on_progress:
            on_progress(done / len(indices))
    return Result(
        workload=workload.name,
        gpus=Gpus(len(workload.models), gpus.memory_bytes),
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        num_failed=sum(result.num_failed for result in results),
        num_swap_ins=sum(result.num_swap_ins for result in results),
        num_preemptions=sum(result.num_preemptions for result in results),
        num_called_off=sum(result.num_called_off for result in results),
        bytes_moved=sum(result.bytes_moved for result in results),
        commands=_sum(result.commands for result in results),
        inputs=_sum(result.inputs for result in results),
        decide_s=_sum(result.decide_s for result in results),
        simulated_s=max(result.simulated_s for result in results),
        took_s=sum(result.took_s for result in results),
        tenants=workload.tenants(),
    )


Number = TypeVar("Number", int, float)


def _sum(parts: Iterable[dict[str, Number]]) -> dict[str, Number]:
    total: dict[str, Number] = {}
    for part in parts:
        for key, value in part.items():
            total[key] = total[key] + value if key in total else value
    return total
