"""Clients that take no answer, ask for too much at once, or vanish: nothing is kept for them."""

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest

from services.api.call import Call
from services.api.relay import Relay
from tests.integration.api_stack import MAX_QUEUED, MODEL, Stack, error_of, running_stack
from tests.integration.nats_process import NatsServer
from tests.integration.scripted_agent import GenerateDelivery

STREAM = {"model": MODEL, "prompt": "x", "max_tokens": 10_000, "stream": True}
TEXT = "word " * 3000


class Reader:
    """A client that reads when it is told to, over a small window."""

    async def connect(self, stack: Stack) -> None:
        url = stack.http.base_url
        own = socket.socket()
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        own.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(own, (url.host, url.port))
        self.socket = own
        body = json.dumps(STREAM)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        await loop.sock_sendall(own, (head + body).encode())

    async def read(self, num_bytes: int = 65536) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self.socket, num_bytes)

    def vanish(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, Call]:
    """The open requests of the stack's relay."""
    found: dict[str, Call] = {}
    start = Relay.start

    async def started(relay: Relay) -> None:
        relay._calls = found
        await start(relay)

    monkeypatch.setattr(Relay, "start", started)
    return found


@pytest.fixture
async def impatient(nats_server: NatsServer, calls: dict[str, Call]) -> AsyncIterator[Stack]:
    limits: dict[str, Any] = {
        "write_timeout_s": 0.5,
        "max_connections": 12,
        "max_open_body_bytes": 5000,
    }
    async with running_stack(nats_server, 30, **limits) as stack:
        yield stack


async def pour(stack: Stack, delivery: GenerateDelivery, stop: asyncio.Event) -> None:
    """Tokens as fast as they go."""
    index = 0
    while not stop.is_set():
        await stack.agent.tokens(delivery, TEXT, index=index)
        index += 1
        await asyncio.sleep(0)


async def test_a_client_that_takes_nothing_is_cut_off(
    impatient: Stack, calls: dict[str, Call]
) -> None:
    await impatient.agent.pull(MODEL)
    client = Reader()
    await client.connect(impatient)
    delivery = await impatient.agent.next()
    await impatient.agent.started(delivery)
    stop = asyncio.Event()
    pouring = asyncio.create_task(pour(impatient, delivery, stop))
    cancel = await impatient.agent.next_cancel()
    stop.set()
    await pouring
    assert cancel.request_id == delivery.request.request_id
    assert calls == {}
    got = 0
    with contextlib.suppress(ConnectionResetError):  # what it had taken may still be read
        while data := await client.read():
            got += len(data)
            assert b"[DONE]" not in data
    client.socket.close()
    await delivery.ack()
    # Whoever reads is served, before and after.
    asking = asyncio.create_task(impatient.ask())
    await impatient.agent.answer(await impatient.agent.next(), "ok")
    assert (await asking).status_code == 200


async def test_more_connections_than_allowed_are_told_so(impatient: Stack) -> None:
    url = impatient.http.base_url
    await impatient.http.get("/healthz")  # one of them is kept alive
    kept = [await asyncio.open_connection(url.host, url.port) for _ in range(11)]
    reader, writer = await asyncio.open_connection(url.host, url.port)
    answer = (await reader.read()).decode()
    assert answer.startswith("HTTP/1.1 503 Service Unavailable\r\n")
    for part in ("server_overloaded", "12 connections", "api.max_connections", "retry-after: 2"):
        assert part in answer
    for one in (writer, *(other for _, other in kept)):
        one.close()
        await one.wait_closed()
    await impatient.until(lambda got: got[0] == 200)


async def test_bodies_of_all_open_requests_are_bounded_together(impatient: Stack) -> None:
    small, big = {"content": "x" * 100, "role": "user"}, {"content": "x" * 3000, "role": "user"}
    waiting = [asyncio.create_task(impatient.ask(messages=[big]))]
    await impatient.queue_holds(1)
    answer = await impatient.ask(messages=[big])
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (503, "server_overloaded")
    assert "api.max_open_body_bytes" in error["message"]
    assert int(answer.headers["retry-after"]) > 0
    waiting.append(asyncio.create_task(impatient.ask(messages=[small])))
    await impatient.queue_holds(2)
    await impatient.agent.pull(MODEL)
    for _ in waiting:
        await impatient.agent.answer(await impatient.agent.next(), "ok")
    assert [(await one).status_code for one in waiting] == [200, 200]
    waiting = [asyncio.create_task(impatient.ask(messages=[big]))]  # room again
    await impatient.agent.answer(await impatient.agent.next(), "ok")
    assert (await waiting[0]).status_code == 200


async def test_clients_that_vanish_leave_nothing_behind(
    impatient: Stack, calls: dict[str, Call]
) -> None:
    """The same as `bench.vanish` with few clients, and a look inside."""
    await impatient.agent.pull(MODEL, num_free=100)
    before = len(asyncio.all_tasks())
    for _ in range(3):
        clients = [Reader() for _ in range(MAX_QUEUED)]
        deliveries = []
        for client in clients:
            await client.connect(impatient)
            deliveries.append(await impatient.agent.next())
            await impatient.agent.answer_begins(deliveries[-1], "one")
            while b"one" not in await client.read():
                pass
        assert len(calls) == MAX_QUEUED
        *leaving, staying = zip(clients, deliveries, strict=True)
        for client, _ in leaving:
            client.vanish()
        cancelled = {(await impatient.agent.next_cancel()).request_id for _ in leaving}
        assert cancelled == {delivery.request.request_id for _, delivery in leaving}
        client, delivery = staying
        assert list(calls) == [delivery.request.request_id]
        await impatient.agent.finished(delivery, 1)
        while b"[DONE]" not in await client.read():
            pass
        client.socket.close()
        await impatient.queue_holds(0)
    assert calls == {}
    async with asyncio.timeout(10):
        while True:
            if len(asyncio.all_tasks()) <= before:
                break
            await asyncio.sleep(0.02)
