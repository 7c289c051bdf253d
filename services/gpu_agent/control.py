"""The agent's control process: commands and requests in, events and heartbeats out.

Control owns the replica table and never touches device memory: the engine worker does, one
operation at a time. Here everything comes together, and what is stale is turned away:

    leaders  ---> raise the epoch, and are sent our status
    commands ---> fenced by epoch and generation ---> `Operations` ---> worker
    questions about tokens -> `Tokenizing` -------------------------> worker
    requests ---> `Pull`, by free slots -----------> `Serving` ------> worker
    worker  ----> `Outcomes` or `Serving` -------> `Reporter`, chunks
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from schemas import names
from schemas.commands import Command, Register, Unload
from schemas.events import AgentStarted, AgentStopped, LeaderElected, WorkerDied
from schemas.requests import CancelRequest, VerifyRequest
from schemas.state import AgentStatus, LeaseRecord
from services.bus import Bucket, Bus, BusError, Message
from services.gpu_agent import ipc
from services.gpu_agent.operations import Operations
from services.gpu_agent.outcomes import Outcomes
from services.gpu_agent.pulling import Pull
from services.gpu_agent.replicas import Replica
from services.gpu_agent.reporter import Reporter
from services.gpu_agent.serving import Serving
from services.gpu_agent.tokenizing import Tokenizing
from services.gpu_agent.worker_link import STOP_GRACE_S, WorkerKeeper
from services.settings import GpuSettings

log = logging.getLogger(__name__)

_ELECTED = names.events_subject("leader_elected")


def _always() -> bool:
    return True


class AgentControl:
    """One GPU's agent: `start_worker`, `open`, then the bus and the worker drive it.

    ``may_speak``: whether we hold the GPU's lease. Without it no status leaves, because
    another agent may be speaking for the GPU by now.
    """

    def __init__(
        self,
        bus: Bus,
        gpu: GpuSettings,
        instance: str,
        *,
        lock_fd: int | None = None,
        images: Path | None = None,
        may_speak: Callable[[], bool] = _always,
    ) -> None:
        self.gpu = gpu.name
        self.instance = instance
        self.ready: ipc.Ready | None = None
        self.replicas: dict[str, Replica] = {}
        self._settings = gpu
        self._bus = bus
        self._may_speak = may_speak
        self._epoch = 0
        self._is_open = False
        self._stopping = False
        self.reporter = Reporter(bus, self.gpu)
        self.worker = WorkerKeeper(
            gpu, lock_fd, images, self._greeting, self._on_worker, self._on_worker_death
        )
        self.serving = Serving(bus, self.gpu, self.reporter, self.worker.send, self._freed)
        self.tokenizing = Tokenizing(bus, self.worker.send)
        self.operations = Operations(
            self.gpu,
            self.reporter,
            self.worker.send,
            self._changed,
            self.serving.preempt,
            self.serving.end_all,
            self.serving.hand_back,
        )
        self.outcomes = Outcomes(
            self.gpu,
            self.reporter,
            self.operations,
            self.serving,
            self.replicas,
            self._changed,
            self._open_replica,
            self.publish_status,
        )

    def start_worker(self) -> None:
        """Takes seconds until it is ready, and needs nobody's leave: begin with this."""
        self.worker.start()

    async def open(self) -> None:
        """Listen for commands, and say that we are here. Call once we hold the lease."""
        self._is_open = True
        await self.serving.start()
        await self._bus.subscribe(_ELECTED, LeaderElected, self._on_leader)
        await self._learn_leader()
        self._bus.on_reconnect(self._learn_leader)
        await self._bus.subscribe(names.command_subject(self.gpu), Command, self._on_command)
        await self._bus.subscribe(names.cancel_subject(), CancelRequest, self._on_cancel)
        await self._bus.subscribe(names.verify_subject(self.gpu), VerifyRequest, self._on_verify)
        if self.ready:
            await self._announce(self.ready)
        else:
            await self.publish_status()

    async def drain(self, grace_s: float) -> None:
        """Stop pulling, let requests end for up to ``grace_s`` seconds, hand back the rest."""
        self._stopping = True
        for replica in self.replicas.values():
            replica.stop_pulling()
        # Nobody could hear the answers while the bus is away.
        await self.serving.finish(grace_s if self._bus.is_connected else 0.0)

    async def stop(self) -> None:
        """Hand back what is still here, end the worker, say goodbye."""
        await self.drain(0.0)
        await self.tokenizing.close()
        await self.worker.stop(STOP_GRACE_S if self.ready else 0.0)
        if self._is_open:
            await self.reporter.event(AgentStopped(self.gpu, self.instance, time.time()))

    # -- what others see -----------------------------------------------------------------

    async def publish_status(self) -> None:
        if not self._is_open or not self._may_speak():
            return
        ready = self.ready
        status = AgentStatus(
            gpu=self.gpu,
            instance=self.instance,
            worker_pid=self.worker.pid if ready else 0,
            device=ready.device if ready else self._settings.device,
            device_name=ready.device_name if ready else "",
            budget_bytes=ready.budget_bytes if ready else 0,
            used_bytes=self.outcomes.memory.device_bytes,
            page_bytes=ready.page_bytes if ready else 0,
            replicas=tuple(replica.status() for replica in self.replicas.values()),
            host_budget_bytes=ready.host_budget_bytes if ready else 0,
            host_used_bytes=self.outcomes.memory.host_bytes,
        )
        await self.reporter.status(status)

    async def _announce(self, ready: ipc.Ready) -> None:
        where = (self.gpu, self.instance, time.time())
        await self.reporter.event(
            AgentStarted(*where, ready.device, ready.device_name, ready.budget_bytes)
        )
        await self.publish_status()

    async def _changed(self, replica: Replica) -> None:
        self.reporter.residency(replica.residency(self.gpu))
        await self.publish_status()

    # -- leaders -------------------------------------------------------------------------

    async def _on_leader(self, message: Message[LeaderElected]) -> None:
        """From now on nothing of an older leader counts, and the new one wants to know of us."""
        if message.body.epoch >= self._epoch:
            self._epoch = message.body.epoch
            await self.publish_status()

    async def _learn_leader(self) -> None:
        """Who leads, where we were not there to hear it: we start, or were cut off."""
        bucket = Bucket(self._bus, names.BUCKET_LEASES, LeaseRecord)
        try:
            entry = await bucket.get(names.LEADER_KEY)
        except BusError as error:
            log.warning("who leads is not known yet: %s", error)
            return
        # The write that acquires the lease can not name its own revision, which is the epoch.
        # An expiry, too, is newer than whoever led until then.
        epoch = entry.value.epoch if entry.value and entry.value.epoch else entry.revision
        self._epoch = max(self._epoch, epoch)

    # -- commands ------------------------------------------------------------------------

    async def _on_command(self, message: Message[Command]) -> None:
        command = message.body
        if self._stopping:
            return
        if command.epoch < self._epoch:
            words = f"epoch {command.epoch} is older than {self._epoch}"
            await self.operations.reject(command, words)
            return
        self._epoch = command.epoch
        replica = self.replicas.get(command.model)
        if replica and command.generation < replica.generation:
            words = f"generation {command.generation} is older than {replica.generation}"
            await self.operations.reject(command, words)
        elif replica and replica.is_leaving and not isinstance(command, Unload):
            await self.operations.reject(command, "it is being unloaded")
        elif isinstance(command, Register):
            if replica is None or _may_change(replica, command):
                replica = self.replicas[command.model] = Replica(command.spec, command.generation)
            if replica.spec == command.spec:
                replica.settings = command.settings
            await self.operations.register(command, replica)
        elif replica is None and isinstance(command, Unload):
            await self.operations.unloaded(command.model, command.generation, 0)
        elif replica is None:
            words = f"model {command.model!r} is not registered here"
            await self.operations.reject(command, words)
        else:
            await self.operations.execute(command, replica, message.context)

    async def _on_verify(self, message: Message[VerifyRequest]) -> None:
        """Anybody may ask: it changes nothing, unless weights are damaged."""
        replica = self.replicas.get(message.body.model)
        if replica and replica.state in ("host", "resident"):
            self.worker.send(ipc.Verify(message.body.model))

    # -- requests ------------------------------------------------------------------------

    async def _on_cancel(self, message: Message[CancelRequest]) -> None:
        cancel = message.body
        if not cancel.gpu:
            await self.serving.cancel(cancel.request_id)
        elif cancel.gpu == self.gpu:
            await self.serving.release(cancel.request_id)

    async def _freed(self, replica: Replica) -> None:
        """A slot is free: pull more, or swap out where that waits for the last one."""
        await self.operations.swap_out_if_drained(replica)  # where it is, a status goes out
        if not replica.in_flight and (replica.pull or replica.state == "host"):
            # A status that was sent before the request ended may be read after its
            # RequestEnded, and the model would look busy until the next heartbeat.
            await self.publish_status()
        if replica.pull:
            await replica.pull.refresh()

    def _open_replica(self, replica: Replica) -> None:
        """It may take requests now."""
        if not self._stopping and not replica.pull:
            replica.pull = Pull(self._bus, replica, self.serving.on_delivery)

    # -- the worker ----------------------------------------------------------------------

    def _greeting(self) -> list[ipc.ToWorker]:
        """A new worker knows our models first of all."""
        return [ipc.Register(replica.spec) for replica in self.replicas.values()]

    async def _on_worker_death(self, reason: str) -> None:
        self.ready = None
        self.outcomes.forget_memory()
        for replica in [one for one in self.replicas.values() if one.is_leaving]:
            await self.outcomes.forgotten(replica, 0)
        for replica in self.replicas.values():
            replica.stop_pulling()
            if replica.state != "failed":
                replica.move("cold", reason)
                self.reporter.residency(replica.residency(self.gpu))
        await self.serving.worker_died(reason)
        await self.tokenizing.give_up(reason)
        if self._is_open:
            await self.reporter.event(WorkerDied(self.gpu, time.time(), reason))
        await self.publish_status()

    async def _on_worker(self, message: ipc.FromWorker) -> None:
        match message:
            case ipc.Produced():
                await self.serving.on_produced(message)
            case ipc.Embedded():
                await self.serving.on_embedded(message)
            case ipc.Begun():
                self.serving.on_begun(message)
            case ipc.Done():
                await self.serving.on_done(message)
            case ipc.Broke():
                await self.serving.on_broke(message)
            case ipc.TokenizeAnswered():
                await self.tokenizing.on_answer(message)
            case ipc.Ready():
                self.ready = message
                if self._is_open:
                    await self._announce(message)
            case _:
                if replica := self.replicas.get(message.model):  # else it is forgotten by now
                    await self.outcomes.on_answer(message, replica)
                if isinstance(message, ipc.Registered):
                    await self.tokenizing.open(message.model)
                elif isinstance(message, ipc.Forgotten):
                    await self.tokenizing.forget(message.model)


def _may_change(replica: Replica, command: Register) -> bool:
    """Other settings are taken where no weights were read yet with the old ones."""
    return replica.spec != command.spec and replica.state in ("cold", "failed")
