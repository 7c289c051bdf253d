"""Requests in flight: queue delivery -> worker -> token chunks -> acknowledgement.

    on_delivery   Started to the api, Submit to the worker          RequestStarted
    on_produced   Tokens to the api
    on_done       Finished to the api, ack to the queue             RequestEnded
    on_broke      Failed to the api, ack to the queue               RequestEnded
    worker_died   nak: the queue delivers again, here or elsewhere; after
                  MAX_CRASHES deaths under the same request: Failed RequestEnded

Every chunk is published with a reply subject of ours: where nobody listens any more (the
api died, or gave up), the server answers "no responders" and the request is cancelled.
"""

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

from schemas.events import RequestEnded, RequestStarted
from schemas.requests import GenerateRequest
from schemas.stream import Chunk, ErrorCode, Failed, Finished, RequestTiming, Started, Tokens
from services import telemetry
from services.bus import Bus, Delivery
from services.bus.connection import RawMessage
from services.gpu_agent import ipc
from services.gpu_agent.replicas import Replica
from services.gpu_agent.reporter import Reporter

log = logging.getLogger(__name__)

_REMEMBERED = 4096
MAX_CRASHES = 2  # a request under which the worker died this often is not tried again

Outcome = Literal["stop", "length", "cancelled", "failed"]


@dataclass
class InFlight:
    delivery: Delivery
    replica: Replica
    attempt: int
    pulled_at: float
    begun_at: float = 0.0
    prompt_tokens: int = 0
    num_tokens: int = 0

    @property
    def request(self) -> GenerateRequest:
        return self.delivery.request


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
        self._send = send
        self._freed = freed
        self._gone_inbox = f"{bus.inbox}.gone"
        self._crashes: dict[str, int] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()  # lately ended, newest last
        self.in_flight: dict[str, InFlight] = {}

    async def start(self) -> None:
        await self._bus.subscribe_raw(f"{self._gone_inbox}.*", self._on_gone)
        self._bus.on_reconnect(self._on_reconnect)

    # -- from the queue ------------------------------------------------------------------

    async def on_delivery(self, replica: Replica, delivery: Delivery) -> None:
        request = delivery.request
        if known := self.in_flight.get(request.request_id):
            known.delivery = delivery  # delivered again after a reconnect: go on, answer this one
            return
        if request.request_id in self._ended:
            await delivery.ack()  # it ended while the connection was away
            return
        now = time.time()
        flight = InFlight(delivery, replica, attempt=delivery.num_delivered, pulled_at=now)
        if now >= request.deadline_at:
            await self._fail(flight, "deadline_exceeded", "the request's deadline passed in queue")
            return
        if replica.state != "resident":
            await delivery.nak()
            return
        self.in_flight[request.request_id] = flight
        self._idle.clear()
        replica.in_flight.add(request.request_id)
        start = replica.start_kind(request.created_at)
        swap = None if start == "warm" else replica.last_swap_in
        await self._chunk(
            flight, Started(request.request_id, self._gpu, flight.attempt, start, swap)
        )
        self._send(ipc.Submit(request))
        wait_s = now - request.created_at
        await self._reporter.event(
            RequestStarted(
                self._gpu, request.model, request.request_id, now, flight.attempt, wait_s
            )
        )
        self._span(flight, telemetry.SPAN_QUEUE_WAIT, request.created_at, now)

    async def cancel(self, request_id: str) -> None:
        if request_id in self.in_flight:
            self._send(ipc.Cancel(request_id))

    async def _on_gone(self, raw: RawMessage) -> None:
        request_id = raw.subject.rsplit(".", 1)[1]
        if raw.headers.get("Status") == "503" and request_id in self.in_flight:
            log.info("nobody waits for request %s any more: cancelled", request_id)
            self._send(ipc.Cancel(request_id))

    async def _on_reconnect(self) -> None:
        for flight in self.in_flight.values():
            flight.delivery.invalidate()

    async def keep_alive(self) -> None:
        """Tell the queue that all of these are still being worked on."""
        for flight in list(self.in_flight.values()):
            await flight.delivery.in_progress()

    # -- from the worker -----------------------------------------------------------------

    def on_begun(self, message: ipc.Begun) -> None:
        if flight := self.in_flight.get(message.request_id):
            flight.begun_at = message.at
            flight.prompt_tokens = message.prompt_tokens

    async def on_produced(self, message: ipc.Produced) -> None:
        if flight := self.in_flight.get(message.request_id):
            flight.num_tokens = message.index + len(message.token_ids)
            chunk = Tokens(
                message.request_id,
                flight.attempt,
                message.index,
                message.token_ids,
                message.text,
            )
            await self._chunk(flight, chunk)

    async def on_done(self, message: ipc.Done) -> None:
        flight = self.in_flight.get(message.request_id)
        if not flight:
            return
        timing = RequestTiming(
            queue_wait_s=flight.pulled_at - flight.request.created_at,
            prefill_s=message.prefill_s,
            decode_s=message.decode_s,
        )
        chunk = Finished(
            message.request_id,
            flight.attempt,
            message.finish_reason,
            message.prompt_tokens,
            message.completion_tokens,
            timing,
            message.text,
        )
        prefilled_at = flight.begun_at + message.prefill_s
        if flight.begun_at:
            self._span(flight, telemetry.SPAN_PREFILL, flight.begun_at, prefilled_at)
            self._span(flight, telemetry.SPAN_DECODE, prefilled_at, prefilled_at + message.decode_s)
        flight.num_tokens = message.completion_tokens
        flight.prompt_tokens = message.prompt_tokens
        await self._end(flight, chunk, message.finish_reason, timing)

    async def on_broke(self, message: ipc.Broke) -> None:
        if flight := self.in_flight.get(message.request_id):
            outcome: Outcome = "cancelled" if message.code == "cancelled" else "failed"
            await self._fail(flight, message.code, message.message, outcome)

    async def worker_died(self, reason: str) -> None:
        """Hand every request back to the queue, except those that keep killing the worker."""
        for request_id, flight in list(self.in_flight.items()):
            crashes = self._crashes[request_id] = self._crashes.get(request_id, 0) + 1
            if crashes >= MAX_CRASHES:
                words = f"{reason}, {crashes} times while it worked on this request"
                await self._fail(flight, "engine_failed", words)
            else:
                self._forget(flight)
                await flight.delivery.nak()

    async def finish(self, grace_s: float) -> None:
        """At shutdown: wait up to ``grace_s`` seconds; what still runs goes back to the queue."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace_s)
        for flight in list(self.in_flight.values()):
            self._forget(flight)
            await flight.delivery.nak()

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
        self._crashes.pop(flight.request.request_id, None)
        self._ended[flight.request.request_id] = None
        while len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)
        await self._chunk(flight, chunk)
        await flight.delivery.ack()
        await self._reporter.event(
            RequestEnded(
                gpu=self._gpu,
                model=flight.request.model,
                request_id=flight.request.request_id,
                at=time.time(),
                outcome=outcome,
                prompt_tokens=flight.prompt_tokens,
                completion_tokens=flight.num_tokens,
                timing=timing,
                error=error,
            )
        )
        await self._freed(flight.replica)

    def _forget(self, flight: InFlight) -> None:
        request_id = flight.request.request_id
        self.in_flight.pop(request_id, None)
        if not self.in_flight:
            self._idle.set()
        flight.replica.in_flight.discard(request_id)

    async def _chunk(self, flight: InFlight, chunk: Chunk) -> None:
        request = flight.request
        reply = f"{self._gone_inbox}.{request.request_id}"
        await self._bus.publish(request.reply_to, chunk, reply=reply)

    def _span(self, flight: InFlight, name: str, start: float, end: float) -> None:
        self._reporter.span(
            name,
            flight.delivery.context,
            start,
            end,
            flight.request.model,
            request_id=flight.request.request_id,
            attempt=flight.attempt,
        )
