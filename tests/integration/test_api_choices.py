"""Several choices and several prompts of one HTTP request: whole, streamed, and how they end."""

import asyncio
from collections import defaultdict
from typing import Any

import httpx
import openai
import pytest

from schemas.requests import TextPrompt
from schemas.stream import PromptTold
from services.bus import Delivery
from tests.integration.api_stack import MAX_QUEUED, MODEL, Stack, error_of, events_of

HI: Any = [{"role": "user", "content": "hi"}]


async def deliveries(stack: Stack, num: int) -> list[Any]:
    """As the agent gets them, in the order of their choices."""
    found: list[Any] = [await stack.agent.next() for _ in range(num)]
    return sorted(found, key=lambda one: one.request.request_id)


async def test_choices_of_a_chat_by_the_official_client(stack: Stack) -> None:
    await stack.agent.pull(MODEL)
    asking = asyncio.create_task(
        stack.openai.chat.completions.create(model=MODEL, messages=HI, n=3, seed=5)
    )
    asked = await deliveries(stack, 3)
    assert [one.request.sampling.seed for one in asked] == [5, 6, 7]
    for place in (2, 0, 1):  # they end in any order
        await stack.agent.started(asked[place])
        await stack.agent.tokens(asked[place], f"choice {place}")
        await stack.agent.finished(asked[place], 1, cached_tokens=4 + place)
    answer = await asking
    said = [(one.index, one.message.content, one.finish_reason) for one in answer.choices]
    assert said == [(i, f"choice {i}", "stop") for i in range(3)]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 3)
    assert answer.usage.total_tokens == 10
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 4
    # One HTTP request, one id; the queue knows each choice by an id of its own.
    head = answer.id.removeprefix("chatcmpl-")
    assert [one.request.request_id for one in asked] == [f"{head}-c{i}" for i in range(3)]
    await stack.queue_holds(0)


async def test_choices_of_a_chat_stream_interleave(stack: Stack) -> None:
    await stack.agent.pull(MODEL)
    asking = asyncio.create_task(
        stack.ask(n=2, stream=True, stream_options={"include_usage": True})
    )
    first, second = await deliveries(stack, 2)
    for one in (second, first):
        await stack.agent.started(one)
    await stack.agent.tokens(second, "b0")
    await stack.agent.tokens(first, "a0")
    await stack.agent.tokens(second, "b1", index=1)
    await stack.agent.finished(second, 2, reason="length")
    await stack.agent.tokens(first, "a1", index=1)
    await stack.agent.finished(first, 2, text="!")
    *events, usage, done = events_of((await asking).text)
    assert done == "[DONE]"
    choices = [event["choices"][0] for event in events]
    assert [one["index"] for one in choices[:2]] == [0, 1]
    assert all(one["delta"] == {"role": "assistant", "content": ""} for one in choices[:2])
    texts: dict[int, str] = defaultdict(str)
    reasons: dict[int, str] = {}
    for one in choices[2:]:
        texts[one["index"]] += one["delta"].get("content") or ""
        if one["finish_reason"]:
            reasons[one["index"]] = one["finish_reason"]
    assert texts == {0: "a0a1!", 1: "b0b1"}
    assert reasons == {0: "stop", 1: "length"}
    assert [event["usage"] for event in events] == [None] * len(events)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 4
    assert len({event["id"] for event in events}) == 1


async def test_several_prompts_by_the_official_client(stack: Stack) -> None:
    await stack.agent.pull(MODEL)
    asking = asyncio.create_task(
        stack.openai.completions.create(model=MODEL, prompt=["a", "b", "c"], seed=1)
    )
    asked = await deliveries(stack, 3)
    assert [one.request.prompt for one in asked] == [TextPrompt(text) for text in "abc"]
    assert {one.request.sampling.seed for one in asked} == {1}
    for one in reversed(asked):
        await stack.agent.answer(one, one.request.prompt.text.upper())
    answer = await asking
    assert [(one.index, one.text) for one in answer.choices] == [(0, "A"), (1, "B"), (2, "C")]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (21, 3)


async def test_echo_of_text_and_of_token_ids(stack: Stack) -> None:
    await stack.agent.pull(MODEL)
    asking = asyncio.create_task(
        stack.openai.completions.create(model=MODEL, prompt="Once", echo=True)
    )
    await stack.agent.answer(await stack.agent.next(), " upon")
    assert (await asking).choices[0].text == "Once upon"
    stream = await asyncio.gather(
        stack.openai.completions.create(model=MODEL, prompt=[[5, 6]], echo=True, stream=True),
        _answer_and_tell(stack, PromptTold(2, (), "Twice")),
    )
    chunks = [chunk async for chunk in stream[0]]
    assert [chunk.choices[0].text for chunk in chunks] == ["Twice upon", " a", ""]


async def _answer_and_tell(stack: Stack, told: PromptTold) -> Delivery:
    delivery = await stack.agent.next()
    assert delivery.request.sampling.tell_prompt_text
    await stack.agent.started(delivery)
    await stack.agent.tokens(delivery, " upon", " a", prompt=told)
    await stack.agent.finished(delivery, 2)
    return delivery


async def test_token_ids_and_usage_so_far(stack: Stack) -> None:
    await stack.agent.pull(MODEL)
    options = {"include_usage": True, "continuous_usage_stats": True}
    asking = asyncio.create_task(
        stack.ask(stream=True, stream_options=options, return_token_ids=True, request_id="mine")
    )
    delivery = await stack.agent.next()
    assert delivery.request.sampling.tell_prompt_ids
    await stack.agent.started(delivery)
    await stack.agent.tokens(delivery, "a", "", "b", prompt=PromptTold(7, tuple(range(7))))
    await stack.agent.finished(delivery, 3)
    *events, usage, done = events_of((await asking).text)
    assert done == "[DONE]"
    assert {event["id"] for event in events} == {"chatcmpl-mine"}
    assert events[0]["prompt_token_ids"] == list(range(7))
    assert [event["choices"][0].get("token_ids") for event in events[1:]] == [
        [100],
        [101],
        [102],
        None,
    ]
    assert [event["usage"]["completion_tokens"] for event in events] == [0, 1, 2, 3, 3]
    assert [event["usage"]["prompt_tokens"] for event in events] == [7] * 5
    assert usage["usage"]["total_tokens"] == 10


# -- how they end --------------------------------------------------------------------------------


async def test_one_failing_choice_fails_the_answer_and_takes_the_others_back(stack: Stack) -> None:
    asking = asyncio.create_task(stack.ask(n=3))
    await stack.queue_holds(3)
    await stack.agent.pull(MODEL, num_free=2)
    first, second = await deliveries(stack, 2)
    await stack.agent.answer_begins(first, "one")
    await stack.agent.failed(second, "engine_failed", "out of luck")
    answer = await asking
    assert (answer.status_code, error_of(answer)["code"]) == (500, "engine_failed")
    # One runs: it is cancelled. One waits: it is taken out of the queue, and that is told.
    withdrawn = await stack.withdrawals.next()
    assert withdrawn.reason == "choice_failed"
    cancelled = {(await stack.agent.next_cancel()).request_id for _ in range(2)}
    assert cancelled == {first.request.request_id, withdrawn.request_id}
    await stack.agent.finished(first, 1, reason="cancelled")
    await stack.queue_holds(0)


async def test_the_client_leaving_cancels_all_choices(stack: Stack) -> None:
    await stack.agent.pull(MODEL)
    asking = asyncio.create_task(stack.ask(n=2, stream=True))
    asked = await deliveries(stack, 2)
    await stack.agent.answer_begins(asked[0], "one")
    asking.cancel()
    cancelled = {(await stack.agent.next_cancel()).request_id for _ in range(2)}
    assert cancelled == {one.request.request_id for one in asked}
    for one in asked:
        await stack.agent.finished(one, 1, reason="cancelled")
    await stack.queue_holds(0)


async def test_a_queue_without_room_for_all_takes_none(stack: Stack) -> None:
    waiting = [asyncio.create_task(stack.ask()) for _ in range(2)]
    await stack.queue_holds(2)
    answer = await stack.ask(n=3)
    assert (answer.status_code, error_of(answer)["code"]) == (429, "queue_full")
    await stack.queue_holds(2)
    await stack.agent.pull(MODEL)
    for _ in waiting:
        await stack.agent.answer(await stack.agent.next(), "ok")
    assert [(await one).status_code for one in waiting] == [200, 200]


@pytest.mark.parametrize(
    ("body", "param", "code", "words"),
    [
        ({"n": 129}, "n", "invalid_value", "n = 129 must be between 1 and 128."),
        ({"n": MAX_QUEUED + 1}, "n", "invalid_value", f"holds {MAX_QUEUED} requests"),
        ({"prompt": ["x"] * (MAX_QUEUED + 1)}, "n", "invalid_value", "4 choices are asked for"),
        ({"best_of": 2}, "best_of", "unsupported_parameter", "best_of = 2 is not supported"),
        ({"echo": True, "logprobs": 0}, "echo", "unsupported_parameter", "log probabilities"),
        ({"suffix": "end"}, "suffix", "unsupported_parameter", "suffix = 'end' is not supported"),
    ],
)
async def test_refusals_over_http(
    stack: Stack, body: dict[str, Any], param: str, code: str, words: str
) -> None:
    answer = await stack.http.post("/v1/completions", json={"model": MODEL, "prompt": "x"} | body)
    error = error_of(answer)
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code)
    assert words in error["message"]


async def test_too_long_a_prompt_is_named_with_both_numbers(stack: Stack) -> None:
    await stack.agent.pull(MODEL)

    async def fail() -> None:
        while True:
            words = "prompt has 900 tokens; this model's context is 512 tokens: shorten the prompt"
            await stack.agent.failed(await stack.agent.next(), "context_length_exceeded", words)

    failing = asyncio.create_task(fail())
    with pytest.raises(openai.BadRequestError, match=r"900 tokens; .* 512 tokens") as caught:
        await stack.openai.chat.completions.create(model=MODEL, messages=HI)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError) as caught:
        await stack.openai.completions.create(model=MODEL, prompt=["x", "y"])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    failing.cancel()


async def test_unknown_fields_are_named_in_a_header(stack: Stack) -> None:
    await stack.agent.pull(MODEL)
    asking = asyncio.create_task(stack.ask(made_up=1, n=2, user="u"))
    for one in await deliveries(stack, 2):
        await stack.agent.answer(one, "ok")
    answer: httpx.Response = await asking
    assert answer.headers["x-hotswap-ignored-fields"] == "made_up"
    assert answer.headers["x-hotswap-start"] == "warm"
