"""Reading what a stream still holds, on a real nats-server."""

import time
from collections.abc import AsyncIterator

import pytest

from schemas import names
from services.bus import Bus, BusError, declare, history
from services.bus.connection import RawMessage
from tests.integration.bus.kit import Parties

STREAM = names.STREAM_EVENTS
ON_A = names.event_subject("swap_in_completed", "g0", "a")
ON_B = names.event_subject("swap_in_completed", "g1", "b")
ALL = f"{names.PREFIX}.events.swap_in_completed.>"


@pytest.fixture
async def bus(party: Parties) -> Bus:
    bus = await party("admin")
    await declare(bus)
    return bus


async def bodies(messages: AsyncIterator[RawMessage]) -> list[tuple[str, bytes]]:
    return [(raw.subject, raw.data) async for raw in messages]


async def test_an_empty_stream_has_nothing(bus: Bus) -> None:
    assert await bodies(history.read(bus, STREAM, ALL, 0.0)) == []


async def test_messages_come_in_order_with_their_subjects(bus: Bus) -> None:
    stored = [(ON_A, b"1"), (ON_B, b"2"), (ON_A, b"3")]
    for subject, data in stored:
        await bus.store(subject, data, {})
    await bus.store(names.event_subject("worker_died", "g0"), b"another kind", {})
    assert await bodies(history.read(bus, STREAM, ALL, 0.0)) == stored
    only_a = names.event_subject("swap_in_completed", "g0", "a")
    assert await bodies(history.read(bus, STREAM, only_a, 0.0)) == [stored[0], stored[2]]


async def test_only_those_since_then_are_read(bus: Bus) -> None:
    await bus.store(ON_A, b"early", {})
    [early] = [raw async for raw in history.read(bus, STREAM, ALL, 0.0)]
    seq = await bus.store(ON_A, b"late", {})
    answer = await bus.jetstream(f"STREAM.MSG.GET.{STREAM}", {"seq": seq})
    late_at = history.seconds(answer["message"]["time"])
    assert history.seconds(early.headers["Nats-Time-Stamp"]) < late_at
    assert await bodies(history.read(bus, STREAM, ALL, late_at)) == [(ON_A, b"late")]
    assert await bodies(history.read(bus, STREAM, ALL, time.time() + 60)) == []


async def test_more_than_one_batch(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_BATCH", 4)
    for number in range(10):
        await bus.store(ON_A if number % 3 else ON_B, str(number).encode(), {})
    found = await bodies(history.read(bus, STREAM, ALL, 0.0))
    assert [data for _, data in found] == [str(number).encode() for number in range(10)]
    for _ in range(2):  # 12 are exactly three batches
        await bus.store(ON_A, b"more", {})
    assert len(await bodies(history.read(bus, STREAM, ALL, 0.0))) == 12


async def test_a_stream_that_is_not_there_is_an_error(bus: Bus) -> None:
    with pytest.raises(BusError, match="HS_NONE"):
        await bodies(history.read(bus, "HS_NONE", ALL, 0.0))
