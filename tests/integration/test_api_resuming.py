"""One stream, whoever works on it: what the api tells agents that are to go on with a request."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from schemas.requests import GenerateRequest
from schemas.stream import ResumeFrom, Resuming
from services.api import taking_back
from services.bus import Delivery
from services.bus.connection import RawMessage
from tests.integration.api_stack import MODEL, Stack, events_of, running_stack
from tests.integration.nats_process import NatsServer
from tests.integration.scripted_agent import GPU


async def ask_api(stack: Stack, to: Delivery, gpu: str = GPU) -> ResumeFrom:
    """As an agent does with a request that may have run before."""
    bus = stack.agent.bus
    answer: asyncio.Future[ResumeFrom] = asyncio.get_running_loop().create_future()

    async def on_answer(raw: RawMessage) -> None:
        answer.set_result(msgspec.json.decode(raw.data, type=ResumeFrom))

    inbox = f"{bus.inbox}.resume.{to.request.request_id}"
    stop = await bus.subscribe_raw(inbox, on_answer)
    attempt = to.request.attempts_before + to.num_delivered
    query = Resuming(to.request.request_id, gpu, attempt)
    await bus.publish(to.request.reply_to, query, reply=inbox)
    try:
        return await asyncio.wait_for(answer, 10)
    finally:
        await stop()


def contents(body: str) -> list[Any]:
    return [chunk["choices"][0]["delta"].get("content") for chunk in events_of(body)[:-1]]


async def test_a_second_agent_goes_on_behind_what_the_client_has(stack: Stack) -> None:
    await stack.agent.pull(MODEL)
    asking = asyncio.create_task(stack.ask(stream=True))
    first = await stack.agent.next()
    await stack.agent.answer_begins(first, "a", "b")
    await first.nak()
    second = await stack.agent.next()
    known = await ask_api(stack, second, "gpu1")
    assert (known.verdict, known.token_ids) == ("run", (100, 101))
    let_go = await stack.agent.next_cancel()  # whoever had it may live, and not know
    assert (let_go.request_id, let_go.gpu) == (first.request.request_id, GPU)
    await stack.agent.tokens(first, "x", index=2, first_id=900)  # stale: dropped
    await stack.agent.started(second)
    await stack.agent.tokens(second, "c", "d", index=2)
    await stack.agent.finished(second, 4)
    assert contents((await asking).text) == ["", "a", "b", "c", "d", None]
    assert (await ask_api(stack, second)).verdict == "drop"  # its acknowledgement was lost


async def test_a_request_that_was_given_up_is_not_resumed(stack: Stack) -> None:
    await stack.agent.pull(MODEL)
    asking = asyncio.create_task(stack.ask(stream=True))
    first = await stack.agent.next()
    await stack.agent.answer_begins(first, "a")
    asking.cancel()
    await stack.agent.next_cancel()
    assert (await ask_api(stack, first)).verdict == "cancel"
    await stack.agent.failed(first, "cancelled", "cancelled")
    await stack.queue_holds(0)


async def test_a_gap_is_filled_at_once(stack: Stack) -> None:
    """What comes after the lost tokens shows that they are lost: nobody waits for the end."""
    await stack.agent.pull(MODEL)
    asking = asyncio.create_task(stack.ask(stream=True))
    first = await stack.agent.next()
    await stack.agent.started(first)
    await stack.agent.tokens(first, "a")
    await stack.agent.tokens(first, "c", "d", index=2)
    second = await stack.agent.next()
    assert isinstance(second.request, GenerateRequest)
    assert second.request.request_id == f"{first.request.request_id}-r2"
    assert second.request.prefix_token_ids == (100,)
    assert (await stack.agent.next_cancel()).request_id == first.request.request_id
    await stack.agent.finished(first, 4, reason="cancelled")
    await stack.agent.started(second)
    await stack.agent.tokens(second, "b", "c", index=1)
    await stack.agent.finished(second, 3)
    assert contents((await asking).text) == ["", "a", "b", "c", None]
    await stack.queue_holds(0)


async def test_an_agent_that_died_leaves_the_last_word_to_the_api(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had begun, so it would tell the end; nobody else does."""
    monkeypatch.setattr(taking_back, "CONFIRM_S", 0.1)
    await stack.agent.pull(MODEL)
    asking = asyncio.create_task(stack.ask())
    delivery = await stack.agent.next()
    await stack.agent.answer_begins(delivery, "a")
    asking.cancel()
    withdrawn = await stack.withdrawals.next()
    assert (withdrawn.request_id, withdrawn.reason) == (delivery.request.request_id, "client_left")


# -- the api's connection drops ------------------------------------------------------------


@pytest.fixture
async def proxied(nats_server: NatsServer) -> AsyncIterator[Stack]:
    async with running_stack(nats_server, timeout_s=30, through_proxy=True) as stack:
        yield stack


async def test_an_end_that_the_api_could_not_hear_is_asked_for(proxied: Stack) -> None:
    stack = proxied
    await stack.agent.pull(MODEL)
    asking = asyncio.create_task(stack.ask(stream=True))
    first = await stack.agent.next()
    await stack.agent.answer_begins(first, "a")
    async with stack.api_cut_off():
        await stack.agent.tokens(first, "b", index=1)
        await stack.agent.finished(first, 2)
        await stack.queue_holds(0)
    second = await stack.agent.next()
    assert second.request.request_id == f"{first.request.request_id}-r2"
    assert second.request.prefix_token_ids == (100,)
    await stack.agent.started(second)
    await stack.agent.tokens(second, "b", index=1)
    await stack.agent.finished(second, 2)
    assert contents((await asking).text) == ["", "a", "b", None]


async def test_what_is_under_way_goes_on_when_the_api_is_back(proxied: Stack) -> None:
    """No second message for it, and no second run."""
    stack = proxied
    await stack.agent.pull(MODEL)
    asking = asyncio.create_task(stack.ask(stream=True))
    first = await stack.agent.next()
    await stack.agent.answer_begins(first, "a")
    async with stack.api_cut_off():
        pass
    await stack.queue_holds(1)
    await stack.agent.tokens(first, "b", index=1)
    await stack.agent.finished(first, 2)
    assert contents((await asking).text) == ["", "a", "b", None]
    await stack.queue_holds(0)
    assert stack.agent.deliveries.empty()
