"""How a request that is open gets into the queue, and back into it: its runs.

    first run                        the client's request, under its own id
    the queue delivers it again      an agent or a worker died. Whoever gets it asks (`resume`), and
                                     goes on behind what is known here. Still the same run.
    the NATS server lost its queue   queued again under its id (`recover`); whoever gets it asks,
                                     and who had it before is told to let go of it
    tokens, or the end, are lost     a new run, ``<id>-r2``, with what is known as its prefix
                                     (`again`), in place of the one before

Core NATS delivers at most once, so chunks are lost where a connection breaks; and an agent that
finds no listener cancels.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from schemas.requests import GenerateRequest
from schemas.stream import ResumeFrom, Resuming
from services.api.call import Background, Call
from services.api.taking_back import TakingBack
from services.bus import Bus, BusError, WorkQueue

log = logging.getLogger(__name__)

MAX_RUNS: Final = 4  # then an error is the better answer
_RETRY_S: Final = 0.5


class Runs:
    """The runs of all calls. ``give_up(call, why)``: no further run is worth it."""

    def __init__(
        self,
        bus: Bus,
        queue: WorkQueue,
        background: Background,
        taking_back: TakingBack,
        give_up: Callable[[Call, str], None],
    ) -> None:
        self._bus = bus
        self._queue = queue
        self._background = background
        self._taking_back = taking_back
        self._give_up = give_up

    async def enqueue(self, call: Call, run: str, attempts_before: int = 0) -> bool:
        """Queue ``run``. Whether it is new to the queue. Raises QueueFull, BusError."""
        call.runs.setdefault(run, None)
        request = msgspec.structs.replace(
            call.request, request_id=run, attempts_before=attempts_before
        )
        if isinstance(request, GenerateRequest) and run != call.request_id:
            known = tuple(call.answer.token_ids)
            request = msgspec.structs.replace(request, prefix_token_ids=known)
        seq, is_new = await self._queue.enqueue_once(request)
        if run in call.runs:  # else its answer was complete before the queue's word was here
            call.runs[run] = seq
            if call.ended:
                await self._taking_back.withdraw(call, run)
        return is_new

    def resume(self, request_id: str, call: Call | None, query: Resuming, reply: str) -> None:
        """An agent was given a run that may have run before: where does it go on, if at all?

        ``call``: what is open under ``request_id``.
        """
        run = query.request_id
        answer = ResumeFrom(run, "cancel")
        if call is None and self._taking_back.has_ended(request_id):
            answer = ResumeFrom(run, "drop")
        elif call is not None and run == call.newest_run:
            call.answer.is_stale(run, query.attempt)  # from now on, what earlier attempts say is
            answer = ResumeFrom(run, "run", tuple(call.answer.token_ids))
            if call.has_begun and call.started:
                call.num_resumed += 1
                words = "request %s goes on at gpu %s, behind %d tokens"
                log.warning(words, run, query.gpu, len(answer.token_ids))
                if call.started.gpu != query.gpu:  # it may live, and not know
                    cancel = self._taking_back.cancel(call.model, run, call.started.gpu)
                    self._background.run(call, cancel)
        self._background.run(call, self._bus.publish(reply, answer))

    def again(self, call: Call, run: str, why: str) -> None:
        """``run`` gave no complete answer, which is nobody's fault: a new one in its place."""
        if run != call.newest_run:
            return  # a newer run is under way
        if len(call.runs) >= MAX_RUNS:
            words = f"{why}; the request was run {len(call.runs)} times. Please try again."
            self._give_up(call, words)
            return
        next_run = f"{call.request_id}-r{len(call.runs) + 1}"
        log.warning("request %s runs again as %s: %s", run, next_run, why)
        call.num_resumed += call.has_begun
        call.runs[next_run] = None
        self._background.run(call, self._replace(call, run, next_run))

    async def _replace(self, call: Call, run: str, next_run: str) -> None:
        await self._patiently(call, lambda: self.enqueue(call, next_run))
        if not call.ended:  # it may compute still
            await self._taking_back.withdraw(call, run)

    def recover(self, call: Call) -> None:
        """After a reconnect: its newest run is to be in the queue, if it is not any more."""
        run = call.newest_run
        seq = call.runs.get(run)
        if seq is not None:  # else it is being queued just now
            work = self._patiently(call, lambda: self._recover(call, run, seq))
            self._background.run(call, work)

    async def _recover(self, call: Call, run: str, seq: int) -> None:
        if run != call.newest_run or await self._queue.holds(seq, run):
            return
        # Sequence numbers of a restarted server start from 1 again: none of ours is valid.
        call.runs = dict.fromkeys(call.runs)
        num_before = max(call.answer.num_attempts(run), 1)
        if not await self.enqueue(call, run, num_before) and not call.ended:
            # The server knows it, and it has left the queue: it ended when we could not hear it.
            self.again(call, run, "its end was lost on the way")

    async def _patiently(self, call: Call, work: Callable[[], Awaitable[object]]) -> None:
        """For a request that was admitted already: it waits for room, and for the server."""
        while not call.ended:
            try:
                await work()
                break
            except BusError as error:
                log.warning("request %s is not queued again yet: %s", call.newest_run, error)
                await asyncio.sleep(_RETRY_S)
