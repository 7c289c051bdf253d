"""Which role a path needs, however it is written, and what a body may take."""

import asyncio
from typing import Any

import pytest

from services.api.errors import ApiError
from services.api.guard import role_for
from services.api.limits import MIN_BYTES_PER_S, OpenRequests


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("/healthz", None),
        ("/readyz/", None),
        ("/schema", None),
        ("/schema/openapi.json", None),
        ("/schemas", "user"),
        ("/healthz/../v1/models", "user"),
        ("/", "user"),
        ("/v1/chat/completions", "user"),
        ("/v1/models/keys", "user"),
        ("/v1/files", "user"),
        ("/v1/batches", "user"),
        ("/v1/keys", "admin"),
        ("/v1/keys/", "admin"),
        ("//v1//keys//x", "admin"),
        ("/v1/keys/healthz", "admin"),
        ("/v1/keysmith", "user"),
        ("/v1/deployments/org/model", "admin"),
        ("/metrics", "admin"),
    ],
)
def test_the_role_that_a_path_needs(path: str, role: str | None) -> None:
    assert role_for(path) == role


def test_a_body_has_a_while_to_begin_and_then_a_lowest_speed() -> None:
    room = OpenRequests(10, 10**9, read_timeout_s=5.0)
    assert room.time_for(0) == 5.0
    assert room.time_for(10 * MIN_BYTES_PER_S) == 15.0


async def test_requests_and_bytes_are_given_back_however_they_end() -> None:
    room = OpenRequests(2, 100, read_timeout_s=5.0)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"x" * 60, "more_body": True}

    with room.enter() as body:
        await body.watched(receive)()
        with room.enter() as other:
            with pytest.raises(ApiError, match=r"2 requests open.*api\.max_open_requests"):
                room.enter().__enter__()
            with pytest.raises(ApiError, match=r"120 bytes.*api\.max_open_body_bytes"):
                await other.watched(receive)()
        assert (room.num, room.num_bytes) == (1, 60)
    assert (room.num, room.num_bytes) == (0, 0)


async def test_a_body_that_does_not_come_is_408_and_what_comes_after_it_is_waited_for() -> None:
    room = OpenRequests(2, 100, read_timeout_s=0.01)
    messages: asyncio.Queue[Any] = asyncio.Queue()
    with room.enter() as body:
        receive = body.watched(messages.get)
        with pytest.raises(ApiError) as caught:
            await receive()
        assert (caught.value.status, caught.value.headers["connection"]) == (408, "close")
    with room.enter() as body:
        receive = body.watched(messages.get)
        messages.put_nowait({"type": "http.request", "body": b"all", "more_body": False})
        first: Any = await receive()
        assert first["body"] == b"all"
        leaving: asyncio.Task[Any] = asyncio.ensure_future(receive())
        done, _ = await asyncio.wait({leaving}, timeout=0.05)
        assert not done  # a complete request waits for its client as long as it takes
        messages.put_nowait({"type": "http.disconnect"})
        assert (await leaving)["type"] == "http.disconnect"
