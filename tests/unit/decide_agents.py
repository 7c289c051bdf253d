"""Agents for random walks: they keep their own books of memory, and die when told to.

A `FakeAgent` is the independent count: a SwapIn that does not fit there fails the test. It plays
pipelined swap-ins (requests start while the bytes arrive), swap-ins that are called off, requests
that are suspended, host images that make room for others, and weights that turn out damaged.
"""

from dataclasses import dataclass, field

from schemas.commands import Command, Load, Register, SwapIn, SwapOut, Unload
from schemas.events import (
    AgentStopped,
    CommandFailed,
    CommandRejected,
    Event,
    ModelLoaded,
    ModelRegistered,
    ModelUnloaded,
    SwapInCancelled,
    SwapInCompleted,
    SwapOutCompleted,
    VerificationFailed,
    WorkerDied,
)
from schemas.names import RequestClass
from schemas.state import (
    AgentStatus,
    ModelFacts,
    ReplicaState,
    ReplicaStatus,
    SwapTrace,
)
from services.scheduler.lifecycle import DEVICE_STATES, IMAGE_STATES, CommandKind

SIZES = {"a": 60, "b": 60, "c": 30, "d": 30, "e": 90}  # model -> MiB
UNINTERRUPTED = ("d",)
KINDS: dict[type[Command], CommandKind] = {
    Register: "register",
    Load: "load",
    SwapIn: "swap_in",
    SwapOut: "swap_out",
    Unload: "unload",
}


def facts(num_bytes: int) -> ModelFacts:
    return ModelFacts("Llama", "float32", 1, num_bytes - 10, 10, 2048, 8)


@dataclass
class FakeReplica:
    state: ReplicaState = "cold"
    generation: int = 0
    facts: ModelFacts | None = None
    running: list[str] = field(default_factory=list)  # suspended where it is not on the device
    may_preempt: bool = True
    is_arriving: bool = False  # bytes of a swap-in are still on their way
    used_at: float = 0.0
    settings: str = ""  # fingerprint of what it was registered with

    @property
    def may_start(self) -> bool:
        return self.state in ("swapping_in", "resident")

    @property
    def may_compute(self) -> bool:
        return self.state in ("resident", "draining") and not self.is_arriving

    @property
    def num_suspended(self) -> int:
        return len(self.running) if self.state == "host" else 0

    @property
    def weight_bytes(self) -> int:
        return self.facts.weight_bytes if self.facts else 0


def klass_of(request_id: str) -> RequestClass:
    """Every seventh request is one of class batch."""
    return "batch" if int(request_id.removeprefix("r")) % 7 == 0 else "interactive"


class FakeAgent:
    """What an agent is to the scheduler: takes commands, answers, and may die."""

    def __init__(self, gpu: str, budget_bytes: int, host_budget_bytes: int = 0) -> None:
        self.gpu = gpu
        self.budget_bytes = budget_bytes
        self.host_budget_bytes = host_budget_bytes  # 0: no limit
        self.num_instances = 1
        self.worker_pid = 1
        self.replicas: dict[str, FakeReplica] = {}
        self.inbox: list[Command] = []
        self.events: list[Event] = []
        self.ended: list[str] = []  # requests that were ended because a command said so
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

    @property
    def host_used_bytes(self) -> int:
        return sum(r.weight_bytes for r in self.replicas.values() if r.state in IMAGE_STATES)

    def report(self, now: float) -> None:
        replicas = tuple(
            ReplicaStatus(
                model,
                r.state,
                r.generation,
                len(r.running),
                r.facts,
                batch_in_flight=sum(klass_of(one) == "batch" for one in r.running),
                settings=r.settings,
            )
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
            host_budget_bytes=self.host_budget_bytes if self.worker_pid else 0,
            host_used_bytes=self.host_used_bytes,
        )
        self.statuses.append((now, status))

    def accept(self, now: float) -> None:
        """Take the next command from the inbox."""
        command = self.inbox.pop(0)
        if isinstance(command, Unload) and command.model not in self.replicas:
            who = (self.gpu, command.model, command.generation, now)
            self.events.append(ModelUnloaded(*who, 0))
            return
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
                if state in ("cold", "failed"):
                    replica.settings = command.settings
                replica.facts = replica.facts or facts(size)
                replica.may_preempt = command.model not in UNINTERRUPTED
                if state == "failed":
                    replica.state = "cold"
                self.events.append(ModelRegistered(*where, replica.facts))
            case Load() if state == "cold" and replica.facts:
                replica.state = "loading"
                if not self._make_room(now):
                    replica.state = "failed"
                    self.events.append(CommandFailed(*where, kind, "no room in host memory"))
            case Load() if state == "loading":
                pass
            case Load() if state != "failed" and replica.facts:
                self.events.append(ModelLoaded(*where, 1, 0.1))
            case SwapIn() if state == "host" and replica.facts:
                need = self.used_bytes + replica.facts.footprint_bytes
                assert need <= self.budget_bytes, f"{self.gpu} over-committed by {command}"
                replica.state = "swapping_in"
                replica.is_arriving = True
            case SwapIn() if state == "swapping_in":
                pass
            case SwapIn() if state == "resident":
                self.events.append(SwapInCompleted(*where, SwapTrace(now)))
            case SwapOut() if state in ("swapping_in", "resident", "draining"):
                assert replica.may_preempt or not command.preempt
                if command.end_requests:
                    self.ended += replica.running
                    replica.running.clear()
                replica.state = "swapping_out" if command.preempt else "draining"
            case SwapOut() if state == "swapping_out":
                pass
            case SwapOut() if state == "host":
                trace, num = SwapTrace(now), replica.num_suspended
                self.events.append(SwapOutCompleted(*where, trace, num))
            case Unload() if state in ("host", "cold", "failed"):
                self.ended += replica.running if command.end_requests else []
                del self.replicas[command.model]
                held = replica.weight_bytes if state == "host" else 0
                self.events.append(ModelUnloaded(*where, held))
            case _:
                self.events.append(CommandRejected(*where, kind, f"is {state}"))
                return
        replica.generation = command.generation
        self.report(now)

    def _make_room(self, now: float) -> bool:
        """Drop host images, least recently used first, until the budget is kept."""
        idle = [(r.used_at, model) for model, r in self.replicas.items() if r.state == "host"]
        for _, model in sorted(idle):
            if self.host_used_bytes <= self.host_budget_bytes:
                break
            replica = self.replicas[model]
            replica.state = "cold"
            replica.running.clear()  # back to the queue, where they were suspended
            where = (self.gpu, model, replica.generation, now)
            self.events.append(ModelUnloaded(*where, replica.weight_bytes))
        return not self.host_budget_bytes or self.host_used_bytes <= self.host_budget_bytes

    def corrupt(self, model: str, now: float) -> None:
        """A check finds the weights of ``model`` damaged; its requests go back to the queue."""
        replica = self.replicas[model]
        if not replica.may_start and not replica.num_suspended:
            return
        where = (self.gpu, model, replica.generation, now)
        self.events.append(VerificationFailed(*where, "page", "page 3 of 7 differs"))
        if replica.state == "swapping_in":
            self.events.append(CommandFailed(*where, "swap_in", "page 3 of 7 differs"))
        replica.state = "failed"
        replica.is_arriving = False
        replica.running.clear()
        self.report(now)

    def advance(self, model: str, now: float, succeed: bool = True) -> None:
        """Finish what ``model`` is at."""
        replica = self.replicas[model]
        where = (self.gpu, model, replica.generation, now)
        if replica.state == "loading" and succeed:
            replica.state = "host"
            replica.used_at = now
            self.events.append(ModelLoaded(*where, 1, 0.1))
        elif replica.state == "loading":
            replica.state = "failed"
            self.events.append(CommandFailed(*where, "load", "no luck"))
        elif replica.state == "swapping_in" and succeed:
            replica.state = "resident"
            replica.is_arriving = False
            self.events.append(SwapInCompleted(*where, SwapTrace(now)))
        elif replica.state == "swapping_in" and not replica.running:
            replica.state = "host"  # a copy that broke changed nothing
            replica.is_arriving = False
            self.events.append(CommandFailed(*where, "swap_in", "no luck"))
        elif replica.state == "swapping_in":
            self.corrupt(model, now)
        elif replica.state == "draining" and not replica.running:
            replica.state = "swapping_out"
        elif replica.state == "draining" and replica.is_arriving:
            replica.is_arriving = False  # called off too late: it is there, and its requests run
        elif replica.state == "swapping_out" and (succeed or replica.is_arriving):
            replica.state = "host"
            replica.used_at = now
            if replica.is_arriving:
                self.events.append(SwapInCancelled(*where, SwapTrace(now)))
                replica.is_arriving = False
            num = replica.num_suspended
            self.events.append(SwapOutCompleted(*where, SwapTrace(now), num))
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
            replica.is_arriving = False
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
