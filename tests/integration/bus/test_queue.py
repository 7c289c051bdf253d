"""The request queue as the api and the scheduler see it, on a real nats-server."""

import time

import pytest
from opentelemetry import trace

from schemas import names
from services.bus import Bus, Delivery, QueueFull, WorkQueue, declare
from tests.integration.bus.kit import MODEL, Box, Parties, holds_only, pulling, request, tap


async def test_a_request_is_queued_once(api: Bus, agent: Bus, counting: WorkQueue) -> None:
    queue = WorkQueue(api)
    sent = request(deadline_s=30)
    seq = await queue.enqueue(sent)
    assert await queue.enqueue(sent) == seq
    await queue.enqueue(request("other"))
    depths, at = await counting.depths()
    assert depths == {MODEL: 1, "other": 1}
    assert abs(at - time.time()) < 5
    box: Box[Delivery] = Box()
    await pulling(agent, box, want=4)
    delivery = await box.count(1)
    assert (delivery.request, delivery.num_delivered, delivery.stream_seq) == (sent, 1, seq)
    await delivery.ack()
    await holds_only(counting, {"other": 1})
    assert len(box.all) == 1


async def test_a_full_queue_refuses_and_says_so(api: Bus, party: Parties) -> None:
    admin = await party("admin")
    await admin.jetstream(f"STREAM.DELETE.{names.STREAM_REQUESTS}")
    await declare(admin, max_queued_per_model=2)
    queue = WorkQueue(api)
    first = await queue.enqueue(request())
    await queue.enqueue(request())
    with pytest.raises(QueueFull, match=f"the queue of model '{MODEL}' is full"):
        await queue.enqueue(request())
    await queue.enqueue(request("another model is not affected"))
    assert await queue.withdraw(first)
    await queue.enqueue(request())


async def test_what_was_withdrawn_is_not_delivered(
    api: Bus, agent: Bus, counting: WorkQueue
) -> None:
    queue = WorkQueue(api)
    seq = await queue.enqueue(request())
    kept = request()
    await queue.enqueue(kept)
    assert await queue.withdraw(seq)
    assert not await queue.withdraw(seq)
    box: Box[Delivery] = Box()
    await pulling(agent, box, want=2)
    delivery = await box.count(1)
    assert delivery.request == kept
    await delivery.ack()
    await holds_only(counting, {})


async def test_a_request_that_nobody_waits_for_any_more_leaves(
    api: Bus, agent: Bus, counting: WorkQueue
) -> None:
    queue = WorkQueue(api)
    await queue.enqueue(request(deadline_s=0.5))
    await holds_only(counting, {MODEL: 1})
    await holds_only(counting, {})
    alive = request()
    await queue.enqueue(alive)
    box: Box[Delivery] = Box()
    await pulling(agent, box, want=2)
    assert (await box.count(1)).request == alive


async def test_demand_has_headers_and_never_a_body(party: Parties, api: Bus) -> None:
    demand = await tap(await party("scheduler"), names.demand_subject())
    parent = trace.SpanContext(0xAB, 0xCD, is_remote=False, trace_flags=trace.TraceFlags(1))
    sent = request()
    with trace.use_span(trace.NonRecordingSpan(parent)):
        await WorkQueue(api).enqueue(sent)
    raw = await demand.count(1)
    assert raw.subject == names.demand_subject("interactive", MODEL)
    assert raw.data == b""
    assert raw.headers["Nats-Msg-Id"] == sent.request_id
    assert f"{0xAB:032x}" in raw.headers["traceparent"]
    assert "secret" not in repr(raw.headers)
