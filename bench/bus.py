"""The typed bus against raw nats-py, over a real nats-server on this machine.

    round trip   a chunk of one token there and back over core NATS, one at a time
    streams      chunks of 64 tokens as fast as they go, as from a busy agent to the api
    queue        enqueue -> pull -> a chunk back -> ack, against a bare request and reply

The raw side sends the same bytes with the same client library, without looking into them. The
typed side also encodes, decodes and checks every field, and looks for a trace context to carry
(a chunk has none; what a request or a command carries, the raw side carries as well). "By hand"
is raw nats-py with the standard library's json, unchecked.
"""

import asyncio
import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from nats.aio.msg import Msg
from opentelemetry import trace

from bench._wire import Turns, Wire, open_wire, per
from bench.harness import Bench, Samples
from schemas.requests import GenerateRequest, SamplingParams, TextPrompt
from schemas.stream import Tokens
from services.bus import Delivery, Message, Puller, WorkQueue, declare
from services.bus.connection import RawMessage

TYPED_AT_MOST = 1.5
BY_HAND_AT_MOST = 1.0
QUEUE_ADDS_AT_MOST_S = 1e-3

NUM_TRIPS = 200
NUM_CHUNKS = 16 * 64
NUM_REQUESTS = 100
CHUNK_TOKENS = 64
MODEL = "bench/model"

ONE = Tokens("c0ffee-0001", 1, 128, (4711,), " time")
CHUNK = Tokens("c0ffee-0001", 1, 128, tuple(range(4711, 4711 + CHUNK_TOKENS)), "time " * 64)
SPAN = trace.NonRecordingSpan(
    trace.SpanContext(0xC0FFEE, 0xBEEF, is_remote=False, trace_flags=trace.TraceFlags(1))
)

Measure = Callable[[], Coroutine[Any, Any, float]]
Publish = Callable[[], Coroutine[Any, Any, None]]
Prepare = Callable[[Wire], Coroutine[Any, Any, dict[str, Measure]]]


async def round_trips(wire: Wire) -> dict[str, Measure]:
    """Seconds of one trip there and back, without and with a trace context to carry."""
    turns = Turns()
    data = msgspec.json.encode(ONE)

    async def raw_echo(msg: Msg) -> None:
        await wire.raw_far.publish("bench.raw.back", msg.data, headers=msg.headers)

    async def echo(message: Message[Tokens]) -> None:
        with _in_span() if message.headers else contextlib.nullcontext():
            await wire.far.publish("bench.typed.back", message.body)

    async def raw_back(_: Msg) -> None:
        turns.come()

    async def back(_: Message[Tokens]) -> None:
        turns.come()

    await wire.raw_far.subscribe("bench.raw.there", cb=raw_echo)
    await wire.raw_near.subscribe("bench.raw.back", cb=raw_back)
    await wire.far.subscribe("bench.typed.there", Tokens, echo)
    await wire.near.subscribe("bench.typed.back", Tokens, back)

    async def trips(publish: Publish) -> float:
        began = time.perf_counter()
        for _ in range(NUM_TRIPS):
            arrival = turns.expect(1)
            await publish()
            await arrival
        return per(NUM_TRIPS, began)

    async def traced() -> float:
        with _in_span():
            return await trips(lambda: wire.near.publish("bench.typed.there", ONE))

    with _in_span():
        headers = wire.near.headers()
    there = "bench.raw.there"
    return {
        "trip, raw": lambda: trips(lambda: wire.raw_near.publish(there, data)),
        "trip, typed": lambda: trips(lambda: wire.near.publish("bench.typed.there", ONE)),
        "trip, raw + header": lambda: trips(
            lambda: wire.raw_near.publish(there, data, headers=headers)
        ),
        "trip, typed in a span": traced,
    }


async def streams(wire: Wire) -> dict[str, Measure]:
    """Seconds per chunk, sender and receiver together: they share this thread."""
    turns = Turns()
    data = msgspec.json.encode(CHUNK)

    async def raw_take(_: Msg) -> None:
        turns.come()

    async def hand_take(msg: Msg) -> None:
        if json.loads(msg.data)["type"] == "hotswap.stream.v1.tokens":
            turns.come()

    async def take(_: Message[Tokens]) -> None:
        turns.come()

    await wire.raw_near.subscribe("bench.raw.stream", cb=raw_take)
    await wire.raw_near.subscribe("bench.hand.stream", cb=hand_take)
    await wire.near.subscribe("bench.typed.stream", Tokens, take)

    async def send(publish: Publish) -> float:
        arrival = turns.expect(NUM_CHUNKS)
        began = time.perf_counter()
        for _ in range(NUM_CHUNKS):
            await publish()
        await arrival
        return per(NUM_CHUNKS, began)

    async def by_hand() -> None:
        content = {"type": "hotswap.stream.v1.tokens", **msgspec.structs.asdict(CHUNK)}
        await wire.raw_far.publish("bench.hand.stream", json.dumps(content).encode())

    return {
        "stream, raw": lambda: send(lambda: wire.raw_far.publish("bench.raw.stream", data)),
        "stream, by hand": lambda: send(by_hand),
        "stream, typed": lambda: send(lambda: wire.far.publish("bench.typed.stream", CHUNK)),
    }


async def queue(wire: Wire) -> dict[str, Measure]:
    """Seconds from a request to the first chunk of its answer."""
    turns = Turns()
    await declare(wire.near)
    work = WorkQueue(wire.near)
    reply_to = f"{wire.near.inbox}.r"
    ids = iter(range(1 << 30))

    def request() -> GenerateRequest:
        now = time.time()
        return GenerateRequest(
            f"bench-{next(ids)}",
            MODEL,
            "interactive",
            TextPrompt("Tell me how a page table works. " * 16),
            SamplingParams(seed=42, max_tokens=256),
            reply_to,
            now,
            now + 60,
        )

    async def on_delivery(delivery: Delivery) -> None:
        await wire.far.publish(delivery.request.reply_to, ONE)
        await delivery.ack()
        await puller.want(8)

    async def on_reply(_: RawMessage) -> None:
        turns.come()

    puller = Puller(wire.far, MODEL, on_delivery)
    await puller.start()
    await puller.want(8)
    await wire.near.subscribe_raw(reply_to, on_reply)
    data, answer = msgspec.json.encode(request()), msgspec.json.encode(ONE)

    async def respond(msg: Msg) -> None:
        await wire.raw_far.publish(msg.reply, answer)

    await wire.raw_far.subscribe("bench.raw.request", cb=respond)

    async def bare() -> float:
        began = time.perf_counter()
        for _ in range(NUM_REQUESTS):
            await wire.raw_near.request("bench.raw.request", data, timeout=5)
        return per(NUM_REQUESTS, began)

    async def queued() -> float:
        began = time.perf_counter()
        for _ in range(NUM_REQUESTS):
            arrival = turns.expect(1)
            await work.enqueue(request())
            await arrival
        return per(NUM_REQUESTS, began)

    return {"bare request and reply": bare, "through the queue": queued}


def main(argv: list[str]) -> int:
    """Run the benchmark. Returns its exit status."""
    bench = Bench("bus", "the typed bus against raw nats-py, on a real server", argv, rounds=30)
    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        wire = runner.run(stack.enter_async_context(open_wire()))

        def take(prepare: Prepare) -> dict[str, Samples]:
            measures = runner.run(prepare(wire))
            runner.run(wire.flush())
            return bench.round_robin(
                {name: functools.partial(_run, runner, call) for name, call in measures.items()}
            )

        try:
            trip, stream, queued = take(round_trips), take(streams), take(queue)
        finally:
            runner.run(stack.aclose())

    plain = trip["trip, typed"].over(trip["trip, raw"]).median
    bench.target("trip, typed over raw", plain, at_most=TYPED_AT_MOST, unit="x")
    traced = trip["trip, typed in a span"].over(trip["trip, raw + header"]).median
    bench.target("trip in a span, typed over raw", traced, at_most=TYPED_AT_MOST, unit="x")
    by_hand = stream["stream, typed"].over(stream["stream, by hand"]).median
    bench.target("stream, typed over by hand", by_hand, at_most=BY_HAND_AT_MOST, unit="x")
    of_raw = stream["stream, typed"].over(stream["stream, raw"]).median
    bench.value("stream, typed over raw bytes", of_raw, "x")
    bench.value("stream, typed", 1 / stream["stream, typed"].median, "chunks/s")
    bare, through = queued["bare request and reply"], queued["through the queue"]
    added = Samples(tuple(q - b for q, b in zip(through.values, bare.values, strict=True)))
    bench.target("the queue adds", added.median, at_most=QUEUE_ADDS_AT_MOST_S, unit="s")
    return bench.finish()


def _in_span() -> contextlib.AbstractContextManager[trace.Span]:
    return trace.use_span(SPAN)


def _run(runner: asyncio.Runner, call: Measure) -> float:
    return runner.run(call())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
