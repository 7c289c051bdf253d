"""The engine of one simulated GPU: which requests run, and that they end.

It pulls from the queues of resident models as long as rows and KV allow; `compute` says when each
prompt and answer is done.
"""

import math
from collections.abc import Callable

from schemas.events import RequestEnded, RequestStarted
from schemas.state import ModelFacts, ReplicaState
from schemas.stream import RequestTiming
from services.scheduler.simulate.compute import Compute, Lane, Sequence
from services.scheduler.simulate.cost import CostModel
from services.scheduler.simulate.memory import DeviceMemory
from services.scheduler.simulate.world import ModelQueue, World


class SimReplica(Lane):
    """One model on one GPU. ``rows``: taken and not ended; in state ``host`` they are suspended.

    ``job`` numbers what it is at: a callback of an earlier job comes to nothing.
    """

    __slots__ = (
        "began_s",
        "copy_bytes",
        "engine",
        "facts",
        "generation",
        "is_registered",
        "job",
        "kept_bytes",
        "num_rows_max",
        "queue",
        "ready_s",
        "state",
        "waiting_since",
    )

    def __init__(self, engine: "Engine", queue: ModelQueue) -> None:
        super().__init__(queue.model, queue.size)
        self.engine = engine
        self.queue = queue
        self.num_rows_max = queue.size.max_batch
        self.state: ReplicaState = "host"
        self.generation = 0
        self.is_registered = True
        self.facts = ModelFacts(
            architecture="Simulated",
            dtype="bfloat16",
            num_parameters=queue.size.weight_bytes // 2,
            weight_bytes=queue.size.weight_bytes,
            kv_bytes=queue.size.kv_bytes,
            max_model_len=1 << 20,
            max_batch=queue.size.max_batch,
        )
        self.job = 0
        self.began_s: float | None = None  # when the link began with it
        self.ready_s = 0.0  # when it may
        self.waiting_since = 0.0
        self.kept_bytes = 0  # of its weights, on the device when the swap-in was taken up
        self.copy_bytes = 0


class Engine:
    """``drained`` is called for a draining replica when its last request ended."""

    __slots__ = (
        "_compute",
        "_cost",
        "_memory",
        "_name",
        "_short_of_kv",
        "_wake_s",
        "_world",
        "drained",
    )

    def __init__(
        self,
        world: World,
        name: str,
        memory: DeviceMemory,
        cost: CostModel,
        drained: Callable[[SimReplica], None],
    ) -> None:
        self._world = world
        self._name = name
        self._memory = memory
        self._cost = cost
        self.drained = drained
        self.clear()

    def clear(self) -> None:
        """The worker is dead; whoever asks gives its requests back."""
        self._compute = Compute(self._cost)
        self._compute.advance(self._world.now)
        self._wake_s = math.inf
        self._short_of_kv: dict[SimReplica, None] = {}  # have free rows, lack KV

    def resume(self, replica: SimReplica) -> None:
        """It is resident: what was suspended goes on, and more is taken."""
        self._compute.advance(self._world.now)
        for sequence in replica.rows:
            self._memory.kv_tokens += sequence.tokens
            self._compute.add(sequence)
        self._world.num_suspended -= len(replica.rows)
        if not replica.rows:
            self._start_early(replica)
        self.pull(replica)
        self._arm()

    def _start_early(self, replica: SimReplica) -> None:
        """Take the first request; its prompt was read while weights came, as far as they were
        there and nothing else computed.
        """
        if self._cost.prefill_tail >= 1 or not replica.queue.waiting or replica.began_s is None:
            return
        first = replica.queue.waiting[0]
        since_s = max(first.at_s, replica.began_s, self._compute.idle_since_s)
        self.start(replica, self._world.now - since_s)

    def suspend(self, replica: SimReplica) -> None:
        """Its requests stop where they are."""
        self._compute.advance(self._world.now)
        self._compute.suspend(replica)
        self._memory.kv_tokens -= sum(sequence.tokens for sequence in replica.rows)
        self._world.num_suspended += len(replica.rows)
        self._arm()

    def swap_wait_s(self) -> float:
        """How long a swap has to wait for the engine."""
        if not self._cost.swaps_wait:
            return 0.0
        self._compute.advance(self._world.now)
        return self._compute.step_left_s()

    def forget(self, replica: SimReplica) -> None:
        """It is about to leave: it takes no more."""
        self._short_of_kv.pop(replica, None)

    def may_start(self, replica: SimReplica, sequence: Sequence) -> bool:
        """Whether a row is free, and KV for it; one that runs alone gets all it needs."""
        num_rows = len(replica.rows)
        if num_rows >= replica.num_rows_max:
            return False
        if num_rows == 0 or self._memory.fits(sequence.tokens):
            return True
        self._short_of_kv[replica] = None
        return False

    def start(self, replica: SimReplica, read_s: float = 0.0) -> None:
        """Take the first request of the queue. `compute` must have been advanced to now.

        ``read_s``: so long its prompt could be read already.
        """
        world = self._world
        sequence = replica.queue.waiting.popleft()
        world.num_queued -= 1
        sequence.attempt += 1
        sequence.started_s = now = world.now
        sequence.reset(self._cost.prefill_left_s(sequence.input_tokens, read_s))
        sequence.lane = replica
        replica.rows[sequence] = None
        self._memory.kv_tokens += sequence.input_tokens + sequence.output_tokens
        self._compute.add(sequence)
        world.tell(
            RequestStarted(
                self._name,
                replica.model,
                sequence.request_id,
                now,
                sequence.attempt,
                now - sequence.at_s,
                sequence.tenant,
            )
        )

    def start_now(self, replica: SimReplica) -> None:
        """As `start`, from outside."""
        self._compute.advance(self._world.now)
        self.start(replica)
        self._arm()

    def pull_now(self, replica: SimReplica) -> None:
        """As `pull`, from outside."""
        self._compute.advance(self._world.now)
        self.pull(replica)
        self._arm()

    def pull(self, replica: SimReplica) -> None:
        """Take requests for as long as there are any, and room."""
        waiting = replica.queue.waiting
        while waiting and replica.state == "resident" and self.may_start(replica, waiting[0]):
            self.start(replica)

    def _arm(self) -> None:
        """See to it that `_wake` is called when the next prompt or sequence is done.

        A call that comes too early sets the next one, so later ones need no new entry.
        """
        next_s = self._compute.next_s()
        if next_s < self._wake_s:
            self._wake_s = next_s
            self._world.schedule(next_s, self._wake, next_s)

    def _wake(self, set_for_s: float) -> None:
        if set_for_s != self._wake_s:
            return
        self._wake_s = math.inf
        now = self._world.now
        compute = self._compute
        compute.advance(now)
        while sequence := compute.pop_prompt():
            if not sequence.first_s:
                sequence.first_s = now
            if sequence.output_tokens <= 1:
                self._end(sequence)
            else:
                compute.decode(sequence)
        while ended := compute.pop_end():
            self._end(ended)
        self._arm()

    def _end(self, sequence: Sequence) -> None:
        world, replica = self._world, sequence.lane
        assert isinstance(replica, SimReplica)
        now = world.now
        del replica.rows[sequence]
        sequence.lane = None
        self._memory.kv_tokens -= sequence.input_tokens + sequence.output_tokens
        world.tell(
            RequestEnded(
                self._name,
                replica.model,
                sequence.request_id,
                now,
                "length",
                sequence.input_tokens,
                sequence.output_tokens,
                RequestTiming(
                    sequence.started_s - sequence.at_s,
                    sequence.first_s - sequence.started_s,
                    now - sequence.first_s,
                ),
                tenant=sequence.tenant,
            )
        )
        world.end_of(sequence, replica.model)
        if replica.state == "draining" and not replica.rows:
            self.drained(replica)
        elif replica.queue.waiting:
            self.pull(replica)
        if self._short_of_kv:
            self.use_kv()

    def use_kv(self) -> None:
        """KV was freed: let those try that lacked it."""
        if not self._short_of_kv:
            return
        short, self._short_of_kv = self._short_of_kv, {}
        self._compute.advance(self._world.now)
        for replica in short:
            self.pull(replica)
        self._arm()
