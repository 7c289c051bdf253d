"""The api over a real nats-server and real HTTP: its answers and its refusals."""

import asyncio
from typing import Any

import pytest
from openai._legacy_response import LegacyAPIResponse
from openai.types.chat import ChatCompletion
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from schemas.requests import ChatMessage, ChatPrompt, TextPrompt
from schemas.state import SwapTrace
from tests.integration.api_stack import CHAT, MAX_QUEUED, MODEL, Stack, error_of, events_of

# -- answers -------------------------------------------------------------------------------


async def test_chat_by_the_official_client(stack: Stack) -> None:
    await stack.agent.pull(MODEL)

    async def ask() -> LegacyAPIResponse[ChatCompletion]:
        return await stack.openai.chat.completions.with_raw_response.create(
            model=MODEL,
            messages=[
                {"role": "developer", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            ],
            seed=-1,
            extra_body={"top_k": 5, "made_up": 1},
        )

    asking = asyncio.create_task(ask())
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
    waited_s = chunks[-1]["hotswap"]["waited_s"]
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
            "usage": {
                "prompt_tokens": 7,
                "completion_tokens": 1,
                "total_tokens": 8,
                "prompt_tokens_details": {"cached_tokens": 0},
            },
            "hotswap": {"start": "warm", "gpu": "gpu0", "waited_s": waited_s},
        },
    ]
    assert float(answer.headers["x-hotswap-wait-seconds"]) == waited_s


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


async def test_a_client_is_told_to_try_again_when_the_model_is_expected(stack: Stack) -> None:
    await stack.scheduler.predict(MODEL, 100.0)  # more than is ever told
    waiting = [asyncio.create_task(stack.ask()) for _ in range(MAX_QUEUED)]
    await stack.queue_holds(MAX_QUEUED)
    answer = await stack.ask()
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "60")
    await stack.scheduler.fail(MODEL, "out of luck")
    for refused in (*[await one for one in waiting], await stack.ask()):
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "60")


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("context_length_exceeded", 400),
        ("invalid_prompt", 400),
        ("model_unavailable", 503),
        ("engine_failed", 500),
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


async def test_removed_deployment_ends_what_waits(stack: Stack) -> None:
    asking = asyncio.create_task(stack.ask())
    await stack.queue_holds(1)
    await stack.scheduler.remove(MODEL)
    assert "was removed" in error_of(await asking)["message"]
    assert (await stack.ask()).status_code == 404
