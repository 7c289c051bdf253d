"""Requests out to the queue, chunks in from the agents, and every way in which a request ends.

All replies come to ``<inbox>.r.<request id>`` under one wildcard subscription. A request is
open until exactly one of these ends it:

    1. Finished          complete                                 the agent has acknowledged it
    2. Failed            the agent's error, with its code         likewise
    3. client left       +
    4. deadline          |
    5. model failed      | taken back (`TakingBack`): withdrawn from the queue, cancelled at the
    6. reader too slow   | agent, and one terminal event, whoever is there to publish it
    7. runs diverged     |
    8. shutdown          |
    9. choice failed     +

Until then it is one stream, whatever happens to those who work on it (`Runs`).
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import TypeAlias

import msgspec

from schemas.requests import (
    EmbedInput,
    EmbedRequest,
    GenerateRequest,
    Prompt,
    Request,
    SamplingParams,
)
from schemas.stream import (
    Chunk,
    Failed,
    Finished,
    Resuming,
    Started,
    Tokens,
    Vectors,
)
from services.api import errors
from services.api.answer import Diverged, Piece
from services.api.call import Background, Call, ClientLeft
from services.api.errors import ApiError
from services.api.runs import Runs
from services.api.taking_back import TakingBack, WithdrawReason
from services.api.waits import RetryAfter, unknown
from services.bus import Bus, BusError, QueueFull, WorkQueue
from services.bus.connection import Hook

log = logging.getLogger(__name__)

Admit: TypeAlias = Callable[[Request], None]
Ended: TypeAlias = Callable[[Call], None]

TIMEOUT_SETTING = "api.request_timeout_s"


class Relay:
    """Owns every open request of this process.

    ``admit`` may refuse one (it raises ApiError); ``ended`` is called with each that was admitted.
    """

    def __init__(
        self,
        bus: Bus,
        timeout_s: float,
        max_queued_per_model: int,
        retry_after_s: RetryAfter = unknown,
        *,
        admit: Admit = lambda request: None,
        ended: Ended = lambda call: None,
    ) -> None:
        self._bus = bus
        self._admit = admit
        self._ended = ended
        self._retry_after_s = retry_after_s
        self._timeout_s = timeout_s
        self.max_queued = max_queued_per_model
        self._calls: dict[str, Call] = {}
        self._decoder: msgspec.json.Decoder[Chunk] = msgspec.json.Decoder(Chunk)
        self._background = Background()
        queue = WorkQueue(bus)
        self._taking_back = TakingBack(bus, queue)
        what = (bus, queue, self._background, self._taking_back)
        self._runs = Runs(
            *what, lambda call, why: self._give_up(call, errors.engine_failed(why), None)
        )
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False
        self._unsubscribe: Hook | None = None
        self._undo_hook: Callable[[], None] | None = None

    async def start(self) -> None:
        """Listen for replies. After this, `open` may be called."""
        self._unsubscribe = await self._bus.listen(f"{self._bus.inbox}.r.*", self._on_reply)
        self._undo_hook = self._bus.on_reconnect(self._on_reconnect)

    async def open(
        self,
        request_id: str,
        model: str,
        prompt: Prompt,
        sampling: SamplingParams,
        *,
        tenant: str = "",
        timeout_s: float | None = None,
    ) -> Call:
        """Queue a request. Raises ApiError where it can not be queued.

        ``timeout_s``: where the client waits no longer than that for the whole answer.
        """
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
                deadline_at=now + self._bound(timeout_s),
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
        timeout_s: float | None = None,
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
                deadline_at=now + self._bound(timeout_s),
                dimensions=dimensions,
                tenant=tenant,
            )
        )

    def _bound(self, timeout_s: float | None) -> float:
        return self._timeout_s if timeout_s is None else min(timeout_s, self._timeout_s)

    async def _open(self, request: Request) -> Call:
        if self._closing:
            raise errors.shutting_down()
        if not self._bus.is_connected:
            raise errors.bus_unavailable()
        self._admit(request)
        request_id, model = request.request_id, request.model
        call = Call(request)
        self._calls[request_id] = call
        self._idle.clear()
        loop = asyncio.get_running_loop()
        call.timer = loop.call_later(call.timeout_s, self._on_deadline, call)
        # A task of its own: the HTTP side may be cancelled, but a request that reached the
        # queue must have its sequence number known, or it could not be withdrawn.
        queueing = self._background.run(call, self._runs.enqueue(call, request_id))
        try:
            await asyncio.shield(queueing)
        except QueueFull as error:
            if not call.ended:
                self._drop(call, error)
            retry_after_s = self._retry_after_s(model)
            raise errors.queue_full(model, self.max_queued, retry_after_s) from error
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

    def choice_failed(self, call: Call) -> None:
        """Its answer has come to an error elsewhere: nobody reads this part of it (way 9)."""
        self._give_up(call, ClientLeft(), "choice_failed")

    def model_failed(self, model: str, reason: str) -> None:
        """End what waits for ``model`` and has not been started (way 5)."""
        retry_after_s = self._retry_after_s(model)
        for call in list(self._calls.values()):
            if call.model == model and call.started is None:
                error = errors.model_unavailable(model, reason, retry_after_s)
                self._give_up(call, error, "model_failed")

    def model_gone(self, model: str, reason: str) -> None:
        """End whatever is for ``model``: nobody has it any more (way 5)."""
        for call in list(self._calls.values()):
            if call.model == model:
                self._give_up(call, errors.model_unavailable(model, reason), "model_failed")

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
            return  # its tokens will be missed, and the request runs again
        call = self._calls.get(request_id)
        if isinstance(chunk, Resuming):
            self._runs.resume(request_id, call, chunk, reply)
        elif call is None:
            if model := self._taking_back.on_chunk(request_id, chunk):
                self._background.run(None, self._taking_back.cancel(model, chunk.request_id))
        elif not call.answer.is_stale(chunk.request_id, chunk.attempt):
            self._on_chunk(call, chunk)

    def _on_chunk(self, call: Call, chunk: Chunk) -> None:
        match chunk:
            case Tokens():
                self._on_tokens(call, chunk)
            case Vectors():
                if call.vectors:
                    call.vectors.add(chunk)
            case Started():
                call.start(chunk)
            case Finished() if chunk.finish_reason == "cancelled":
                self._runs.again(call, chunk.request_id, "the agent cancelled it")
            case Finished():
                self._on_finished(call, chunk)
            case Failed() if chunk.code == "cancelled":
                self._runs.again(call, chunk.request_id, chunk.message)
            case Failed() if chunk.request_id == call.newest_run:
                retry_after_s = self._retry_after_s(call.model)
                param = call.param_of(chunk.code)
                error = errors.from_failure(chunk.code, chunk.message, param, retry_after_s)
                if chunk.code == "deadline_exceeded":  # the agent does not know whose it is
                    error = self._too_late(call)
                self._end(call, error, chunk.request_id)

    def _on_tokens(self, call: Call, chunk: Tokens) -> None:
        if call.answer.has_gap_before(chunk):
            self._runs.again(call, chunk.request_id, "tokens were lost on the way")
            return
        try:
            piece = call.answer.add(chunk)
        except Diverged as error:
            self._give_up(call, errors.engine_failed(str(error)), None)
            return
        if piece is not None and (too_slow := call.push(piece, len(chunk.token_ids))):
            self._give_up(call, too_slow, None)

    def _on_finished(self, call: Call, chunk: Finished) -> None:
        if call.vectors and (missing := call.vectors.num_missing):
            self._runs.again(call, chunk.request_id, f"{missing} vectors were lost on the way")
            return
        if missing := call.answer.missing(chunk):
            words = f"{missing} of its {chunk.completion_tokens} tokens were lost on the way"
            self._runs.again(call, chunk.request_id, words)
            return
        if text := call.answer.finish(chunk):
            call.push(Piece(text), 0)
        self._end(call, chunk, chunk.request_id)

    async def _on_reconnect(self) -> None:
        for call in list(self._calls.values()):
            self._runs.recover(call)

    # -- ends ------------------------------------------------------------------------------

    def _on_deadline(self, call: Call) -> None:
        self._give_up(call, self._too_late(call), "deadline")

    def _too_late(self, call: Call) -> ApiError:
        whose = "the request's timeout" if call.timeout_s < self._timeout_s else TIMEOUT_SETTING
        return errors.deadline_exceeded(call.timeout_s, whose, call.stage)

    def _give_up(self, call: Call, cause: Exception, reason: WithdrawReason | None) -> None:
        """Ways 3 to 9: end ``call`` from this side. Does nothing where it has ended already."""
        if call.ended:
            return
        self._drop(call, cause)
        self._taking_back.note_given_up(call)
        work = self._taking_back.take_back(call, list(call.runs), reason)
        self._background.run(call, work)

    def _end(self, call: Call, how: Finished | ApiError, run: str) -> None:
        """Ways 1 and 2: ``run`` has ended at its agent; stop the others, if there are any."""
        self._drop(call, how)
        self._taking_back.note_end(call)
        call.runs.pop(run, None)
        if call.runs:
            self._background.run(call, self._taking_back.take_back(call, list(call.runs), None))

    def _drop(self, call: Call, how: Finished | Exception) -> None:
        call.end(how)
        del self._calls[call.request_id]
        self._ended(call)
        if not self._calls:
            self._idle.set()
