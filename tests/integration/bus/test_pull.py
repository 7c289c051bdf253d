"""Pulling requests by free slots, on a real nats-server."""

import asyncio
import json
import random
import time

import pytest

from schemas import names
from services.bus import Bus, Delivery, Puller, WorkQueue, work_queue
from services.bus.connection import RawMessage
from services.bus.work_queue import REDELIVER_AFTER_S
from tests.integration.bus.kit import (
    MODEL,
    Box,
    Parties,
    eventually,
    holds_only,
    pulling,
    request,
    tap,
)
from tests.integration.nats_process import NatsServer


def asked(pulls: list[RawMessage]) -> int:
    return sum(json.loads(raw.data)["batch"] for raw in pulls)


async def test_never_more_is_asked_for_than_wanted_one_after_the_other(
    api: Bus, agent: Bus, pulls: Box[RawMessage]
) -> None:
    """Pulls were once counted per pull, which messages do not tell: it stopped after a few."""
    queue, slots, number = WorkQueue(api), 8, 120
    box: Box[Delivery] = Box()

    async def serve(delivery: Delivery) -> None:
        await box.put(delivery)
        await delivery.ack()
        await puller.want(slots)

    puller = Puller(agent, MODEL, serve)
    await puller.start()
    await puller.want(slots)
    for done in range(1, number + 1):
        await queue.enqueue(request())
        await box.count(done)
        assert asked(pulls.all) <= done + slots
    await pulls.until(lambda seen: asked(seen) == number + slots)


async def test_never_more_runs_than_there_are_slots(
    api: Bus, agent: Bus, pulls: Box[RawMessage]
) -> None:
    """150 at once over 8 slots, each held for a random while."""
    queue, slots, number = WorkQueue(api), 8, 150
    rng = random.Random(3)
    running: set[str] = set()
    highest = 0
    ended: Box[str] = Box()
    tasks: set[asyncio.Task[None]] = set()

    async def run(delivery: Delivery) -> None:
        for _ in range(rng.randrange(20)):
            await asyncio.sleep(0)  # some work
        await delivery.ack()
        running.remove(delivery.request.request_id)
        await puller.want(slots - len(running))
        await ended.put(delivery.request.request_id)

    async def serve(delivery: Delivery) -> None:
        nonlocal highest
        running.add(delivery.request.request_id)
        highest = max(highest, len(running))
        tasks.add(asyncio.create_task(run(delivery)))
        await puller.want(slots - len(running))

    puller = Puller(agent, MODEL, serve)
    await puller.start()
    await puller.want(slots)
    sent = [request() for _ in range(number)]
    await asyncio.gather(*(queue.enqueue(one) for one in sent))
    await ended.count(number)
    assert sorted(ended.all) == sorted(one.request_id for one in sent)
    assert highest == slots
    assert asked(pulls.all) <= number + slots


async def test_an_expired_pull_is_asked_again(
    api: Bus, agent: Bus, pulls: Box[RawMessage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work_queue, "PULL_EXPIRES_S", 1.0)
    queue = WorkQueue(api)
    box: Box[Delivery] = Box()
    puller = await pulling(agent, box, want=3)
    await queue.enqueue(request())
    await box.count(1)  # two are left of this pull
    await puller.want(2)
    await pulls.count(2)
    assert [asked([raw]) for raw in pulls.all] == [3, 2]
    await queue.enqueue(request())
    await queue.enqueue(request())
    await box.count(3)


async def test_what_was_in_the_air_is_handed_back_on_stop(
    party: Parties, api: Bus, agent: Bus
) -> None:
    wire = await tap(await party("admin"), "_INBOX_agent.*.pull.>")
    queue = WorkQueue(api)
    entered, go_on = asyncio.Event(), asyncio.Event()

    async def hold(delivery: Delivery) -> None:
        entered.set()
        await go_on.wait()
        await delivery.nak()

    puller = Puller(agent, MODEL, hold)
    await puller.start()
    await puller.want(3)
    sent = [request() for _ in range(3)]
    for one in sent:
        await queue.enqueue(one)
    await wire.count(3)
    await entered.wait()
    await agent.flush()  # now all three are in the client, and one in the handler
    puller.stop()
    puller.stop()  # idempotent
    go_on.set()
    box: Box[Delivery] = Box()
    began = time.monotonic()
    await pulling(await party("agent"), box, want=3)
    await box.count(3)
    assert time.monotonic() - began < REDELIVER_AFTER_S / 2
    assert {d.request.request_id for d in box.all} == {one.request_id for one in sent}


async def test_two_replicas_share_one_model(party: Parties, api: Bus) -> None:
    queue = WorkQueue(api)
    boxes = [Box[Delivery](), Box[Delivery]()]
    for box in boxes:
        await pulling(await party("agent"), box, want=2)
    sent = [request() for _ in range(4)]
    for one in sent:
        await queue.enqueue(one)
    for box in boxes:  # neither can take more than two
        await box.count(2)
    got = [delivery.request.request_id for box in boxes for delivery in box.all]
    assert sorted(got) == sorted(one.request_id for one in sent)


async def test_an_unreadable_request_is_dropped(
    party: Parties, api: Bus, agent: Bus, counting: WorkQueue
) -> None:
    admin = await party("admin")
    await admin.store(names.request_subject("interactive", MODEL), b"{}", {})
    good = request()
    await WorkQueue(api).enqueue(good)
    box: Box[Delivery] = Box()
    puller = await pulling(agent, box, want=1)
    await puller.want(2)
    delivery = await box.count(1)
    assert delivery.request == good
    await delivery.ack()
    await holds_only(counting, {})


async def test_a_replica_that_says_nothing_loses_its_request(
    api: Bus, agent: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work_queue, "REDELIVER_AFTER_S", 1.0)
    queue = WorkQueue(api)
    box: Box[Delivery] = Box()
    await pulling(agent, box, want=2)
    await queue.enqueue(request())
    again = await box.count(2)
    assert [d.num_delivered for d in box.all] == [1, 2]
    assert again.stream_seq == box.all[0].stream_seq


# -- when the server dies -------------------------------------------------------------------


async def test_pullers_go_on_after_a_restart_and_old_deliveries_stay_silent(
    nats_server: NatsServer, api: Bus, agent: Bus, counting: WorkQueue
) -> None:
    queue = WorkQueue(api)
    box: Box[Delivery] = Box()
    puller = await pulling(agent, box, want=2)
    await queue.enqueue(request())
    old = await box.count(1)
    await puller.want(1)

    ready = Box[bool]()
    api.on_reconnect(lambda: ready.put(True))
    agent.on_reconnect(lambda: ready.put(True))
    await asyncio.to_thread(nats_server.restart)
    await ready.count(2)
    old.invalidate()
    await queue.enqueue(request())
    new = await box.count(2)
    # Same stream, consumer and numbers: an answer to the old one would hit the new one.
    assert (new.stream_seq, new.num_delivered) == (old.stream_seq, old.num_delivered)
    await old.ack()
    await agent.flush()
    assert (await counting.depths())[0] == {MODEL: 1}
    await new.ack()
    await holds_only(counting, {})


async def test_a_puller_survives_the_loss_of_its_consumer(
    party: Parties, api: Bus, agent: Bus, pulls: Box[RawMessage]
) -> None:
    """Each open pull says so; it begins afresh once, not once for each."""
    admin = await party("admin")
    creations = await tap(admin, f"$JS.API.CONSUMER.CREATE.{names.STREAM_REQUESTS}.>")
    box: Box[Delivery] = Box()
    puller = await pulling(agent, box, want=1)
    for wanted in (2, 3, 4):
        await puller.want(wanted)
    await pulls.count(4)
    name = names.consumer_name(MODEL)

    async def all_wait() -> bool:
        info = await admin.jetstream(f"CONSUMER.INFO.{names.STREAM_REQUESTS}.{name}")
        return bool(info["num_waiting"] == 4)

    await eventually(all_wait, "the server to take four pulls")  # those on their way are lost
    await admin.jetstream(f"CONSUMER.DELETE.{names.STREAM_REQUESTS}.{name}")
    await pulls.count(5)
    assert asked(pulls.all[4:]) == 4
    for _ in range(4):
        await WorkQueue(api).enqueue(request())
    await box.count(4)
    assert len(creations.all) == 2
    assert len(pulls.all) == 5


async def test_stopping_while_it_begins_leaves_nothing_behind(
    api: Bus, agent: Bus, pulls: Box[RawMessage]
) -> None:
    box: Box[Delivery] = Box()
    puller = Puller(agent, MODEL, box.put)
    beginning = asyncio.create_task(puller.start())
    await asyncio.sleep(0)
    puller.stop()
    await beginning
    await puller.want(4)
    other: Box[Delivery] = Box()
    await pulling(agent, other, want=1)
    sent = request()
    await WorkQueue(api).enqueue(sent)
    assert (await other.count(1)).request == sent
    assert asked(pulls.all) == 1
    assert not box.all
