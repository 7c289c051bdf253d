"""The request queues: JetStream work queues, one subject per model, pulled by free slots.

    api    enqueue -> [HS_REQUESTS] -> Puller -> Delivery   agent        interactive, in memory
                      [HS_BATCH]                                         batch, in files
                                                  |- ack          the request ended
                                                  |- nak          not now: deliver again at once
                                                  |- in_progress  still on it: do not redeliver

All replicas of a model share one consumer with a ``prioritized`` priority group, so a
replica that is to be drained can pull behind the others. nats-py has no priority groups,
hence the raw CONSUMER.CREATE and MSG.NEXT requests.
"""

import asyncio
import base64
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import msgspec
from opentelemetry import propagate
from opentelemetry.context import Context

from schemas import names
from schemas.requests import Request
from services.bus.connection import (
    Bus,
    BusError,
    Hook,
    JetStreamError,
    RawMessage,
    header_of,
)
from services.bus.topology import NS

log = logging.getLogger(__name__)

PRIORITY_GROUP = "replicas"
PULL_EXPIRES_S = 30.0
REDELIVER_AFTER_S = 5.0  # a Delivery that is neither acked nor in_progress for this long
# A consumer that nobody pulls from for so long is forgotten, and with it who has which request.
_CONSUMER_IDLE_S: dict[names.RequestClass, float] = {"interactive": 300.0, "batch": 24 * 3600.0}
_FULL = (10077, 10054, 10053)  # "maximum messages per subject exceeded" and its kin

_NO_MESSAGE = 10037

_request_decoder: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)


class QueueFull(BusError):
    """The model's queue has no room; try again later."""


@dataclass
class Delivery:
    """One request as the queue gave it to us."""

    request: Request
    context: Context = field(repr=False)
    num_delivered: int
    stream_seq: int
    _bus: Bus = field(repr=False)
    _ack_subject: str = field(repr=False)
    _is_stale: bool = False

    async def ack(self) -> None:
        await self._answer(b"+ACK")

    async def nak(self, delay_s: float = 0.0) -> None:
        """``delay_s``: it is delivered again no sooner."""
        word = b"-NAK"
        if delay_s:
            word += b' {"delay": %d}' % int(delay_s * NS)
        await self._answer(word)

    async def in_progress(self) -> None:
        await self._answer(b"+WPI")

    def invalidate(self) -> None:
        """Answer no more: after a reconnect. The request will be delivered again.

        A restarted server has an empty memory stream and counts from 1 again, so an answer to
        an old delivery could hit another request that has its number now. The stream of the batch
        class is kept in files, with its numbers.
        """
        self._is_stale = self.request.klass != "batch"

    async def _answer(self, word: bytes) -> None:
        if not self._is_stale:
            await self._bus.publish_raw(self._ack_subject, word)


class WorkQueue:
    """The api's and the scheduler's side of the queue."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def enqueue(self, request: Request) -> int:
        """Store ``request`` for some replica; returns its stream sequence.

        Idempotent by request id within the stream's duplicate window.
        Raises QueueFull, BusUnavailable.
        """
        seq, _ = await self.enqueue_once(request)
        return seq

    async def enqueue_once(self, request: Request) -> tuple[int, bool]:
        """Likewise; also whether it is new. If not, it is in the queue still, or has left it."""
        left_s = max(1, round(request.deadline_at - time.time()))
        headers = self._bus.headers(Nats_Msg_Id=request.request_id, Nats_TTL=f"{left_s}s")
        if request.tenant:
            headers[names.HEADER_TENANT] = request.tenant
        subject = names.request_subject(request.klass, request.model)
        try:
            return await self._bus.store_once(subject, msgspec.json.encode(request), headers)
        except JetStreamError as error:
            if error.code in _FULL:
                raise QueueFull(f"the queue of model {request.model!r} is full") from error
            raise

    async def withdraw(self, stream_seq: int, klass: names.RequestClass = "interactive") -> bool:
        """Take a request back. False where it already left the queue."""
        try:
            await self._bus.jetstream(
                f"STREAM.MSG.DELETE.{names.request_stream(klass)}",
                {"seq": stream_seq, "no_erase": True},
            )
        except JetStreamError:
            return False
        return True

    async def holds(self, stream_seq: int, request_id: str) -> bool:
        """Whether that very request is in the queue still, or in flight at an agent."""
        body = {"seq": stream_seq}
        try:
            found = await self._bus.jetstream(f"STREAM.MSG.GET.{names.STREAM_REQUESTS}", body)
        except JetStreamError as error:
            if error.code == _NO_MESSAGE:
                return False
            raise
        block = base64.b64decode(found["message"].get("hdrs", ""))
        return header_of(block, b"Nats-Msg-Id") == request_id

    async def depths(
        self, klass: names.RequestClass = "interactive"
    ) -> tuple[dict[str, int], float]:
        """Requests per model in the queue, those in flight at agents included, and when.

        The time is unix seconds by the server's clock, just before it counted.
        """
        asked_at = time.monotonic()
        info = await self._bus.jetstream(
            f"STREAM.INFO.{names.request_stream(klass)}",
            {"subjects_filter": f"{names.PREFIX}.requests.>"},
        )
        depths: dict[str, int] = {}
        for subject, count in (info["state"].get("subjects") or {}).items():
            model = names.model_of_subject(subject)
            depths[model] = depths.get(model, 0) + count
        took_s = time.monotonic() - asked_at
        return depths, datetime.fromisoformat(info["ts"]).timestamp() - took_s


class Puller:
    """Pulls one model's requests of one class for one replica, never more than asked for by `want`.

    A pull stays open at the server until its batch is used up or it expires; it is then
    answered by a status that says how many were still to come. Requests arrive under their
    own subject, so which pull brought one can not be told: only their sum is kept.
    """

    def __init__(
        self,
        bus: Bus,
        model: str,
        on_delivery: Callable[[Delivery], Awaitable[None]],
        klass: names.RequestClass = "interactive",
    ) -> None:
        self.model = model
        self._klass = klass
        self._stream = names.request_stream(klass)
        self._bus = bus
        self._on_delivery = on_delivery
        self._consumer = names.consumer_name(model)
        self._inbox = ""
        self._num_asked = 0  # requests that open pulls may still bring
        self._wanted = 0
        self._stopped = False
        self._unsubscribe: Hook | None = None
        self._undo_hook: Callable[[], None] | None = None
        self._retry: asyncio.Task[None] | None = None
        self._arming = asyncio.Lock()
        self._closing: set[asyncio.Future[None]] = set()  # subscriptions on their way out

    async def start(self) -> None:
        """Make the consumer exist and listen. Nothing is pulled until `want`."""
        self._undo_hook = self._bus.on_reconnect(self._rearm)
        await self._rearm()

    async def want(self, num_free: int) -> None:
        """There is room for ``num_free`` more requests: keep that many asked for."""
        self._wanted = num_free
        short = num_free - self._num_asked
        if short <= 0 or self._stopped or not self._inbox:
            return
        self._num_asked += short
        body = {
            "batch": short,
            "expires": int(PULL_EXPIRES_S * NS),
            "group": PRIORITY_GROUP,
            "priority": 0,
        }
        await self._bus.publish_raw(
            f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._consumer}",
            msgspec.json.encode(body),
            reply=self._inbox,
        )

    def stop(self) -> None:
        """Take no more. What the server sent before it took note is handed back at once.

        Without a listener the server drops our open pulls by itself.
        """
        if self._stopped:
            return
        self._stopped = True
        if self._undo_hook:
            self._undo_hook()
        if self._retry:
            self._retry.cancel()
        self._leave_inbox()

    async def _rearm(self) -> None:
        """Begin afresh on an inbox of its own: pulls of an earlier one find no listener."""
        async with self._arming:  # a reconnect and a pull that ended may both want it
            self._leave_inbox()
            self._num_asked = 0
            self._inbox = inbox = self._bus.new_inbox(
                f"pull.{self._klass}.{names.escape(self.model)}"
            )

            async def on_raw(raw: RawMessage) -> None:
                if raw.headers.get("Status"):
                    await self._on_status(inbox, raw)
                    return
                if inbox == self._inbox:  # else of a pull that is not counted any more
                    self._num_asked = max(0, self._num_asked - 1)
                await self._on_message(raw)

            self._unsubscribe = await self._bus.subscribe_raw(inbox, on_raw)
            if self._stopped:  # meanwhile
                self._leave_inbox()
                return
            await self._create_consumer()
            await self.want(self._wanted)

    async def _create_consumer(self) -> None:
        config: dict[str, Any] = {
            "durable_name": self._consumer,
            "filter_subject": names.request_subject(self._klass, self.model),
            "ack_policy": "explicit",
            "ack_wait": int(REDELIVER_AFTER_S * NS),
            "max_ack_pending": 10_000,
            "inactive_threshold": int(_CONSUMER_IDLE_S[self._klass] * NS),
            "priority_policy": "prioritized",
            "priority_groups": [PRIORITY_GROUP],
        }
        await self._bus.jetstream(
            f"CONSUMER.CREATE.{self._stream}.{self._consumer}",
            {"stream_name": self._stream, "config": config, "action": ""},
        )

    async def _on_status(self, inbox: str, raw: RawMessage) -> None:
        status = raw.headers["Status"]
        if self._stopped or inbox != self._inbox or status == "100":  # 100: heartbeat
            return
        left = raw.headers.get("Nats-Pending-Messages")
        if status == "408" and left is not None:  # the pull expired: ask again
            self._num_asked = max(0, self._num_asked - int(left))
            await self.want(self._wanted)
        else:  # 409: consumer deleted, server shutting down, leadership change ...
            words = raw.headers.get("Description", "")
            log.warning("pull for %s ended: %s %s", self.model, status, words)
            if self._retry is None or self._retry.done():  # every open pull tells us
                self._retry = asyncio.create_task(self._retry_later(inbox))

    async def _retry_later(self, inbox: str) -> None:
        """Begin afresh soon, unless a reconnect has done so: ``inbox`` is old then."""
        while True:
            await asyncio.sleep(0.2)
            if self._stopped or inbox != self._inbox:
                return
            try:
                await self._rearm()
                return
            except BusError as error:
                log.warning("pulling for %s again: %s", self.model, error)
                inbox = self._inbox

    async def _on_message(self, raw: RawMessage) -> None:
        # $JS.ACK.[domain.account.]<stream>.<consumer>.<delivered>.<seq>.<cseq>.<time>.<pending>
        tail = raw.reply.split(".")
        num_delivered, stream_seq = int(tail[-5]), int(tail[-4])
        if self._stopped:
            await self._bus.publish_raw(raw.reply, b"-NAK")
            return
        try:
            request = _request_decoder.decode(raw.data)
        except msgspec.DecodeError as error:
            log.error("dropped an unreadable request for %s: %s", self.model, error)
            await self._bus.publish_raw(raw.reply, b"+TERM")
            return
        context = propagate.extract(raw.headers)
        await self._on_delivery(
            Delivery(request, context, num_delivered, stream_seq, self._bus, raw.reply)
        )

    def _leave_inbox(self) -> None:
        if self._unsubscribe:
            leaving = asyncio.ensure_future(self._unsubscribe())
            self._closing.add(leaving)
            leaving.add_done_callback(self._closing.discard)
            self._unsubscribe = None
