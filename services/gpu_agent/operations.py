"""What a command does to a replica, and what the engine worker's answer does.

    Register   files looked at -> facts            cold
    Load       disk -> host image                  cold -> loading -> host
    SwapIn     host -> device, start pulling       host -> swapping_in -> resident
    SwapOut    stop pulling, drain, drop pages     resident -> draining -> swapping_out -> host

A command begins one operation of the worker, and is answered by an event when the worker is
done. Commands are idempotent: one for what is under way adds nothing, one for what is so
already is answered at once, one that the state does not allow is rejected.
"""

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Literal, TypeAlias

from opentelemetry.context import Context

from schemas.commands import Command, Load, Register, SwapIn, SwapOut
from schemas.events import (
    CommandFailed,
    CommandRejected,
    LoadProgressed,
    ModelLoaded,
    ModelRegistered,
    SwapInCompleted,
    SwapOutCompleted,
)
from schemas.state import ReplicaState, SwapTrace
from services import telemetry
from services.gpu_agent import ipc
from services.gpu_agent.replicas import Replica
from services.gpu_agent.reporter import Reporter

log = logging.getLogger(__name__)

Op: TypeAlias = Literal["register", "load", "swap_in", "swap_out"]
Answer: TypeAlias = (
    ipc.Registered | ipc.LoadProgress | ipc.Loaded | ipc.SwappedIn | ipc.SwappedOut | ipc.OpFailed
)
_OPS: dict[type, Op] = {Register: "register", Load: "load", SwapIn: "swap_in", SwapOut: "swap_out"}

# A swap that failed changed nothing; a model that can not be read is failed.
_AFTER_FAILURE: dict[Op, ReplicaState] = {
    "register": "failed",
    "load": "failed",
    "swap_in": "host",
    "swap_out": "resident",
}


class Operations:
    """Moves the replicas of one GPU. ``send``: to the worker; ``changed``: tell everybody;
    ``begin_pulling``: the replica may take requests.
    """

    def __init__(
        self,
        gpu: str,
        reporter: Reporter,
        send: Callable[[ipc.ToWorker], None],
        changed: Callable[[Replica], Awaitable[None]],
        begin_pulling: Callable[[Replica], None],
    ) -> None:
        self.used_bytes = 0  # of device memory, as the worker last said
        self._gpu = gpu
        self._reporter = reporter
        self._send = send
        self._changed = changed
        self._begin_pulling = begin_pulling
        self._contexts: dict[str, Context] = {}  # model -> trace context of what it works on

    # -- commands ------------------------------------------------------------------------

    async def register(self, command: Register, replica: Replica) -> None:
        replica.generation = command.generation
        if replica.facts and replica.state != "failed":
            await self._reporter.event(
                ModelRegistered(
                    self._gpu, command.model, command.generation, time.time(), replica.facts
                )
            )
            await self._changed(replica)
            return
        replica.move("cold")
        self._send(ipc.Register(replica.spec))

    async def execute(
        self, command: Load | SwapIn | SwapOut, replica: Replica, context: Context
    ) -> None:
        replica.generation = command.generation
        where = (self._gpu, command.model, command.generation, time.time())
        match command, replica.state:
            case Load(), "cold":
                await self._begin(replica, "loading", ipc.Load(command.model), context)
            case Load(), "host" | "swapping_in" | "resident" | "draining" | "swapping_out":
                await self._reporter.event(ModelLoaded(*where, num_bytes=0, load_s=0.0))
            case SwapIn(), "host":
                await self._begin(replica, "swapping_in", ipc.SwapIn(command.model), context)
            case SwapIn(), "resident":
                trace = replica.last_swap_in or SwapTrace(started_at=replica.resident_since)
                await self._reporter.event(SwapInCompleted(*where, trace))
            case SwapOut(), "resident":
                self._contexts[command.model] = context
                replica.drain_started_at = time.time()
                replica.move("draining")
                replica.stop_pulling()
                await self._changed(replica)
                await self.swap_out_if_drained(replica)
            case SwapOut(), "host":
                await self._reporter.event(
                    SwapOutCompleted(*where, SwapTrace(started_at=time.time()))
                )
            case (
                (Load(), "loading")
                | (SwapIn(), "swapping_in")
                | (SwapOut(), "draining" | "swapping_out")
            ):
                pass  # under way: its event will carry this generation
            case _, "failed":
                await self.reject(command, f"the replica failed: {replica.reason}")
            case _:
                await self.reject(command, f"the replica is {replica.state}")

    async def reject(self, command: Command, reason: str) -> None:
        kind = _OPS[type(command)]
        log.warning("rejected %s of %s: %s", kind, command.model, reason)
        where = (self._gpu, command.model, command.generation, time.time())
        await self._reporter.event(CommandRejected(*where, kind, reason))

    async def swap_out_if_drained(self, replica: Replica) -> None:
        if replica.state == "draining" and not replica.in_flight:
            replica.move("swapping_out")
            self._send(ipc.SwapOut(replica.spec.name))
            await self._changed(replica)

    async def _begin(
        self, replica: Replica, state: ReplicaState, operation: ipc.ToWorker, context: Context
    ) -> None:
        self._contexts[replica.spec.name] = context
        replica.move(state)
        self._send(operation)
        await self._changed(replica)

    # -- the worker's answers --------------------------------------------------------------

    async def on_answer(self, answer: Answer, replica: Replica) -> None:
        """An operation moved on: update the table, then tell everybody."""
        model, now = answer.model, time.time()
        where = (self._gpu, model, replica.generation, now)
        context = self._contexts.get(model)
        match answer:
            case ipc.LoadProgress(_, done, total):
                await self._reporter.event(LoadProgressed(self._gpu, model, now, done, total))
                return
            case ipc.Registered(_, facts):
                replica.facts = facts
                await self._reporter.event(ModelRegistered(*where, facts))
            case ipc.Loaded(_, num_bytes, load_s):
                replica.loaded_at = now
                replica.move("host")
                self._reporter.span(
                    telemetry.SPAN_LOAD, context, now - load_s, now, model, num_bytes=num_bytes
                )
                await self._reporter.event(ModelLoaded(*where, num_bytes, load_s))
            case ipc.SwappedIn(_, trace, used_bytes):
                self.used_bytes = used_bytes
                replica.last_swap_in = trace
                replica.resident_since = now
                replica.move("resident")
                self._reporter.swap_span(telemetry.SPAN_SWAP_IN, context, model, trace)
                await self._reporter.event(SwapInCompleted(*where, trace))
                self._begin_pulling(replica)
            case ipc.SwappedOut(_, trace, used_bytes):
                self.used_bytes = used_bytes
                trace = _with_drain(trace, replica.drain_started_at)
                replica.move("host")
                self._reporter.swap_span(telemetry.SPAN_SWAP_OUT, context, model, trace)
                await self._reporter.event(SwapOutCompleted(*where, trace))
            case ipc.OpFailed(_, op, reason):
                log.error("%s of %s failed: %s", op, model, reason)
                replica.move(_AFTER_FAILURE[op], reason)
                await self._reporter.event(CommandFailed(*where, op, reason))
                if replica.state == "resident":
                    self._begin_pulling(replica)
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
