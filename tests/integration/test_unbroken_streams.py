"""32 open streams, and kill -9 of whoever works on them: each goes on at the token where it was."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from schemas import names
from schemas.events import RequestEnded
from services.bus import Bus, Message
from tests.integration.system_kit import MIB, System, config_of, write_models

NUM_STREAMS = 32
NUM_TOKENS = 160
BEGUN = 12  # tokens that each stream has when the kill comes
PATIENCE_S = 120.0


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = tmp_path_factory.mktemp("unbroken")
    models = {"llama": write_models(folder / "models")["llama"]}
    config = config_of(models, f"{128 * MIB}B") + f"max_batch = {NUM_STREAMS}\nkv_tokens = 8192\n"
    with System(folder, config) as running:
        yield running


class Streams:
    """All of them at once. ``texts`` and ``usages`` by number, once they have ended whole."""

    def __init__(self, system: System) -> None:
        self.num_tokens = [0] * NUM_STREAMS
        self.texts = [""] * NUM_STREAMS
        self.usages: list[dict[str, Any]] = [{}] * NUM_STREAMS
        self._system = system
        self._grown = asyncio.Condition()

    async def run(self) -> None:
        async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
            await asyncio.gather(*(self._one(client, n) for n in range(NUM_STREAMS)))

    async def have_begun(self) -> None:
        async with asyncio.timeout(PATIENCE_S), self._grown:
            await self._grown.wait_for(lambda: min(self.num_tokens) >= BEGUN)

    async def _one(self, client: httpx.AsyncClient, n: int) -> None:
        body = {
            "model": "llama",
            "prompt": f"stream number {n}: ",
            "max_tokens": NUM_TOKENS,
            "temperature": 0 if n % 4 else 0.8,  # one of four is sampled
            "seed": n,
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": 0,  # so that each token is one event, text or not
        }
        url = f"{self._system.url}/v1/completions"
        async with client.stream("POST", url, json=body) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                for choice in event["choices"]:
                    self.texts[n] += choice["text"]
                    async with self._grown:
                        self.num_tokens[n] += len((choice["logprobs"] or {}).get("tokens", ()))
                        self._grown.notify_all()
                self.usages[n] = event["usage"] or {}
            assert line == "data: [DONE]" or not line


@contextlib.asynccontextmanager
async def ends(system: System) -> AsyncIterator[tuple[list[RequestEnded], asyncio.Event]]:
    """The events that tell ends, and when there is one for each stream."""
    bus = await Bus.connect(system.admin, service="admin")
    seen: list[RequestEnded] = []
    are_all = asyncio.Event()

    async def on_event(message: Message[RequestEnded]) -> None:
        seen.append(message.body)
        if len(seen) == NUM_STREAMS:
            are_all.set()

    await bus.subscribe(names.events_subject("request_ended"), RequestEnded, on_event)
    await bus.flush()
    yield seen, are_all
    await bus.close()


@pytest.fixture(scope="module")
def undisturbed(system: System) -> Streams:
    streams = Streams(system)
    asyncio.run(streams.run())
    return streams


@pytest.mark.parametrize("victim", ["worker", "agent"])
async def test_kill_with_32_streams_open(system: System, undisturbed: Streams, victim: str) -> None:
    await asyncio.to_thread(system.wait, system.is_ready, "readiness")
    streams = Streams(system)
    async with ends(system) as (ended, are_all):
        running = asyncio.create_task(streams.run())
        await streams.have_begun()
        system.kill(victim)
        await asyncio.wait_for(running, PATIENCE_S)
        assert streams.texts == undisturbed.texts
        assert streams.num_tokens == [NUM_TOKENS] * NUM_STREAMS  # none missing, none doubled
        assert [usage["completion_tokens"] for usage in streams.usages] == streams.num_tokens
        await asyncio.wait_for(are_all.wait(), 10)
    # Every request has one end, and nothing that a client had was computed again.
    assert len({one.request_id for one in ended}) == len(ended) == NUM_STREAMS
    assert {one.outcome for one in ended} == {"length"}
    assert all(BEGUN <= one.prefix_tokens < NUM_TOKENS for one in ended)
