"""The system live on the CPU device beside its simulation: how long first tokens take.

Three small models of which two fit, then nine of which three fit. In each configuration:

1. calibrate  the system is alone with single requests: what prompts, decode rounds, swaps and all
              the rest take becomes the simulator's cost model (`_live_probes`, `_live_cost`)
2. live       requests drawn by seed (Poisson) come over HTTP at their times, whatever is under way
3. calibrate  again: other users of the machine come and go
4. simulate   the same requests, sizes, budget and policy, with the constants of 1 and 3

for one seed after the other, and the percentiles of the time to first token, over all seeds, are
compared. No constant is fitted to what is compared. Each seed begins with a request for every
model, one after the other, which do not count: so the device holds the same, live and simulated,
when the others come. While other users of the machine are busy, seeds are run again as long as
there is time, and of each seed the run counts during which they were quietest.
"""

import asyncio
import functools
import math
import operator
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Final, NamedTuple

from bench._live_cost import Samples, cost_model, reaction_s
from bench._live_noise import loudest, quietest, read_cpu, share_of_others
from bench._live_probes import calibrate, interruption
from bench._live_rig import (
    MAX_OUTPUT,
    MAX_PROMPT,
    SCHEDULER,
    Live,
    open_live,
    write_models,
)
from bench._stats import percentile
from bench.harness import Bench
from schemas.events import SwapInCompleted
from services.gpu_agent.engine.schedule import DEFAULT_CHUNK_TOKENS
from services.scheduler.service import TICK_S
from services.scheduler.simulate.cost import CostModel
from services.scheduler.simulate.run import Gpus, Options, simulate
from services.scheduler.simulate.workload import ModelSize, Request, Workload, poisson
from services.scheduler.state import PolicyConfig
from services.settings import ModelSettings

MEDIAN_PROMPT, SIGMA_PROMPT = 96, 0.7  # tokens; lognormal
MEDIAN_OUTPUT, SIGMA_OUTPUT = 16, 0.6
LEAD_S = 0.4  # between the requests that do not count, and before the others
QUIET = 0.05  # while others use more than this share of the CPUs, seeds are run again
OFF_AT_MOST: Final = 0.2
PERCENTILES = (50, 90, 95)


class Shape(NamedTuple):
    """A configuration. ``rate_per_s``: requests, over all models."""

    name: str
    num_models: int
    num_fit: int
    rate_per_s: float


SHAPES = (Shape("3 models", 3, 2, 2.0), Shape("9 models", 9, 3, 1.5))


class Outcome(NamedTuple):
    """Of all seeds together, live or simulated. ``ttft_s``: of the requests that count."""

    ttft_s: list[float]
    num_failed: int
    num_swap_ins: int
    num_preemptions: int
    swapped_bytes: int


def lengths(rng: random.Random) -> tuple[int, int]:
    """Tokens of a prompt and of its answer."""
    num_in = rng.lognormvariate(math.log(MEDIAN_PROMPT), SIGMA_PROMPT)
    num_out = rng.lognormvariate(math.log(MEDIAN_OUTPUT), SIGMA_OUTPUT)
    return min(MAX_PROMPT, max(8, int(num_in))), min(MAX_OUTPUT, max(2, int(num_out)))


def draw(live: Live, shape: Shape, seed: int, duration_s: float) -> Workload:
    """Of models as large as the agent says that they are. The first requests do not count."""
    assert live.status
    sizes = {}
    for replica in live.status.replicas:
        assert replica.facts
        facts = replica.facts
        sizes[replica.model] = ModelSize(facts.weight_bytes, facts.kv_bytes, facts.max_batch)
    drawn = poisson(
        sizes, shape.rate_per_s, duration_s, seed=seed, lengths=lengths, name=shape.name
    )
    lead = [Request(number * LEAD_S, model, 8, 2) for number, model in enumerate(sizes)]
    begins_s = len(lead) * LEAD_S
    rest = [request._replace(at_s=begins_s + request.at_s) for request in drawn.requests]
    return Workload(shape.name, sizes, lead + rest)


def pooled(outcomes: list[Outcome]) -> Outcome:
    """All seeds as one."""
    return Outcome(
        [one for outcome in outcomes for one in outcome.ttft_s],
        *(sum(column) for column in zip(*(outcome[1:] for outcome in outcomes), strict=True)),
    )


def off(live_s: list[float], simulated_s: list[float], percent: float) -> float:
    """How far the live percentile is from the simulated one, as a share of that."""
    simulated = percentile(tuple(simulated_s), percent)
    return abs(percentile(tuple(live_s), percent) / simulated - 1)


# -- live ------------------------------------------------------------------------------------


async def run_live(live: Live, workload: Workload) -> Outcome:
    """Send each request at its time, and wait for all of them."""
    since = time.time()
    began = time.monotonic()
    asked = []
    for request in workload.requests:
        await asyncio.sleep(max(0.0, began + request.at_s - time.monotonic()))
        asking = live.ask(request.model, request.input_tokens, request.output_tokens)
        asked.append(asyncio.create_task(asking))
    answers = await asyncio.gather(*asked)
    await live.ended(*answers)
    counted = [answer.ttft_s for answer in answers[len(workload.models) :] if answer.chunks_at]
    swaps = [body.trace for _, body in live.of(SwapInCompleted, since)]
    return Outcome(
        counted,
        sum(not answer.chunks_at for answer in answers),
        len(swaps),
        live.num_preempted(since),
        sum(trace.num_bytes for trace in swaps),
    )


# -- simulated -------------------------------------------------------------------------------


def run_simulated(workload: Workload, budget_bytes: int, cost: CostModel, bus_s: float) -> Outcome:
    config = PolicyConfig(
        run_quantum_s=SCHEDULER.run_quantum_s,
        ttft_target_s=SCHEDULER.ttft_target_s,
        token_target_s=SCHEDULER.token_target_s,
        starvation_s=SCHEDULER.starvation_s,
        preemption=SCHEDULER.preemption,
        replicate=SCHEDULER.replicate,
        migrate=SCHEDULER.migrate,
        retry_s=SCHEDULER.retry_failed_s,
    )
    options = Options(tick_s=TICK_S, bus_s=bus_s)
    result = simulate(workload, Gpus(1, budget_bytes), cost, config, options)
    counted = [ttft_s for ttft_s in result.ttft_s[len(workload.models) :] if not math.isnan(ttft_s)]
    return Outcome(
        counted,
        result.num_failed,
        result.num_swap_ins,
        result.num_preemptions,
        result.bytes_moved,
    )


# -- both ------------------------------------------------------------------------------------


class Effort(NamedTuple):
    """Of one configuration. ``seconds``: of traffic for each seed; ``probes``: rounds, each time.

    ``again_for_s``: until so long after the start, seeds that others disturbed are run again.
    """

    seeds: tuple[int, ...]
    seconds: float
    probes: int
    again_for_s: float


FULL = Effort((1, 2, 3, 4, 5), 13.0, 2, 125.0)
QUICK = Effort((1,), 5.0, 1, 0.0)


class Trial(NamedTuple):
    """One seed, live, between two calibrations."""

    seed: int
    workload: Workload
    was: Outcome
    samples: Samples
    others: float  # share of the machine's CPU time that others used meanwhile


async def trials(live: Live, shape: Shape, effort: Effort) -> list[Trial]:
    """Every seed once; then again those that others disturbed most, as long as there is time."""
    began = time.monotonic()
    num_cores = len(os.sched_getaffinity(0))
    done: list[Trial] = []
    clock, before = read_cpu(), await calibrate(live, effort.probes)
    while True:
        if len(done) < len(effort.seeds):
            seed = effort.seeds[len(done)]
        elif time.monotonic() - began > effort.again_for_s or loudest(done).others < QUIET:
            return done
        else:
            seed = loudest(done).seed
        workload = draw(live, shape, seed, effort.seconds)
        was = await run_live(live, workload)
        next_clock, after = read_cpu(), await calibrate(live, effort.probes)
        others = share_of_others(clock, read_cpu(), num_cores)
        done.append(Trial(seed, workload, was, before + after, others))
        clock, before = next_clock, after


async def compare(bench: Bench, shape: Shape, models: dict[str, ModelSettings]) -> None:
    """One configuration."""
    async with open_live(models, shape.num_fit) as live:
        suspends_s = await interruption(live)
        done = await trials(live, shape, QUICK if bench.quick else FULL)
        if not bench.quick:
            suspends_s += await interruption(live)
        assert live.status
        budget_bytes = live.status.budget_bytes
    chosen = list(quietest(done).values())
    if not suspends_s:  # answers were too slow to be interrupted
        suspends_s = [one.swap_out_s for trial in chosen for one in trial.samples.switches]
    suspend_s = statistics.median(suspends_s)
    told = []
    for trial in chosen:
        cost = cost_model(trial.samples, suspend_s, DEFAULT_CHUNK_TOKENS)
        bus_s = reaction_s(trial.samples)
        told.append(run_simulated(trial.workload, budget_bytes, cost, bus_s))
    bench.value(f"{shape.name}: trials", len(done))
    bench.value(f"{shape.name}: trials that count", len(chosen))
    bench.value(f"{shape.name}: CPU that others used", max(one.others for one in chosen))
    report_cost(
        bench, shape.name, functools.reduce(operator.add, (t.samples for t in chosen)), suspend_s
    )
    report(bench, shape.name, pooled([trial.was for trial in chosen]), pooled(told))


def report_cost(bench: Bench, name: str, samples: Samples, suspend_s: float) -> None:
    """The constants, and how well they add up to a switch that nothing else disturbs."""
    cost = cost_model(samples, suspend_s, DEFAULT_CHUNK_TOKENS)
    for field in cost.__struct_fields__:
        if getattr(cost, field) != getattr(CostModel(), field):
            unit = "s" if field.endswith("_s") and "per_s" not in field else ""
            bench.value(f"{name}: {field}", getattr(cost, field), unit)
    bench.value(f"{name}: bus_s", reaction_s(samples), "s")
    shares = tuple(one.unexplained_s / one.ttft_s for one in samples.switches)
    bench.value(f"{name}: unexplained part of a lone switch", percentile(shares, 50))


def report(bench: Bench, name: str, was: Outcome, told: Outcome) -> None:
    bench.value(f"{name}: requests compared", len(was.ttft_s))
    for what, outcome in (("live", was), ("simulated", told)):
        for percent in (10, 25, 50, 75, 90, 95, 99):
            took_s = percentile(tuple(outcome.ttft_s), percent)
            bench.value(f"{name}: {what} TTFT p{percent}", took_s, "s")
        bench.value(f"{name}: {what} swap-ins", outcome.num_swap_ins)
        bench.value(f"{name}: {what} bytes swapped in", outcome.swapped_bytes / 1e6, "MB")
        bench.value(f"{name}: {what} preemptions", outcome.num_preemptions)
    # A quick run has too few requests for the others.
    for percent in PERCENTILES[:1] if bench.quick else PERCENTILES:
        far = off(was.ttft_s, told.ttft_s, percent)
        bench.target(f"{name}: TTFT p{percent} off the simulator's by", far, at_most=OFF_AT_MOST)
    bench.target(f"{name}: requests that failed", was.num_failed + told.num_failed, at_most=0)


def main(argv: list[str]) -> int:
    bench = Bench("live", "first tokens of the live system beside the simulator's", argv)
    with tempfile.TemporaryDirectory(prefix="hotswap-live-") as folder:
        models = write_models(Path(folder), max(shape.num_models for shape in SHAPES))
        for shape in SHAPES:
            used = dict(list(models.items())[: shape.num_models])
            asyncio.run(compare(bench, shape, used))
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
