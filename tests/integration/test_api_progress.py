"""Streams that wait: comments about the wait, which no client trips over, and what follows them."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import openai
import pytest

from schemas.state import SwapTrace
from services.api import respond
from tests.integration.api_stack import CHAT, MODEL, Stack, events_of, running_stack
from tests.integration.nats_process import NatsServer

SOON_S = 0.02
COMMENT = ": hotswap "


@pytest.fixture
async def stack(nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stack]:
    """Streams begin after no time at all."""
    monkeypatch.setattr(respond, "CHECK_S", SOON_S)
    monkeypatch.setattr(respond, "EVERY_S", SOON_S)
    monkeypatch.setattr(respond, "QUIET_S", SOON_S)
    async with running_stack(nats_server, timeout_s=30, progress_after_s=SOON_S) as stack:
        yield stack


class Waiting:
    """One stream as it comes. ``told``: the bodies of the comments so far."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.told: list[dict[str, Any]] = []
        self.events: list[Any] = []
        self._lines = response.aiter_lines()

    async def until(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The next comment for which ``condition`` holds."""
        async with asyncio.timeout(10):
            async for line in self._lines:
                self._take(line)
                if line.startswith(COMMENT) and condition(self.told[-1]):
                    return self.told[-1]
        raise AssertionError(f"the stream ended; comments were {self.told}")

    async def rest(self) -> None:
        async for line in self._lines:
            self._take(line)

    def _take(self, line: str) -> None:
        if line.startswith(COMMENT):
            self.told.append(json.loads(line.removeprefix(COMMENT)))
        elif line.startswith("data: ") and line != "data: [DONE]":
            self.events.append(json.loads(line.removeprefix("data: ")))
        else:
            assert line in ("", "data: [DONE]"), line


@contextlib.asynccontextmanager
async def waiting(stack: Stack, **more: Any) -> AsyncIterator[Waiting]:
    body = CHAT | {"stream": True} | more
    async with stack.http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        yield Waiting(response)


async def test_a_stream_tells_why_nothing_comes(stack: Stack) -> None:
    await stack.agent.hold(MODEL, "host")
    async with waiting(stack) as stream:
        await stack.scheduler.predict(MODEL, 30.0, place=2)
        told = await stream.until(lambda one: "position" in one)
        assert (told["state"], told["position"]) == ("waiting", 2)
        assert 0 < told["predicted_wait_s"] <= 30
        await stack.agent.hold(MODEL, "loading")
        await stream.until(lambda one: one["state"] == "loading")
        await stack.agent.loads(MODEL, 10, 40)
        told = await stream.until(lambda one: "done_bytes" in one)
        assert (told["state"], told["done_bytes"], told["total_bytes"]) == ("loading", 10, 40)
        await stack.agent.hold(MODEL, "swapping_in")
        await stream.until(lambda one: one["state"] == "swapping_in")
        await stack.agent.hold(MODEL)
        await stream.until(lambda one: one["state"] == "queued")
        await stack.agent.pull(MODEL)
        delivery = await stack.agent.next()
        swap = SwapTrace(started_at=1.0, total_s=0.25, num_bytes=4096)
        await stack.agent.started(delivery, "switch", swap)
        await stream.until(lambda one: one["state"] == "computing")
        await stack.agent.tokens(delivery, "a")
        await stack.agent.hold(MODEL, "host")
        await stream.until(lambda one: one["state"] == "suspended")
        await stack.agent.tokens(delivery, "b", index=1)
        await stack.agent.finished(delivery, 2)
        await stream.rest()
    assert "".join(one["choices"][0]["delta"].get("content") or "" for one in stream.events) == "ab"
    # The headers left long before this was known.
    assert "x-hotswap-start" not in stream.response.headers
    last = stream.told[-1]
    assert (last["start"], last["gpu"], last["swap_bytes"]) == ("switch", "gpu0", 4096)
    assert last["swap_s"] == 0.25
    waited_s = [one["waited_s"] for one in stream.told]
    assert waited_s[:-1] == sorted(waited_s[:-1])


async def test_with_usage_the_last_chunk_tells_it(stack: Stack) -> None:
    async with waiting(stack, stream_options={"include_usage": True}) as stream:
        await stream.until(lambda one: True)
        await stack.agent.pull(MODEL)
        await stack.agent.answer(await stack.agent.next(), "a")
        await stream.rest()
    assert stream.events[-1]["usage"]["completion_tokens"] == 1
    assert stream.events[-1]["hotswap"]["start"] == "warm"
    assert all("state" in one for one in stream.told)


async def test_an_error_after_the_begin_comes_as_an_event(stack: Stack) -> None:
    async with waiting(stack) as stream:
        await stream.until(lambda one: True)
        await stack.scheduler.fail(MODEL, "it needs 9 GB, the device has 8 GB")
        await stream.rest()
    [event] = stream.events
    assert event["error"]["code"] == "model_unavailable"
    assert "it needs 9 GB" in event["error"]["message"]
    await stack.queue_holds(0)


async def test_an_error_before_it_keeps_its_status(stack: Stack) -> None:
    await stack.scheduler.remove(MODEL)
    await stack.until(lambda got: got[1]["data"] == [], "/v1/models")
    assert (await stack.ask(stream=True)).status_code == 404


async def test_a_client_that_leaves_while_it_is_told(stack: Stack) -> None:
    async with waiting(stack) as stream:
        await stream.until(lambda one: True)
    assert (await stack.withdrawals.next()).reason == "client_left"
    await stack.queue_holds(0)


async def test_answers_that_are_not_streamed_are_not_touched(stack: Stack) -> None:
    asking = asyncio.create_task(stack.ask())
    await stack.queue_holds(1)
    async with waiting(stack) as stream:  # time for many comments
        await stream.until(lambda one: len(stream.told) > 3)
    await stack.queue_holds(1)
    await stack.agent.pull(MODEL)
    await stack.agent.answer(await stack.agent.next(), "a")
    answer = await asking
    assert answer.headers["x-hotswap-start"] == "warm"
    assert answer.json()["hotswap"]["start"] == "warm"


# -- clients -------------------------------------------------------------------------------


async def answer_slowly(stack: Stack, num_comments: int = 3) -> None:
    """After time for some comments: another stream counts them."""
    async with waiting(stack) as other:
        await other.until(lambda one: len(other.told) >= num_comments)
    await stack.queue_holds(1)
    await stack.agent.pull(MODEL)
    await stack.agent.answer(await stack.agent.next(), "a", "b")


async def test_the_official_client_skips_comments(stack: Stack) -> None:
    stream = await stack.openai.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "x"}], stream=True
    )
    answering = asyncio.create_task(answer_slowly(stack))
    contents = [chunk.choices[0].delta.content async for chunk in stream]
    assert contents == ["", "a", "b", None]
    await answering


async def test_the_official_client_raises_an_error_that_comes_late(stack: Stack) -> None:
    stream = await stack.openai.completions.create(model=MODEL, prompt="x", stream=True)
    await stack.scheduler.fail(MODEL, "out of luck")
    with pytest.raises(openai.APIError, match="out of luck"):
        async for _ in stream:
            pass


def by_data_lines(body: bytes) -> list[Any]:
    """As benchmarks do: chunks at blank lines, comments skipped, what is left is data."""
    out = []
    for chunk in body.strip().split(b"\n\n"):
        message = chunk.decode()
        if message.startswith(":"):
            continue
        data = message.removeprefix("data: ")
        if data != "[DONE]":
            out.append(json.loads(data))
    return out


def by_the_standard(body: bytes) -> list[Any]:
    """Server-sent events, read as the WHATWG's text says."""
    out: list[Any] = []
    data: list[str] = []
    for line in body.decode().split("\n"):
        if not line:
            out += ["\n".join(data)] if data else []
            data = []
        elif not line.startswith(":"):
            field, _, value = line.partition(":")
            assert field == "data", line
            data.append(value.removeprefix(" "))
    assert out.pop() == "[DONE]"
    return [json.loads(one) for one in out]


async def test_line_parsers_skip_comments(stack: Stack) -> None:
    body = CHAT | {"stream": True}
    asking = asyncio.create_task(stack.http.post("/v1/chat/completions", json=body))
    await stack.queue_holds(1)
    await answer_slowly(stack)
    answer = await asking
    assert answer.content.count(COMMENT.encode()) > 3
    seen = by_data_lines(answer.content)
    assert seen == by_the_standard(answer.content)
    contents = [one["choices"][0]["delta"].get("content") for one in seen]
    assert contents == ["", "a", "b", None]


async def test_a_stream_that_does_not_wait_has_no_comments(nats_server: NatsServer) -> None:
    async with running_stack(nats_server, timeout_s=30, progress_after_s=30) as stack:
        await stack.agent.pull(MODEL)
        asking = asyncio.create_task(stack.ask(stream=True))
        await stack.agent.answer(await stack.agent.next(), "a")
        answer = await asking
        assert COMMENT not in answer.text
        assert answer.headers["x-hotswap-start"] == "warm"
        assert events_of(answer.text)[-1] == "[DONE]"
