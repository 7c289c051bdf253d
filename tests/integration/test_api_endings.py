"""How requests end at the api when clients leave, time runs out, or an agent or server dies."""

import asyncio

import pytest

from services.api import service
from services.bus import Delivery
from tests.integration.api_stack import CHAT, MODEL, Stack, error_of, events_of, running_stack
from tests.integration.nats_process import NatsServer

# -- clients that leave, deadlines, shutdown -----------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_client_leaves_the_queue(stack: Stack, stream: bool) -> None:
    asking = asyncio.create_task(stack.ask(stream=stream))
    await stack.queue_holds(1)
    asking.cancel()
    withdrawn = await stack.withdrawals.next()
    assert withdrawn.reason == "client_left"
    assert (await stack.agent.next_cancel()).request_id == withdrawn.request_id
    await stack.queue_holds(0)


async def test_client_leaves_a_stream(stack: Stack) -> None:
    await stack.agent.pull(MODEL)
    body = CHAT | {"stream": True}
    answering = asyncio.create_task(stack.agent.next())
    opening = stack.http.stream("POST", "/v1/chat/completions", json=body)
    entering = asyncio.create_task(opening.__aenter__())
    delivery = await answering
    await stack.agent.started(delivery)
    await stack.agent.tokens(delivery, "one")
    async for line in (await entering).aiter_lines():
        if "one" in line:
            break
    await opening.__aexit__(None, None, None)
    await _is_cancelled_at_the_agent(stack, delivery)


async def test_client_leaves_a_running_request(stack: Stack) -> None:
    await stack.agent.pull(MODEL)
    asking = asyncio.create_task(stack.ask())
    delivery = await stack.agent.next()
    await stack.agent.answer_begins(delivery, "one")
    asking.cancel()
    await _is_cancelled_at_the_agent(stack, delivery)


async def _is_cancelled_at_the_agent(stack: Stack, delivery: Delivery) -> None:
    assert (await stack.agent.next_cancel()).request_id == delivery.request.request_id
    await stack.agent.finished(delivery, 1, reason="cancelled")
    await stack.queue_holds(0)
    assert stack.withdrawals.is_empty()  # the agent reports the end of what it started


async def test_deadline(nats_server: NatsServer) -> None:
    async with running_stack(nats_server, timeout_s=0.5) as stack:
        answer = await stack.ask()
        error = error_of(answer)
        assert (answer.status_code, error["code"]) == (504, "deadline_exceeded")
        assert "still waiting for model" in error["message"]
        assert (await stack.withdrawals.next()).reason == "deadline"
        await stack.agent.next_cancel()
        await stack.queue_holds(0)


@pytest.mark.parametrize("where", ["body", "header"])
async def test_a_client_sets_a_shorter_deadline(stack: Stack, where: str) -> None:
    await stack.agent.pull(MODEL)
    body = CHAT | ({"timeout": 0.3} if where == "body" else {})
    headers = {"x-request-timeout-s": "0.3"} if where == "header" else {}
    asking = asyncio.create_task(
        stack.http.post("/v1/chat/completions", json=body, headers=headers)
    )
    delivery = await stack.agent.next()
    assert delivery.request.deadline_at - delivery.request.created_at == pytest.approx(0.3)
    await stack.agent.answer_begins(delivery, "a")
    answer = await asking
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (504, "deadline_exceeded")
    assert "0.3 s (the request's timeout); it was running on gpu 'gpu0'" in error["message"]
    await _is_cancelled_at_the_agent(stack, delivery)


async def test_an_agent_that_sees_the_deadline_first(stack: Stack) -> None:
    await stack.agent.pull(MODEL)
    asking = asyncio.create_task(stack.ask(timeout=20))
    delivery = await stack.agent.next()
    await stack.agent.failed(delivery, "deadline_exceeded", "the deadline passed in queue")
    answer = await asking
    assert answer.status_code == 504
    assert "20 s (the request's timeout)" in error_of(answer)["message"]


async def test_no_deadline_beyond_the_servers(stack: Stack) -> None:
    await stack.agent.pull(MODEL)
    asking = asyncio.create_task(stack.ask(timeout=1e9))
    delivery = await stack.agent.next()
    assert delivery.request.deadline_at - delivery.request.created_at == pytest.approx(30)
    await stack.agent.answer(delivery, "a")
    assert (await asking).status_code == 200


@pytest.mark.parametrize(
    ("body", "headers", "param"),
    [
        ({"timeout": 0}, {}, "timeout"),
        ({"timeout": -1.5}, {}, "timeout"),
        ({"timeout": "soon"}, {}, "timeout"),
        ({}, {"x-request-timeout-s": "nan"}, "x-request-timeout-s"),
        ({}, {"x-request-timeout-s": "5s"}, "x-request-timeout-s"),
    ],
)
async def test_a_timeout_that_is_none(
    stack: Stack, body: dict[str, object], headers: dict[str, str], param: str
) -> None:
    answer = await stack.http.post("/v1/chat/completions", json=CHAT | body, headers=headers)
    assert (answer.status_code, error_of(answer)["param"]) == (400, param)


async def test_shutdown_ends_what_is_open(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "SHUTDOWN_GRACE_S", 0.3)
    asking = asyncio.create_task(stack.ask(stream=True))
    await stack.queue_holds(1)
    stack.stop.set()
    answer = await asking
    assert (answer.status_code, error_of(answer)["code"]) == (503, "shutting_down")
    assert (await stack.withdrawals.next()).reason == "shutdown"
    await asyncio.wait_for(stack.running, 10)


# -- agents and servers that die -----------------------------------------------------------


async def test_second_attempt_gives_one_unbroken_stream(stack: Stack) -> None:
    await stack.agent.pull(MODEL)
    asking = asyncio.create_task(stack.ask(stream=True))
    first = await stack.agent.next()
    await stack.agent.started(first)
    await stack.agent.tokens(first, "a", "b")
    await first.nak()
    second = await stack.agent.next()
    assert second.num_delivered == 2
    await stack.agent.started(second)
    await stack.agent.tokens(second, "a")
    await stack.agent.tokens(first, "c", index=2)  # stale: dropped
    await stack.agent.tokens(second, "b", "c", "d", index=1)
    await stack.agent.finished(second, 4)
    *chunks, done = events_of((await asking).text)
    assert done == "[DONE]"
    contents = [chunk["choices"][0]["delta"].get("content") for chunk in chunks]
    assert contents == ["", "a", "b", "c", "d", None]


async def test_agent_that_cancels_by_itself_makes_it_run_again(stack: Stack) -> None:
    await stack.agent.pull(MODEL)
    asking = asyncio.create_task(stack.ask())
    first = await stack.agent.next()
    await stack.agent.started(first)
    await stack.agent.finished(first, 0, reason="cancelled")
    await stack.agent.answer(await stack.agent.next(), "ok")
    assert (await asking).json()["choices"][0]["message"]["content"] == "ok"


async def test_second_attempt_that_says_something_else_is_an_error(stack: Stack) -> None:
    await stack.agent.pull(MODEL)
    asking = asyncio.create_task(stack.ask(stream=True))
    first = await stack.agent.next()
    await stack.agent.tokens(first, "a", "b")
    await first.nak()
    second = await stack.agent.next()
    await stack.agent.tokens(second, "x", first_id=900)
    last = events_of((await asking).text)[-1]
    assert last["error"]["code"] == "engine_failed"
    assert "does not repeat itself" in last["error"]["message"]
    await stack.agent.next_cancel()


async def test_lost_tokens_make_it_run_again(stack: Stack) -> None:
    await stack.agent.pull(MODEL)
    asking = asyncio.create_task(stack.ask())
    first = await stack.agent.next()
    await stack.agent.started(first)
    await stack.agent.tokens(first, "a")
    await stack.agent.tokens(first, "c", index=2)
    await stack.agent.finished(first, 3)
    second = await stack.agent.next()
    assert second.request.request_id == f"{first.request.request_id}-r2"
    assert second.request.sampling == first.request.sampling
    await stack.agent.answer(second, "a", "b", "c")
    assert (await asking).json()["choices"][0]["message"]["content"] == "abc"


async def test_killed_nats_server_loses_no_request(stack: Stack) -> None:
    await stack.agent.pull(MODEL, num_free=1)
    streaming = asyncio.create_task(stack.ask(stream=True))
    first = await stack.agent.next()
    await stack.agent.started(first)
    await stack.agent.tokens(first, "a", "b")
    waiting = asyncio.create_task(stack.ask())
    await stack.queue_holds(2)
    stack.nats.kill()
    await stack.until(lambda got: got[0] == 503)
    refused = await stack.ask()
    assert (refused.status_code, error_of(refused)["code"]) == (503, "bus_unavailable")
    stack.nats.start()
    await stack.agent.pullers[f"interactive.{MODEL}"].want(2)
    again: list[Delivery] = [await stack.agent.next() for _ in range(2)]
    assert first.request.request_id in {one.request.request_id for one in again}
    for delivery in again:
        await stack.agent.answer(delivery, "a", "b", "c")
    contents = [
        chunk["choices"][0]["delta"].get("content")
        for chunk in events_of((await streaming).text)[:-1]
    ]
    assert contents == ["", "a", "b", "c", None]
    assert (await waiting).json()["choices"][0]["message"]["content"] == "abc"
    await stack.queue_holds(0)
