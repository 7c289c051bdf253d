"""One simulated GPU: its agent, answering commands as the real one does.

A replica's states are those of `services.scheduler.lifecycle`. What the agent does in each::

    loading       the disk reads one image after another
    swapping_in   the link copies one model after another: a fixed time, what is missing of the
                  weights, and the KV of its suspended requests
    resident      pulls from its model's queue as long as rows and KV allow
    draining      pulls nothing, and leaves when its last request ended
    swapping_out  unmapping; after a preemption, suspending its requests first

Events leave at once, commands were delayed on their way here. Nothing calls back into this module
while it works: what `decide` answers to an event arrives later.
"""

from collections import deque
from collections.abc import Callable

from schemas.commands import Command, Load, Register, SwapIn, SwapOut
from schemas.events import (
    AgentStarted,
    CommandRejected,
    ModelLoaded,
    ModelRegistered,
    SwapInCancelled,
    SwapInCompleted,
    SwapOutCompleted,
    WorkerDied,
)
from schemas.state import AgentStatus, ReplicaState, ReplicaStatus, SwapTrace
from services.scheduler.lifecycle import DEVICE_STATES, CommandKind
from services.scheduler.simulate.compute import Sequence
from services.scheduler.simulate.cost import CostModel
from services.scheduler.simulate.engine import Engine, SimReplica
from services.scheduler.simulate.errors import SimulationFault
from services.scheduler.simulate.memory import DeviceMemory
from services.scheduler.simulate.world import World

REDELIVERY_S = 5.0  # until the queue delivers again what a dead agent had
RESTART_S = 3.0  # until the next agent process reports
NEXT_WORKER_S = 2.0

_KINDS: dict[type[Command], CommandKind] = {
    Register: "register",
    Load: "load",
    SwapIn: "swap_in",
    SwapOut: "swap_out",
}
_MOVING: tuple[ReplicaState, ...] = ("loading", "swapping_in", "draining", "swapping_out")


class SimGpu:
    """``name``: as in commands. All models' host images are there at the start."""

    def __init__(self, world: World, name: str, budget_bytes: int, cost: CostModel) -> None:
        self.name = name
        self.cost = cost
        self.world = world
        self.memory = DeviceMemory(budget_bytes, cost.kv_bytes_per_token)
        self.engine = Engine(world, name, self.memory, cost, self._unmap)
        self.replicas = {m: SimReplica(self.engine, queue) for m, queue in world.queues.items()}
        self.num_instances = 1
        self.worker_pid = 1
        self.is_up = True
        self._link: deque[SimReplica] = deque()  # the first one is being copied
        self._disk_free_s = 0.0

    # -- what the scheduler is told --------------------------------------------------------

    def report(self) -> None:
        """Send a status."""
        memory = self.memory
        self.world.tell(
            AgentStatus(
                gpu=self.name,
                instance=f"{self.name}-{self.num_instances}",
                worker_pid=self.worker_pid,
                device="cuda",
                device_name="simulated",
                budget_bytes=memory.budget_bytes if self.worker_pid else 0,
                used_bytes=memory.used_bytes,
                page_bytes=1,
                replicas=tuple(
                    ReplicaStatus(
                        model,
                        replica.state,
                        replica.generation,
                        len(replica.rows),
                        replica.facts,
                        cached_bytes=memory.cached_bytes(model),
                    )
                    for model, replica in self.replicas.items()
                    if replica.is_registered
                ),
            )
        )

    def heartbeat(self, every_s: float) -> None:
        """Send a status now, and again ``every_s`` later."""
        if self.is_up:
            self.report()
        self.world.schedule(self.world.now + every_s, self.heartbeat, every_s)

    # -- commands --------------------------------------------------------------------------

    def accept(self, command: Command) -> None:
        """A command arrives."""
        self.world.num_moving -= 1
        if not self.is_up:
            return
        replica = self.replicas[command.model]
        if command.generation == replica.generation:
            return
        if command.generation < replica.generation:
            self._reject(command, "older than the newest")
            return
        if not self.worker_pid:
            self._reject(command, "the engine worker is down")
            return
        before, replica.generation = replica.generation, command.generation
        match command:
            case Register():
                registered = self._when_registered
                self._later(replica, self.cost.register_s, registered, keep_job=True)
            case Load() if replica.state == "cold" and replica.is_registered:
                self._load(replica)
            case Load() if replica.state == "loading":
                pass
            case Load() if replica.is_registered:
                self._say_loaded(replica)
            case SwapIn() if replica.state == "host":
                self._begin_swap_in(replica, command.waiting_since)
            case SwapIn() if replica.state == "swapping_in":
                pass
            case SwapIn() if replica.state == "resident":
                self.world.tell(SwapInCompleted(*self._where(replica), SwapTrace(self.world.now)))
            case SwapOut() if replica.state == "swapping_in":
                self._call_off(replica)
            case SwapOut() if replica.state in ("resident", "draining"):
                self._leave(replica, command.preempt)
            case SwapOut() if replica.state == "swapping_out":
                pass
            case SwapOut() if replica.state == "host":
                self._say_swapped_out(replica, SwapTrace(self.world.now))
            case _:
                replica.generation = before
                self._reject(command, f"is {replica.state}")

    def _reject(self, command: Command, reason: str) -> None:
        where = (self.name, command.model, command.generation, self.world.now)
        self.world.tell(CommandRejected(*where, _KINDS[type(command)], reason))

    def _where(self, replica: SimReplica) -> tuple[str, str, int, float]:
        return (self.name, replica.model, replica.generation, self.world.now)

    def _move(self, replica: SimReplica, state: ReplicaState) -> None:
        self.world.num_moving += (state in _MOVING) - (replica.state in _MOVING)
        if (replica.state == "resident") != (state == "resident"):
            servers = replica.queue.servers
            servers.append(replica) if state == "resident" else servers.remove(replica)
        replica.state = state
        replica.job += 1

    def _later(
        self,
        replica: SimReplica,
        wait_s: float,
        callback: Callable[[SimReplica], None],
        keep_job: bool = False,
    ) -> None:
        """Call back, unless the replica is at something else by then."""
        what = (replica, -1 if keep_job else replica.job, callback, self.num_instances)
        self.world.schedule(self.world.now + wait_s, self._if_still, what)

    def _if_still(self, what: tuple[SimReplica, int, Callable[[SimReplica], None], int]) -> None:
        replica, job, callback, instance = what
        if job in (-1, replica.job) and instance == self.num_instances and self.is_up:
            callback(replica)

    # -- register and load -----------------------------------------------------------------

    def _when_registered(self, replica: SimReplica) -> None:
        replica.is_registered = True
        self.world.tell(ModelRegistered(*self._where(replica), replica.facts))
        self.report()  # a new instance is believed by its statuses only

    def _load(self, replica: SimReplica) -> None:
        self._move(replica, "loading")
        took_s = replica.size.weight_bytes / self.cost.load_bytes_per_s
        self._disk_free_s = max(self._disk_free_s, self.world.now) + took_s
        self._later(replica, self._disk_free_s - self.world.now, self._when_loaded)

    def _when_loaded(self, replica: SimReplica) -> None:
        self._move(replica, "host")
        self._say_loaded(replica)

    def _say_loaded(self, replica: SimReplica) -> None:
        num_bytes = replica.size.weight_bytes
        load_s = num_bytes / self.cost.load_bytes_per_s
        self.world.tell(ModelLoaded(*self._where(replica), num_bytes, load_s))

    # -- swap in ---------------------------------------------------------------------------

    def _begin_swap_in(self, replica: SimReplica, waiting_since: float) -> None:
        replica.kept_bytes = self.memory.take(replica.model, replica.size)
        self._move(replica, "swapping_in")
        replica.waiting_since = waiting_since
        replica.began_s = None
        replica.ready_s = self.world.now + self.engine.swap_wait_s()
        self._link.append(replica)
        if self._link[0] is replica:
            self._copy_next()

    def _copy_next(self) -> None:
        """The link is free: it takes the next model."""
        if not self._link:
            return
        replica = self._link[0]
        replica.began_s = max(self.world.now, replica.ready_s)
        tokens = sum(sequence.kept_tokens for sequence in replica.rows)
        replica.copy_bytes = replica.size.weight_bytes - replica.kept_bytes
        num_bytes = replica.copy_bytes + tokens * self.cost.kv_bytes_per_token
        wait_s = replica.began_s - self.world.now
        self._later(replica, wait_s + self.cost.swap_in_s(num_bytes), self._when_swapped_in)

    def _when_swapped_in(self, replica: SimReplica) -> None:
        self._link.popleft()
        self.world.counts.num_swap_ins += 1
        self.world.counts.bytes_moved += replica.copy_bytes
        self._move(replica, "resident")
        self._copy_next()
        self.world.tell(SwapInCompleted(*self._where(replica), self._trace(replica)))
        self.engine.resume(replica)

    def _trace(self, replica: SimReplica) -> SwapTrace:
        now = self.world.now
        began_s = now if replica.began_s is None else replica.began_s
        return SwapTrace(
            started_at=began_s,
            drain_s=max(0.0, began_s - replica.waiting_since) if replica.waiting_since else 0.0,
            copy_s=now - began_s,
            total_s=now - began_s,
            num_bytes=replica.copy_bytes,
            kept_bytes=replica.kept_bytes,
        )

    def _call_off(self, replica: SimReplica) -> None:
        """What has arrived stays on the device until the pages are taken."""
        was_copied = self._link[0] is replica
        self._link.remove(replica)
        arrived = 0
        if was_copied and replica.began_s is not None:
            copied_s = max(0.0, self.world.now - replica.began_s - self.cost.swap_fixed_s)
            if copied_s:
                arrived = int(min(replica.copy_bytes, copied_s * self.cost.link_bytes_per_s))
        replica.copy_bytes = arrived
        self.world.counts.bytes_moved += arrived
        self.world.counts.num_called_off += 1
        self.memory.leave(replica.model, replica.size, replica.kept_bytes + arrived)
        self._move(replica, "host")
        if was_copied:
            self._copy_next()
        self.world.tell(SwapInCancelled(*self._where(replica), self._trace(replica)))
        self._say_swapped_out(replica, SwapTrace(self.world.now))

    # -- swap out --------------------------------------------------------------------------

    def _leave(self, replica: SimReplica, preempt: bool) -> None:
        self.engine.forget(replica)
        if not replica.rows:
            self._unmap(replica)
        elif preempt:
            wait_s = max(self.engine.swap_wait_s(), self.cost.suspend_s)
            self.engine.suspend(replica)
            self.world.counts.num_preemptions += 1
            self._move(replica, "swapping_out")
            self._later(replica, wait_s, self._when_swapped_out)
        elif replica.state == "resident":
            self._move(replica, "draining")

    def _unmap(self, replica: SimReplica) -> None:
        """Nothing runs on it any more."""
        self._move(replica, "swapping_out")
        wait_s = self.engine.swap_wait_s()
        self._later(replica, wait_s + self.cost.swap_out_s, self._when_swapped_out)

    def _when_swapped_out(self, replica: SimReplica) -> None:
        self._move(replica, "host")
        self.memory.leave(replica.model, replica.size, replica.size.weight_bytes)
        suspend_s = self.cost.suspend_s if replica.rows else 0.0
        trace = SwapTrace(self.world.now, total_s=suspend_s, suspend_s=suspend_s)
        self._say_swapped_out(replica, trace)
        self.engine.use_kv()

    def _say_swapped_out(self, replica: SimReplica, trace: SwapTrace) -> None:
        self.world.tell(SwapOutCompleted(*self._where(replica), trace, len(replica.rows)))

    # -- death -----------------------------------------------------------------------------

    def kill_worker(self) -> None:
        """The engine worker ends: every replica is cold, its requests go back to the queue."""
        if not self.is_up or not self.worker_pid:
            return
        next_pid, self.worker_pid = self.worker_pid + 1, 0
        requests = self._lose_all()
        self.world.tell(WorkerDied(self.name, self.world.now, "killed"))
        self.report()
        self.world.schedule(self.world.now + NEXT_WORKER_S, self._next_worker, next_pid)
        self._give_back(requests)

    def _next_worker(self, pid: int) -> None:
        if self.is_up and not self.worker_pid:
            self.worker_pid = pid
            self.report()

    def die(self) -> None:
        """The agent process ends; the next one knows nothing of the models."""
        if not self.is_up:
            return
        self.is_up = False
        requests = self._lose_all()
        for replica in self.replicas.values():
            replica.is_registered = False
            replica.generation = 0
        now = self.world.now
        self.world.schedule(now + REDELIVERY_S, self._give_back, requests)
        self.world.schedule(now + RESTART_S, self._restart, self.worker_pid + 1)

    def _restart(self, pid: int) -> None:
        self.is_up = True
        self.num_instances += 1
        self.worker_pid = pid
        where = (self.name, f"{self.name}-{self.num_instances}", self.world.now)
        self.world.tell(AgentStarted(*where, "cuda", "simulated", self.memory.budget_bytes))
        self.report()

    def _lose_all(self) -> list[Sequence]:
        """Everything is cold. Returns the requests that ran or were suspended here."""
        lost: list[Sequence] = []
        for replica in self.replicas.values():
            if not self._computes(replica):
                self.world.num_suspended -= len(replica.rows)
            lost += replica.rows
            replica.rows.clear()
            replica.num_decoding = 0
            self._move(replica, "cold")
        self.memory.clear()
        self.engine.clear()
        self._link.clear()
        self._disk_free_s = 0.0
        return sorted(lost, key=lambda sequence: sequence.index)

    def _computes(self, replica: SimReplica) -> bool:
        return replica.state in ("resident", "draining")

    def _give_back(self, requests: list[Sequence]) -> None:
        """They are delivered again, before those that came later."""
        for sequence in reversed(requests):
            assert sequence.lane is not None
            queue = self.world.queues[sequence.lane.model]
            sequence.lane = None
            queue.waiting.appendleft(sequence)
            self.world.num_queued += 1
        for queue in self.world.queues.values():
            for server in list(queue.servers):
                server.engine.pull_now(server)

    # -- invariants ------------------------------------------------------------------------

    def validate(self) -> None:
        """Raise SimulationFault unless its books agree."""
        held = [r for r in self.replicas.values() if r.state in DEVICE_STATES]
        used = sum(r.size.weight_bytes + r.size.kv_bytes for r in held)
        tokens = sum(s.tokens for r in held if self._computes(r) for s in r.rows)
        if used != self.memory.used_bytes or tokens != self.memory.kv_tokens:
            raise SimulationFault(
                f"{self.name}: {used} bytes and {tokens} tokens are in use, not "
                f"{self.memory.used_bytes} and {self.memory.kv_tokens}"
            )
