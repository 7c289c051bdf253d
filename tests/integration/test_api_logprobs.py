"""Log probabilities and the settings around them, by the official client, in OpenAI's forms."""

import asyncio
from typing import Any

import openai
import pytest

from schemas.requests import GenerateRequest, SamplingParams
from schemas.stream import TokenLogprob, TokenLogprobs
from services.bus import Delivery
from tests.integration.api_stack import MODEL, Stack, events_of

HI: Any = [{"role": "user", "content": "hi"}]
# "h", the two halves of "é", and the token that ends it, which adds no text.
TOLD = (
    TokenLogprobs(
        TokenLogprob(100, -0.5, "h"),
        offset=0,
        top=(TokenLogprob(7, -0.25, "H"), TokenLogprob(100, -0.5, "h")),
    ),
    TokenLogprobs(TokenLogprob(101, -0.125, "\\xc3", b"\xc3"), offset=1),
    TokenLogprobs(TokenLogprob(102, 0.0, "\\xa9", b"\xa9"), offset=1),
    TokenLogprobs(TokenLogprob(103, -9999.0, "</s>"), offset=2),
)
TEXTS = ("h", "", "é", "")


def sampling_of(delivery: Delivery) -> SamplingParams:
    assert isinstance(delivery.request, GenerateRequest)
    return delivery.request.sampling


async def answer(stack: Stack) -> SamplingParams:
    """The one answer of this file; what was asked for."""
    delivery = await stack.agent.next()
    await stack.agent.started(delivery)
    await stack.agent.tokens(delivery, *TEXTS, logprobs=TOLD)
    await stack.agent.finished(delivery, len(TEXTS))
    return sampling_of(delivery)


async def test_chat(stack: Stack) -> None:
    await stack.agent.pull(MODEL)
    answering = asyncio.create_task(answer(stack))
    got = await stack.openai.chat.completions.create(
        model=MODEL,
        messages=HI,
        logprobs=True,
        top_logprobs=2,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"100": 5},
        extra_body={"min_p": 0.1, "repetition_penalty": 1.1, "stop_token_ids": [103]},
    )
    sampling = await answering
    assert (sampling.logprobs, sampling.min_p, sampling.repetition_penalty) == (2, 0.1, 1.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
    assert (sampling.logit_bias, sampling.stop_token_ids) == ({100: 5.0}, (103,))
    assert got.choices[0].message.content == "hé"
    logprobs = got.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert logprobs.refusal is None
    assert [one.token for one in logprobs.content] == ["h", "\\xc3", "\\xa9", "</s>"]
    assert [one.logprob for one in logprobs.content] == [-0.5, -0.125, 0.0, -9999.0]
    spoken = b"".join(bytes(one.bytes or []) for one in logprobs.content[:3])
    assert spoken.decode() == got.choices[0].message.content
    assert [(top.token, top.logprob, top.bytes) for top in logprobs.content[0].top_logprobs] == [
        ("H", -0.25, [72]),
        ("h", -0.5, [104]),
    ]
    assert logprobs.content[1].top_logprobs == []


async def test_chat_stream_has_openais_exact_form(stack: Stack) -> None:
    await stack.agent.pull(MODEL)
    answering = asyncio.create_task(answer(stack))
    got = await stack.ask(stream=True, logprobs=True, top_logprobs=2)
    await answering
    *events, done = events_of(got.text)
    assert done == "[DONE]"
    choices = [event["choices"][0] for event in events]
    assert [choice["delta"].get("content") for choice in choices] == ["", "h", "", "é", "", None]
    assert choices[0]["logprobs"] is None
    assert choices[-1]["logprobs"] is None
    h = {"token": "h", "logprob": -0.5, "bytes": [104]}
    top = [{"token": "H", "logprob": -0.25, "bytes": [72]}, h]
    assert choices[1]["logprobs"] == {"content": [h | {"top_logprobs": top}], "refusal": None}
    half = {"token": "\\xc3", "logprob": -0.125, "bytes": [0xC3], "top_logprobs": []}
    assert choices[2]["logprobs"] == {"content": [half], "refusal": None}


async def test_completions_whole_and_streamed(stack: Stack) -> None:
    await stack.agent.pull(MODEL)
    answering = asyncio.create_task(answer(stack))
    got = await stack.openai.completions.create(model=MODEL, prompt="x", logprobs=2)
    assert (await answering).logprobs == 2
    whole = got.choices[0].logprobs
    assert whole is not None
    assert whole.tokens == ["h", "\\xc3", "\\xa9", "</s>"]
    assert whole.token_logprobs == [-0.5, -0.125, 0.0, -9999.0]
    assert whole.text_offset == [0, 1, 1, 2]
    assert whole.top_logprobs is not None
    assert whole.top_logprobs[:2] == [{"H": -0.25, "h": -0.5}, {"\\xc3": -0.125}]
    answering = asyncio.create_task(answer(stack))
    stream = await stack.openai.completions.create(model=MODEL, prompt="x", logprobs=2, stream=True)
    parts = [chunk.choices[0] async for chunk in stream]
    await answering
    assert [part.text for part in parts] == ["h", "", "é", "", ""]
    told = [part.logprobs for part in parts if part.logprobs]
    assert [token for one in told for token in one.tokens or []] == whole.tokens
    assert [place for one in told for place in one.text_offset or []] == whole.text_offset


async def test_nobody_else_gets_any(stack: Stack) -> None:
    await stack.agent.pull(MODEL)
    asking = asyncio.create_task(stack.ask())
    delivery = await stack.agent.next()
    await stack.agent.answer(delivery, "x")
    assert (await asking).json()["choices"][0]["logprobs"] is None
    assert sampling_of(delivery).logprobs is None


async def test_a_wrong_setting_is_named(stack: Stack) -> None:
    with pytest.raises(openai.BadRequestError, match="top_logprobs = 21") as caught:
        await stack.openai.chat.completions.create(
            model=MODEL, messages=HI, logprobs=True, top_logprobs=21
        )
    assert caught.value.param == "top_logprobs"
    with pytest.raises(openai.BadRequestError, match="presence_penalty = 3"):
        await stack.openai.completions.create(model=MODEL, prompt="x", presence_penalty=3)
