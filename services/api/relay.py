"""Requests out to the queue, chunks in from the agents, and every way in which a request ends.

All replies come to ``<inbox>.r.<request id>`` under one wildcard subscription. A request is
open until exactly one of these ends it:

    1. Finished          complete                                 the agent has acknowledged it
    2. Failed            the agent's error, with its code         likewise
    3. client left       +
    4. deadline          |
    5. model failed      | taken back: withdrawn from the queue, cancelled at the agent, and
    6. reader too slow   | RequestWithdrawn where no agent had started it (else the agent
    7. runs diverged     | publishes RequestEnded)
    8. shutdown          +

A restarted NATS server has lost its memory stream, so after every reconnect all open requests
are queued again under their ids; the queue drops those that it still has. Chunks can be lost
while a connection is away (core NATS delivers at most once), and an agent that finds no
listener cancels: then the request is run again under a new id, ``<id>-r2``, with the same seed,
and `Answer` skips what the client already has.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Literal, TypeAlias

import msgspec

from schemas.events import RequestWithdrawn, kind_of
from schemas.names import cancel_subject, event_subject
from schemas.requests import (
    CancelRequest,
    EmbedInput,
    EmbedRequest,
    GenerateRequest,
    Prompt,
    Request,
    SamplingParams,
)
from schemas.stream import Chunk, Failed, Finished, Started, Tokens, Vectors
from services.api import errors
from services.api.answer import Diverged, Piece
from services.api.call import Background, Call, ClientLeft
from services.api.errors import ApiError
from services.api.waits import RetryAfter, unknown
from services.bus import Bus, BusError, QueueFull, WorkQueue
from services.bus.connection import Hook

log = logging.getLogger(__name__)

WithdrawReason: TypeAlias = Literal["client_left", "deadline", "model_failed", "shutdown"]

MAX_RUNS = 4  # then an error is the better answer
_RETRY_S = 0.5
_SETTLE_S = 0.05  # an agent that pulled a request just before it was withdrawn says so by then
_REMEMBERED = 2048  # requests given up, in case an agent had just pulled one


class Relay:
    """Owns every open request of this process."""

    def __init__(
        self,
        bus: Bus,
        timeout_s: float,
        max_queued_per_model: int,
        retry_after_s: RetryAfter = unknown,
    ) -> None:
        self._bus = bus
        self._retry_after_s = retry_after_s
        self._queue = WorkQueue(bus)
        self._timeout_s = timeout_s
        self._max_queued = max_queued_per_model
        self._calls: dict[str, Call] = {}
        self._leaving: dict[str, Call] = {}  # being taken back right now
        self._given_up: dict[str, str] = {}  # request id -> model, oldest first
        self._decoder: msgspec.json.Decoder[Chunk] = msgspec.json.Decoder(Chunk)
        self._background = Background()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False
        self._unsubscribe: Hook | None = None
        self._undo_hook: Callable[[], None] | None = None

    async def start(self) -> None:
        """Listen for replies. After this, `open` may be called."""
        self._unsubscribe = await self._bus.listen(f"{self._bus.inbox}.r.*", self._on_reply)
        self._undo_hook = self._bus.on_reconnect(self._queue_again)

    async def open(
        self,
        request_id: str,
        model: str,
        prompt: Prompt,
        sampling: SamplingParams,
        *,
        tenant: str = "",
    ) -> Call:
        """Queue a request. Raises ApiError where it can not be queued."""
        now = time.time()
        return await self._open(
            GenerateRequest(
                request_id=request_id,
                model=model,
                klass="interactive",
                prompt=prompt,
                sampling=sampling,
                reply_to=f"{self._bus.inbox}.r.{request_id}",
                created_at=now,
                deadline_at=now + self._timeout_s,
                tenant=tenant,
            )
        )

    async def open_embed(
        self,
        request_id: str,
        model: str,
        inputs: tuple[EmbedInput, ...],
        dimensions: int | None,
        *,
        tenant: str = "",
    ) -> Call:
        """Queue a request for embeddings. Raises ApiError where it can not be queued."""
        now = time.time()
        return await self._open(
            EmbedRequest(
                request_id=request_id,
                model=model,
                klass="interactive",
                inputs=inputs,
                reply_to=f"{self._bus.inbox}.r.{request_id}",
                created_at=now,
                deadline_at=now + self._timeout_s,
                dimensions=dimensions,
                tenant=tenant,
            )
        )

    async def _open(self, request: Request) -> Call:
        if self._closing:
            raise errors.shutting_down()
        if not self._bus.is_connected:
            raise errors.bus_unavailable()
        request_id, model = request.request_id, request.model
        call = Call(request)
        self._calls[request_id] = call
        self._idle.clear()
        loop = asyncio.get_running_loop()
        call.timer = loop.call_later(self._timeout_s, self._on_deadline, call)
        # A task of its own: the HTTP side may be cancelled, but a request that reached the
        # queue must have its sequence number known, or it could not be withdrawn.
        queueing = self._background.run(call, self._enqueue(call, request_id))
        try:
            await asyncio.shield(queueing)
        except QueueFull as error:
            if not call.ended:
                self._drop(call, error)
            retry_after_s = self._retry_after_s(model)
            raise errors.queue_full(model, self._max_queued, retry_after_s) from error
        except BusError as error:
            log.warning("request %s for %s was not queued: %s", request_id, model, error)
            # It may have been stored all the same, only the answer was lost: take it back.
            self._give_up(call, errors.bus_unavailable(), None)
            raise errors.bus_unavailable() from error
        except asyncio.CancelledError:
            self.client_left(call)
            raise
        return call

    def client_left(self, call: Call) -> None:
        """The HTTP client is gone; safe to call at any time (way 3)."""
        self._give_up(call, ClientLeft(), "client_left")

    def model_failed(self, model: str, reason: str) -> None:
        """End what waits for ``model`` and has not been started (way 5)."""
        retry_after_s = self._retry_after_s(model)
        for call in list(self._calls.values()):
            if call.model == model and call.started is None:
                error = errors.model_unavailable(model, reason, retry_after_s)
                self._give_up(call, error, "model_failed")

    async def drain(self, grace_s: float) -> None:
        """Take no more; let open requests end for ``grace_s`` seconds, then end them (way 8)."""
        self._closing = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace_s)
        if self._calls:
            log.warning("ending %d requests: the server shuts down", len(self._calls))
        for call in list(self._calls.values()):
            self._give_up(call, errors.shutting_down(), "shutdown")

    async def close(self) -> None:
        """After `drain`: finish taking requests back, stop listening."""
        if self._undo_hook:
            self._undo_hook()
        await self._background.wait(5)
        if self._unsubscribe:
            await self._unsubscribe()

    # -- chunks in -------------------------------------------------------------------------

    def _on_reply(self, subject: str, data: bytes, headers: bytes, reply: str) -> None:
        """Called for every token of every stream: what has to wait does so beside it."""
        request_id = subject.rsplit(".", 1)[1]
        try:
            chunk = self._decoder.decode(data)
        except msgspec.DecodeError as error:
            log.error("request %s: unreadable chunk: %s", request_id, error)
            return  # its tokens will be missed at the end, and the request runs again
        if call := self._calls.get(request_id):
            if not call.answer.is_stale(chunk.request_id, chunk.attempt):
                self._on_chunk(call, chunk)
            return
        if isinstance(chunk, Started) and (leaving := self._leaving.get(request_id)):
            leaving.started = chunk
        if isinstance(chunk, Started | Tokens | Vectors) and request_id in self._given_up:
            # Its agent pulled it before it was withdrawn, and saw the cancellation too early.
            model = self._given_up.pop(request_id)
            self._background.run(None, self._cancel(model, chunk.request_id))

    def _on_chunk(self, call: Call, chunk: Chunk) -> None:
        match chunk:
            case Tokens():
                self._on_tokens(call, chunk)
            case Vectors():
                if call.vectors:
                    call.vectors.add(chunk)
            case Started():
                call.started = chunk
            case Finished() if chunk.finish_reason == "cancelled":
                self._run_again(call, chunk.request_id, "the agent cancelled it")
            case Finished():
                self._on_finished(call, chunk)
            case Failed() if chunk.code == "cancelled":
                self._run_again(call, chunk.request_id, chunk.message)
            case Failed() if chunk.request_id == call.newest_run:
                retry_after_s = self._retry_after_s(call.model)
                error = errors.from_failure(chunk.code, chunk.message, call.param, retry_after_s)
                self._end(call, error, chunk.request_id)

    def _on_tokens(self, call: Call, chunk: Tokens) -> None:
        try:
            piece = call.answer.add(chunk)
        except Diverged as error:
            self._give_up(call, errors.engine_failed(str(error)), None)
            return
        if piece is not None and (too_slow := call.push(piece, len(chunk.token_ids))):
            self._give_up(call, too_slow, None)

    def _on_finished(self, call: Call, chunk: Finished) -> None:
        if call.vectors and (missing := call.vectors.num_missing):
            self._run_again(call, chunk.request_id, f"{missing} vectors were lost on the way")
            return
        if missing := call.answer.missing(chunk):
            words = f"{missing} of its {chunk.completion_tokens} tokens were lost on the way"
            self._run_again(call, chunk.request_id, words)
            return
        if text := call.answer.finish(chunk):
            call.push(Piece(text), 0)
        self._end(call, chunk, chunk.request_id)

    # -- further runs ----------------------------------------------------------------------

    def _run_again(self, call: Call, run: str, why: str) -> None:
        """``run`` ended without a complete answer, which is nobody's fault: once more."""
        if run != call.newest_run:
            return  # a newer run is under way
        if len(call.runs) >= MAX_RUNS:
            words = f"{why}; the request was run {len(call.runs)} times. Please try again."
            self._give_up(call, errors.engine_failed(words), None)
            return
        next_run = f"{call.request_id}-r{len(call.runs) + 1}"
        log.warning("request %s runs again as %s: %s", run, next_run, why)
        call.runs[next_run] = None
        self._background.run(call, self._enqueue_patiently(call, next_run))

    async def _queue_again(self) -> None:
        """After a reconnect. Sequence numbers of a restarted server start from 1 again."""
        for call in list(self._calls.values()):
            call.runs = dict.fromkeys(call.runs)
            call.answer.queued_again(call.newest_run)
            self._background.run(call, self._enqueue_patiently(call, call.newest_run))

    async def _enqueue_patiently(self, call: Call, run: str) -> None:
        """Queue a request that was admitted already: it waits for room, and for the server."""
        while not call.ended:
            try:
                await self._enqueue(call, run)
                break
            except BusError as error:
                log.warning("request %s is not queued again yet: %s", run, error)
                await asyncio.sleep(_RETRY_S)

    async def _enqueue(self, call: Call, run: str) -> None:
        call.runs.setdefault(run, None)
        seq = await self._queue.enqueue(msgspec.structs.replace(call.request, request_id=run))
        if run not in call.runs:
            return  # its answer was complete before the queue's word was here
        call.runs[run] = seq
        if call.ended:
            await self._take_back(call, run)

    # -- ends ------------------------------------------------------------------------------

    def _on_deadline(self, call: Call) -> None:
        error = errors.deadline_exceeded(self._timeout_s, call.stage)
        self._give_up(call, error, "deadline")

    def _give_up(self, call: Call, cause: Exception, reason: WithdrawReason | None) -> None:
        """Ways 3 to 8: end ``call`` from this side. Does nothing where it has ended already."""
        if call.ended:
            return
        self._drop(call, cause)
        self._given_up[call.request_id] = call.model
        if len(self._given_up) > _REMEMBERED:
            del self._given_up[next(iter(self._given_up))]
        self._background.run(call, self._withdraw(call, list(call.runs), reason))

    def _end(self, call: Call, how: Finished | ApiError, run: str) -> None:
        """Ways 1 and 2: ``run`` has ended at its agent; stop the others, if there are any."""
        self._drop(call, how)
        call.runs.pop(run, None)
        if call.runs:
            self._background.run(call, self._withdraw(call, list(call.runs), None))

    def _drop(self, call: Call, how: Finished | Exception) -> None:
        call.end(how)
        del self._calls[call.request_id]
        if not self._calls:
            self._idle.set()

    async def _withdraw(self, call: Call, runs: list[str], reason: WithdrawReason | None) -> None:
        self._leaving[call.request_id] = call
        try:
            for run in runs:
                await self._take_back(call, run)
            if reason:
                await asyncio.sleep(_SETTLE_S)
        finally:
            del self._leaving[call.request_id]
        if reason and call.started is None:
            event = RequestWithdrawn(
                model=call.model, request_id=call.request_id, at=time.time(), reason=reason
            )
            await self._bus.publish(event_subject(kind_of(event), model=call.model), event)

    async def _take_back(self, call: Call, run: str) -> None:
        """Out of the queue first, so that whoever pulled it before gets the cancellation after."""
        seq = call.runs.get(run)
        # While the server is away the call would wait in memory, and could then hit another
        # request under the same number; a restarted server has forgotten this one anyway.
        if seq is not None and self._bus.is_connected:
            try:
                await self._queue.withdraw(seq)
            except BusError as error:
                log.warning("request %s could not be withdrawn: %s", run, error)
        await self._cancel(call.model, run)

    async def _cancel(self, model: str, run: str) -> None:
        await self._bus.publish(cancel_subject(model), CancelRequest(request_id=run, model=model))
