"""What a command does to a replica. What the engine worker makes of it is in outcomes.py.

    Register   files looked at -> facts            cold
    Load       disk -> host image                  cold -> loading -> host
    SwapIn     host -> device, start pulling       host -> swapping_in -> resident
    SwapOut    stop pulling, drain, drop pages     resident -> draining -> swapping_out -> host
               the same, called off on its way     swapping_in -> draining -> ...
               the same, but its requests are      resident -> swapping_out -> host
               suspended: preempt                  swapping_in, draining -> swapping_out -> ...
               the same, but its requests are ended with an error: end_requests
    Unload     drop the image, forget the model    host, cold, failed -> gone

A command begins one operation of the worker, and is answered by an event when the worker is
done. Commands are idempotent: one for what is under way adds nothing, one for what is so
already is answered at once, one that the state does not allow is rejected.

Requests are pulled from the moment a swap-in's pages are mapped: their prefill begins while the
weights arrive.
"""

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Literal, TypeAlias

from opentelemetry.context import Context

from schemas.commands import Command, Load, Register, SwapIn, SwapOut, Unload
from schemas.events import (
    CommandRejected,
    ModelLoaded,
    ModelRegistered,
    ModelUnloaded,
    SwapInCompleted,
    SwapOutCompleted,
)
from schemas.state import ReplicaState, SwapTrace
from services.gpu_agent import ipc
from services.gpu_agent.replicas import Replica
from services.gpu_agent.reporter import Reporter

log = logging.getLogger(__name__)

Op: TypeAlias = Literal["register", "load", "swap_in", "swap_out", "unload"]
_OPS: dict[type, Op] = {
    Register: "register",
    Load: "load",
    SwapIn: "swap_in",
    SwapOut: "swap_out",
    Unload: "unload",
}


class Operations:
    """Carries out commands. ``send``: to the worker; ``changed``: tell everybody; ``preempt``: a
    replica leaves with its requests; ``end_all``: its requests end with an error,
    for the reason that is given; ``hand_back``: they go back to the queue.

    ``contexts``: model -> trace context of what it works on.
    """

    def __init__(
        self,
        gpu: str,
        reporter: Reporter,
        send: Callable[[ipc.ToWorker], None],
        changed: Callable[[Replica], Awaitable[None]],
        preempt: Callable[[Replica], Awaitable[None]],
        end_all: Callable[[Replica, str], Awaitable[None]],
        hand_back: Callable[[Replica], Awaitable[None]],
    ) -> None:
        self.contexts: dict[str, Context] = {}
        self._gpu = gpu
        self._reporter = reporter
        self._send = send
        self._changed = changed
        self._preempt = preempt
        self._end_all = end_all
        self._hand_back = hand_back

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
        self, command: Load | SwapIn | SwapOut | Unload, replica: Replica, context: Context
    ) -> None:
        replica.generation = command.generation
        where = (self._gpu, command.model, command.generation, time.time())
        match command, replica.state:
            case Load(), "cold":
                await self._begin(replica, "loading", ipc.Load(command.model), context)
            case Load(), "host" | "swapping_in" | "resident" | "draining" | "swapping_out":
                await self._reporter.event(ModelLoaded(*where, num_bytes=0, load_s=0.0))
            case SwapIn(), "host":
                replica.waiting_since, replica.decided_at = (
                    command.waiting_since,
                    command.decided_at,
                )
                await self._begin(replica, "swapping_in", ipc.SwapIn(command.model), context)
            case SwapIn(), "resident":
                trace = replica.last_swap_in or SwapTrace(started_at=replica.resident_since)
                await self._reporter.event(SwapInCompleted(*where, trace))
            case SwapOut(), "resident" | "swapping_in":
                self.contexts[command.model] = context
                replica.drain_started_at = time.time()
                replica.move("draining")
                replica.stop_pulling()
                if command.end_requests:
                    await self._end_all(replica, command.end_requests)
                if _may_preempt(command, replica):
                    await self._swap_out(replica, preempt=True)
                else:
                    await self._changed(replica)
                    await self.swap_out_if_drained(replica)
            case SwapOut(end_requests=reason), "draining" if reason:
                await self._end_all(replica, reason)
                await self.swap_out_if_drained(replica)
            case SwapOut(), "draining" if _may_preempt(command, replica):
                await self._swap_out(replica, preempt=True)
            case SwapOut(), "host":
                trace = SwapTrace(started_at=time.time())
                await self._reporter.event(SwapOutCompleted(*where, trace, len(replica.in_flight)))
            case Unload(), "host" | "cold" | "failed":
                if command.end_requests:
                    await self._end_all(replica, command.end_requests)
                else:
                    await self._hand_back(replica)
                if not replica.is_leaving:
                    replica.is_leaving = True
                    self._send(ipc.Forget(command.model))
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

    async def unloaded(self, model: str, generation: int, num_bytes: int) -> None:
        """Say that ``model`` is not known here any more."""
        await self._reporter.event(
            ModelUnloaded(self._gpu, model, generation, time.time(), num_bytes)
        )

    async def reject(self, command: Command, reason: str) -> None:
        kind = _OPS[type(command)]
        log.warning("rejected %s of %s: %s", kind, command.model, reason)
        where = (self._gpu, command.model, command.generation, time.time())
        await self._reporter.event(CommandRejected(*where, kind, reason))

    async def swap_out_if_drained(self, replica: Replica) -> None:
        if replica.state == "draining" and not replica.in_flight:
            await self._swap_out(replica)

    async def _swap_out(self, replica: Replica, preempt: bool = False) -> None:
        replica.move("swapping_out")
        self._send(ipc.SwapOut(replica.spec.name, preempt))
        if preempt:
            await self._preempt(replica)
        await self._changed(replica)

    async def _begin(
        self, replica: Replica, state: ReplicaState, operation: ipc.ToWorker, context: Context
    ) -> None:
        self.contexts[replica.spec.name] = context
        replica.move(state)
        self._send(operation)
        await self._changed(replica)


def _may_preempt(command: Load | SwapIn | SwapOut | Unload, replica: Replica) -> bool:
    """Whether the command says so, and the model's settings allow it."""
    asked = isinstance(command, SwapOut) and command.preempt
    return asked and replica.spec.preemption != "drain"
