"""Several calls as one answer: seeds and ids, what comes of each, and how all end together."""

import asyncio
import json
from typing import Any, cast

import pytest

from schemas.requests import GenerateRequest, Prompt, SamplingParams, TextPrompt
from schemas.stream import Finished, PromptTold, RequestTiming, Started
from services.api import errors
from services.api import fan as fan_module
from services.api.answer import Piece
from services.api.call import Call, ClientLeft
from services.api.errors import ApiError
from services.api.fan import Fan, open_fan
from services.api.forms import chunks_of, whole
from services.api.parsing import Parsed, parse_completion
from services.api.relay import Relay


class Desk:
    """In the relay's place: notes what is opened and what is taken back."""

    max_queued = 6

    def __init__(self, refuse: int = -1) -> None:
        self.calls: dict[str, Call] = {}
        self.left: list[str] = []
        self.failed: list[str] = []
        self._refuse = refuse

    async def open_one(self, name: str, prompt: Prompt, sampling: SamplingParams) -> Call:
        if len(self.calls) == self._refuse:
            raise errors.queue_full("m", self.max_queued)
        request = GenerateRequest(name, "m", "interactive", prompt, sampling, "x", 5.0, 9.0)
        self.calls[name] = Call(request)
        return self.calls[name]

    def client_left(self, call: Call) -> None:
        if not call.ended:
            call.end(ClientLeft())
            self.left.append(call.request_id)

    def choice_failed(self, call: Call) -> None:
        if not call.ended:
            call.end(ClientLeft())
            self.failed.append(call.request_id)


def parsed_of(**more: Any) -> Parsed:
    return parse_completion(json.dumps({"model": "m", "prompt": "hi"} | more).encode())


async def opened(desk: Desk, parsed: Parsed) -> Fan:
    return await open_fan(parsed, "id", cast(Relay, desk), desk.open_one)


def end(num_tokens: int, cached: int = 0, prompt: int = 3) -> Finished:
    return Finished("x", 1, "stop", prompt, num_tokens, RequestTiming(), cached_tokens=cached)


async def test_one_choice_is_one_request_under_its_own_id() -> None:
    desk = Desk()
    fan = await opened(desk, parsed_of(seed=7))
    assert list(desk.calls) == ["id"]
    assert desk.calls["id"].request.sampling.seed == 7  # type: ignore[union-attr]
    assert len(fan.calls) == 1


async def test_choices_go_prompt_by_prompt_and_seeds_by_their_place() -> None:
    desk = Desk()
    fan = await opened(desk, parsed_of(prompt=["a", "b"], n=2, seed=2**63 - 1))
    assert list(desk.calls) == ["id-c0", "id-c1", "id-c2", "id-c3"]
    asked = [call.request for call in desk.calls.values()]
    assert all(isinstance(one, GenerateRequest) for one in asked)
    assert [one.prompt for one in asked] == [TextPrompt(text) for text in "aabb"]  # type: ignore[union-attr]
    assert [one.sampling.seed for one in asked] == [2**63 - 1, 0, 2**63 - 1, 0]  # type: ignore[union-attr]
    assert [fan.prompt_of(i) for i in range(4)] == [0, 0, 1, 1]


async def test_without_a_seed_equal_prompts_are_not_answered_alike() -> None:
    desk = Desk()
    await opened(desk, parsed_of(prompt=["a", "a"], n=2))
    seeds = {call.request.sampling.seed for call in desk.calls.values()}  # type: ignore[union-attr]
    assert len(seeds) == 4


async def test_more_choices_than_a_queue_holds_are_refused_with_both_numbers() -> None:
    desk = Desk()
    with pytest.raises(ApiError, match=r"7 choices are asked for.*holds 6 requests") as caught:
        await opened(desk, parsed_of(n=7))
    assert (caught.value.status, caught.value.info.param) == (400, "n")
    assert desk.calls == {}


async def test_where_one_finds_no_room_all_are_taken_back() -> None:
    desk = Desk(refuse=2)
    with pytest.raises(ApiError) as caught:
        await opened(desk, parsed_of(n=4))
    assert (caught.value.status, caught.value.info.code) == (429, "queue_full")
    assert desk.failed == ["id-c0", "id-c1"]


async def test_a_handler_that_is_cancelled_leaves_nothing_in_the_queue() -> None:
    desk = Desk()
    stuck, all_here = asyncio.Event(), asyncio.Event()

    async def open_one(name: str, prompt: Prompt, sampling: SamplingParams) -> Call:
        call = await desk.open_one(name, prompt, sampling)
        if len(desk.calls) == 3:
            all_here.set()
        if name == "id-c1":
            try:
                await stuck.wait()
            except asyncio.CancelledError:  # as the relay does
                desk.client_left(call)
                raise
        return call

    opening = asyncio.create_task(open_fan(parsed_of(n=3), "id", cast(Relay, desk), open_one))
    await all_here.wait()
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert sorted(desk.left) == ["id-c0", "id-c1", "id-c2"]


async def test_what_comes_is_told_by_index_and_ends_when_all_have() -> None:
    desk = Desk()
    fan = await opened(desk, parsed_of(n=2))
    first, second = fan.calls
    reading = asyncio.create_task(fan.read())
    await asyncio.sleep(0)
    assert not reading.done()
    second.push(Piece("b"), 1)
    assert await reading == [(1, Piece("b"))]
    first.push(Piece("a"), 1)
    second.end(end(1))
    assert await fan.read() == [(0, Piece("a")), (1, end(1))]
    first.end(end(2))
    assert await fan.read() == [(0, end(2))]
    assert await fan.read() == []
    assert fan.is_complete
    fan.close()
    assert (desk.left, desk.failed) == ([], [])


async def test_one_failure_ends_the_answer_and_takes_the_others_back() -> None:
    desk = Desk()
    fan = await opened(desk, parsed_of(n=3))
    fan.calls[0].push(Piece("a"), 1)
    fan.calls[1].end(errors.engine_failed("out of luck"))
    assert await fan.read() == [(0, Piece("a"))]  # what is there first, then the error
    with pytest.raises(ApiError, match="out of luck"):
        await fan.read()
    fan.close()
    assert (desk.left, desk.failed) == ([], ["id-c0", "id-c2"])


async def test_the_client_leaving_ends_all() -> None:
    desk = Desk()
    fan = await opened(desk, parsed_of(n=2))
    reading = asyncio.create_task(fan.read())
    await asyncio.sleep(0)
    fan.close()
    with pytest.raises(ClientLeft):
        await reading
    assert (desk.left, desk.failed) == (["id-c0", "id-c1"], [])


async def test_how_it_was_started_is_told_of_the_first_that_was() -> None:
    fan = await opened(Desk(), parsed_of(n=2))
    assert fan.lead.started is None
    fan.calls[1].started = Started("id-c1", "gpu0", 1, "warm")
    assert fan.lead.started == fan.calls[1].started


async def complete(parsed: Parsed) -> tuple[Fan, list[fan_module.Told]]:
    """An answer with choice i saying "t<i>", of prompts with 3 tokens, 2 or 1 of them cached."""
    fan = await opened(Desk(), parsed)
    for i, call in enumerate(fan.calls):
        call.answer.prompt = PromptTold(3, (7, 8, 9), "told ")
        call.push(Piece(f"t{i}", (), (100 + i,)), 1)
        call.end(end(1, cached=2 - i % 2))
    return fan, await fan.read()


async def test_usage_counts_a_prompt_once_and_all_choices() -> None:
    parsed = parsed_of(prompt=["a", "b"], n=2)
    answer = json.loads(whole(parsed, *await complete(parsed)))
    assert [(one["index"], one["text"]) for one in answer["choices"]] == [
        (0, "t0"),
        (1, "t1"),
        (2, "t2"),
        (3, "t3"),
    ]
    assert answer["usage"] == {
        "prompt_tokens": 6,
        "completion_tokens": 4,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert "token_ids" not in answer["choices"][0]


async def test_echo_and_token_ids_and_the_clients_own_id() -> None:
    parsed = parsed_of(prompt=["a ", [1]], echo=True, return_token_ids=True, request_id="mine")
    answer = json.loads(whole(parsed, *await complete(parsed)))
    assert answer["id"] == "cmpl-mine"
    assert [one["text"] for one in answer["choices"]] == ["a t0", "told t1"]
    assert answer["choices"][1]["token_ids"] == [101]
    assert answer["choices"][1]["prompt_token_ids"] == [7, 8, 9]


async def test_a_stream_tells_the_prompt_once_and_usage_so_far() -> None:
    parsed = parsed_of(
        n=2,
        echo=True,
        return_token_ids=True,
        stream=True,
        stream_options={"continuous_usage_stats": True},
    )
    fan, told = await complete(parsed)
    fan.calls[0].answer.prompt = PromptTold(3, (7, 8, 9))
    chunks = chunks_of(parsed, fan)
    body = b"".join(
        [
            *chunks.opening(),
            chunks.told(0, Piece("", (), (5,))),
            *(chunks.told(index, what) for index, what in told),
            *chunks.closing(),
        ]
    )
    events = [json.loads(one.removeprefix(b"data: ")) for one in body.split(b"\n\n") if one]
    choices = [event["choices"][0] for event in events]
    assert [(one["index"], one["text"], one["finish_reason"]) for one in choices] == [
        (0, "hi", None),
        (0, "t0", None),
        (0, "", "stop"),
        (1, "hit1", None),
        (1, "", "stop"),
    ]
    assert [one.get("token_ids") for one in choices] == [[5], [100], None, [101], None]
    assert [one.get("prompt_token_ids") for one in choices] == [
        [7, 8, 9],
        None,
        None,
        [7, 8, 9],
        None,
    ]
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 2, 3, 3]
    assert {event["usage"]["prompt_tokens"] for event in events} == {3}
