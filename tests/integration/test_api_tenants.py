"""API keys over a real nats-server and real HTTP: on the bus there is a hash, and never the key."""

import asyncio
import hashlib
import logging

import pytest

from schemas import names
from services.bus import Bus
from services.bus.connection import RawMessage
from tests.integration.api_stack import MODEL, Stack
from tests.integration.scripted_agent import GenerateDelivery

KEY = "sk-secret-of-ada"
HASH = hashlib.sha256(KEY.encode()).hexdigest()[:16]


async def heard(bus: Bus) -> list[RawMessage]:
    """All that is said on the bus from now on."""
    messages: list[RawMessage] = []

    async def note(raw: RawMessage) -> None:
        messages.append(raw)

    await bus.subscribe_raw(">", note)
    await bus.flush()
    return messages


async def answered(stack: Stack, headers: dict[str, str]) -> GenerateDelivery:
    body = {"model": MODEL, "prompt": "x"}
    asking = asyncio.create_task(stack.http.post("/v1/completions", json=body, headers=headers))
    delivery = await stack.agent.next()
    await stack.agent.answer(delivery, "ok")
    assert (await asking).status_code == 200
    return delivery


async def test_the_hash_of_the_key_is_on_the_bus_and_never_the_key(
    stack: Stack, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    bus = await Bus.connect(stack.nats.credentials["admin"], service="listener")
    try:
        messages = await heard(bus)
        await stack.agent.pull(MODEL)
        delivery = await answered(stack, {"Authorization": f"Bearer {KEY}"})
        assert delivery.request.tenant == HASH
        await bus.flush()
    finally:
        await bus.close()
    (demand,) = [raw for raw in messages if raw.subject.startswith("hs.v1.demand.")]
    assert demand.headers[names.HEADER_TENANT] == HASH
    assert demand.data == b""
    said = [f"{raw.subject} {raw.headers} {raw.data.decode()}" for raw in messages]
    assert any(HASH in words for words in said)
    assert not any(KEY in words for words in said)
    assert KEY not in caplog.text


async def test_requests_without_a_key_are_for_nobody_in_particular(stack: Stack) -> None:
    await stack.agent.pull(MODEL)
    for headers in ({}, {"Authorization": "Basic YTpi"}):
        assert (await answered(stack, headers)).request.tenant == ""
