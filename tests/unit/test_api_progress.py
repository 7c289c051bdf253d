"""What a stream that waits is told, from what everybody publishes."""

import json
from typing import cast

import pytest

from schemas.events import LoadProgressed
from schemas.requests import GenerateRequest, SamplingParams, TextPrompt
from schemas.state import PredictedWait, ReplicaState
from schemas.stream import Started
from services.api.call import Call
from services.api.progress import Progress, WaitState, comment, state_of
from services.api.waits import Waits
from services.bus import Bus

AT = 1000.0


def a_call(begun_on: str = "") -> Call:
    request = GenerateRequest(
        request_id="r",
        model="m",
        klass="interactive",
        prompt=TextPrompt("x"),
        sampling=SamplingParams(seed=1),
        reply_to="inbox.r.r",
        created_at=AT,
        deadline_at=AT + 60,
    )
    call = Call(request)
    call.runs["r"] = 1
    if begun_on:
        call.start(Started("r", begun_on, 1, "warm"))
    return call


@pytest.mark.parametrize(
    ("states", "told"),
    [
        ({}, "waiting"),
        ({"a": "cold"}, "waiting"),
        ({"a": "host", "b": "loading"}, "waiting"),  # one that needs no load will be first
        ({"a": "loading"}, "loading"),
        ({"a": "loading", "b": "swapping_in"}, "swapping_in"),
        ({"a": "swapping_out"}, "waiting"),
        ({"a": "swapping_in", "b": "resident"}, "queued"),
    ],
)
def test_before_it_begins(states: dict[str, ReplicaState], told: str) -> None:
    assert state_of(a_call(), states) == told


@pytest.mark.parametrize(
    ("states", "told"),
    [
        ({"a": "resident"}, "computing"),
        ({"a": "host", "b": "resident"}, "suspended"),
        ({"a": "draining"}, "suspended"),
        ({"a": "swapping_in"}, "suspended"),
        ({"a": "cold"}, "resuming"),  # its worker died
        ({"b": "resident"}, "resuming"),  # its agent did
    ],
)
def test_after_it_began(states: dict[str, ReplicaState], told: str) -> None:
    assert state_of(a_call("a"), states) == told


def test_a_later_run_waits_anew() -> None:
    call = a_call("a")
    call.runs["r-r2"] = 2
    assert state_of(call, {"a": "host"}) == "waiting"


class World:
    now = AT

    def __init__(self) -> None:
        self.states: dict[str, ReplicaState] = {"a": "host"}
        self.waits = Waits(cast(Bus, None), lambda: self.now)
        self.progress = Progress(
            cast(Bus, None), self.waits, lambda model: self.states, lambda: self.now
        )


def test_position_and_wait_are_told_while_it_waits() -> None:
    world = World()
    assert world.progress.of(a_call()) == WaitState("waiting", 0.0)
    world.waits.note(PredictedWait("m", AT, 4.0, 1, 0, AT, 2))
    world.now += 1.5
    assert world.progress.of(a_call()) == WaitState("waiting", 1.5, 2, 2.5)
    world.states["a"] = "swapping_in"
    assert world.progress.of(a_call()) == WaitState("swapping_in", 1.5, None, 2.5)
    world.states["a"] = "resident"
    assert world.progress.of(a_call()) == WaitState("queued", 1.5)


def test_bytes_are_told_while_it_loads() -> None:
    world = World()
    world.states["a"] = "loading"
    assert world.progress.of(a_call()) == WaitState("loading", 0.0)
    world.progress.note(LoadProgressed("a", "m", AT, 10, 40))
    told = world.progress.of(a_call())
    assert (told.done_bytes, told.total_bytes) == (10, 40)
    world.now += 60  # of an earlier load
    assert world.progress.of(a_call()) == WaitState("loading", 60.0)


def test_a_comment_is_one_line_that_begins_with_a_colon() -> None:
    line, *rest = comment(WaitState("waiting", 1.5, 2)).split(b"\n")
    assert rest == [b"", b""]
    assert line.startswith(b": hotswap ")
    body = json.loads(line.removeprefix(b": hotswap "))
    assert body == {"state": "waiting", "waited_s": 1.5, "position": 2}


def test_news_is_another_state_or_place() -> None:
    first = WaitState("waiting", 1.0, 3, 2.0)
    assert not WaitState("waiting", 1.2, 3, 1.8).is_news_after(first)
    assert WaitState("waiting", 1.2, 2, 1.8).is_news_after(first)
    assert WaitState("loading", 1.2).is_news_after(first)
