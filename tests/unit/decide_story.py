"""A readable way to tell `decide` what happened and to name what it commands.

Sizes are MiB. A `Story` answers nothing by itself: each test says what agents report.
`validate` runs after every input. What `tell` returns is without the times that a SwapIn
carries for its trace; `Story.commands` has all of it. `Story.decided` takes what was noted to be
told since it was asked last.
"""

from typing import Literal

import msgspec

from schemas.commands import Command, Register, SwapIn
from schemas.events import (
    CommandFailed,
    DecisionMade,
    ModelLoaded,
    ModelRegistered,
    ModelUnloaded,
    RequestEnded,
    RequestStarted,
    RequestWithdrawn,
    SwapInCompleted,
    SwapOutCompleted,
)
from schemas.state import (
    AgentStatus,
    ModelFacts,
    ModelSpec,
    Preemption,
    ReplicaState,
    ReplicaStatus,
    SwapTrace,
)
from schemas.stream import RequestTiming
from services.scheduler.decide import decide
from services.scheduler.inputs import (
    Demand,
    DeploymentAdded,
    Input,
    Tick,
)
from services.scheduler.lifecycle import CommandKind
from services.scheduler.replica import Replica
from services.scheduler.state import MIB, ClusterState

EPOCH = 3
GPU = "gpu0"


def spec(model: str, preload: bool = False, preemption: Preemption = "preserve") -> ModelSpec:
    return ModelSpec(model, f"/models/{model}", preload=preload, preemption=preemption)


def register(model: str, generation: int, wanted: ModelSpec | None = None) -> Register:
    """What is commanded for ``wanted``, or for `spec`."""
    wanted = wanted or spec(model)
    return Register(GPU, model, EPOCH, generation, wanted.for_agents(), wanted.fingerprint())


def facts(weights: int, kv: int = 0) -> ModelFacts:
    return ModelFacts("Llama", "bfloat16", 1, weights * MIB, kv * MIB, 2048, 8)


class Story:
    def __init__(self) -> None:
        self.state = ClusterState(EPOCH)
        self.now = 1000.0
        self.commands: list[Command] = []

    def tell(self, event: Input, after: float = 0.0) -> list[Command]:
        self.now += after
        commands = decide(self.state, event, self.now)
        self.state.validate()
        self.commands += commands
        return [_without_times(command) for command in commands]

    def decided(self) -> list[DecisionMade]:
        return self.state.decisions.take()

    def replica(self, model: str, gpu: str = GPU) -> Replica:
        return self.state.agents[gpu].replicas[model]

    # -- what may be told ------------------------------------------------------------------

    def tick(self, after: float = 0.0) -> list[Command]:
        """Time passes, and healthy agents were heard meanwhile."""
        for agent in self.state.agents.values():
            agent.seen_at = self.now + after
        return self.tell(Tick(), after)

    def status(
        self,
        *replicas: ReplicaStatus,
        gpu: str = GPU,
        budget: int = 100,
        instance: str = "i1",
        pid: int = 10,
        host_budget: int = 0,
        host_used: int = 0,
    ) -> list[Command]:
        return self.tell(
            AgentStatus(gpu, instance, pid, "cpu", "cpu", budget * MIB, 0, 1, replicas,
                        host_budget * MIB, host_used * MIB)
        )  # fmt: skip

    def demand(
        self, request_id: str, model: str, at: float | None = None, tenant: str = ""
    ) -> list[Command]:
        at = self.now if at is None else at
        return self.tell(Demand(request_id, model, "interactive", at, tenant))

    def registered(self, model: str, size: int, generation: int = 1) -> list[Command]:
        return self.tell(ModelRegistered(GPU, model, generation, self.now, facts(size)))

    def loaded(self, model: str, generation: int) -> list[Command]:
        return self.tell(ModelLoaded(GPU, model, generation, self.now, 1, 0.1))

    def unloaded(self, model: str, generation: int, size: int = 1) -> list[Command]:
        return self.tell(ModelUnloaded(GPU, model, generation, self.now, size * MIB))

    def swapped_in(self, model: str, generation: int, swap_s: float = 0.0) -> list[Command]:
        trace = SwapTrace(0.0, total_s=swap_s)
        return self.tell(SwapInCompleted(GPU, model, generation, self.now, trace))

    def swapped_out(self, model: str, generation: int, num_suspended: int = 0) -> list[Command]:
        trace = SwapTrace(0.0)
        return self.tell(SwapOutCompleted(GPU, model, generation, self.now, trace, num_suspended))

    def failed(self, model: str, generation: int, kind: CommandKind) -> list[Command]:
        return self.tell(CommandFailed(GPU, model, generation, self.now, kind, f"{kind} broke"))

    def started(self, request_id: str, model: str, tenant: str = "") -> list[Command]:
        return self.tell(RequestStarted(GPU, model, request_id, self.now, 1, 0.0, tenant))

    def ended(
        self,
        request_id: str,
        model: str,
        outcome: Literal["stop", "cancelled"] = "stop",
        tenant: str = "",
        took_s: float = 0.0,
    ) -> list[Command]:
        who = (GPU, model, request_id, self.now)
        timing = RequestTiming(decode_s=took_s)
        return self.tell(RequestEnded(*who, outcome, 1, 1, timing, tenant=tenant))

    def withdrawn(self, request_id: str, model: str) -> list[Command]:
        return self.tell(RequestWithdrawn(model, request_id, self.now, "client_left"))


def _without_times(command: Command) -> Command:
    if isinstance(command, SwapIn):
        return msgspec.structs.replace(command, waiting_since=0.0, decided_at=0.0)
    return command


def on(model: str, state: ReplicaState, size: int, generation: int = 1, in_flight: int = 0,
       reason: str = "") -> ReplicaStatus:  # fmt: skip
    return ReplicaStatus(model, state, generation, in_flight, facts(size), reason)


def running(*replicas: ReplicaStatus, budget: int = 100, host_budget: int = 0) -> Story:
    """An agent with these replicas, their deployments known."""
    story = Story()
    for replica in replicas:
        story.tell(DeploymentAdded(spec(replica.model)))
    assert story.status(*replicas, budget=budget, host_budget=host_budget) == []
    return story
