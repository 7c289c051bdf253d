"""Typed KV buckets with watches, and leases, over the JetStream API.

A bucket is a stream with one subject per key. Expiry is announced by a marker message
(header ``Nats-Marker-Reason``), deletion by ``KV-Operation``: both are "no value" here.
"""

import asyncio
import base64
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec

from schemas.names import BUCKET_LEASES
from schemas.state import LeaseRecord
from services.bus.connection import (
    Bus,
    BusError,
    Hook,
    JetStreamError,
    RawMessage,
    headers_of,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

_NO_MESSAGE_FOUND = 10037


class LeaseLost(BusError):
    """Somebody else holds the lease, or it expired before we renewed it."""


@dataclass(frozen=True)
class Entry(Generic[T]):
    """A key and its value; ``value`` is None when the key was deleted or expired.

    ``ttl_s``: what it was stored with; 0: no TTL.
    """

    key: str
    value: T | None
    revision: int
    ttl_s: int = 0


def _is_tombstone(headers: Mapping[str, str]) -> bool:
    return "KV-Operation" in headers or "Nats-Marker-Reason" in headers


def _ttl_s(headers: Mapping[str, str]) -> int:
    number = headers.get("Nats-TTL", "").removesuffix("s")
    return int(number) if number.isdecimal() else 0


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
        a JetStreamError that `is_wrong_revision`.
        """
        headers: dict[str, str] = {}
        if expect is not None:
            headers["Nats-Expected-Last-Subject-Sequence"] = str(expect)
        if ttl_s is not None:
            headers["Nats-TTL"] = f"{ttl_s}s"
        return await self._bus.store(self._prefix + key, msgspec.json.encode(value), headers)

    async def delete(self, key: str, *, expect: int | None = None) -> None:
        """``expect``: as for `put`."""
        headers = {"KV-Operation": "DEL"}
        if expect is not None:
            headers["Nats-Expected-Last-Subject-Sequence"] = str(expect)
        await self._bus.store(self._prefix + key, b"", headers)

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
        headers = headers_of(base64.b64decode(message.get("hdrs", "")))
        if _is_tombstone(headers):
            return Entry(key, None, int(message["seq"]))
        data = base64.b64decode(message.get("data", ""))
        value = self._decoder.decode(data)
        return Entry(key, value, int(message["seq"]), _ttl_s(headers))

    async def items(self) -> dict[str, T]:
        """Every key's value now."""
        found: dict[str, T] = {}

        async def collect(entry: Entry[T]) -> None:
            if entry.value is not None:
                found[entry.key] = entry.value

        await (await self.watch(collect))()
        return found

    async def entries(self) -> dict[str, Entry[T]]:
        """Every key that has a value now, with its revision."""
        found: dict[str, Entry[T]] = {}

        async def collect(entry: Entry[T]) -> None:
            found[entry.key] = entry

        await (await self.watch(collect))()
        return {key: entry for key, entry in found.items() if entry.value is not None}

    async def watch(
        self, on_entry: Callable[[Entry[T]], Awaitable[None]], *, key: str = ">"
    ) -> Hook:
        """Call ``on_entry`` for every key's present value, then for each change. Returns its undo.

        ``key``: of this key only.

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
                        "filter_subject": self._prefix + key,
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
        await on_entry(Entry(key, value, revision, _ttl_s(raw.headers)))


class Writer(Generic[T]):
    """Writes a bucket's records soon, newest value per key, retrying while the server is away.

    For records that mirror state which lives elsewhere: `put` never waits, and a key that
    changed twice before it was written is written once. ``may_write``: where it says no, the
    record is somebody else's to write by now, and ours is dropped.
    """

    def __init__(self, bucket: Bucket[T], may_write: Callable[[], bool] = lambda: True) -> None:
        self._bucket = bucket
        self._may_write = may_write
        self._pending: dict[str, T | None] = {}  # None: to be deleted
        self._wake = asyncio.Event()

    def put(self, key: str, value: T) -> None:
        self._pending[key] = value
        self._wake.set()

    def delete(self, key: str) -> None:
        self._pending[key] = None
        self._wake.set()

    async def run(self) -> None:
        """Write for ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._pending:
                key, value = next(iter(self._pending.items()))
                if not self._may_write():
                    self._pending.clear()
                    break
                try:
                    if value is None:
                        await self._bucket.delete(key)
                    else:
                        await self._bucket.put(key, value)
                except BusError as error:
                    log.warning("%s in %s not written yet: %s", key, self._bucket.name, error)
                    self._pending[key] = self._pending.pop(key)  # the others first
                    await asyncio.sleep(0.5)
                    continue
                if key in self._pending and self._pending[key] is value:
                    del self._pending[key]


class Lease:
    """A key of HS_LEASES that its holder renews, and that is free when nobody did for its TTL.

    Two never hold it at once, whatever dies, stops for a while or is cut off:

    1. Every write names the revision that it replaces, so of any number of writers that saw the
       same revision one succeeds: one successor, and none over a renewal that it had not seen.
    2. A holder believes in its lease (`is_held`) for the TTL, counted from before it asked for
       the last write that succeeded. Whoever waits takes it over when the revision has not
       changed for the TTL, counted from when that revision was seen. Seen is later than asked
       for, and each counts by its own monotonic clock, so the holder has stepped down first::

           holder    asks |----------- TTL -----------|  is_held no more
           server        stored
           waiting         seen |----------- TTL -----------| replaces that revision

    3. A holder that was stopped between a look at `is_held` and what it did then is fenced off:
       ``epoch``, the stream sequence of the acquiring write, grows with every change of holder,
       and agents turn away what carries an older one than they have heard of.

    Nobody waits for the server to expire the key, whose timers may be a second late; where it
    is found expired or given up, it is free at once. The TTL that counts is the holder's: it
    stands in its message. The server's shortest TTL is 1 s.
    """

    def __init__(self, bus: Bus, key: str, holder: str, ttl_s: int) -> None:
        self.key = key
        self.holder = holder
        self.ttl_s = ttl_s
        self.epoch = 0
        self.valid_until = 0.0  # monotonic
        self._written = 0  # revision of our last write
        self._seen = 0  # the newest revision that we know of, whoever wrote it
        self._free_at = 0.0  # monotonic: when we may replace that one
        self._changed = asyncio.Event()
        self._bucket = Bucket(bus, BUCKET_LEASES, LeaseRecord)

    @property
    def is_held(self) -> bool:
        return time.monotonic() < self.valid_until

    async def acquire(self) -> None:
        """Wait until it is ours. Raises BusError, TimeoutError; then ask again."""
        stop = await self._bucket.watch(self._on_entry, key=self.key)
        try:
            self._see(await self._bucket.get(self.key))  # a key that never was is not watched
            while True:
                self._changed.clear()
                wait_s = self._free_at - time.monotonic()
                if wait_s > 0:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._changed.wait(), wait_s)
                elif await self._take():
                    return
                else:
                    self._see(await self._bucket.get(self.key))
        finally:
            await stop()

    async def try_acquire(self) -> bool:
        """Take the lease if nobody holds it (or we still do). Ask again and again: somebody
        else's is free when it has not changed between calls a TTL apart.
        """
        self._see(await self._bucket.get(self.key))
        return time.monotonic() >= self._free_at and await self._take()

    async def renew(self) -> None:
        """Hold it for another TTL. Raises LeaseLost where it is somebody else's now."""
        record = LeaseRecord(holder=self.holder, epoch=self.epoch)
        try:
            await self._write(record, self._written)
            return
        except JetStreamError as error:
            if not error.is_wrong_revision:
                raise
        entry = await self._bucket.get(self.key)
        if entry.value is None or entry.value.holder != self.holder:
            self.valid_until = 0.0
            raise LeaseLost(f"lease {self.key} is no longer held by {self.holder}")
        await self._write(record, entry.revision)  # over one whose answer was lost

    async def release(self) -> None:
        """Give it up at once, so that a successor need not wait."""
        self.valid_until = 0.0
        try:
            await self._bucket.delete(self.key, expect=self._written)
        except BusError:
            log.info("lease %s was already gone", self.key)

    async def _on_entry(self, entry: Entry[LeaseRecord]) -> None:
        if entry.revision > self._seen:  # else what a read has told us by now
            self._see(entry)

    def _see(self, entry: Entry[LeaseRecord]) -> None:
        """Note the revision, and from when on we may replace it."""
        if entry.value is None or entry.value.holder == self.holder:
            self._free_at = 0.0
        elif entry.revision != self._seen:
            self._free_at = time.monotonic() + (entry.ttl_s or self.ttl_s)
        self._seen = entry.revision
        self._changed.set()

    async def _take(self) -> bool:
        try:
            await self._write(LeaseRecord(holder=self.holder, epoch=0), self._seen)
        except JetStreamError as error:
            if error.is_wrong_revision:
                return False
            raise
        self.epoch = self._written
        return True

    async def _write(self, record: LeaseRecord, over: int) -> None:
        """Replace the revision ``over``."""
        asked_at = time.monotonic()
        self._written = await self._bucket.put(self.key, record, expect=over, ttl_s=self.ttl_s)
        self.valid_until = asked_at + self.ttl_s
