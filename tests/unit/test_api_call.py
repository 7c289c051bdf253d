"""One open request as the HTTP side reads it."""

import asyncio

import pytest

from schemas.requests import GenerateRequest, SamplingParams, TextPrompt
from schemas.stream import Finished, RequestTiming
from services.api import call as call_module
from services.api import errors
from services.api.answer import Piece
from services.api.call import Call, ClientLeft

FINISHED = Finished("r", 1, "stop", 1, 2, RequestTiming())


@pytest.fixture
def call() -> Call:
    return Call(
        GenerateRequest(
            request_id="r",
            model="m",
            klass="interactive",
            prompt=TextPrompt("x"),
            sampling=SamplingParams(seed=1),
            reply_to="inbox.r.r",
            created_at=0.0,
            deadline_at=1.0,
        )
    )


async def test_read_waits_then_gives_all_that_came(call: Call) -> None:
    reading = asyncio.create_task(call.read())
    await asyncio.sleep(0)
    assert not reading.done()
    call.push(Piece("a"), 1)
    call.push(Piece("b"), 1)
    assert await reading == [Piece("a"), Piece("b")]
    call.push(Piece("c"), 1)
    call.end(FINISHED)
    assert [await call.read(), await call.read(), await call.read()] == [[Piece("c")], [], []]


async def test_text_before_an_error_is_read_first(call: Call) -> None:
    call.push(Piece("a"), 1)
    call.end(errors.engine_failed("no"))
    assert await call.read() == [Piece("a")]
    with pytest.raises(errors.ApiError, match="no"):
        await call.read()


async def test_nothing_is_read_for_a_client_that_left(call: Call) -> None:
    call.push(Piece("a"), 1)
    call.end(ClientLeft())
    with pytest.raises(ClientLeft):
        await call.read()


async def test_a_reader_too_far_behind_is_an_error(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call_module, "MAX_BUFFERED_TOKENS", 3)
    assert call.push(Piece("abc"), 3) is None
    assert await call.read() == [Piece("abc")]
    assert call.push(Piece("abc"), 3) is None
    error = call.push(Piece("d"), 1)
    assert error is not None
    assert error.info.code == "slow_reader"


async def test_it_ends_once(call: Call) -> None:
    call.end(FINISHED)
    with pytest.raises(AssertionError, match="ends twice"):
        call.end(FINISHED)
