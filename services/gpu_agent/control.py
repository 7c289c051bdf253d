"""The agent's control process: commands in, events and heartbeats out.

Control owns the replica table and never touches device memory: the engine worker does,
one operation at a time. A command is accepted, checked against the table, turned into a
worker operation, and answered by an event when the worker is done; a command for what is
already so is answered at once (commands are idempotent).

    Register   files looked at -> facts            cold
    Load       disk -> host image                  cold -> loading -> host
    SwapIn     host -> device, start pulling       host -> swapping_in -> resident
    SwapOut    stop pulling, drain, drop pages     resident -> draining -> swapping_out -> host
"""

import asyncio
import logging
import time
from typing import Literal

from opentelemetry.context import Context

from schemas import names
from schemas.commands import Command, Load, Register, SwapIn, SwapOut
from schemas.events import (
    AgentEvent,
    AgentStarted,
    AgentStopped,
    CommandFailed,
    CommandRejected,
    LoadProgressed,
    ModelLoaded,
    ModelRegistered,
    SwapInCompleted,
    SwapOutCompleted,
    WorkerDied,
)
from schemas.requests import CancelRequest
from schemas.state import AgentStatus, SwapTrace
from services import telemetry
from services.bus import Bus, BusError, Delivery, Message, Puller
from services.gpu_agent import ipc
from services.gpu_agent.replicas import Replica
from services.gpu_agent.reporter import Reporter
from services.gpu_agent.serving import Serving
from services.gpu_agent.worker_link import WorkerLink
from services.settings import GpuSettings

log = logging.getLogger(__name__)

Op = Literal["register", "load", "swap_in", "swap_out"]
_OPS: dict[type, Op] = {
    Register: "register",
    Load: "load",
    SwapIn: "swap_in",
    SwapOut: "swap_out",
}

_RESTART_PAUSE_S = 2.0  # before a new worker where the last one died within this time


class AgentControl:
    """One GPU's agent. `start`, then everything is driven by the bus and the worker."""

    def __init__(self, bus: Bus, gpu: GpuSettings, instance: str) -> None:
        self.gpu = gpu.name
        self.instance = instance
        self.ready: ipc.Ready | None = None
        self.replicas: dict[str, Replica] = {}
        self._settings = gpu
        self._bus = bus
        self._link = self._new_link()
        self._link_started_at = 0.0
        self._epoch = 0
        self._used_bytes = 0
        self._contexts: dict[str, Context] = {}  # model -> trace context of the command it works on
        self._stopping = False
        self.reporter = Reporter(bus, self.gpu)
        self.serving = Serving(bus, self.gpu, self.reporter, self._send, self._freed)

    def _send(self, message: ipc.ToWorker) -> None:
        self._link.send(message)

    async def start(self) -> None:
        await self.serving.start()
        await self._start_worker()
        await self._bus.subscribe(names.command_subject(self.gpu), Command, self._on_command)
        await self._bus.subscribe(names.cancel_subject(), CancelRequest, self._on_cancel)

    async def stop(self, grace_s: float) -> None:
        """Stop pulling, let requests end for up to ``grace_s`` seconds, hand back the rest."""
        self._stopping = True
        for replica in self.replicas.values():
            if replica.puller:
                replica.puller.stop()
        await self.serving.finish(grace_s)
        await self._link.stop()
        await self.reporter.event(AgentStopped(self.gpu, self.instance, time.time()))

    # -- what others see -----------------------------------------------------------------

    async def publish_status(self) -> None:
        ready = self.ready
        status = AgentStatus(
            gpu=self.gpu,
            instance=self.instance,
            worker_pid=self._link.pid if ready else 0,
            device=ready.device if ready else self._settings.device,
            device_name=ready.device_name if ready else "",
            budget_bytes=ready.budget_bytes if ready else 0,
            used_bytes=self._used_bytes,
            page_bytes=ready.page_bytes if ready else 0,
            replicas=tuple(replica.status() for replica in self.replicas.values()),
        )
        await self.reporter.status(status)

    async def _changed(self, replica: Replica) -> None:
        self.reporter.residency(replica.residency(self.gpu))
        await self.publish_status()

    # -- commands ------------------------------------------------------------------------

    async def _on_command(self, message: Message[Command]) -> None:
        command = message.body
        replica = self.replicas.get(command.model)
        if self._stopping:
            return
        if command.epoch < self._epoch:
            await self._reject(command, f"epoch {command.epoch} is older than {self._epoch}")
            return
        self._epoch = command.epoch
        if isinstance(command, Register):
            await self._register(command)
            return
        if replica is None:
            await self._reject(command, f"model {command.model!r} is not registered here")
            return
        if command.generation < replica.generation:
            words = f"generation {command.generation} is older than {replica.generation}"
            await self._reject(command, words)
            return
        self._contexts[command.model] = message.context
        replica.generation = command.generation
        match command:
            case Load():
                await self._load(command, replica)
            case SwapIn():
                await self._swap_in(command, replica)
            case SwapOut():
                await self._swap_out(command, replica)

    async def _register(self, command: Register) -> None:
        replica = self.replicas.get(command.model)
        if replica is None or (replica.spec != command.spec and replica.state == "cold"):
            replica = self.replicas[command.model] = Replica(command.spec, command.generation)
        replica.generation = command.generation
        if replica.facts and replica.state != "failed":
            await self.reporter.event(
                ModelRegistered(
                    self.gpu, command.model, command.generation, time.time(), replica.facts
                )
            )
            await self._changed(replica)
            return
        replica.move("cold")
        self._send(ipc.Register(replica.spec))

    async def _load(self, command: Load, replica: Replica) -> None:
        match replica.state:
            case "cold":
                replica.move("loading")
                self._send(ipc.Load(command.model))
                await self._changed(replica)
            case "loading":
                pass
            case "failed":
                await self._reject(command, f"the replica failed: {replica.reason}")
            case _:
                await self.reporter.event(
                    ModelLoaded(self.gpu, command.model, command.generation, time.time(), 0, 0.0)
                )

    async def _swap_in(self, command: SwapIn, replica: Replica) -> None:
        match replica.state:
            case "host":
                replica.move("swapping_in")
                self._send(ipc.SwapIn(command.model))
                await self._changed(replica)
            case "resident":
                trace = replica.last_swap_in or SwapTrace(started_at=replica.resident_since)
                await self.reporter.event(
                    SwapInCompleted(self.gpu, command.model, command.generation, time.time(), trace)
                )
            case "swapping_in":
                pass
            case _:
                await self._reject(command, f"the replica is {replica.state}, not host")

    async def _swap_out(self, command: SwapOut, replica: Replica) -> None:
        match replica.state:
            case "resident":
                replica.drain_started_at = time.time()
                replica.move("draining")
                if replica.puller:
                    replica.puller.stop()
                    replica.puller = None
                await self._changed(replica)
                await self._freed(replica)
            case "draining" | "swapping_out":
                pass
            case "host":
                now = time.time()
                trace = SwapTrace(started_at=now)
                await self.reporter.event(
                    SwapOutCompleted(self.gpu, command.model, command.generation, now, trace)
                )
            case _:
                await self._reject(command, f"the replica is {replica.state}, not resident")

    async def _reject(self, command: Command, reason: str) -> None:
        kind = _OPS[type(command)]
        log.warning("rejected %s of %s: %s", kind, command.model, reason)
        await self.reporter.event(
            CommandRejected(self.gpu, command.model, command.generation, time.time(), kind, reason)
        )

    # -- requests ------------------------------------------------------------------------

    async def _on_cancel(self, message: Message[CancelRequest]) -> None:
        await self.serving.cancel(message.body.request_id)

    async def _freed(self, replica: Replica) -> None:
        """A slot is free, or the replica is to be drained: pull more, or swap out when empty."""
        if replica.state == "draining" and not replica.in_flight:
            replica.move("swapping_out")
            self._send(ipc.SwapOut(replica.spec.name))
            await self._changed(replica)
        elif replica.puller:
            await replica.puller.want(replica.num_free)

    async def _start_pulling(self, replica: Replica) -> None:
        async def on_delivery(delivery: Delivery) -> None:
            await self.serving.on_delivery(replica, delivery)

        puller = Puller(self._bus, replica.spec.name, on_delivery)
        replica.puller = puller
        try:
            await puller.start()
            await puller.want(replica.num_free)
        except BusError as error:  # the server is away: its return re-arms the puller
            log.warning("can not pull for %s yet: %s", replica.spec.name, error)

    # -- the worker ----------------------------------------------------------------------

    def _new_link(self) -> WorkerLink:
        """A link to a worker yet to be started, which will know our models first of all."""
        link = WorkerLink(self._settings, self._on_worker, self._on_worker_death)
        for replica in self.replicas.values():
            link.send(ipc.Register(replica.spec))
        return link

    async def _start_worker(self) -> None:
        self._link_started_at = time.monotonic()
        await self._link.start()

    async def _on_worker_death(self, reason: str) -> None:
        log.error("%s; starting a new one", reason)
        self.ready = None
        self._used_bytes = 0
        self._link = self._new_link()
        for replica in self.replicas.values():
            if replica.puller:
                replica.puller.stop()
                replica.puller = None
            if replica.state != "failed":
                replica.move("cold", reason)
                self.reporter.residency(replica.residency(self.gpu))
        await self.serving.worker_died(reason)
        await self.reporter.event(WorkerDied(self.gpu, time.time(), reason))
        await self.publish_status()
        if time.monotonic() - self._link_started_at < _RESTART_PAUSE_S:
            await asyncio.sleep(_RESTART_PAUSE_S)
        if not self._stopping:
            await self._start_worker()

    async def _on_worker(self, message: ipc.FromWorker) -> None:
        match message:
            case ipc.Produced():
                await self.serving.on_produced(message)
            case ipc.Begun():
                self.serving.on_begun(message)
            case ipc.Done():
                await self.serving.on_done(message)
            case ipc.Broke():
                await self.serving.on_broke(message)
            case ipc.Ready():
                self.ready = message
                await self.reporter.event(
                    AgentStarted(
                        self.gpu,
                        self.instance,
                        time.time(),
                        message.device,
                        message.device_name,
                        message.budget_bytes,
                    )
                )
                await self.publish_status()
            case _:
                await self._on_operation(message, self.replicas[message.model])

    async def _on_operation(
        self,
        message: ipc.Registered
        | ipc.LoadProgress
        | ipc.Loaded
        | ipc.SwappedIn
        | ipc.SwappedOut
        | ipc.OpFailed,
        replica: Replica,
    ) -> None:
        """A worker operation moved on: update the table, then tell everybody."""
        model, generation, now = message.model, replica.generation, time.time()
        event: AgentEvent
        match message:
            case ipc.LoadProgress():
                event = LoadProgressed(
                    self.gpu, model, now, message.done_bytes, message.total_bytes
                )
                await self.reporter.event(event)
                return
            case ipc.Registered():
                replica.facts = message.facts
                event = ModelRegistered(self.gpu, model, generation, now, message.facts)
            case ipc.Loaded():
                replica.loaded_at = now
                replica.move("host")
                self.reporter.span(
                    telemetry.SPAN_LOAD,
                    self._contexts.get(model),
                    now - message.load_s,
                    now,
                    model,
                    num_bytes=message.num_bytes,
                )
                event = ModelLoaded(
                    self.gpu, model, generation, now, message.num_bytes, message.load_s
                )
            case ipc.SwappedIn():
                self._used_bytes = message.used_bytes
                trace = replica.last_swap_in = message.trace
                replica.resident_since = now
                replica.move("resident")
                context = self._contexts.get(model)
                self.reporter.swap_span(telemetry.SPAN_SWAP_IN, context, model, trace)
                event = SwapInCompleted(self.gpu, model, generation, now, trace)
                await self._start_pulling(replica)
            case ipc.SwappedOut():
                self._used_bytes = message.used_bytes
                trace = _with_drain(message.trace, replica.drain_started_at)
                replica.move("host")
                context = self._contexts.get(model)
                self.reporter.swap_span(telemetry.SPAN_SWAP_OUT, context, model, trace)
                event = SwapOutCompleted(self.gpu, model, generation, now, trace)
            case ipc.OpFailed():
                log.error("%s of %s failed: %s", message.op, model, message.reason)
                # A swap that failed changed nothing; a model that can not be read is failed.
                after = {"swap_in": "host", "swap_out": "resident"}.get(message.op, "failed")
                replica.move(after, message.reason)  # type: ignore[arg-type]
                event = CommandFailed(self.gpu, model, generation, now, message.op, message.reason)
                if replica.state == "resident":
                    await self._start_pulling(replica)
        await self.reporter.event(event)
        await self._changed(replica)


def _with_drain(trace: SwapTrace, drain_started_at: float) -> SwapTrace:
    """``trace`` of the worker's part, begun when the drain began."""
    drain_s = max(0.0, trace.started_at - drain_started_at)
    return SwapTrace(
        started_at=drain_started_at,
        drain_s=drain_s,
        map_s=trace.map_s,
        total_s=drain_s + trace.total_s,
        num_bytes=trace.num_bytes,
    )
