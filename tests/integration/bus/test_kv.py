"""Buckets, watches, writers and leases, on a real nats-server."""

import asyncio

import pytest

from schemas import names
from schemas.state import LeaseRecord, ResidencyRecord
from services.bus import Bucket, Bus, Entry, JetStreamError, Lease, LeaseLost, Writer, declare, kv
from tests.integration.bus.kit import Box, Parties, tap
from tests.integration.nats_process import NatsServer

BUCKET = names.BUCKET_RESIDENCY


@pytest.fixture
async def bus(party: Parties) -> Bus:
    bus = await party("admin")
    await declare(bus)
    return bus


def record(model: str, generation: int = 1) -> ResidencyRecord:
    return ResidencyRecord("g0", model, "resident", generation, 0.0)


def bucket_of(bus: Bus) -> Bucket[ResidencyRecord]:
    return Bucket(bus, BUCKET, ResidencyRecord)


# -- buckets --------------------------------------------------------------------------------


async def test_values_revisions_and_what_is_expected(bus: Bus) -> None:
    bucket = bucket_of(bus)
    assert await bucket.get("g0.a") == Entry("g0.a", None, 0)
    first = await bucket.put("g0.a", record("a"), expect=0)
    assert await bucket.get("g0.a") == Entry("g0.a", record("a"), first)
    for wrong in (0, first + 1):
        with pytest.raises(JetStreamError, match="wrong last sequence") as caught:
            await bucket.put("g0.a", record("a", 2), expect=wrong)
        assert caught.value.code == 10071
    second = await bucket.put("g0.a", record("a", 2), expect=first)
    await bucket.delete("g0.a")
    gone = await bucket.get("g0.a")
    assert (gone.value, gone.revision) == (None, second + 1)
    await bucket.put("g0.a", record("a", 3), expect=gone.revision)
    await bucket.put("g0.b", record("b"))
    await bucket.delete("g0.b")
    assert await bucket.items() == {"g0.a": record("a", 3)}


async def test_a_watch_sees_what_is_there_then_puts_deletions_and_expiry(bus: Bus) -> None:
    bucket = bucket_of(bus)
    seen: Box[Entry[ResidencyRecord]] = Box()
    await bucket.put("g0.a", record("a"))
    await bucket.put("g0.a", record("a", 2))
    stop = await bucket.watch(seen.put)
    assert [entry.value for entry in seen.all] == [record("a", 2)]  # on return, not later
    await bucket.put("g0.b", record("b"), ttl_s=1)
    await bucket.delete("g0.a")
    await seen.count(3)
    assert [(entry.key, entry.value) for entry in seen.all[1:]] == [
        ("g0.b", record("b")),
        ("g0.a", None),
    ]
    expired = await seen.count(4)
    assert (expired.key, expired.value) == ("g0.b", None)
    assert await bucket.get("g0.b") == expired
    await stop()
    tapped = await tap(bus, f"$KV.{BUCKET}.>")
    await bucket.put("g0.a", record("a", 3))
    await tapped.count(1)
    await bus.flush()
    assert len(seen.all) == 4


async def test_an_empty_bucket_and_a_foreign_record(bus: Bus) -> None:
    bucket = bucket_of(bus)
    assert await bucket.items() == {}
    await bus.store(f"$KV.{BUCKET}.g0.bad", b'{"type": "of another version"}', {})
    assert await bucket.items() == {}  # told in the log, and no reason to wait for ever
    await bucket.put("g0.good", record("good"))
    assert await bucket.items() == {"g0.good": record("good")}


async def test_a_watcher_that_fails_does_not_hang_the_watch(bus: Bus) -> None:
    bucket = bucket_of(bus)
    await bucket.put("g0.a", record("a"))

    async def fail(_: Entry[ResidencyRecord]) -> None:
        raise ValueError("a fault in a watcher")

    stop = await asyncio.wait_for(bucket.watch(fail), 5)
    await stop()


async def test_watches_and_streams_come_back_with_the_server(
    nats_server: NatsServer, bus: Bus
) -> None:
    bucket = bucket_of(bus)
    seen: Box[Entry[ResidencyRecord]] = Box()
    await bucket.put("g0.a", record("a"))
    await bucket.watch(seen.put)
    ready = Box[bool]()
    bus.on_reconnect(lambda: ready.put(True))  # the last hook: all others have run
    await asyncio.to_thread(nats_server.restart)
    await ready.count(1)
    assert [entry.value for entry in seen.all] == [record("a")] * 2  # present values again
    await bucket.put("g0.b", record("b"))
    assert (await seen.count(3)).value == record("b")
    info = await bus.jetstream(f"STREAM.INFO.{names.STREAM_REQUESTS}")  # was in memory only
    assert info["config"]["republish"]["headers_only"]


# -- writers --------------------------------------------------------------------------------


async def test_a_writer_coalesces_and_outlives_an_outage(nats_server: NatsServer, bus: Bus) -> None:
    bucket = bucket_of(bus)
    seen: Box[Entry[ResidencyRecord]] = Box()
    await bucket.watch(seen.put)
    writer = Writer(bucket)
    task = asyncio.create_task(writer.run())
    for generation in range(1, 100):
        writer.put("g0.a", record("a", generation))
    await seen.until(lambda entries: entries[-1:] and entries[-1].value == record("a", 99))
    assert len(seen.all) <= 2  # not 99

    await asyncio.to_thread(nats_server.kill)
    for generation in range(100, 200):
        writer.put("g0.a", record("a", generation))
        writer.put("g0.b", record("b", generation))
    await asyncio.to_thread(nats_server.start)
    await seen.until(
        lambda entries: {record("a", 199), record("b", 199)} <= {e.value for e in entries}
    )
    assert await bucket.items() == {"g0.a": record("a", 199), "g0.b": record("b", 199)}
    task.cancel()


async def test_a_record_that_is_refused_does_not_hold_up_the_others(bus: Bus) -> None:
    bucket = bucket_of(bus)
    seen: Box[Entry[ResidencyRecord]] = Box()
    await bucket.watch(seen.put)
    writer = Writer(bucket)
    writer.put("g0.huge", record("x" * (bus.max_payload + 1)))
    writer.put("g0.a", record("a"))
    task = asyncio.create_task(writer.run())
    assert (await seen.count(1)).key == "g0.a"
    assert not task.done()
    task.cancel()


# -- leases ---------------------------------------------------------------------------------

KEY = names.LEADER_KEY


async def test_one_holder_at_a_time_and_growing_epochs(bus: Bus) -> None:
    first, second = Lease(bus, KEY, "first", ttl_s=30), Lease(bus, KEY, "second", ttl_s=30)
    taken = await asyncio.gather(first.try_acquire(), second.try_acquire())
    assert sorted(taken) == [False, True]  # however the two interleave
    holder, other = (first, second) if taken[0] else (second, first)
    await holder.renew()
    await holder.renew()
    assert not await other.try_acquire()
    assert await holder.try_acquire()  # again, as after its own restart
    epoch = holder.epoch
    await holder.release()
    assert await other.try_acquire()  # at once: the expiry is far
    assert other.epoch > epoch
    with pytest.raises(LeaseLost, match=f"{KEY} is no longer held by {holder.holder}"):
        await holder.renew()
    await holder.release()  # no longer its own to give up
    assert not await holder.try_acquire()
    await other.renew()


async def test_a_lease_expires_and_is_taken_over(bus: Bus) -> None:
    ended: Box[Entry[LeaseRecord]] = Box()
    await Bucket(bus, names.BUCKET_LEASES, LeaseRecord).watch(ended.put)
    old, new = Lease(bus, KEY, "old", ttl_s=1), Lease(bus, KEY, "new", ttl_s=1)
    assert await old.try_acquire()
    assert not await new.try_acquire()
    await ended.until(lambda entries: entries[-1:] and entries[-1].value is None, 4)
    assert await new.try_acquire()
    assert new.epoch > old.epoch
    with pytest.raises(LeaseLost):
        await old.renew()


class Clock:
    """In the place of the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


async def test_the_clock_of_whoever_waits_counts_and_the_ttl_of_the_holder(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the server's timers do: here they would take an hour."""
    clock = Clock()
    monkeypatch.setattr(kv, "time", clock)
    dead, heir = Lease(bus, KEY, "dead", ttl_s=3600), Lease(bus, KEY, "heir", ttl_s=1)
    assert await dead.try_acquire()
    clock.now += 10
    assert not await heir.try_acquire()
    clock.now += 3599
    assert dead.is_held is False  # counted from when it asked, which is earlier
    assert not await heir.try_acquire()
    await dead.renew()
    clock.now += 2
    assert not await heir.try_acquire()  # that was a sign of life
    clock.now += 3600
    assert await heir.try_acquire()
    assert heir.epoch > dead.epoch
    with pytest.raises(LeaseLost):
        await dead.renew()


async def test_of_many_that_wait_one_is_next(bus: Bus) -> None:
    leases = Bucket(bus, names.BUCKET_LEASES, LeaseRecord)
    dead = await leases.put(KEY, LeaseRecord(holder="dead", epoch=1))  # never expires
    rivals = [Lease(bus, KEY, f"rival{n}", ttl_s=1) for n in range(3)]
    waiting = {asyncio.create_task(rival.acquire()): rival for rival in rivals}
    epoch = dead
    while waiting:
        done, _ = await asyncio.wait(waiting, timeout=8, return_when=asyncio.FIRST_COMPLETED)
        (task,) = done
        winner = waiting.pop(task)
        await task
        assert [rival.is_held for rival in rivals].count(True) == 1
        assert winner.epoch > epoch
        epoch = winner.epoch
        await winner.release()


async def test_a_renewal_whose_answer_was_lost_is_still_ours(bus: Bus) -> None:
    lease = Lease(bus, KEY, "holder", ttl_s=30)
    assert await lease.try_acquire()
    leases = Bucket(bus, names.BUCKET_LEASES, LeaseRecord)
    await leases.put(KEY, LeaseRecord(holder="holder", epoch=lease.epoch), ttl_s=30)
    await lease.renew()
    await lease.renew()


async def test_what_is_not_ours_is_not_given_up(bus: Bus) -> None:
    first, second = Lease(bus, KEY, "first", ttl_s=30), Lease(bus, KEY, "second", ttl_s=30)
    assert await first.try_acquire()
    assert not await second.try_acquire()
    await second.release()
    await first.renew()


async def test_a_lease_and_its_epochs_outlive_the_server(nats_server: NatsServer, bus: Bus) -> None:
    lease, rival = Lease(bus, KEY, "holder", ttl_s=30), Lease(bus, KEY, "rival", ttl_s=30)
    assert await lease.try_acquire()
    ready = Box[bool]()
    bus.on_reconnect(lambda: ready.put(True))
    await asyncio.to_thread(nats_server.restart)
    await ready.count(1)
    assert not await rival.try_acquire()
    await lease.renew()
    await lease.release()
    assert await rival.try_acquire()
    assert rival.epoch > lease.epoch
