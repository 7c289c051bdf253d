"""What the engine worker's answers do to a replica: the end of what operations.py began.

    Registered  -> cold, with its facts         Arriving       -> requests are pulled
    Loaded      -> host                         SwappedIn      -> resident
    Unloaded    -> cold                         SwappedOut     -> host; requests may be suspended
    Corrupted   -> cold, or failed where it keeps happening
    OpFailed    -> as before; failed where the files can not be used

Each is told to everybody as an event.
"""

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final, Literal, TypeAlias

import msgspec
from opentelemetry.context import Context

from schemas.events import (
    CommandFailed,
    CommandRejected,
    LoadProgressed,
    ModelLoaded,
    ModelRegistered,
    ModelUnloaded,
    ModelVerified,
    SwapInCancelled,
    SwapInCompleted,
    SwapOutCompleted,
    VerificationFailed,
)
from schemas.state import ReplicaState, SwapTrace
from services import telemetry
from services.gpu_agent import ipc
from services.gpu_agent.operations import Operations
from services.gpu_agent.replicas import Replica
from services.gpu_agent.reporter import Reporter
from services.gpu_agent.serving import Serving

log = logging.getLogger(__name__)

Answer: TypeAlias = (
    ipc.Registered
    | ipc.LoadProgress
    | ipc.Loaded
    | ipc.Unloaded
    | ipc.Forgotten
    | ipc.Arriving
    | ipc.SwappedIn
    | ipc.SwapInCancelled
    | ipc.SwappedOut
    | ipc.Verified
    | ipc.Corrupted
    | ipc.OpFailed
)
MAX_CORRUPTIONS: Final = 3  # of one model on one GPU: then the replica is failed
_UNLOADED: Final = "its host image made room for another model's"
_NOTHING: Final = ipc.Memory(0, 0, {})

# A swap that failed changed nothing; a model that can not be read is failed.
_AFTER_FAILURE: Final[dict[Literal["register", "load", "swap_in", "swap_out"], ReplicaState]] = {
    "register": "failed",
    "load": "failed",
    "swap_in": "host",
    "swap_out": "resident",
}


class Outcomes:
    """Moves the ``replicas`` of one GPU. ``changed``: tell everybody; ``open_replica``: it may
    take requests; ``status``: say what is here.
    """

    def __init__(
        self,
        gpu: str,
        reporter: Reporter,
        operations: Operations,
        serving: Serving,
        replicas: dict[str, Replica],
        changed: Callable[[Replica], Awaitable[None]],
        open_replica: Callable[[Replica], None],
        status: Callable[[], Awaitable[None]],
    ) -> None:
        self.memory = _NOTHING  # as the worker last said
        self._gpu = gpu
        self._reporter = reporter
        self._operations = operations
        self._serving = serving
        self._replicas = replicas
        self._changed = changed
        self._open_replica = open_replica
        self._status = status

    async def on_answer(self, answer: Answer, replica: Replica) -> None:
        """An operation moved on: update the table, then tell everybody."""
        model, now = answer.model, time.time()
        where = (self._gpu, model, replica.generation, now)
        context = self._operations.contexts.get(model)
        match answer:
            case ipc.LoadProgress(_, done, total):
                took = max(now - replica.changed_at, 1e-9)
                rate = done / took / 1e9
                await self._reporter.event(LoadProgressed(self._gpu, model, now, done, total, rate))
                return
            case ipc.Verified(_, num_pages, num_bytes, verify_s):
                await self._reporter.event(
                    ModelVerified(self._gpu, model, now, num_pages, num_bytes, verify_s)
                )
                return
            case ipc.Registered(_, facts):
                replica.facts, replica.lost_image = facts, ""
                await self._reporter.event(ModelRegistered(*where, facts))
            case ipc.Loaded(_, num_bytes, load_s, memory):
                self._note_memory(memory)
                replica.loaded_at = now
                replica.move("host")
                self._reporter.span(
                    telemetry.SPAN_LOAD, context, now - load_s, now, model, num_bytes=num_bytes
                )
                await self._reporter.event(ModelLoaded(*where, num_bytes, load_s))
            case ipc.Forgotten(_, num_bytes, memory):
                self._note_memory(memory)
                await self.forgotten(replica, num_bytes)
                return
            case ipc.Unloaded() if replica.state != "host":
                # A swap-in is on its way to the worker, and will fail.
                replica.lost_image, replica.after_loss = _UNLOADED, "cold"
                return
            case ipc.Unloaded(_, num_bytes):
                replica.move("cold", _UNLOADED)
                await self._reporter.event(ModelUnloaded(*where, num_bytes))
                await self._serving.hand_back(replica)
            case ipc.Arriving():
                if replica.state == "swapping_in":
                    replica.is_arriving = True
                    self._serving.resumed(replica)
                    self._open_replica(replica)
                return
            case ipc.SwappedIn(_, trace, memory):
                self._note_memory(memory)
                await self._swapped_in(replica, _with_wait(trace, replica), context)
            case ipc.SwapInCancelled(_, trace):
                self._reporter.swap_span(telemetry.SPAN_SWAP_IN, context, model, trace)
                await self._reporter.event(SwapInCancelled(*where, trace))
                return
            case ipc.SwappedOut(_, trace, memory):
                self._note_memory(memory)
                trace = _with_drain(trace, replica.drain_started_at)
                replica.move("host")
                await self._serving.suspended(replica)
                self._reporter.swap_span(telemetry.SPAN_SWAP_OUT, context, model, trace)
                num_suspended = len(replica.in_flight)
                await self._reporter.event(SwapOutCompleted(*where, trace, num_suspended))
            case ipc.Corrupted(_, check, reason, memory):
                self._note_memory(memory)
                log.error("verification of %s failed: %s", model, reason)
                replica.stop_pulling()
                replica.num_corruptions += 1
                # Its files are good as far as anybody knows; what keeps happening needs a person.
                is_hopeless = replica.num_corruptions >= MAX_CORRUPTIONS
                replica.after_loss = "failed" if is_hopeless else "cold"
                if replica.state in ("swapping_in", "draining", "swapping_out"):
                    replica.lost_image = reason  # OpFailed follows, and settles it
                else:
                    replica.move(replica.after_loss, reason)
                await self._reporter.event(VerificationFailed(*where, check, reason))
                await self._serving.hand_back(replica)
                await self._operations.swap_out_if_drained(replica)
            case ipc.OpFailed():
                await self._failed(answer, replica)
        await self._changed(replica)

    async def forgotten(self, replica: Replica, num_bytes: int) -> None:
        """Nothing of ``replica`` is here any more."""
        model = replica.spec.name
        del self._replicas[model]
        self._operations.contexts.pop(model, None)
        self._reporter.forget_residency(model)
        await self._operations.unloaded(model, replica.generation, num_bytes)
        await self._status()

    async def _swapped_in(
        self, replica: Replica, trace: SwapTrace, context: Context | None
    ) -> None:
        # The worker may have been in the middle of a forward when the last byte came. Never later
        # than now, whatever the clocks say: who asks from now on finds the model there.
        now = min(time.time(), trace.started_at + trace.total_s)
        replica.last_swap_in = trace
        replica.resident_since = now
        replica.awaits_first_token = True
        if replica.state == "swapping_in":  # else a SwapOut waits for its requests to end
            replica.move("resident")
            self._open_replica(replica)
        model = replica.spec.name
        self._reporter.swap_span(telemetry.SPAN_SWAP_IN, context, model, trace)
        await self._reporter.event(
            SwapInCompleted(self._gpu, model, replica.generation, now, trace)
        )
        await self._serving.announce(replica)

    async def _failed(self, answer: ipc.OpFailed, replica: Replica) -> None:
        op, reason = answer.op, answer.reason
        log.error("%s of %s failed: %s", op, answer.model, reason)
        if op == "verify":
            return
        if op == "unload":
            replica.is_leaving = False
            where = (self._gpu, answer.model, replica.generation, time.time())
            await self._reporter.event(CommandFailed(*where, op, reason))
            return
        if op == "swap_out" and replica.state != "swapping_out":
            return  # it is out already: the swap-in that it was to call off had failed
        where = (self._gpu, answer.model, replica.generation, time.time())
        if replica.lost_image and replica.after_loss == "cold":
            # Nothing is wrong with the model: it is loaded again, and its requests wait for that.
            replica.move("cold", replica.lost_image)
            replica.lost_image = ""
            await self._reporter.event(CommandRejected(*where, op, replica.reason))
            return
        was_leaving = replica.state in ("draining", "swapping_out")
        replica.move("failed" if replica.lost_image else _AFTER_FAILURE[op], reason)
        replica.lost_image = ""
        await self._reporter.event(CommandFailed(*where, op, reason))
        if op == "swap_in":
            replica.stop_pulling()
            await self._serving.hand_back(replica)
            if was_leaving and replica.state == "host":
                trace = SwapTrace(started_at=time.time())
                await self._reporter.event(SwapOutCompleted(*where, trace))
        elif replica.state == "resident":
            self._open_replica(replica)

    def forget_memory(self) -> None:
        """The worker is gone, and all its memory with it."""
        self._note_memory(_NOTHING)

    def _note_memory(self, memory: ipc.Memory) -> None:
        self.memory = memory
        for model, replica in self._replicas.items():
            replica.cached_bytes = memory.cached_bytes.get(model, 0)


def _with_drain(trace: SwapTrace, drain_started_at: float) -> SwapTrace:
    """``trace`` of the worker's part, begun when the drain began."""
    drain_s = max(0.0, trace.started_at - drain_started_at)
    return msgspec.structs.replace(
        trace, started_at=drain_started_at, drain_s=drain_s, total_s=drain_s + trace.total_s
    )


def _with_wait(trace: SwapTrace, replica: Replica) -> SwapTrace:
    """``trace`` of a swap-in, and what came before it: the decision, and victims leaving."""
    if not replica.decided_at:
        return trace
    waited_s = replica.decided_at - replica.waiting_since if replica.waiting_since else 0.0
    drain_s = trace.started_at - replica.decided_at
    return msgspec.structs.replace(trace, decision_s=max(0.0, waited_s), drain_s=max(0.0, drain_s))
