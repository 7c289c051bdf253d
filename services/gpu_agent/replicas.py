"""What one agent knows of its replicas, and the records it publishes about them.

Control is the only writer; `status` and `residency` are read-outs.
"""

import time
from dataclasses import dataclass, field
from typing import Protocol

from schemas.names import RequestClass
from schemas.state import (
    ModelFacts,
    ModelSpec,
    ReplicaState,
    ReplicaStatus,
    ResidencyRecord,
    SwapTrace,
)
from schemas.stream import StartKind


class Pull(Protocol):
    """`services.gpu_agent.pulling.Pull`, as far as the table needs it."""

    async def refresh(self) -> None: ...

    def stop(self) -> None: ...


@dataclass
class Replica:
    """One deployment on this GPU. ``generation``: of the last command accepted for it."""

    spec: ModelSpec
    generation: int
    state: ReplicaState = "cold"
    facts: ModelFacts | None = None
    reason: str = ""
    loaded_at: float = 0.0  # unix seconds when the host image was last filled
    resident_since: float = 0.0
    is_arriving: bool = False  # swapping in, and may take requests already
    waiting_since: float = 0.0  # of its first waiter; 0: unknown
    decided_at: float = 0.0  # first command for that waiter; 0: unknown
    awaits_first_token: bool = False  # since the last swap-in
    cached_bytes: int = 0  # of its weights, still on the device though swapped out
    settings: str = ""  # fingerprint of ``spec``, as the scheduler told it
    is_leaving: bool = False  # the worker is told to forget it
    lost_image: str = ""  # why the worker dropped its image under a swap-in, whose end is to come
    after_loss: ReplicaState = "cold"  # what it is then
    num_corruptions: int = 0  # how often its weights were not what was loaded
    last_swap_in: SwapTrace | None = None
    drain_started_at: float = 0.0
    pull: Pull | None = None  # while it may take requests
    in_flight: set[str] = field(default_factory=set)  # request ids admitted here; suspended in host
    # Those of them that are of class batch, the newest last.
    batch_in_flight: dict[str, None] = field(default_factory=dict)
    changed_at: float = field(default_factory=time.time)

    @property
    def is_open(self) -> bool:
        """Whether its batch takes requests: resident, or about to be."""
        return self.state == "resident" or self.is_arriving

    def num_free(self, klass: RequestClass) -> int:
        """Requests that may join the batch now. Interactive ones take the slots of the others."""
        most = self.facts.max_batch if self.facts else 0
        taken = len(self.in_flight)
        if klass == "interactive":
            taken -= len(self.batch_in_flight)
        return max(0, most - taken) if self.is_open else 0

    def move(self, state: ReplicaState, reason: str = "") -> None:
        self.state = state
        self.is_arriving = False
        self.reason = reason
        self.changed_at = time.time()

    def stop_pulling(self) -> None:
        if self.pull:
            self.pull.stop()
            self.pull = None

    def start_kind(self, created_at: float) -> StartKind:
        """How a request admitted at ``created_at`` (unix seconds) found the model, which is
        resident now.
        """
        if created_at >= self.resident_since:
            return "warm"
        return "cold" if created_at < self.loaded_at else "switch"

    def status(self) -> ReplicaStatus:
        return ReplicaStatus(
            model=self.spec.name,
            state=self.state,
            generation=self.generation,
            in_flight=len(self.in_flight),
            facts=self.facts,
            reason=self.reason,
            cached_bytes=self.cached_bytes,
            settings=self.settings,
            batch_in_flight=len(self.batch_in_flight),
        )

    def residency(self, gpu: str) -> ResidencyRecord:
        return ResidencyRecord(
            gpu=gpu,
            model=self.spec.name,
            state=self.state,
            generation=self.generation,
            changed_at=self.changed_at,
            reason=self.reason,
        )
