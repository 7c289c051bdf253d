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

What decisions go by is filed in an index (`services.scheduler.index`): fields that matter there
are properties, which file the replica anew when they change.
"""

from collections import deque
from dataclasses import dataclass
from typing import Literal

from schemas.state import ModelFacts, ReplicaState
from services.scheduler.estimates import Disk, Link
from services.scheduler.index import Index, keep
from services.scheduler.lifecycle import (
    DEVICE_STATES,
    IMAGE_STATES,
    LEAVING_STATES,
    CommandKind,
    Lifecycle,
)

NUM_PAST_INSTANCES = 16
_DEVICE = frozenset(DEVICE_STATES)
_IMAGE = frozenset(IMAGE_STATES)


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
    is_unasked: bool = False  # a swap-in that nobody waits for: pinned, or one replica more,
    is_prefetch: bool = False  # or a guess
    end_requests: str = ""  # of a swap-out or an unload: why its requests are ended


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
        "_batch_in_flight",
        "_believe_at",
        "_cached_bytes",
        "_facts",
        "_failure",
        "_in_flight",
        "_pending",
        "agent",
        "batch_late_at",
        "came_late",
        "counted_image_bytes",
        "decided_at",
        "floor",
        "footprint_bytes",
        "generation",
        "gpu",
        "host_since",
        "is_stale",
        "last_kind",
        "last_used",
        "life",
        "may_stray",
        "model",
        "num_uses",
        "resident_since",
        "slack_at",
        "slack_s",
        "swap_s",
        "worth",
    )

    def __init__(self, agent: "Agent", model: str) -> None:
        self.agent = agent
        self.gpu = agent.gpu
        self.model = model
        self.generation = agent.last_generation  # of the last command; grows only
        self.floor = (
            agent.last_generation
        )  # a status or event below this generation is about the past
        self.footprint_bytes = 0  # device bytes while resident; 0: not registered
        self.last_kind: CommandKind | None = None  # what the state is the outcome of
        self.is_stale = False  # registered with other settings than are wanted now
        self.may_stray = False  # a command to an instance that ended may yet reach the next one
        self.last_used = 0.0
        self.num_uses = 0  # requests since it came in
        self.worth = 0.0  # of keeping it, where the eviction policy counts that
        self.resident_since = 0.0
        # When it was loaded or swapped out; its suspended requests wait since.
        self.host_since = 0.0
        # First command to bring those back; before that, that for earlier ones.
        self.decided_at = 0.0
        self.slack_s = 0.0  # what its requests are ahead of their target, on average, at slack_at
        self.slack_at = 0.0
        self.swap_s = 0.0  # what its last swap-in took; 0: unknown
        self.counted_image_bytes = 0  # as the agent's sum has it
        self._believe_at: float | None = None
        self._facts: ModelFacts | None = None
        # Of class batch (`services.scheduler.batches`): when the last one that started here is no
        # more put back, and whether it was brought in for such as had waited for very long.
        self.batch_late_at = 0.0
        self.came_late = False
        self._in_flight = 0
        self._batch_in_flight = 0
        self._cached_bytes = 0
        self._pending: Pending | None = None
        self._failure: Failure | None = None
        self.life = Lifecycle(f"{self.gpu}/{model}", self._refile)
        self._refile()

    def _refile(self) -> None:
        self.agent.refile(self)
        self.agent.index.refile(self)

    @property
    def is_large(self) -> bool:
        """It needs more than half of the GPU: no two of the kind fit."""
        return 2 * self.footprint_bytes > self.agent.budget_bytes

    # -- what the index must know of --------------------------------------------------------

    @property
    def facts(self) -> ModelFacts | None:
        """None: not registered."""
        return self._facts

    @facts.setter
    def facts(self, facts: ModelFacts | None) -> None:
        if facts != self._facts:
            self._facts = facts
            self.footprint_bytes = facts.footprint_bytes if facts else 0
            self._refile()

    @property
    def in_flight(self) -> int:
        """Requests that the agent has taken and not ended."""
        return self._in_flight

    @in_flight.setter
    def in_flight(self, num: int) -> None:
        was, self._in_flight = self._in_flight, num
        if num == 0:
            self._batch_in_flight = 0
        if (was > 0) != (num > 0):
            keep(self.agent.suspended, self.model, self, self.is_suspended)
            self.agent.index.busy_changed(self)

    @property
    def batch_in_flight(self) -> int:
        """Of these, the ones of class batch."""
        return min(self._batch_in_flight, self._in_flight)

    @batch_in_flight.setter
    def batch_in_flight(self, num: int) -> None:
        if num != self._batch_in_flight:
            self._batch_in_flight = num
            self.agent.index.busy_changed(self)

    @property
    def cached_bytes(self) -> int:
        """Of its weights, on the device though swapped out, as last reported."""
        return self._cached_bytes

    @cached_bytes.setter
    def cached_bytes(self, num_bytes: int) -> None:
        if num_bytes != self._cached_bytes:
            self._cached_bytes = num_bytes
            self._refile()

    @property
    def pending(self) -> Pending | None:
        """The command that is not answered yet."""
        return self._pending

    @pending.setter
    def pending(self, pending: Pending | None) -> None:
        if pending is not self._pending:
            self._pending = pending
            self._refile()

    @property
    def believe_at(self) -> float | None:
        """Set: the agent disagrees; from then on it is right."""
        return self._believe_at

    @believe_at.setter
    def believe_at(self, at: float | None) -> None:
        if at != self._believe_at:
            self._believe_at = at
            self._refile()

    @property
    def failure(self) -> Failure | None:
        return self._failure

    @failure.setter
    def failure(self, failure: Failure | None) -> None:
        if failure is not self._failure:
            self._failure = failure
            self._refile()

    def hide_failure(self) -> None:
        """A later success suggests that it works, or only a request can show."""
        if self._failure and self._failure.is_visible:
            self._failure.is_visible = False
            self._refile()

    # -- queries -----------------------------------------------------------------------------

    @property
    def state(self) -> ReplicaState:
        return self.life.state

    @property
    def device_bytes(self) -> int:
        """Bytes counted against the budget now."""
        return self.footprint_bytes if self.life.state in _DEVICE else 0

    @property
    def image_bytes(self) -> int:
        """Bytes of host memory that its image takes now."""
        return self.weight_bytes if self.life.state in _IMAGE else 0

    @property
    def weight_bytes(self) -> int:
        return self._facts.weight_bytes if self._facts else 0

    @property
    def serves(self) -> bool:
        """Resident or about to be: waiters of its model need no decision."""
        return self.life.state in ("resident", "swapping_in")

    @property
    def is_suspended(self) -> bool:
        """Its requests were preempted, and wait here for its next swap-in."""
        return self._in_flight > 0 and self.life.state == "host"

    @property
    def is_suspending(self) -> bool:
        """On its way out with its requests. An agent that drains one first gets no further than
        ``draining`` with requests, so this can be told without having commanded it.
        """
        if self._in_flight == 0:
            return False
        preempts = self._pending is not None and self._pending.preempt
        return self.state == "swapping_out" or (self.state == "draining" and preempts)

    @property
    def is_settled(self) -> bool:
        """Nothing is pending and agent and scheduler agree: it may be commanded."""
        return self._pending is None and self._believe_at is None

    @property
    def is_broken(self) -> bool:
        """Users are told that it failed, so nobody asks for it."""
        return self._failure is not None and self._failure.is_visible

    @property
    def swap_in_s(self) -> float:
        """What its next swap-in will take (seconds), as far as known."""
        return self.agent.link.swap_in_s(self.weight_bytes - self._cached_bytes)

    def arrives_in_s(self, now: float) -> float:
        """What its swap-in, which is under way, should still take (seconds)."""
        begun_at = self._pending.sent_at if self._pending else now
        return max(0.0, begun_at + self.swap_in_s - now)

    @property
    def desired(self) -> Literal["resident", "host", "cold"]:
        """What the commands so far aim at (`schemas.state.PlacementRecord.desired`)."""
        if self.state in ("swapping_in", "resident"):
            return "resident"
        return "cold" if self.state in ("cold", "failed") else "host"


class Agent:
    """One GPU's agent and its replicas. Those of some state are in dicts of their own."""

    def __init__(self, gpu: str, index: Index | None = None) -> None:
        self.gpu = gpu
        self.index = index or Index()
        self.instance = ""
        self.past_instances: deque[str] = deque(maxlen=NUM_PAST_INSTANCES)  # never come back
        self._is_alive = False
        self._worker_pid = 0
        self._worker_died = False
        self._budget_bytes = 0
        self.host_budget_bytes = 0  # 0: unknown, then nothing limits it
        self.host_used_bytes = 0  # as last reported
        self.image_bytes = 0  # of host memory that all images here take, loading ones included
        self.seen_at = 0.0
        self.last_generation = 0  # of replicas that are forgotten
        self.link = Link()
        self.disk = Disk()
        self.replicas: dict[str, Replica] = {}
        self.device: dict[str, Replica] = {}
        self.suspended: dict[str, Replica] = {}
        self.loading: dict[str, Replica] = {}
        self.cold: dict[str, Replica] = {}  # registered, and without an image
        self.planned: dict[str, None] = {}  # models that bytes here are being freed for

    @property
    def is_alive(self) -> bool:
        return self._is_alive

    @is_alive.setter
    def is_alive(self, is_alive: bool) -> None:
        if is_alive != self._is_alive:
            self._is_alive = is_alive
            self.index.health_changed(self)

    @property
    def worker_pid(self) -> int:
        """As last reported; 0: down."""
        return self._worker_pid

    @worker_pid.setter
    def worker_pid(self, pid: int) -> None:
        if pid != self._worker_pid:
            self._worker_pid = pid
            self.index.health_changed(self)

    @property
    def worker_died(self) -> bool:
        """An event said so; the next status tells more."""
        return self._worker_died

    @worker_died.setter
    def worker_died(self, died: bool) -> None:
        if died != self._worker_died:
            self._worker_died = died
            self.index.health_changed(self)

    @property
    def budget_bytes(self) -> int:
        return self._budget_bytes

    @budget_bytes.setter
    def budget_bytes(self, num_bytes: int) -> None:
        if num_bytes != self._budget_bytes:
            self._budget_bytes = num_bytes
            self.index.health_changed(self)

    @property
    def is_usable(self) -> bool:
        """Commands make sense and its residents serve."""
        return self._is_alive and self._worker_pid != 0 and not self._worker_died

    @property
    def reserved_bytes(self) -> int:
        return sum(r.footprint_bytes for r in self.device.values())

    @property
    def leaving_bytes(self) -> int:
        return sum(r.footprint_bytes for r in self.device.values() if r.state in LEAVING_STATES)

    @property
    def free_bytes(self) -> int:
        return self._budget_bytes - self.reserved_bytes

    @property
    def planned_bytes(self) -> int:
        """What plans on this GPU will take, once it is free."""
        return sum(self.replicas[model].footprint_bytes for model in self.planned)

    def refile(self, replica: Replica) -> None:
        """``replica`` changed: its state, or what it needs."""
        model, state = replica.model, replica.state
        keep(self.device, model, replica, state in _DEVICE)
        keep(self.suspended, model, replica, replica.is_suspended)
        keep(self.loading, model, replica, state == "loading")
        keep(self.cold, model, replica, state == "cold" and replica.facts is not None)
        self.image_bytes += replica.image_bytes - replica.counted_image_bytes
        replica.counted_image_bytes = replica.image_bytes

    def forget(self, replica: Replica) -> None:
        """Nothing of ``replica`` is left: it is cold, and nobody knows what it needs."""
        del self.replicas[replica.model]
        self.last_generation = max(self.last_generation, replica.generation)
        self.index.forget(replica)

    def replica(self, model: str) -> Replica:
        """The replica of ``model`` here, made cold and unregistered if there was none."""
        if model not in self.replicas:
            self.replicas[model] = Replica(self, model)
        return self.replicas[model]
