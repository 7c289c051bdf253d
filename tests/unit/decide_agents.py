"""Agents for random walks: they keep their own books of device memory, and die when told to.

A `FakeAgent` is the independent count: a SwapIn that does not fit there fails the test.
"""

from dataclasses import dataclass, field

from schemas.commands import Command, Load, Register, SwapIn, SwapOut
from schemas.events import (
    AgentStopped,
    CommandFailed,
    CommandRejected,
    Event,
    ModelLoaded,
    ModelRegistered,
    SwapInCompleted,
    SwapOutCompleted,
    WorkerDied,
)
from schemas.state import (
    AgentStatus,
    ModelFacts,
    ReplicaState,
    ReplicaStatus,
    SwapTrace,
)
from services.scheduler.lifecycle import DEVICE_STATES, CommandKind

SIZES = {"a": 60, "b": 60, "c": 30, "d": 30, "e": 90}  # model -> MiB
KINDS: dict[type[Command], CommandKind] = {
    Register: "register",
    Load: "load",
    SwapIn: "swap_in",
    SwapOut: "swap_out",
}


def facts(num_bytes: int) -> ModelFacts:
    return ModelFacts("Llama", "float32", 1, num_bytes - 10, 10, 2048, 8)


@dataclass
class FakeReplica:
    state: ReplicaState = "cold"
    generation: int = 0
    facts: ModelFacts | None = None
    running: list[str] = field(default_factory=list)


class FakeAgent:
    """What an agent is to the scheduler: takes commands, answers, and may die."""

    def __init__(self, gpu: str, budget_bytes: int) -> None:
        self.gpu = gpu
        self.budget_bytes = budget_bytes
        self.num_instances = 1
        self.worker_pid = 1
        self.replicas: dict[str, FakeReplica] = {}
        self.inbox: list[Command] = []
        self.events: list[Event] = []
        self.statuses: list[tuple[float, AgentStatus]] = []

    @property
    def instance(self) -> str:
        return f"{self.gpu}-{self.num_instances}"

    @property
    def used_bytes(self) -> int:
        return sum(
            r.facts.footprint_bytes
            for r in self.replicas.values()
            if r.facts and r.state in DEVICE_STATES
        )

    def report(self, now: float) -> None:
        replicas = tuple(
            ReplicaStatus(model, r.state, r.generation, len(r.running), r.facts)
            for model, r in self.replicas.items()
        )
        status = AgentStatus(
            gpu=self.gpu,
            instance=self.instance,
            worker_pid=self.worker_pid,
            device="cpu",
            device_name="fake",
            budget_bytes=self.budget_bytes if self.worker_pid else 0,
            used_bytes=self.used_bytes,
            page_bytes=1,
            replicas=replicas,
        )
        self.statuses.append((now, status))

    def accept(self, now: float) -> None:
        """Take the next command from the inbox."""
        command = self.inbox.pop(0)
        replica = self.replicas.setdefault(command.model, FakeReplica())
        where = (self.gpu, command.model, command.generation, now)
        kind = KINDS[type(command)]
        if command.generation == replica.generation:
            return
        if command.generation < replica.generation:
            self.events.append(CommandRejected(*where, kind, "older than the newest"))
            return
        state = replica.state
        match command:
            case Register():
                size = SIZES.get(command.model, 1000)
                replica.facts = replica.facts or facts(size)
                if state == "failed":
                    replica.state = "cold"
                self.events.append(ModelRegistered(*where, replica.facts))
            case Load() if state in ("cold", "loading") and replica.facts:
                replica.state = "loading"
            case Load() if state != "failed" and replica.facts:
                self.events.append(ModelLoaded(*where, 1, 0.1))
            case SwapIn() if state == "host" and replica.facts:
                need = self.used_bytes + replica.facts.footprint_bytes
                assert need <= self.budget_bytes, f"{self.gpu} over-committed by {command}"
                replica.state = "swapping_in"
            case SwapIn() if state == "swapping_in":
                pass
            case SwapIn() if state == "resident":
                self.events.append(SwapInCompleted(*where, SwapTrace(now)))
            case SwapOut() if state in ("resident", "draining"):
                replica.state = "draining"
            case SwapOut() if state == "host":
                self.events.append(SwapOutCompleted(*where, SwapTrace(now)))
            case _:
                self.events.append(CommandRejected(*where, kind, f"is {state}"))
                return
        replica.generation = command.generation
        self.report(now)

    def advance(self, model: str, now: float, succeed: bool = True) -> None:
        """Finish what ``model`` is at."""
        replica = self.replicas[model]
        where = (self.gpu, model, replica.generation, now)
        if replica.state == "loading" and succeed:
            replica.state = "host"
            self.events.append(ModelLoaded(*where, 1, 0.1))
        elif replica.state == "swapping_in" and succeed:
            replica.state = "resident"
            self.events.append(SwapInCompleted(*where, SwapTrace(now)))
        elif replica.state in ("loading", "swapping_in"):
            kind: CommandKind = "load" if replica.state == "loading" else "swap_in"
            replica.state = "failed"
            self.events.append(CommandFailed(*where, kind, "no luck"))
        elif replica.state == "draining" and not replica.running:
            replica.state = "swapping_out"
        elif replica.state == "swapping_out" and succeed:
            replica.state = "host"
            self.events.append(SwapOutCompleted(*where, SwapTrace(now)))
        elif replica.state == "swapping_out":
            replica.state = "resident"
            self.events.append(CommandFailed(*where, "swap_out", "no luck"))
        else:
            return
        self.report(now)

    def lose_worker(self, now: float) -> None:
        next_pid = self.worker_pid + 1
        self.worker_pid = 0
        for replica in self.replicas.values():
            replica.state = "cold"
            replica.running.clear()
        self.events.append(WorkerDied(self.gpu, now, "killed"))
        self.report(now)
        self.worker_pid = next_pid
        self.report(now)

    def restart(self, now: float, in_order: bool) -> None:
        if in_order:
            self.events.append(AgentStopped(self.gpu, self.instance, now))
        self.num_instances += 1
        self.worker_pid += 1
        self.replicas.clear()
        self.report(now)
