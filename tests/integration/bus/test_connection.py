"""Connecting, messages and reconnects, on a real nats-server."""

import asyncio
import json
import time

import msgspec
import pytest
from opentelemetry import trace

from schemas import names
from schemas.state import (
    AgentStatus,
)
from services.bus import (
    Bus,
    BusError,
    BusUnavailable,
    Message,
)
from services.bus.connection import header_of, headers_of
from services.ops.nats_server import free_port
from tests.integration.bus.kit import Box, Parties, errors, tap
from tests.integration.nats_process import NatsServer

STATUS = AgentStatus("g0", "i", 1, "cpu", "cpu", 1, 0, 1)


# -- connecting -----------------------------------------------------------------------------


async def test_wrong_credentials_fail_at_once(nats_server: NatsServer) -> None:
    wrong = msgspec.structs.replace(nats_server.credentials["api"], password="wrong")
    began = time.monotonic()
    with pytest.raises(BusUnavailable, match=r"uthorization.*--creds right"):
        await Bus.connect(wrong, service="test", patience_s=30)
    assert time.monotonic() - began < 5


async def test_no_server_fails_after_its_patience(nats_server: NatsServer) -> None:
    url = f"nats://127.0.0.1:{free_port(0)}"
    nowhere = msgspec.structs.replace(nats_server.credentials["api"], url=url)
    began = time.monotonic()
    with pytest.raises(BusUnavailable, match=f"no NATS connection to {url} within 0.5 s.*running"):
        await Bus.connect(nowhere, service="test", patience_s=0.5)
    assert 0.4 < time.monotonic() - began < 3


async def test_a_server_that_comes_up_late_is_waited_for(nats_server: NatsServer) -> None:
    nats_server.kill()
    user = nats_server.credentials["api"]
    connecting = asyncio.create_task(Bus.connect(user, service="test", patience_s=20))
    await asyncio.sleep(0)  # let it find nobody
    await asyncio.to_thread(nats_server.start)
    bus = await connecting
    assert bus.is_connected
    await bus.close()


# -- messages -------------------------------------------------------------------------------


async def test_listening(
    nats_server: NatsServer, party: Parties, caplog: pytest.LogCaptureFixture
) -> None:
    """The short way: headers as bytes, faults are loud, and it outlives the server."""
    bus, other = await party("admin"), await party("admin")
    heard: list[tuple[str, bytes, str, dict[str, str]]] = []

    def listener(subject: str, data: bytes, headers: bytes, reply: str) -> None:
        if data == b"bad":
            raise ValueError("a fault in a listener")
        heard.append((subject, data, header_of(headers, b"Name"), headers_of(headers)))

    stop = await bus.listen("t.*", listener)
    await bus.flush()

    async def say(data: bytes, headers: dict[str, str] | None = None) -> None:
        await other.publish_raw("t.x", data, headers=headers)
        await other.flush()
        await bus.flush()

    await say(b"1", {"Long-Name": "no", "Name": "a b: c"})
    await say(b"bad")
    await say(b"2")
    assert heard == [
        ("t.x", b"1", "a b: c", {"Long-Name": "no", "Name": "a b: c"}),
        ("t.x", b"2", "", {}),
    ]
    assert any("listener failed" in line for line in errors(caplog))
    back = [Box[bool](), Box[bool]()]
    for one, box in zip((bus, other), back, strict=True):
        one.on_reconnect(lambda box=box: box.put(True))  # type: ignore[misc]
    await asyncio.to_thread(nats_server.restart)
    for box in back:
        await box.count(1)
    await say(b"3")
    assert len(heard) == 3
    await stop()
    await say(b"4")
    assert len(heard) == 3


async def test_messages_are_typed_json_and_carry_the_trace(party: Parties) -> None:
    agent, admin = await party("agent"), await party("admin")
    raw = await tap(admin, "hs.v1.agent.*.status")
    box: Box[Message[AgentStatus]] = Box()
    await admin.subscribe("hs.v1.agent.*.status", AgentStatus, box.put)
    await admin.flush()
    parent = trace.SpanContext(0xAB, 0xCD, is_remote=False, trace_flags=trace.TraceFlags(1))
    with trace.use_span(trace.NonRecordingSpan(parent)):
        await agent.publish(names.status_subject("g0"), STATUS, Some_Header="x")
    message = await box.count(1)
    assert message.body == STATUS
    assert message.headers["Some-Header"] == "x"
    seen = trace.get_current_span(message.context).get_span_context()
    assert (seen.trace_id, seen.span_id) == (0xAB, 0xCD)
    assert json.loads((await raw.count(1)).data)["type"] == "hotswap.agent.v1.status"


async def test_bad_messages_and_failing_handlers_stop_nobody(
    party: Parties, caplog: pytest.LogCaptureFixture
) -> None:
    agent, admin = await party("agent"), await party("admin")
    box: Box[str] = Box()

    async def on_status(message: Message[AgentStatus]) -> None:
        await box.put(message.body.gpu)
        if message.body.gpu == "g0":
            raise ValueError("a fault in a handler")

    await admin.subscribe("hs.v1.agent.*.status", AgentStatus, on_status)
    await admin.flush()
    subject = names.status_subject("g0")
    await agent.publish_raw(subject, b"{not json")
    await agent.publish_raw(subject, b'{"type": "hotswap.agent.v1.other"}')
    await agent.publish(subject, STATUS)
    await agent.publish(subject, msgspec.structs.replace(STATUS, gpu="g1"))
    await box.count(2)
    assert box.all == ["g0", "g1"]
    assert [line.split(":")[0] for line in errors(caplog)] == [
        f"dropped a message on {subject}",
        f"dropped a message on {subject}",
        f"handler of hs.v1.agent.*.status failed on {subject}",
    ]


async def test_hooks_run_in_order_after_a_reconnect(
    nats_server: NatsServer, party: Parties, caplog: pytest.LogCaptureFixture
) -> None:
    bus = await party("admin")
    ran: Box[str] = Box()
    failures = [BusError("not yet"), TimeoutError("nor now")]

    async def flaky() -> None:
        await ran.put("flaky")
        if failures:
            raise failures.pop()

    async def faulty() -> None:
        await ran.put("faulty")
        undo_third()  # what is undone meanwhile does not run
        raise ValueError("a fault of ours")

    async def third() -> None:
        await ran.put("third")

    async def last() -> None:
        await ran.put("last")

    undo_first = bus.on_reconnect(third)
    bus.on_reconnect(flaky)
    bus.on_reconnect(faulty)
    undo_third = bus.on_reconnect(third)
    bus.on_reconnect(last)
    undo_first()
    await asyncio.to_thread(nats_server.restart)
    await ran.until(lambda items: "last" in items)
    assert ran.all == ["flaky", "flaky", "flaky", "faulty", "last"]
    assert errors(caplog) == ["re-arming after a reconnect failed"]
