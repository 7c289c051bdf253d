"""What the scheduler believes about one GPU: its agent, and the replicas there.

The bytes of one device (`Agent`)::

    |<------------------------------ budget_bytes ------------------------------>|
    | resident, swapping_in         | draining, swapping_out |        free       |
    |<------------------ reserved_bytes -------------------->|<--- free_bytes -->|
                                    |<--- leaving_bytes ---->|

A replica's footprint is reserved from the moment its SwapIn is commanded until its
SwapOutCompleted is seen. What a swapped-out model left behind on the device (`cached_bytes`) is
free: its pages are taken when they are needed.

A replica in state ``host`` with requests in flight has *suspended* requests: they were preempted,
wait at its agent, and can go on nowhere else (`services.scheduler.turns`).

Host memory is the agent's to manage: past ``host_budget_bytes`` it drops the least recently used
image that is not in use.
"""

from collections import deque
from dataclasses import dataclass
from typing import Literal

from schemas.state import ModelFacts, ReplicaState
from services.scheduler.lifecycle import (
    DEVICE_STATES,
    IMAGE_STATES,
    LEAVING_STATES,
    PENDING_STATES,
    CommandKind,
    Lifecycle,
    PathKind,
)

NUM_PAST_INSTANCES = 16


@dataclass(slots=True)
class Pending:
    """A command that has no answer yet. What it said is kept, to say it again."""

    kind: CommandKind
    request_id: str
    sent_at: float
    seen_at: float  # when the agent last showed that it is at it
    waiting_since: float = 0.0  # of a swap-in
    decided_at: float = 0.0  # likewise
    preempt: bool = False  # of a swap-out


@dataclass(slots=True)
class Failure:
    """Why a replica does not work, and when to try again.

    ``is_visible``: no later success suggests that it works now; users are told the reason.
    """

    command: CommandKind
    reason: str
    num_failures: int
    retry_at: float
    is_visible: bool = True


class Replica:
    """One deployment on one GPU, as believed."""

    __slots__ = (
        "believe_at",
        "cached_bytes",
        "decided_at",
        "facts",
        "failure",
        "floor",
        "generation",
        "gpu",
        "host_since",
        "in_flight",
        "last_kind",
        "last_used",
        "life",
        "may_stray",
        "model",
        "pending",
        "resident_since",
        "swap_s",
    )

    def __init__(self, gpu: str, model: str) -> None:
        self.gpu = gpu
        self.model = model
        self.life = Lifecycle(f"{gpu}/{model}")
        self.generation = 0  # of the last command; grows only
        self.floor = 0  # a status or event below this generation is about the past
        self.facts: ModelFacts | None = None  # None: not registered
        self.in_flight = 0
        self.cached_bytes = 0  # of its weights, on the device though swapped out, as last reported
        self.pending: Pending | None = None
        self.last_kind: PathKind | None = None  # what the state is the outcome of
        self.may_stray = False  # a command to an instance that ended may yet reach the next one
        self.failure: Failure | None = None
        self.last_used = 0.0
        self.resident_since = 0.0
        self.host_since = (
            0.0  # when it was loaded or swapped out; its suspended requests wait since
        )
        self.decided_at = (
            0.0  # first command to bring those back; before that, that for earlier ones
        )
        self.swap_s = 0.0  # what its last swap-in took; 0: unknown
        self.believe_at: float | None = None  # set: the agent disagrees; from then on it is right

    @property
    def state(self) -> ReplicaState:
        return self.life.state

    @property
    def footprint_bytes(self) -> int:
        return self.facts.footprint_bytes if self.facts else 0

    @property
    def device_bytes(self) -> int:
        """Bytes counted against the budget now."""
        return self.footprint_bytes if self.state in DEVICE_STATES else 0

    @property
    def image_bytes(self) -> int:
        """Bytes of host memory that its image takes now."""
        return self.weight_bytes if self.state in IMAGE_STATES else 0

    @property
    def weight_bytes(self) -> int:
        return self.facts.weight_bytes if self.facts else 0

    @property
    def serves(self) -> bool:
        """Resident or about to be: waiters of its model need no decision."""
        return self.state in ("resident", "swapping_in")

    @property
    def is_suspended(self) -> bool:
        """Its requests were preempted, and wait here for its next swap-in."""
        return self.state == "host" and self.in_flight > 0

    @property
    def is_suspending(self) -> bool:
        """On its way out with its requests. An agent that drains one first gets no further than
        ``draining`` with requests, so this can be told without having commanded it.
        """
        if self.in_flight == 0:
            return False
        preempts = self.pending is not None and self.pending.preempt
        return self.state == "swapping_out" or (self.state == "draining" and preempts)

    @property
    def is_settled(self) -> bool:
        """Nothing is pending and agent and scheduler agree: it may be commanded."""
        return self.pending is None and self.believe_at is None

    @property
    def is_broken(self) -> bool:
        """Users are told that it failed, so nobody asks for it."""
        return self.failure is not None and self.failure.is_visible

    @property
    def desired(self) -> Literal["resident", "host", "cold"]:
        """What the commands so far aim at (`schemas.state.PlacementRecord.desired`)."""
        if self.state in ("swapping_in", "resident"):
            return "resident"
        return "cold" if self.state in ("cold", "failed") else "host"


class Agent:
    """One GPU's agent and its replicas."""

    def __init__(self, gpu: str) -> None:
        self.gpu = gpu
        self.instance = ""
        self.past_instances: deque[str] = deque(maxlen=NUM_PAST_INSTANCES)  # never come back
        self.is_alive = False
        self.worker_pid = 0  # as last reported; 0: down
        self.worker_died = False  # an event said so; the next status tells more
        self.budget_bytes = 0
        self.host_budget_bytes = 0  # 0: unknown, then nothing limits it
        self.host_used_bytes = 0  # as last reported
        self.seen_at = 0.0
        self.replicas: dict[str, Replica] = {}

    @property
    def is_usable(self) -> bool:
        """Commands make sense and its residents serve."""
        return self.is_alive and self.worker_pid != 0 and not self.worker_died

    @property
    def reserved_bytes(self) -> int:
        return sum(r.device_bytes for r in self.replicas.values())

    @property
    def leaving_bytes(self) -> int:
        return sum(r.footprint_bytes for r in self.replicas.values() if r.state in LEAVING_STATES)

    @property
    def free_bytes(self) -> int:
        return self.budget_bytes - self.reserved_bytes

    @property
    def image_bytes(self) -> int:
        """Bytes of host memory that all images here take, loading ones included."""
        return sum(r.image_bytes for r in self.replicas.values())

    def replica(self, model: str) -> Replica:
        """The replica of ``model`` here, made cold and unregistered if there was none."""
        if model not in self.replicas:
            self.replicas[model] = Replica(self.gpu, model)
        return self.replicas[model]


def replica_faults(gpu: str, model: str, replica: Replica) -> list[str]:
    """What must never be in one replica, as text; empty when all is well."""
    wrong = []
    name = f"{gpu}/{model} ({replica.state}, generation {replica.generation})"
    if (replica.gpu, replica.model) != (gpu, model):
        wrong.append(f"{name} is filed as {replica.gpu}/{replica.model}")
    if replica.floor > replica.generation:
        wrong.append(f"{name}: floor {replica.floor} is above its generation")
    if replica.in_flight < 0:
        wrong.append(f"{name}: in_flight is {replica.in_flight}")
    if replica.pending and replica.state not in PENDING_STATES[replica.pending.kind]:
        wrong.append(f"{name}: {replica.pending.kind} is pending; history {replica.life.history}")
    if replica.pending and replica.pending.preempt and replica.pending.kind != "swap_out":
        wrong.append(f"{name}: a {replica.pending.kind} that preempts is pending")
    if replica.state == "failed" and replica.failure is None:
        wrong.append(f"{name} has no failure; history {replica.life.history}")
    if replica.state in DEVICE_STATES and replica.facts is None:
        wrong.append(f"{name} holds device memory of unknown size")
    return wrong
