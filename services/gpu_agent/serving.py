"""Requests in flight: queue delivery -> worker -> token chunks -> acknowledgement.

    on_delivery   Started to the api, Submit to the worker          RequestStarted
                  (delivered again: first `Resumption` asks what the api has of it)
    announce      Started to the api, where the weights were still arriving then
    on_produced   Tokens to the api
    on_embedded   Vectors to the api
    on_done       Finished to the api, ack to the queue             RequestEnded
    on_broke      Failed to the api, ack to the queue               RequestEnded
    worker_died   nak: the queue delivers again, here or elsewhere; `Suspects` says which
                  ones are given up: Failed to the api, ack         RequestEnded
    hand_back     nak, for one replica whose weights failed or were dropped
    preempt       nak, for those of one replica that the worker has not got yet
    _make_room    nak, for one of class batch whose slot an interactive request takes
    suspended     nothing is told: the others wait in the worker until `resumed`
    release       nothing: another agent goes on with it
    finish        nak: whoever gets it next ends it

Requests of class batch are answered as one: nobody waits for their tokens one by one.

Where nobody listens to the chunks any more (the api died, or gave up), the server says so, and
the request is cancelled.

A request that ended here and is delivered again (its acknowledgement was lost with a
connection) is not run again: its last chunk is sent once more, in case that was lost too.
"""

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from typing import Literal, TypeAlias

import msgspec

from schemas.events import RequestEnded, RequestStarted
from schemas.requests import GenerateRequest
from schemas.stream import (
    Chunk,
    ErrorCode,
    Failed,
    RequestTiming,
    ResumeFrom,
    Tokens,
    Vectors,
)
from services import telemetry
from services.bus import Bus, BusError, Delivery
from services.bus.connection import RawMessage
from services.gpu_agent import ipc
from services.gpu_agent.replicas import Replica
from services.gpu_agent.reporter import Reporter
from services.gpu_agent.resuming import Resumption
from services.gpu_agent.suspects import MAX_CRASHES, Suspects
from services.gpu_agent.telling import InFlight, Telling

log = logging.getLogger(__name__)

_REMEMBERED = 4096
_COME_BACK_S = 1.0  # a batch request that found no slot: no sooner

Outcome: TypeAlias = Literal["stop", "length", "cancelled", "failed"]


class Serving:
    """The agent's requests. ``send``: to the worker; ``freed``: a replica has a free slot."""

    def __init__(
        self,
        bus: Bus,
        gpu: str,
        reporter: Reporter,
        send: Callable[[ipc.ToWorker], None],
        freed: Callable[[Replica], Awaitable[None]],
    ) -> None:
        self._bus = bus
        self._gpu = gpu
        self._reporter = reporter
        self._idle = asyncio.Event()
        self._idle.set()
        self._finishing = False
        self._send = send
        self._freed = freed
        self._gone_inbox = f"{bus.inbox}.gone"
        self._telling = Telling(bus, gpu, reporter, self._gone_inbox)
        self._resumption = Resumption(bus, gpu, self._on_verdict)
        self._suspects = Suspects()
        self._line: deque[InFlight] = deque()  # admitted, not submitted yet
        self._ended: OrderedDict[str, Chunk] = OrderedDict()  # lately ended, newest last
        self.in_flight: dict[str, InFlight] = {}

    async def start(self) -> None:
        await self._bus.subscribe_raw(f"{self._gone_inbox}.*", self._on_gone)
        await self._resumption.start()
        self._bus.on_reconnect(self._on_reconnect)

    # -- from the queue ------------------------------------------------------------------

    async def on_delivery(self, replica: Replica, delivery: Delivery) -> None:
        request = delivery.request
        if known := self.in_flight.get(request.request_id):
            delivery.request = known.request  # with the tokens that it went on from
            known.delivery = delivery  # delivered again after a reconnect: go on, answer this one
            return
        if last := self._ended.get(request.request_id):
            await self._telling.publish(request, last)
            await self._settle(delivery.ack())
            return
        now = time.time()
        attempt = request.attempts_before + delivery.num_delivered
        flight = InFlight(delivery, replica, attempt, pulled_at=now)
        if now >= request.deadline_at:
            await self._fail(flight, "deadline_exceeded", "the request's deadline passed in queue")
        elif not replica.is_open:
            await self._settle(delivery.nak())
        elif request.klass == "batch" and not replica.num_free("batch"):
            await self._settle(delivery.nak(_COME_BACK_S))
        else:
            if not replica.num_free("batch") and replica.batch_in_flight:
                await self._make_room(replica)
            self.in_flight[request.request_id] = flight
            self._idle.clear()
            replica.in_flight.add(request.request_id)
            if request.klass == "batch":
                replica.batch_in_flight[request.request_id] = None
            elif attempt > 1:
                self._resumption.ask(flight)
                return
            self._line.append(flight)
            await self._submit_line()

    async def _on_verdict(self, flight: InFlight, known: ResumeFrom) -> None:
        """What the api has of a request that may have run before."""
        request = flight.request
        if self.in_flight.get(request.request_id) is not flight:
            return  # cancelled, or handed back, meanwhile
        if known.verdict == "cancel":
            await self._fail(flight, "cancelled", "nobody waits for it any more", "cancelled")
            return
        if known.verdict == "drop":
            await self._drop(flight)
            await self._settle(flight.delivery.ack())
            return
        if isinstance(request, GenerateRequest):
            flight.delivery.request = msgspec.structs.replace(
                request, prefix_token_ids=known.token_ids
            )
        self._line.append(flight)
        await self._submit_line()

    async def _make_room(self, replica: Replica) -> None:
        """The request of class batch that came last gives its slot back, and is run again later.

        The least work is lost with it, and what it had in the KV cache may still be there then.
        """
        flight = self.in_flight[next(reversed(replica.batch_in_flight))]
        if flight.is_submitted:
            self._send(ipc.Cancel(flight.request.request_id))
        self._forget(flight)
        await self._settle(flight.delivery.nak(_COME_BACK_S))

    async def _submit_line(self) -> None:
        """Give the worker what it may have now, first come first served."""
        while self._line:
            running = [name for name, other in self.in_flight.items() if other.is_running]
            if not self._suspects.may_join(self._line[0].request.request_id, running):
                return
            await self._submit(self._line.popleft())

    async def _submit(self, flight: InFlight) -> None:
        # Handed to the worker before anything is awaited: a cancellation, or the worker's
        # death, finds the request either in line or in the worker, never in between.
        request = flight.request
        flight.is_submitted = True
        self._send(ipc.Submit(request))
        now = time.time()
        if flight.replica.state == "resident":
            await self._telling.announce(flight)
        wait_s = now - request.created_at
        await self._reporter.event(
            RequestStarted(
                self._gpu,
                request.model,
                request.request_id,
                now,
                flight.attempt,
                wait_s,
                request.tenant,
                request.klass,
            )
        )
        self._telling.span(flight, telemetry.SPAN_QUEUE_WAIT, request.created_at, now)

    async def announce(self, replica: Replica) -> None:
        """``replica`` has arrived: tell whoever waited for it."""
        for flight in self._flights_of(replica):
            if flight.is_submitted:
                await self._telling.announce(flight)

    async def cancel(self, request_id: str) -> None:
        flight = self.in_flight.get(request_id)
        if flight and flight.is_submitted:
            self._send(ipc.Cancel(request_id))
        elif flight:
            await self._fail(flight, "cancelled", "cancelled before it began", "cancelled")

    async def release(self, request_id: str) -> None:
        """Another agent goes on with it, and will end it."""
        if flight := self.in_flight.get(request_id):
            log.info("request %s goes on at another agent", request_id)
            if flight.is_submitted:
                self._send(ipc.Cancel(request_id))
            await self._drop(flight)

    async def _on_gone(self, raw: RawMessage) -> None:
        request_id = raw.subject.rsplit(".", 1)[1]
        if raw.headers.get("Status") == "503" and request_id in self.in_flight:
            log.info("nobody waits for request %s any more: cancelled", request_id)
            await self.cancel(request_id)

    async def _on_reconnect(self) -> None:
        for flight in self.in_flight.values():
            flight.delivery.invalidate()

    async def keep_alive(self) -> None:
        """Tell the queue that all of these are still being worked on."""
        for flight in list(self.in_flight.values()):
            await self._settle(flight.delivery.in_progress())

    # -- from the worker -----------------------------------------------------------------

    def on_begun(self, message: ipc.Begun) -> None:
        if flight := self.in_flight.get(message.request_id):
            flight.begun_at = message.at
            flight.prompt_tokens = message.prompt_tokens

    async def on_produced(self, message: ipc.Produced) -> None:
        if flight := self.in_flight.get(message.request_id):
            flight.num_tokens = message.index + len(message.token_ids)
            await self._telling.first_token(flight)
            chunk = Tokens(
                message.request_id,
                flight.attempt,
                message.index,
                message.token_ids,
                message.text,
                message.logprobs,
                message.prompt,
            )
            await self._telling.tokens(flight, chunk)

    async def on_embedded(self, message: ipc.Embedded) -> None:
        if flight := self.in_flight.get(message.request_id):
            await self._telling.first_token(flight)
            chunk = Vectors(
                message.request_id,
                flight.attempt,
                message.index,
                message.dimensions,
                message.data,
            )
            await self._telling.publish(flight.request, chunk)

    async def on_done(self, message: ipc.Done) -> None:
        flight = self.in_flight.get(message.request_id)
        if not flight:
            return
        await self._telling.tell_held(flight)
        chunk = self._telling.finished(flight, message)
        flight.num_tokens = message.completion_tokens
        flight.prompt_tokens = message.prompt_tokens
        await self._telling.announce(flight)  # one that was cancelled while its weights arrived
        await self._end(flight, chunk, message.finish_reason, chunk.timing)

    async def on_broke(self, message: ipc.Broke) -> None:
        if flight := self.in_flight.get(message.request_id):
            outcome: Outcome = "cancelled" if message.code == "cancelled" else "failed"
            await self._fail(flight, message.code, message.message, outcome)

    async def worker_died(self, reason: str) -> None:
        """Hand every request back to the queue, except those that keep killing the worker."""
        flights = list(self.in_flight.values())
        guilty = [
            flight
            for flight in flights
            if flight.is_running and self._suspects.blame(flight.request.request_id)
        ]
        for flight in guilty:
            self._forget(flight)
        await self._return([flight for flight in flights if flight not in guilty])
        for flight in guilty:
            words = f"{reason}, {MAX_CRASHES} times while it worked on this request"
            await self._fail(flight, "engine_failed", words)

    async def hand_back(self, replica: Replica) -> None:
        """Nothing of ``replica``'s can be used: its requests go back to the queue.

        The worker may still keep those that were suspended. It is to forget them: somebody else
        ends them, or it gets them anew.
        """
        flights = self._flights_of(replica)
        for flight in flights:
            if flight.is_submitted:
                self._send(ipc.Cancel(flight.request.request_id))
        await self._return(flights)
        await self._submit_line()

    async def end_all(self, replica: Replica, reason: str) -> None:
        """Its requests end with an error, wherever they are."""
        for flight in self._flights_of(replica):
            if flight.is_submitted:
                self._send(ipc.Cancel(flight.request.request_id))
        for flight in self._flights_of(replica):
            if self.in_flight.get(flight.request.request_id) is flight:
                await self._fail(flight, "model_unavailable", reason)

    async def finish(self, grace_s: float) -> None:
        """At shutdown: wait up to ``grace_s`` seconds; what still runs goes back to the queue,
        and what is suspended at once: nothing is swapped in any more.
        """
        self._finishing = True
        await self._return([f for f in self.in_flight.values() if f.is_suspended])
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace_s)
        await self._return(list(self.in_flight.values()))

    # -- preemption ------------------------------------------------------------------------

    async def preempt(self, replica: Replica) -> None:
        """``replica`` is told to leave with its requests. Those that the worker has not got go
        back to the queue: in line they would hold up others until the model is back.
        """
        await self._return([f for f in self._flights_of(replica) if not f.is_submitted])

    async def suspended(self, replica: Replica) -> None:
        """``replica`` has left the device; its requests wait in the worker for its return."""
        for flight in self._flights_of(replica):
            flight.is_suspended = True
        if self._finishing:
            await self._return(self._flights_of(replica))
        await self._submit_line()  # a request that must run alone may be now

    def resumed(self, replica: Replica) -> None:
        """``replica`` is coming back: the worker goes on with its requests."""
        for flight in self._flights_of(replica):
            flight.is_suspended = False

    def _flights_of(self, replica: Replica) -> list[InFlight]:
        names = sorted(replica.in_flight)
        return [flight for name in names if (flight := self.in_flight.get(name))]

    async def _return(self, flights: list[InFlight]) -> None:
        """Back to the queue. All are forgotten before anything is awaited: none can be submitted
        or answered meanwhile, and what the worker still says of them finds nobody.
        """
        for flight in flights:
            self._forget(flight)
        for flight in flights:
            await self._settle(flight.delivery.nak())

    # -- ends ----------------------------------------------------------------------------

    async def _fail(
        self, flight: InFlight, code: ErrorCode, words: str, outcome: Outcome = "failed"
    ) -> None:
        chunk = Failed(flight.request.request_id, flight.attempt, code, words)
        wait_s = flight.pulled_at - flight.request.created_at
        await self._end(flight, chunk, outcome, RequestTiming(queue_wait_s=wait_s), code)

    async def _end(
        self,
        flight: InFlight,
        chunk: Chunk,
        outcome: Outcome,
        timing: RequestTiming,
        error: ErrorCode | None = None,
    ) -> None:
        """The one place where a request ends: chunk, ack, event, free slot, in that order."""
        self._forget(flight)
        self._suspects.clear(flight.request.request_id)
        self._ended[flight.request.request_id] = chunk
        while len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)
        await self._telling.publish(flight.request, chunk)
        await self._settle(flight.delivery.ack())
        await self._reporter.event(
            RequestEnded(
                gpu=self._gpu,
                model=flight.request.model,
                request_id=flight.request.request_id,
                at=time.time(),
                outcome=outcome,
                prompt_tokens=flight.prompt_tokens,
                completion_tokens=max(flight.num_tokens, flight.num_prefix),
                timing=timing,
                error=error,
                tenant=flight.request.tenant,
                prefix_tokens=flight.num_prefix,
                klass=flight.request.klass,
            )
        )
        await self._freed(flight.replica)
        await self._submit_line()

    async def _drop(self, flight: InFlight) -> None:
        """Forget it without a word; its slot is free."""
        self._forget(flight)
        await self._freed(flight.replica)
        await self._submit_line()

    def _forget(self, flight: InFlight) -> None:
        request_id = flight.request.request_id
        self.in_flight.pop(request_id, None)
        if flight in self._line:
            self._line.remove(flight)
        if not self.in_flight:
            self._idle.set()
        flight.replica.in_flight.discard(request_id)
        flight.replica.batch_in_flight.pop(request_id, None)

    # A full or closed bus loses what is said; state moves on all the same: the queue delivers
    # again what was not acknowledged.

    async def _settle(self, answer: Awaitable[None]) -> None:
        try:
            await answer
        except BusError as error:
            log.warning("an answer to the queue was lost: %s", error)
