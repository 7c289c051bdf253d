"""What all parts of a simulation share: the clock and its heap, the queues, the counts."""

import heapq
import math
from collections import deque
from collections.abc import Callable
from typing import Any

from schemas.state import ModelSpec
from services.scheduler.inputs import Input
from services.scheduler.simulate.compute import Sequence
from services.scheduler.simulate.workload import ModelSize

START_S = 1000.0  # of the clock, so that no time stamp is ever the 0 that stands for "unknown"


class Counts:
    """What happened, as far as nobody else knows it."""

    __slots__ = ("bytes_moved", "num_called_off", "num_preemptions", "num_swap_ins")

    def __init__(self) -> None:
        self.bytes_moved = 0
        self.num_swap_ins = 0
        self.num_preemptions = 0
        self.num_called_off = 0


class ModelQueue:
    """The work queue of one model, and the replicas that pull from it."""

    __slots__ = ("model", "num_open", "servers", "size", "spec", "waiting")

    def __init__(self, model: str, size: ModelSize) -> None:
        self.model = model
        self.size = size
        self.spec = ModelSpec(model, f"/models/{model}", max_batch=size.max_batch)
        self.waiting: deque[Sequence] = deque()
        self.num_open = 0  # requests that came and did not end
        self.servers: list[Any] = []  # `engine.SimReplica`, resident


class World:
    """``tell`` hands an input to `decide` at `now`; `schedule` calls back later."""

    __slots__ = (
        "_num_entries",
        "counts",
        "end_of",
        "heap",
        "now",
        "num_moving",
        "num_queued",
        "num_suspended",
        "queues",
        "tell",
    )

    def __init__(self, queues: dict[str, ModelQueue]) -> None:
        self.now = START_S
        self.heap: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self.queues = queues
        self.counts = Counts()
        self.num_queued = 0  # requests in queues
        self.num_suspended = 0
        self.num_moving = 0  # commands and replicas on their way
        self.tell: Callable[[Input], None] = _nobody_listens
        self.end_of: Callable[[Sequence, str], None] = _nobody_listens
        self._num_entries = 0

    def schedule(self, at_s: float, callback: Callable[[Any], None], what: Any) -> None:
        """Call ``callback(what)`` at ``at_s``; entries of one instant in order."""
        if at_s < math.inf:
            self._num_entries += 1
            heapq.heappush(self.heap, (at_s, self._num_entries, callback, what))


def _nobody_listens(*_what: object) -> None:
    raise AssertionError("the world is not set up")
