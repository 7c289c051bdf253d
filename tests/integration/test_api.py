"""The api over a real nats-server and real HTTP, with an agent whose answers the tests write."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import openai
import pytest
from conftest import NatsServer
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from scripted_agent import ScriptedAgent, ScriptedScheduler, Withdrawals

from schemas.requests import ChatMessage, ChatPrompt, TextPrompt
from schemas.state import SwapTrace
from services.api import service
from services.bus import Bus, Delivery, WorkQueue, declare
from services.nats_server import free_port
from services.settings import ApiSettings, Settings

MODEL = "Qwen/Qwen2.5-7B"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
MAX_QUEUED = 3


class Stack:
    """One api, its clients, and everything that it talks to."""

    def __init__(self, nats: NatsServer, url: str) -> None:
        self.nats = nats
        self.http = httpx.AsyncClient(base_url=url, timeout=20)
        self.openai = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        self.withdrawals = Withdrawals()
        self.stop = asyncio.Event()
        self.running: asyncio.Task[None]
        self.agent: ScriptedAgent
        self.scheduler: ScriptedScheduler
        self.queue: WorkQueue

    async def ask(self, **more: Any) -> httpx.Response:
        return await self.http.post("/v1/chat/completions", json=CHAT | more)

    async def until(self, condition: Callable[[Any], bool], path: str = "/readyz") -> None:
        """Poll ``path`` until ``condition`` holds for its status and JSON body."""
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    answer = await self.http.get(path)
                    if condition((answer.status_code, answer.json())):
                        return
                await asyncio.sleep(0.02)

    async def queue_holds(self, num_requests: int) -> None:
        """Wait until that many requests are queued or in flight."""
        async with asyncio.timeout(10):
            while True:
                depths, _ = await self.queue.depths()
                if sum(depths.values()) == num_requests:
                    return
                await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def running_stack(nats: NatsServer, timeout_s: float) -> AsyncIterator[Stack]:
    port = free_port(0)
    api = ApiSettings(
        port=port,
        request_timeout_s=timeout_s,
        max_queued_per_model=MAX_QUEUED,
        max_body_bytes=100_000,
    )
    stack = Stack(nats, f"http://127.0.0.1:{port}")
    buses = {
        user: await Bus.connect(nats.credentials[user], service=user)
        for user in ("admin", "scheduler", "agent")
    }
    await declare(buses["admin"], MAX_QUEUED)
    stack.queue = WorkQueue(buses["admin"])
    await stack.withdrawals.start(buses["admin"])
    stack.scheduler = ScriptedScheduler(buses["scheduler"])
    stack.agent = ScriptedAgent(buses["agent"])
    stack.running = asyncio.create_task(
        service.run(Settings(api=api), nats.credentials["api"], stop=stack.stop)
    )
    await stack.until(lambda got: got[0] == 503)
    await stack.scheduler.lead()
    await stack.agent.start()
    await stack.scheduler.deploy(MODEL)
    await stack.agent.hold(MODEL)
    await stack.until(lambda got: got[0] == 200)
    await stack.until(lambda got: got[1]["data"][0]["hotswap"]["gpus"] != {}, "/v1/models")
    try:
        yield stack
    finally:
        stack.stop.set()
        await stack.http.aclose()
        await stack.openai.close()
        await asyncio.wait_for(stack.running, 20)
        stack.agent.stop()
        for bus in buses.values():
            await bus.close()


@pytest.fixture
async def stack(nats_server: NatsServer) -> AsyncIterator[Stack]:
    async with running_stack(nats_server, timeout_s=30) as stack:
        yield stack


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"]
    return dict(error)


def events_of(body: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


# -- answers -------------------------------------------------------------------------------


async def test_chat_by_the_official_client(stack: Stack) -> None:
    await stack.agent.pull(MODEL)
    asking = asyncio.create_task(
        stack.openai.chat.completions.with_raw_response.create(
            model=MODEL,
            messages=[
                {"role": "developer", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            ],
            seed=-1,
            extra_body={"top_k": 5, "made_up": 1},
        )
    )
    delivery = await stack.agent.next()
    swap = SwapTrace(started_at=1.0, total_s=0.25, num_bytes=4096)
    await stack.agent.started(delivery, "switch", swap)
    await stack.agent.tokens(delivery, "Hel", "lo")
    await stack.agent.finished(delivery, 2, reason="length", text="!")
    raw = await asking
    answer = raw.parse()
    request = delivery.request
    assert request.prompt == ChatPrompt(
        (ChatMessage("system", "be brief"), ChatMessage("user", "hi"))
    )
    assert (request.sampling.seed, request.sampling.top_k) == (2**63 - 1, 5)
    assert answer.id == f"chatcmpl-{request.request_id}"
    assert answer.choices[0].message.content == "Hello!"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 9
    assert raw.headers["x-request-id"] == request.request_id
    assert raw.headers["x-hotswap-start"] == "switch"
    assert raw.headers["x-hotswap-gpu"] == "gpu0"
    assert raw.headers["x-hotswap-swap-bytes"] == "4096"
    assert float(raw.headers["x-hotswap-swap-seconds"]) == 0.25
    assert raw.headers["x-hotswap-ignored-fields"] == "made_up"
    await stack.queue_holds(0)


async def test_streams_by_the_official_client(stack: Stack) -> None:
    await stack.agent.pull(MODEL)

    async def answer_all() -> None:
        for _ in range(2):
            await stack.agent.answer(await stack.agent.next(), "a", "", "b", rest="c")

    answering = asyncio.create_task(answer_all())
    chat = await stack.openai.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "x"}], stream=True
    )
    contents = [chunk.choices[0].delta.content async for chunk in chat]
    assert contents == ["", "a", "b", "c", None]
    text = await stack.openai.completions.create(
        model=MODEL, prompt="x", stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in text]
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "abc"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3
    await answering


async def test_stream_has_openais_exact_form(stack: Stack) -> None:
    await stack.agent.pull(MODEL)
    asking = asyncio.create_task(stack.ask(stream=True, stream_options={"include_usage": True}))
    delivery = await stack.agent.next()
    await stack.agent.answer(delivery, "hi")
    answer = await asking
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events_of(answer.text)
    assert done == "[DONE]"
    head = {
        "id": f"chatcmpl-{delivery.request.request_id}",
        "object": "chat.completion.chunk",
        "created": int(delivery.request.created_at),
        "model": MODEL,
    }
    choice = {"index": 0, "logprobs": None, "finish_reason": None}
    assert chunks == [
        head
        | {"choices": [choice | {"delta": {"role": "assistant", "content": ""}}], "usage": None},
        head | {"choices": [choice | {"delta": {"content": "hi"}}], "usage": None},
        head | {"choices": [choice | {"delta": {}, "finish_reason": "stop"}], "usage": None},
        head
        | {
            "choices": [],
            "usage": {"prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 8},
        },
    ]


async def test_whole_completion(stack: Stack) -> None:
    await stack.agent.pull(MODEL)
    asking = asyncio.create_task(stack.openai.completions.create(model=MODEL, prompt=["once"]))
    delivery = await stack.agent.next()
    await stack.agent.answer(delivery, " upon", " a")
    assert delivery.request.prompt == TextPrompt("once")
    assert delivery.request.sampling.max_tokens == 16
    answer = await asking
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (" upon a", "stop")


async def test_models_and_health(stack: Stack) -> None:
    model = await stack.openai.models.retrieve(MODEL)
    assert model.id == MODEL
    listed = (await stack.http.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert listed["data"][0]["hotswap"] == {
        "status": "ready",
        "state": "resident",
        "gpus": {"gpu0": "resident"},
        "weight_bytes": 4096,
        "max_model_len": 512,
        "reason": "",
    }
    assert (await stack.http.get("/healthz")).status_code == 200
    page = await stack.http.get("/schema")
    assert "openapi.json" in page.text
    assert "//cdn" not in page.text
    assert (await stack.http.get("/schema/openapi.json")).json()["openapi"] == "3.1.0"


async def test_one_trace_from_client_to_agent(stack: Stack) -> None:
    spans = InMemorySpanExporter()
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        provider = TracerProvider()
        trace.set_tracer_provider(provider)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    await stack.agent.pull(MODEL)
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    asking = asyncio.create_task(
        stack.http.post(
            "/v1/chat/completions",
            json=CHAT | {"stream": True},
            headers={"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"},
        )
    )
    delivery = await stack.agent.next()
    at_agent = trace.get_current_span(delivery.context).get_span_context()
    assert f"{at_agent.trace_id:032x}" == trace_id
    await stack.agent.answer(delivery, "x")
    answer = await asking
    assert answer.headers["x-trace-id"] == trace_id
    [span] = [one for one in spans.get_finished_spans() if one.kind is trace.SpanKind.SERVER]
    assert span.name == "POST /v1/chat/completions"
    assert span.context is not None
    assert span.context.span_id == at_agent.span_id
    assert (
        dict(span.attributes or {}).items()
        >= {
            "hotswap.request_id": delivery.request.request_id,
            "hotswap.model": MODEL,
            "http.response.status_code": 200,
        }.items()
    )


# -- refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "param"),
    [
        ("POST", "/v1/chat/completions", b'{"model": ', 400, "invalid_json", None),
        ("POST", "/v1/chat/completions", b"[1]", 400, "invalid_json", None),
        ("POST", "/v1/chat/completions", b'{"model": "m"}', 400, "missing_field", "messages"),
        (
            "POST",
            "/v1/completions",
            b'{"model": "m", "prompt": "x", "max_tokens": "9"}',
            400,
            "invalid_type",
            "max_tokens",
        ),
        (
            "POST",
            "/v1/completions",
            b'{"model": "nope", "prompt": "x"}',
            404,
            "model_not_found",
            "model",
        ),
        ("POST", "/v1/completions", b" " * 200_000, 413, "request_too_large", None),
        ("GET", "/v1/models/nope", b"", 404, "model_not_found", "model"),
        ("GET", "/v2/other", b"", 404, "unknown_url", None),
        ("GET", "/v1/completions", b"", 405, "method_not_allowed", None),
    ],
)
async def test_refusals(
    stack: Stack, method: str, path: str, body: bytes, status: int, code: str, param: str | None
) -> None:
    answer = await stack.http.request(method, path, content=body)
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    if code == "model_not_found":
        assert MODEL in error["message"]


async def test_full_queue_is_429(stack: Stack) -> None:
    waiting = [asyncio.create_task(stack.ask()) for _ in range(MAX_QUEUED)]
    await stack.queue_holds(MAX_QUEUED)
    answer = await stack.ask()
    assert (answer.status_code, error_of(answer)["code"]) == (429, "queue_full")
    assert int(answer.headers["retry-after"]) > 0
    await stack.agent.pull(MODEL)
    for _ in waiting:
        await stack.agent.answer(await stack.agent.next(), "ok")
    assert [(await one).status_code for one in waiting] == [200] * MAX_QUEUED


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("context_length_exceeded", 400),
        ("invalid_prompt", 400),
        ("model_unavailable", 503),
        ("engine_failed", 500),
        ("deadline_exceeded", 504),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_failures_before_the_first_token(
    stack: Stack, code: Any, status: int, stream: bool
) -> None:
    await stack.agent.pull(MODEL)
    asking = asyncio.create_task(stack.ask(stream=stream))
    delivery = await stack.agent.next()
    await stack.agent.started(delivery)
    await stack.agent.failed(delivery, code, "because 1 > 0")
    answer = await asking
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["message"]) == (status, code, "because 1 > 0")


async def test_failure_in_mid_stream(stack: Stack) -> None:
    await stack.agent.pull(MODEL)
    asking = asyncio.create_task(stack.ask(stream=True))
    delivery = await stack.agent.next()
    await stack.agent.started(delivery)
    await stack.agent.tokens(delivery, "one")
    await stack.agent.failed(delivery, "engine_failed", "out of luck")
    *_, content, last = events_of((await asking).text)
    assert content["choices"][0]["delta"] == {"content": "one"}
    assert last["error"]["code"] == "engine_failed"


async def test_failed_deployment_is_refused_and_ends_what_waits(stack: Stack) -> None:
    asking = asyncio.create_task(stack.ask())
    await stack.queue_holds(1)
    await stack.scheduler.fail(MODEL, "it needs 9 GB, the device has 8 GB")
    for answer in (await asking, await stack.ask()):
        error = error_of(answer)
        assert (answer.status_code, error["code"]) == (503, "model_unavailable")
        assert "it needs 9 GB" in error["message"]
    withdrawn = await stack.withdrawals.next()
    assert (withdrawn.model, withdrawn.reason) == (MODEL, "model_failed")
    await stack.queue_holds(0)


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


@pytest.mark.parametrize("stream", [False, True])
async def test_client_leaves_a_running_request(stack: Stack, stream: bool) -> None:
    await stack.agent.pull(MODEL)
    asking = asyncio.create_task(stack.ask(stream=stream))
    delivery = await stack.agent.next()
    await stack.agent.started(delivery)
    await stack.agent.tokens(delivery, "one")
    async with stack.http.stream("GET", "/healthz"):  # the token is there before the client goes
        asking.cancel()
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
    await stack.agent.pullers[MODEL].want(2)
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
