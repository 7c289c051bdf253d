"""The official client, every resource that this server has, over real HTTP."""

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam

from services.ops.nats_server import free_port
from tests.conformance.processes import MAX_QUEUED
from tests.conformance.willing_agent import ANSWER, BROKEN, CHAT, DIMENSIONS, EMBEDS, HELD

TEXT = "".join(ANSWER)
MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": [{"type": "text", "text": "Hello"}], "name": "ada"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Once more."},
]


@pytest.fixture
def client(api_url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{api_url}/v1", api_key="sk-test", max_retries=0, timeout=20) as client:
        yield client


def an_async_client(api_url: str) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{api_url}/v1", api_key="sk-test", max_retries=0, timeout=20)


# -- chat ----------------------------------------------------------------------------------


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=CHAT,
        messages=MESSAGES,
        max_completion_tokens=3,
        temperature=0,
        top_p=0.9,
        seed=7,
        stop=["\n"],
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"50256": -100},
        user="ada",
        metadata={"k": "v"},
        logprobs=True,
        top_logprobs=2,
        extra_body={"top_k": 5, "min_tokens": 1, "ignore_eos": True, "repetition_penalty": 1.1},
    )
    assert answer.object == "chat.completion"
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", "".join(ANSWER[:3]))
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 10)
    assert choice.logprobs is not None
    told = choice.logprobs.content
    assert told is not None
    assert [one.token for one in told] == list(ANSWER[:3])
    assert bytes(told[0].bytes or []).decode() == ANSWER[0]
    assert [len(one.top_logprobs) for one in told] == [2, 2, 2]
    assert answer._request_id  # the client takes it from x-request-id


def test_a_chat_stream(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model=CHAT, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    with stream:
        chunks = list(stream)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    *told, last = chunks
    assert told[0].choices[0].delta.role == "assistant"
    assert "".join(one.choices[0].delta.content or "" for one in told) == TEXT
    assert [one.choices[0].finish_reason for one in told[:-1]] == [None] * (len(told) - 1)
    assert told[-1].choices[0].finish_reason == "stop"
    assert all(one.usage is None for one in told)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == len(ANSWER)


def test_the_streaming_helper(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model=CHAT, messages=MESSAGES, logprobs=True, stream_options={"include_usage": True}
    ) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    kinds = [event.type for event in events]
    assert kinds.count("content.delta") == len(ANSWER) + 1  # the first one is empty
    assert kinds.count("content.done") == 1
    assert "logprobs.content.delta" in kinds
    assert final.choices[0].message.content == TEXT
    assert final.choices[0].finish_reason == "stop"
    assert final.usage is not None
    assert final.usage.completion_tokens == len(ANSWER)


def test_a_stream_that_is_left(client: OpenAI) -> None:
    stream = client.chat.completions.create(model=CHAT, messages=MESSAGES, stream=True)
    assert next(iter(stream)).choices[0].delta.role == "assistant"
    stream.close()
    assert client.chat.completions.create(model=CHAT, messages=MESSAGES).choices


async def test_the_async_client(api_url: str) -> None:
    async with an_async_client(api_url) as client:
        whole, stream = await asyncio.gather(
            client.chat.completions.create(model=CHAT, messages=MESSAGES),
            client.chat.completions.create(model=CHAT, messages=MESSAGES, stream=True),
        )
        assert whole.choices[0].message.content == TEXT
        texts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(texts) == TEXT
        async with client.chat.completions.stream(model=CHAT, messages=MESSAGES) as helper:
            final = await helper.get_final_completion()
        assert final.choices[0].message.content == TEXT
        async with client.chat.completions.with_streaming_response.create(
            model=CHAT, messages=MESSAGES
        ) as raw:
            assert (await raw.parse()).choices[0].message.content == TEXT
        assert [model.id async for model in client.models.list()] == [BROKEN, CHAT, EMBEDS, HELD]


# -- raw answers ---------------------------------------------------------------------------


def test_raw_answers(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=CHAT, messages=MESSAGES, extra_body={"made_up": 1}
    )
    assert raw.status_code == 200
    assert raw.headers["content-type"] == "application/json"
    assert raw.headers["x-hotswap-start"] == "warm"
    assert raw.headers["x-hotswap-ignored-fields"] == "made_up"
    assert raw.request_id == raw.headers["x-request-id"]
    assert raw.parse().choices[0].message.content == TEXT


def test_raw_streams(client: OpenAI) -> None:
    raw = client.completions.with_raw_response.create(model=CHAT, prompt="x", stream=True)
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert "".join(chunk.choices[0].text for chunk in raw.parse()) == TEXT
    with client.completions.with_streaming_response.create(
        model=CHAT, prompt="x", stream=True
    ) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: {") for line in lines[:-1])
    assert lines[-1] == "data: [DONE]"


# -- completions ---------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["Hello", ["Hello"], [1, 2, 3], [[1, 2, 3]]])
def test_completions(client: OpenAI, prompt: Any) -> None:
    answer = client.completions.create(model=CHAT, prompt=prompt, logprobs=3, max_tokens=2)
    assert answer.object == "text_completion"
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == ("".join(ANSWER[:2]), "length")
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == list(ANSWER[:2])
    assert choice.logprobs.text_offset == [0, len(ANSWER[0])]
    assert choice.logprobs.top_logprobs is not None
    assert [len(one) for one in choice.logprobs.top_logprobs] == [3, 3]


def test_a_completions_stream(client: OpenAI) -> None:
    stream = client.completions.create(
        model=CHAT, prompt="x", stream=True, stream_options={"include_usage": True}
    )
    *told, last = list(stream)
    assert "".join(one.choices[0].text for one in told) == TEXT
    assert told[-1].choices[0].finish_reason == "stop"
    assert last.usage is not None
    assert last.usage.completion_tokens == len(ANSWER)


# -- embeddings and models -----------------------------------------------------------------


@pytest.mark.parametrize("given", ["a", ["a", "b"], [1, 2, 3], [[1], [2, 3]]])
def test_embeddings(client: OpenAI, given: Any) -> None:
    num_inputs = 1 if isinstance(given, str) or isinstance(given[0], int) else len(given)
    by_default = client.embeddings.create(model=EMBEDS, input=given)  # the client asks for base64
    floats = client.embeddings.create(model=EMBEDS, input=given, encoding_format="float")
    for answer in (by_default, floats):
        assert answer.object == "list"
        assert [one.index for one in answer.data] == list(range(num_inputs))
        assert answer.data[0].embedding == [1.0] + [0.0] * (DIMENSIONS - 1)
        assert answer.usage.total_tokens == 7
    short = client.embeddings.create(model=EMBEDS, input=given, dimensions=2)
    assert len(short.data[-1].embedding) == 2


def test_models(client: OpenAI) -> None:
    page = client.models.list()
    assert [model.id for model in page] == [BROKEN, CHAT, EMBEDS, HELD]
    assert not page.has_next_page()
    assert page.object == "list"
    model = client.models.retrieve(CHAT)
    assert (model.id, model.object, model.owned_by) == (CHAT, "model", "hotswap")
    assert model.created > 0
    assert model.model_dump()["max_model_len"] == 512  # as vLLM's clients look for it


# -- errors --------------------------------------------------------------------------------


def test_bad_requests(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=CHAT, messages=MESSAGES, temperature=3)
    assert (caught.value.param, caught.value.code) == ("temperature", "invalid_value")
    assert caught.value.type == "invalid_request_error"
    assert "temperature = 3" in caught.value.message
    assert caught.value.request_id
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.chat.completions.create(model=CHAT, messages=[], stream=True)
    with pytest.raises(openai.BadRequestError, match=r"no embeddings"):
        client.embeddings.create(model=CHAT, input="x")


def test_what_is_not_there(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="no/such model", prompt="x")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("no/such model")
    with pytest.raises(openai.NotFoundError, match="No such endpoint"):
        client.images.generate(prompt="x", model=CHAT)


def test_a_model_that_failed_and_retries_that_wait_as_told(
    client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(openai.InternalServerError, match="it has no weights") as caught:
        client.completions.create(model=BROKEN, prompt="x")
    assert caught.value.status_code == 503
    told_s = float(caught.value.response.headers["retry-after"])
    waits: list[float] = []
    monkeypatch.setattr("openai._base_client.time.sleep", waits.append)
    with pytest.raises(openai.InternalServerError):
        client.with_options(max_retries=2).completions.create(model=BROKEN, prompt="x")
    assert waits == [told_s, told_s]


async def test_a_full_queue(api_url: str) -> None:
    async with an_async_client(api_url) as client:
        asking = [
            asyncio.ensure_future(client.completions.create(model=HELD, prompt="x"))
            for _ in range(MAX_QUEUED + 1)
        ]
        done, waiting = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
        error = done.pop().exception()
        assert isinstance(error, openai.RateLimitError), error
        assert error.code == "queue_full"
        assert float(error.response.headers["retry-after"]) > 0
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


def test_time_outs(client: OpenAI) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.2).completions.create(model=HELD, prompt="x")
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.2).completions.create(model=HELD, prompt="x", stream=True)


def test_nobody_is_there() -> None:
    url = f"http://127.0.0.1:{free_port(0)}/v1"
    with (
        OpenAI(base_url=url, api_key="-", max_retries=0) as client,
        pytest.raises(openai.APIConnectionError),
    ):
        client.models.list()


def test_what_the_client_has_and_this_server_has_not(client: OpenAI) -> None:
    """Clear errors, in the client's own classes."""
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.list()  # of stored ones
    assert caught.value.status_code == 405
    with pytest.raises(openai.APIStatusError) as caught:
        client.models.delete(CHAT)
    assert caught.value.status_code == 405
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=CHAT, messages=MESSAGES, store=True)
    assert (refused.value.code, refused.value.param) == ("unsupported_parameter", "store")


def test_one_connection_for_many_requests(api_url: str) -> None:
    """Errors, streams and whole answers alike leave a connection that can be used again."""
    with httpx.Client(base_url=api_url, timeout=20) as http:
        used = set()
        for body in ({}, {"prompt": "x"}, {"prompt": "x", "stream": True}, {"prompt": 1}) * 2:
            answer = http.post("/v1/completions", json={"model": CHAT} | body)
            used.add(answer.extensions["network_stream"].get_extra_info("client_addr"))
        assert len(used) == 1
