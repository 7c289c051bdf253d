"""Typed KV buckets with watches, and leases, over the JetStream API.

A bucket is a stream with one subject per key. Expiry is announced by a marker message
(header ``Nats-Marker-Reason``), deletion by ``KV-Operation``: both are "no value" here.
"""

import asyncio
import base64
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

from schemas.names import BUCKET_LEASES
from schemas.state import LeaseRecord
from services.bus.connection import Bus, BusError, Hook, JetStreamError, RawMessage

log = logging.getLogger(__name__)

T = TypeVar("T")

_WRONG_LAST_SEQUENCE = 10071
_NO_MESSAGE_FOUND = 10037


class LeaseLost(BusError):
    """Somebody else holds the lease, or it expired before we renewed it."""


@dataclass(frozen=True)
class Entry(Generic[T]):
    """A key and its value; ``value`` is None when the key was deleted or expired."""

    key: str
    value: T | None
    revision: int


def _is_tombstone(headers: Any) -> bool:
    return "KV-Operation" in headers or "Nats-Marker-Reason" in headers


class Bucket(Generic[T]):
    """The bucket ``name``, holding one struct type."""

    def __init__(self, bus: Bus, name: str, kind: type[T]) -> None:
        self.name = name
        self._bus = bus
        self._prefix = f"$KV.{name}."
        self._decoder = msgspec.json.Decoder(kind)

    async def put(
        self, key: str, value: T, *, expect: int | None = None, ttl_s: int | None = None
    ) -> int:
        """Store and return the revision.

        ``expect``: only if that is the current revision (0: no value yet); where it is not,
        JetStreamError with code 10071.
        """
        headers: dict[str, str] = {}
        if expect is not None:
            headers["Nats-Expected-Last-Subject-Sequence"] = str(expect)
        if ttl_s is not None:
            headers["Nats-TTL"] = f"{ttl_s}s"
        return await self._bus.store(self._prefix + key, msgspec.json.encode(value), headers)

    async def delete(self, key: str) -> None:
        await self._bus.store(self._prefix + key, b"", {"KV-Operation": "DEL"})

    async def get(self, key: str) -> Entry[T]:
        """The entry now; value None with its revision where it was deleted or expired."""
        try:
            answer = await self._bus.jetstream(
                f"STREAM.MSG.GET.KV_{self.name}", {"last_by_subj": self._prefix + key}
            )
        except JetStreamError as error:
            if error.code == _NO_MESSAGE_FOUND:
                return Entry(key, None, 0)
            raise
        message = answer["message"]
        headers = base64.b64decode(message.get("hdrs", "")).decode()
        if _is_tombstone(headers):
            return Entry(key, None, int(message["seq"]))
        data = base64.b64decode(message.get("data", ""))
        return Entry(key, self._decoder.decode(data), int(message["seq"]))

    async def items(self) -> dict[str, T]:
        """Every key's value now."""
        found: dict[str, T] = {}

        async def collect(entry: Entry[T]) -> None:
            if entry.value is not None:
                found[entry.key] = entry.value

        await (await self.watch(collect))()
        return found

    async def watch(self, on_entry: Callable[[Entry[T]], Awaitable[None]]) -> Hook:
        """Call ``on_entry`` for every key's present value, then for each change. Returns its undo.

        Returns once the present values have been delivered. After a reconnect all present
        values come again, so ``on_entry`` must be idempotent.
        """
        unsubscribe: Hook | None = None

        async def arm() -> None:
            nonlocal unsubscribe
            if unsubscribe:
                await unsubscribe()
            caught_up = asyncio.Event()

            async def on_raw(raw: RawMessage) -> None:
                if "Status" in raw.headers:
                    return
                try:
                    await self._deliver(raw, on_entry)
                finally:
                    if raw.reply.rsplit(".", 1)[-1] == "0":  # ack subject ends in num_pending
                        caught_up.set()

            inbox = self._bus.new_inbox(f"watch.{self.name}")
            unsubscribe = await self._bus.subscribe_raw(inbox, on_raw)
            info = await self._bus.jetstream(
                f"CONSUMER.CREATE.KV_{self.name}",
                {
                    "stream_name": f"KV_{self.name}",
                    "config": {
                        "deliver_subject": inbox,
                        "deliver_policy": "last_per_subject",
                        "filter_subject": f"$KV.{self.name}.>",
                        "ack_policy": "none",
                        "mem_storage": True,
                        "num_replicas": 1,
                    },
                },
            )
            # Delivery starts at once, so what the server counts here may have come already.
            pending = info["num_pending"] + info["delivered"]["consumer_seq"]
            if pending:
                await asyncio.wait_for(caught_up.wait(), 10)

        await arm()
        undo = self._bus.on_reconnect(arm)

        async def stop() -> None:
            undo()
            if unsubscribe:
                await unsubscribe()

        return stop

    async def _deliver(
        self, raw: RawMessage, on_entry: Callable[[Entry[T]], Awaitable[None]]
    ) -> None:
        key = raw.subject.removeprefix(self._prefix)
        revision = int(
            raw.reply.split(".")[-4]
        )  # $JS.ACK...<stream seq>.<consumer seq>.<time>.<pending>
        if _is_tombstone(raw.headers):
            await on_entry(Entry(key, None, revision))
            return
        try:
            value = self._decoder.decode(raw.data)
        except msgspec.DecodeError as error:
            log.error("dropped %s in bucket %s: %s", key, self.name, error)
            return
        await on_entry(Entry(key, value, revision))


class Writer(Generic[T]):
    """Writes a bucket's records soon, newest value per key, retrying while the server is away.

    For records that mirror state which lives elsewhere: `put` never waits, and a key that
    changed twice before it was written is written once.
    """

    def __init__(self, bucket: Bucket[T]) -> None:
        self._bucket = bucket
        self._pending: dict[str, T] = {}
        self._wake = asyncio.Event()

    def put(self, key: str, value: T) -> None:
        self._pending[key] = value
        self._wake.set()

    async def run(self) -> None:
        """Write for ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._pending:
                key, value = next(iter(self._pending.items()))
                try:
                    await self._bucket.put(key, value)
                except BusError as error:
                    log.warning("%s in %s not written yet: %s", key, self._bucket.name, error)
                    self._pending[key] = self._pending.pop(key)  # the others first
                    await asyncio.sleep(0.5)
                    continue
                if self._pending.get(key) is value:
                    del self._pending[key]


class Lease:
    """A key of HS_LEASES that its holder renews and that expires by itself.

    ``epoch`` is the stream sequence of the acquiring write: it grows with every change of
    holder, so it fences off whoever held the lease before. The server's shortest TTL is 1 s.
    """

    def __init__(self, bus: Bus, key: str, holder: str, ttl_s: int) -> None:
        self.key = key
        self.holder = holder
        self.ttl_s = ttl_s
        self.epoch = 0
        self._revision = 0
        self._bucket = Bucket(bus, BUCKET_LEASES, LeaseRecord)

    async def try_acquire(self) -> bool:
        """Take the lease if nobody holds it (or we still do). One compare-and-set."""
        entry = await self._bucket.get(self.key)
        if entry.value is not None and entry.value.holder != self.holder:
            return False
        try:
            record = LeaseRecord(holder=self.holder, epoch=0)
            self._revision = await self._bucket.put(
                self.key, record, expect=entry.revision, ttl_s=self.ttl_s
            )
        except JetStreamError as error:
            if error.code == _WRONG_LAST_SEQUENCE:
                return False
            raise
        self.epoch = self._revision
        return True

    async def renew(self) -> None:
        """Push the expiry ``ttl_s`` into the future. Raises LeaseLost."""
        record = LeaseRecord(holder=self.holder, epoch=self.epoch)
        try:
            self._revision = await self._bucket.put(
                self.key, record, expect=self._revision, ttl_s=self.ttl_s
            )
        except JetStreamError as error:
            if error.code == _WRONG_LAST_SEQUENCE:
                raise LeaseLost(f"lease {self.key} is no longer held by {self.holder}") from error
            raise

    async def release(self) -> None:
        """Give it up at once, so that a successor need not wait for the expiry."""
        try:
            await self.renew()
            await self._bucket.delete(self.key)
        except (LeaseLost, BusError):
            log.info("lease %s was already gone", self.key)
