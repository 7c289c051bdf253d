"""A stream that waits for a swap, on the real system: what it is told, and what leaving it ends.

The device holds one of two models, and its link is so slow that a swap takes its time.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest

from schemas.events import (
    RequestEnded,
    RequestStarted,
    RequestWithdrawn,
    SwapInCancelled,
    SwapInCompleted,
)
from services.bus import Bus
from tests.integration.agent_kit import Watcher
from tests.integration.system_kit import MIB, System, config_of, write_models

SETTINGS = "max_batch = 2\n[scheduler]\nrun_quantum_s = 0.2\n"
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = tmp_path_factory.mktemp("waiting")
    models = write_models(folder / "models")
    there = {name: models[name] for name in ("llama", "falcon")}
    config = config_of(there, f"{56 * MIB}B", SETTINGS)
    config = config.replace("[models", "link_gb_per_s = 0.012\n[models", 1)  # 25-37 MB: 2-3 s
    with System(folder, config, "progress_after_s = 0.1\n") as running:
        running.wait(
            lambda: all(one["state"] == "host" for one in running.models().values()),
            "the models to be loaded",
        )
        yield running


@pytest.fixture
async def watcher(system: System) -> AsyncIterator[Watcher]:
    watching = Watcher(await Bus.connect(system.admin, service="test"))
    await watching.start()
    yield watching
    await watching.bus.close()


@contextlib.asynccontextmanager
async def stream(system: System, model: str, **more: Any) -> AsyncIterator[AsyncIterator[str]]:
    """The lines of one streamed answer."""
    body = {"model": model, "prompt": "count", "max_tokens": 200, "temperature": 0, "stream": True}
    async with (
        httpx.AsyncClient(timeout=PATIENCE_S, verify=False) as client,
        client.stream("POST", f"{system.url}/v1/completions", json=body | more) as response,
    ):
        assert response.status_code == 200
        yield response.aiter_lines()


async def until(lines: AsyncIterator[str], condition: Callable[[str], bool]) -> list[str]:
    """Lines up to the first one for which ``condition`` holds."""
    seen = []
    async with asyncio.timeout(PATIENCE_S):
        async for line in lines:
            seen.append(line)
            if condition(line):
                return seen
    told = [line for line in seen if line.startswith(":")]
    raise AssertionError(f"the stream ended with {seen[-5:]} after {told}")


def is_token(line: str) -> bool:
    return line.startswith("data: {")


async def terminal_events(watcher: Watcher, num: int) -> list[RequestEnded | RequestWithdrawn]:
    """Once there are ``num``, and requests that came later have ended, so that none is to come."""

    def found() -> list[Any]:
        return [e for e in watcher.events.items if isinstance(e, RequestEnded | RequestWithdrawn)]

    await watcher.events.until_true(lambda: len(found()) >= num, f"{num} ends")
    return found()


async def test_a_stream_is_told_of_its_swap(system: System, watcher: Watcher) -> None:
    assert (await asyncio.to_thread(system.complete, "falcon"))[0] == 200
    async with stream(system, "llama", max_tokens=4) as lines:
        seen = await until(lines, lambda line: line == "data: [DONE]")
    told = [json.loads(one.removeprefix(": hotswap ")) for one in seen if one.startswith(":")]
    assert {one.get("state") for one in told} >= {"swapping_in"}
    first_token = next(i for i, line in enumerate(seen) if is_token(line))
    assert seen[0].startswith(": hotswap "), "it begins before its first token"
    assert all(line == "" or line.startswith(":") for line in seen[:first_token])
    assert told[-1]["start"] == "switch"
    [swap] = [e.trace for e in watcher.events.all(SwapInCompleted, model="llama")]
    assert told[-1]["swap_bytes"] == swap.num_bytes > 0
    assert told[-1]["swap_s"] == pytest.approx(swap.total_s, abs=1e-3)
    assert told[-1]["waited_s"] >= told[-1]["swap_s"]


async def test_leaving_a_swap_calls_it_off(system: System, watcher: Watcher) -> None:
    """Nobody else waits for it."""
    assert (await asyncio.to_thread(system.complete, "falcon"))[0] == 200
    async with stream(system, "llama") as lines:
        await until(lines, lambda line: "swapping_in" in line)
    await watcher.events.until(SwapInCancelled, model="llama")
    assert (await asyncio.to_thread(system.complete, "falcon"))[0] == 200
    ends = await terminal_events(watcher, 3)
    assert not watcher.events.all(SwapInCompleted, model="llama")
    assert len(ends) == 3, "each request has one end"
    assert [getattr(e, "outcome", "withdrawn") for e in ends if e.model == "llama"] in (
        ["cancelled"],  # the agent had pulled it already
        ["withdrawn"],
    )


async def test_leaving_a_swap_that_another_waits_for_does_not(
    system: System, watcher: Watcher
) -> None:
    assert (await asyncio.to_thread(system.complete, "falcon"))[0] == 200
    async with stream(system, "llama") as lines:
        other = asyncio.create_task(asyncio.to_thread(system.complete, "llama"))
        await until(lines, lambda line: "swapping_in" in line)
    assert (await other)[0] == 200
    assert not watcher.events.all(SwapInCancelled)
    assert len(await terminal_events(watcher, 3)) == 3


async def test_leaving_while_it_decodes(system: System, watcher: Watcher) -> None:
    async with stream(system, "falcon", max_tokens=400) as lines:
        await until(lines, is_token)
    [started] = [await watcher.events.until(RequestStarted, model="falcon")]
    ended = await watcher.events.until(RequestEnded, request_id=started.request_id)
    assert (ended.outcome, 0 < ended.completion_tokens < 400) == ("cancelled", True)
    assert (await asyncio.to_thread(system.complete, "falcon"))[0] == 200
    assert len(await terminal_events(watcher, 2)) == 2


async def test_leaving_the_queue(system: System, watcher: Watcher) -> None:
    """The batch of the resident model is full: the third request is in nobody's hands."""
    async with contextlib.AsyncExitStack() as busy:
        both = [stream(system, "falcon", max_tokens=480) for _ in range(2)]
        opened = await asyncio.gather(*(busy.enter_async_context(one) for one in both))
        await asyncio.gather(*(until(lines, is_token) for lines in opened))
        worker = system.service("worker")
        worker.suspend()  # so that they stay
        async with stream(system, "falcon") as waiting:
            await until(waiting, lambda line: "queued" in line)
        withdrawn = await watcher.events.until(RequestWithdrawn, model="falcon")
        worker.resume()
        assert withdrawn.reason == "client_left"
        assert not watcher.events.all(RequestStarted, request_id=withdrawn.request_id)
    ends = await terminal_events(watcher, 3)
    assert len({e.request_id for e in ends}) == len(ends) == 3
