"""The simulation itself: one heap of events, and `decide` between arrivals and GPUs.

What `decide` is told, and when::

    at the start          an AgentStatus of each GPU, then DeploymentAdded of each model
    at each arrival       Demand
    by the GPUs           their events, at once; its commands arrive ``bus_s`` later
    every ``tick_s``      Tick, but only while somebody waits or something is under way
    after a failure       QueueDepths every second for a while, as the live service asks for them

Heartbeats are off unless ``heartbeat_s`` is given: a status tells of every model, so it costs more
than all else. Agents are then never taken for silent.
"""

import gc
import math
import time
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from heapq import heappop
from typing import Literal

import msgspec

from schemas.commands import Command
from services.scheduler.decide import decide
from services.scheduler.inputs import Demand, DeploymentAdded, Input, QueueDepths, Tick
from services.scheduler.simulate import compute
from services.scheduler.simulate.cost import H100, CostModel
from services.scheduler.simulate.engine import SimReplica
from services.scheduler.simulate.errors import SimulateError
from services.scheduler.simulate.gpu import SimGpu
from services.scheduler.simulate.workload import GB, Workload
from services.scheduler.simulate.world import START_S, ModelQueue, World
from services.scheduler.state import ClusterState, PolicyConfig

DEPTHS_EVERY_S = 1.0
DEPTHS_FOR_S = 60.0  # after a failure
PROGRESS_EVERY = 1000  # requests


class Gpus(msgspec.Struct, frozen=True):
    """How many, and the memory of each that models may use."""

    count: int
    memory_bytes: int = 74 * GB


class Failure(msgspec.Struct, frozen=True):
    """The agent process or the engine worker of a GPU (0, 1, ...) dies at ``at_s``."""

    at_s: float
    gpu: int
    what: Literal["agent", "worker"]


class Options(msgspec.Struct, frozen=True):
    """How to run it. ``_s``: seconds."""

    tick_s: float = 0.1
    bus_s: float = 0.001  # from `decide` to the agent
    heartbeat_s: float = 0.0  # 0: none
    patience_s: float = 3600.0  # after the last arrival; what has not ended then never does
    validate_every: int = 0  # calls of `decide` between checks of all invariants; 0: never
    time_decide: bool = False  # which costs time itself
    failures: tuple[Failure, ...] = ()


class Result(msgspec.Struct, frozen=True):
    """What came of it. Arrays go by request; nan: it never came to that."""

    workload: str
    gpus: Gpus
    ttft_s: "array[float]"  # from arrival to first token
    tpot_s: "array[float]"  # per further token; 0 where there is one only
    num_failed: int  # requests that did not end
    num_swap_ins: int
    num_preemptions: int
    num_called_off: int
    bytes_moved: int  # of weights, host -> device
    commands: dict[str, int]
    inputs: dict[str, int]  # calls of `decide`, by kind of input
    decide_s: dict[str, float]  # the same in seconds; empty unless asked for
    simulated_s: float
    took_s: float
    tenants: tuple[str, ...] = ()  # of each request; empty: the workload names none


Listener = Callable[[Input, float, list[Command]], None]


def simulate(
    workload: Workload,
    gpus: Gpus,
    cost: CostModel = H100,
    config: PolicyConfig | None = None,
    options: Options | None = None,
    *,
    on_progress: Callable[[float], None] | None = None,
    listen: Listener | None = None,
) -> Result:
    """Run ``workload`` to its end. ``on_progress``: is told the share of requests that came.

    ``listen`` sees every input, its time and what `decide` answered. Raises SimulateError where
    it can not be run at all.
    """
    run = Simulation(workload, gpus, cost, config or PolicyConfig(), options or Options())
    run.listen = listen
    collects = gc.isenabled()
    gc.disable()  # many objects, no cycles
    try:
        return run.run(on_progress)
    finally:
        if collects:
            gc.enable()


class Simulation:
    """One run. Tests reach into its ``gpus``, ``world`` and ``state``."""

    def __init__(
        self,
        workload: Workload,
        gpus: Gpus,
        cost: CostModel,
        config: PolicyConfig,
        options: Options,
    ) -> None:
        _check(workload, gpus, options)
        if not options.heartbeat_s:
            config = msgspec.structs.replace(config, agent_silent_s=math.inf)
        self.workload = workload
        self.options = options
        self.listen: Listener | None = None
        self.state = ClusterState(epoch=1, config=config)
        self.world = World({m: ModelQueue(m, size) for m, size in workload.models.items()})
        self.world.tell = self._tell
        self.world.end_of = self._note_end
        self.gpus = {
            name: SimGpu(self.world, name, gpus.memory_bytes, cost)
            for name in (f"gpu{number}" for number in range(gpus.count))
        }
        self._sizes = gpus
        self._cost = cost
        self._num_open = 0
        self._num_inputs = 0
        self._is_ticking = False
        self._depths_until_s = -math.inf
        self._inputs: Counter[type[Input]] = Counter()
        self._commands: Counter[type[Command]] = Counter()
        self._decide_s: dict[type[Input], float] = {}
        num = len(workload.requests)
        self.ttft_s = array("d", [math.nan]) * num
        self.tpot_s = array("d", [math.nan]) * num
        if config.eviction == "belady":
            self.state.next_use = next_use(workload)

    def run(self, on_progress: Callable[[float], None] | None = None) -> Result:
        """All of it, up to the last end."""
        began = time.perf_counter()
        self._begin()
        world, requests = self.world, self.workload.requests
        heap = world.heap
        arrived, num = 0, len(requests)
        next_s = START_S + requests[0].at_s if requests else math.inf
        stop_s = START_S + self.workload.duration_s + self.options.patience_s
        while self._num_open or arrived < num:
            if heap and heap[0][0] <= next_s:
                world.now, _, callback, what = heappop(heap)
                if world.now > stop_s:
                    break
                callback(what)
            else:
                world.now = next_s
                self._arrive(arrived)
                arrived += 1
                next_s = START_S + requests[arrived].at_s if arrived < num else math.inf
                if on_progress and arrived % PROGRESS_EVERY == 0:
                    on_progress(arrived / num)
            if not self._is_ticking and self._needs_ticks():
                self._is_ticking = True
                world.schedule(world.now + self.options.tick_s, self._tick, None)
        if on_progress:
            on_progress(1.0)
        return self._result(time.perf_counter() - began)

    def _begin(self) -> None:
        world, options = self.world, self.options
        world.now = START_S
        for gpu in self.gpus.values():
            gpu.report()
            if options.heartbeat_s:
                world.schedule(START_S + options.heartbeat_s, gpu.heartbeat, options.heartbeat_s)
        for queue in world.queues.values():
            self._tell(DeploymentAdded(queue.spec))
        for failure in options.failures:
            world.schedule(START_S + failure.at_s, self._fail, failure)

    # -- between `decide` and the rest -----------------------------------------------------

    def _tell(self, event: Input) -> None:
        now = self.world.now
        kind = type(event)
        self._inputs[kind] += 1
        if self.options.time_decide:
            began = time.perf_counter()
            commands = decide(self.state, event, now)
            took_s = time.perf_counter() - began
            self._decide_s[kind] = self._decide_s.get(kind, 0.0) + took_s
        else:
            commands = decide(self.state, event, now)
        for command in commands:
            self._commands[type(command)] += 1
            self.world.num_moving += 1
            arrives_s = now + self.options.bus_s
            self.world.schedule(arrives_s, self.gpus[command.gpu].accept, command)
        if self.listen:
            self.listen(event, now, commands)
        if self.options.validate_every:
            self._num_inputs += 1
            if self._num_inputs % self.options.validate_every == 0:
                self.state.validate()

    def _needs_ticks(self) -> bool:
        """Whether time alone may change what `decide` wants: not in an idle cluster."""
        world = self.world
        return bool(
            world.num_queued
            or world.num_suspended
            or world.num_moving
            or world.now < self._depths_until_s
            or self.state.config.prefetch
        )

    def _tick(self, _what: None) -> None:
        self._is_ticking = False
        if self._needs_ticks():
            self._tell(Tick())
        if self.options.validate_every:
            for gpu in self.gpus.values():
                gpu.validate()

    def _arrive(self, index: int) -> None:
        request, world = self.workload.requests[index], self.world
        queue = world.queues[request.model]
        name = str(index)
        _, _, num_in, num_out, tenant = request
        queue.waiting.append(compute.Sequence(index, name, world.now, num_in, num_out, tenant))
        queue.num_open += 1
        self._num_open += 1
        world.num_queued += 1
        self._tell(Demand(name, request.model, "interactive", world.now, tenant))
        if queue.servers and len(queue.waiting) == 1:
            servers: list[SimReplica] = queue.servers
            if len(servers) > 1:
                servers = sorted(servers, key=lambda replica: len(replica.rows))
            for replica in servers:
                if replica.engine.may_start(replica, queue.waiting[0]):
                    replica.engine.start_now(replica)
                    break

    def _note_end(self, sequence: compute.Sequence, model: str) -> None:
        self._num_open -= 1
        self.world.queues[model].num_open -= 1
        index = sequence.index
        self.ttft_s[index] = sequence.first_s - sequence.at_s + self._cost.request_s
        further = sequence.output_tokens - 1
        decode_s = self.world.now - sequence.first_s
        self.tpot_s[index] = decode_s / further if further > 0 else 0.0

    # -- failures --------------------------------------------------------------------------

    def _fail(self, failure: Failure) -> None:
        gpu = self.gpus[f"gpu{failure.gpu}"]
        if failure.what == "agent":
            gpu.die()
        else:
            gpu.kill_worker()
        was_asking = self.world.now < self._depths_until_s
        self._depths_until_s = self.world.now + DEPTHS_FOR_S
        if not was_asking:
            self.world.schedule(self.world.now + DEPTHS_EVERY_S, self._ask_depths, None)

    def _ask_depths(self, _what: None) -> None:
        depths = {m: queue.num_open for m, queue in self.world.queues.items() if queue.num_open}
        self._tell(QueueDepths(depths, self.world.now))
        if self.world.now < self._depths_until_s:
            self.world.schedule(self.world.now + DEPTHS_EVERY_S, self._ask_depths, None)

    # -- the end ---------------------------------------------------------------------------

    def _result(self, took_s: float) -> Result:
        counts = self.world.counts
        return Result(
            workload=self.workload.name,
            gpus=self._sizes,
            ttft_s=self.ttft_s,
            tpot_s=self.tpot_s,
            num_failed=sum(map(math.isnan, self.ttft_s)),
            num_swap_ins=counts.num_swap_ins,
            num_preemptions=counts.num_preemptions,
            num_called_off=counts.num_called_off,
            bytes_moved=counts.bytes_moved,
            commands={kind.__name__: num for kind, num in self._commands.items()},
            inputs={kind.__name__: num for kind, num in self._inputs.items()},
            decide_s={kind.__name__: took for kind, took in self._decide_s.items()},
            simulated_s=self.world.now - START_S,
            took_s=took_s,
            tenants=self.workload.tenants(),
        )


def next_use(workload: Workload) -> Callable[[str, float], float]:
    """(model, now) -> when its next request comes; inf: never again. What Belady's rule knows."""
    arrivals: dict[str, array[float]] = {model: array("d") for model in workload.models}
    for request in workload.requests:
        arrivals[request.model].append(START_S + request.at_s)

    def ask(model: str, now: float) -> float:
        times = arrivals[model]
        index = bisect_right(times, now)
        return times[index] if index < len(times) else math.inf

    return ask


def _check(workload: Workload, gpus: Gpus, options: Options) -> None:
    if gpus.count < 1:
        raise SimulateError(f"{gpus.count} GPUs are none: give at least 1")
    if options.tick_s <= 0:
        raise SimulateError(f"tick_s = {options.tick_s} must be greater than 0")
    for model, size in workload.models.items():
        if size.weight_bytes + size.kv_bytes > gpus.memory_bytes:
            raise SimulateError(
                f"{workload.name}: {model} needs {(size.weight_bytes + size.kv_bytes) / GB:.1f} GB "
                f"({size.weight_bytes / GB:.1f} weights + {size.kv_bytes / GB:.1f} KV), "
                f"a GPU has {gpus.memory_bytes / GB:.1f}"
            )
    for failure in options.failures:
        if not 0 <= failure.gpu < gpus.count:
            raise SimulateError(f"{failure}: there are {gpus.count} GPUs, from 0 on")
