"""What `services.scheduler.decide` costs per request event, and how that grows.

A request event is a Demand, a RequestStarted or a RequestEnded. The cluster is told what a live
one tells: a DeploymentAdded of each model, an AgentStatus of each GPU (an image of every model,
four of them resident), then requests. Of a hundred, 98 are for models on some GPU; two are for
models on none, and what `decide` commands for those is answered as agents would. One request runs
per GPU, on average, for one of ten tenants. All request events count, those that swap something
included; what answers to commands cost is a figure of its own.

Two axes: 100, 1,000 and 10,000 models on 16 GPUs; 100 models on 4, 32, 250 and 1,000 GPUs. Growth
may be no more than a logarithm's: ln 10,000 / ln 100 = 2 and ln 1,000 / ln 4 = 5.
"""

import gc
import math
import random
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Final

import msgspec

from bench.harness import Bench, Samples
from schemas.commands import Command, SwapIn, SwapOut
from schemas.events import (
    RequestEnded,
    RequestStarted,
    SwapInCompleted,
    SwapOutCompleted,
)
from schemas.state import AgentStatus, ModelFacts, ModelSpec, ReplicaStatus, SwapTrace
from schemas.stream import RequestTiming
from services.scheduler.decide import decide
from services.scheduler.inputs import Demand, DeploymentAdded, Input, Tick
from services.scheduler.state import ClusterState

GB: Final = 10**9
MODELS: Final = (100, 1_000, 10_000)
MODELS_ON_GPUS: Final = 16
GPUS: Final = (4, 32, 250, 1_000)
GPUS_WITH_MODELS: Final = 100
RESIDENT_PER_GPU: Final = 4
BUDGET_BYTES: Final = 74 * GB  # four models and a rest
FACTS: Final = ModelFacts("Llama", "bfloat16", 8 * GB, 16 * GB, 2 * GB, 8192, 64)
NUM_REQUESTS: Final = 2_000  # per round
NUM_SWAPPED: Final = 40  # of them for models on no GPU
SWAP_S: Final = 0.35
STEP_S: Final = 0.002  # between requests
COST_AT_MOST_S: Final = 25e-6


class Point(msgspec.Struct, frozen=True):
    """One place on an axis."""

    num_models: int
    num_gpus: int

    @property
    def name(self) -> str:
        return f"{self.num_models:,} models, {self.num_gpus:,} GPUs"


class Cost:
    """Seconds in `decide`, and calls."""

    __slots__ = ("calls", "took_s")

    def __init__(self) -> None:
        self.took_s = 0.0
        self.calls = 0

    @property
    def mean_s(self) -> float:
        return self.took_s / self.calls if self.calls else math.nan


class Round:
    """What one round cost, by what it was for."""

    def __init__(self) -> None:
        self.warm = {"Demand": Cost(), "RequestStarted": Cost(), "RequestEnded": Cost()}
        self.deciding = Cost()  # demands for models on no GPU
        self.answers = Cost()  # SwapInCompleted, SwapOutCompleted
        self.ticks = Cost()

    @property
    def request_s(self) -> float:
        """Mean of all request events."""
        costs = [*self.warm.values(), self.deciding]
        return sum(cost.took_s for cost in costs) / sum(cost.calls for cost in costs)


class Running(msgspec.Struct, frozen=True):
    """A request that an agent has started."""

    request_id: str
    gpu: str
    model: str


class Cluster:
    """A belief, and the agents that it is about."""

    def __init__(self, point: Point) -> None:
        self.models = [f"m{number:05}" for number in range(point.num_models)]
        self.gpus = [f"gpu{number:04}" for number in range(point.num_gpus)]
        self.state = ClusterState(epoch=1)
        self.rounds: list[Round] = []
        self._now = 1000.0
        self._rng = random.Random(0)
        self._num_requests = 0
        self._generations: dict[tuple[str, str], int] = {}
        self._running: deque[Running] = deque()
        self._commands: deque[Command] = deque()
        self._changed: dict[str, None] = {}
        # Half of the models, at most, are on GPUs, so that there are always some that are not.
        num_in = min(RESIDENT_PER_GPU * point.num_gpus, point.num_models // 2)
        slots = range(RESIDENT_PER_GPU)
        self._first = {
            gpu: tuple(self.models[(RESIDENT_PER_GPU * number + slot) % num_in] for slot in slots)
            for number, gpu in enumerate(self.gpus)
        }
        self._where: dict[str, dict[str, None]] = {model: {} for model in self.models}
        for model in self.models:
            decide(self.state, DeploymentAdded(ModelSpec(model, f"/models/{model}")), self._now)
        for gpu in self.gpus:
            self._report(gpu)

    def round(self) -> float:
        """A round of requests. Returns the mean cost of a request event, in seconds."""
        one = Round()
        swapped = set(self._rng.sample(range(NUM_REQUESTS), NUM_SWAPPED))
        for number in range(NUM_REQUESTS):
            self._now += STEP_S
            if number in swapped:
                self._cold_request(one)
            else:
                self._warm_request(one)
            if len(self._running) > len(self.gpus):
                self._end_one(one)
        while self._running:
            self._end_one(one)
        self.rounds.append(one)
        self._settle()
        return one.request_s

    # -- requests --------------------------------------------------------------------------

    def _warm_request(self, one: Round) -> None:
        model = self._model_that_is(resident=True)
        request_id = self._next_id()
        demand = Demand(request_id, model, "interactive", self._now, _tenant(request_id))
        self._tell(demand, one.warm["Demand"])
        self._start(one, request_id, model)

    def _cold_request(self, one: Round) -> None:
        model = self._model_that_is(resident=False)
        request_id = self._next_id()
        demand = Demand(request_id, model, "interactive", self._now, _tenant(request_id))
        self._tell(demand, one.deciding)
        self._answer_all(one)
        while not self._where[model]:  # nobody could leave for it
            if self._running:
                self._end_one(one)
            else:
                self._now += 0.1
                self._tell(Tick(), one.ticks)
            self._answer_all(one)
        self._start(one, request_id, model)

    def _model_that_is(self, *, resident: bool) -> str:
        while True:
            if resident:
                gpu = self._rng.choice(self.gpus)
                model = self._rng.choice(self._first[gpu])
            else:
                model = self._rng.choice(self.models)
            if bool(self._where[model]) == resident:
                return model

    def _start(self, one: Round, request_id: str, model: str) -> None:
        gpu = self._rng.choice(list(self._where[model]))
        who = (gpu, model, request_id, self._now)
        started = RequestStarted(*who, 1, 0.0, _tenant(request_id))
        self._tell(started, one.warm["RequestStarted"])
        self._running.append(Running(request_id, gpu, model))

    def _end_one(self, one: Round) -> None:
        ended = self._running.popleft()
        timing = RequestTiming(0.0, 0.05, 0.5)
        who = (ended.gpu, ended.model, ended.request_id, self._now)
        tenant = _tenant(ended.request_id)
        event = RequestEnded(*who, "stop", 100, 50, timing, tenant=tenant)
        self._tell(event, one.warm["RequestEnded"])

    def _next_id(self) -> str:
        self._num_requests += 1
        return f"request-{self._num_requests}"

    def _tell(self, event: Input, cost: Cost) -> None:
        began = time.perf_counter()
        commands = decide(self.state, event, self._now)
        cost.took_s += time.perf_counter() - began
        cost.calls += 1
        self._commands += commands

    # -- agents ----------------------------------------------------------------------------

    def _answer_all(self, one: Round) -> None:
        """Do what is commanded, at once, and say so."""
        while self._commands:
            command = self._commands.popleft()
            gpu, model, generation = command.gpu, command.model, command.generation
            self._generations[gpu, model] = generation
            self._changed[gpu] = None
            self._now += SWAP_S / 10
            trace = SwapTrace(self._now, copy_s=SWAP_S, total_s=SWAP_S, num_bytes=16 * GB)
            event: Input
            if isinstance(command, SwapIn):
                self._where[model][gpu] = None
                event = SwapInCompleted(gpu, model, generation, self._now, trace)
            elif isinstance(command, SwapOut):
                self._where[model].pop(gpu, None)
                suspended = sum((r.gpu, r.model) == (gpu, model) for r in self._running)
                event = SwapOutCompleted(gpu, model, generation, self._now, trace, suspended)
            else:
                raise TypeError(f"nothing is to be registered or loaded: {command}")
            self._tell(event, one.answers)

    def _settle(self) -> None:
        """Every round begins with the same models on the same GPUs."""
        assert not self._commands
        for gpu in self._changed:
            for model in self.models:
                self._where[model].pop(gpu, None)
            self._report(gpu)
        self._changed.clear()
        self.state.take_touched()

    def _report(self, gpu: str) -> None:
        """An account of ``gpu`` with its first models on it, under newer generations."""
        first = self._first[gpu]
        for model in first:
            self._where[model][gpu] = None
        for replica in self.state.agent(gpu).replicas.values():
            generation = max(replica.generation, self._generations.get((gpu, replica.model), 0))
            self._generations[gpu, replica.model] = generation + 1
        status = AgentStatus(
            gpu=gpu,
            instance=gpu,
            worker_pid=1,
            device="cuda",
            device_name="none",
            budget_bytes=BUDGET_BYTES,
            used_bytes=0,
            page_bytes=1,
            replicas=tuple(
                ReplicaStatus(
                    model,
                    "resident" if model in first else "host",
                    self._generations.get((gpu, model), 1),
                    facts=FACTS,
                )
                for model in self.models
            ),
        )
        commands = decide(self.state, status, self._now)
        assert not commands, commands


def _tenant(request_id: str) -> str:
    """One of ten has half of all requests."""
    number = int(request_id.removeprefix("request-"))
    return f"tenant{number % 10 if number % 2 else 0}"


def _mean(costs: Sequence[Cost]) -> float:
    calls = sum(cost.calls for cost in costs)
    return sum(cost.took_s for cost in costs) / calls if calls else math.nan


def _details(bench: Bench, name: str, cluster: Cluster) -> None:
    rounds = cluster.rounds[1:] or cluster.rounds  # the first warmed up
    for kind in rounds[0].warm:
        bench.value(f"{name}: {kind}", _mean([one.warm[kind] for one in rounds]), "s")
    bench.value(f"{name}: Demand that decides", _mean([one.deciding for one in rounds]), "s")
    bench.value(f"{name}: answer to a command", _mean([one.answers for one in rounds]), "s")


def _axis(bench: Bench, points: list[Point], growth: str) -> None:
    """Measure ``points``, the smallest first."""
    clusters = {point.name: Cluster(point) for point in points}
    for cluster in clusters.values():
        cluster.state.validate()
    gc.collect()
    gc.disable()
    try:
        took = bench.round_robin({name: one.round for name, one in clusters.items()})
    finally:
        gc.enable()
    for name, cluster in clusters.items():
        cluster.state.validate()
        bench.value(f"{name}: least", min(took[name].values), "s")
        _details(bench, name, cluster)
        what = f"{name}: a request event"
        bench.target(what, took[name].median, at_most=COST_AT_MOST_S, unit="s")
    first, last = took[points[0].name], took[points[-1].name]
    sizes = [max(p.num_models if growth == "models" else p.num_gpus, 2) for p in points]
    bound = math.log(sizes[-1]) / math.log(sizes[0])
    name = f"growth from {sizes[0]:,} to {sizes[-1]:,} {growth}, of a logarithm's"
    bench.target(name, _ratio(last, first), at_most=round(bound, 2), unit="x")


def _ratio(last: Samples, first: Samples) -> float:
    return last.over(first).median


def main(argv: Sequence[str]) -> int:
    """Run the benchmark. Returns its exit status."""
    if "-h" in argv or "--help" in argv:
        print(__doc__)
    bench = Bench("scheduler", "what a decision costs, and how that grows", argv)
    _axis(bench, [Point(num, MODELS_ON_GPUS) for num in MODELS], "models")
    _axis(bench, [Point(GPUS_WITH_MODELS, num) for num in GPUS], "GPUs")
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
