"""32 open streams, and whoever works on them dies: each goes on at the token where it was.

Real processes and kill -9. The undisturbed answers come from the same system.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from schemas import names
from schemas.events import RequestEnded
from services.api import service
from services.bus import Bus, BusOptions, Message
from services.ops.nats_server import free_port
from services.settings import ApiSettings, Settings
from tests.integration.system_kit import MIB, System, config_of, write_models
from tests.integration.tcp_proxy import TcpProxy

NUM_STREAMS = 32
NUM_TOKENS = 96
BEGUN = 8  # tokens that each stream has when the kill comes
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

    def __init__(self, url: str, num: int = NUM_STREAMS) -> None:
        self.num_tokens = [0] * num
        self.texts = [""] * num
        self.usages: list[dict[str, Any]] = [{}] * num
        self.served: list[dict[str, Any]] = [{}] * num  # what the last chunk says beside them
        self._url = url
        self._grown = asyncio.Condition()

    async def run(self) -> None:
        async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
            await asyncio.gather(*(self._one(client, n) for n in range(len(self.texts))))

    async def have_begun(self) -> None:
        async with asyncio.timeout(PATIENCE_S), self._grown:
            await self._grown.wait_for(lambda: min(self.num_tokens) >= BEGUN)

    def are_those_of(self, other: "Streams") -> None:
        """No token is missing, and none doubled."""
        assert self.texts == other.texts
        assert self.num_tokens == [NUM_TOKENS] * len(self.texts)
        assert [usage["completion_tokens"] for usage in self.usages] == self.num_tokens

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
        url = f"{self._url}/v1/completions"
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
                self.served[n] = event.get("hotswap", {})
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
    streams = Streams(system.url)
    asyncio.run(streams.run())
    return streams


@pytest.mark.parametrize("victim", ["worker", "agent"])
async def test_kill_with_32_streams_open(system: System, undisturbed: Streams, victim: str) -> None:
    await asyncio.to_thread(system.wait, system.is_ready, "readiness")
    streams = Streams(system.url)
    async with ends(system) as (ended, are_all):
        running = asyncio.create_task(streams.run())
        await streams.have_begun()
        system.kill(victim)
        await asyncio.wait_for(running, PATIENCE_S)
        streams.are_those_of(undisturbed)
        assert [one.get("num_resumed") for one in streams.served] == [1] * NUM_STREAMS
        await asyncio.wait_for(are_all.wait(), 10)
    # Every request has one end, and nothing that a client had was computed again.
    assert len({one.request_id for one in ended}) == len(ended) == NUM_STREAMS
    assert {one.outcome for one in ended} == {"length"}
    assert all(BEGUN <= one.prefix_tokens < NUM_TOKENS for one in ended)


@pytest.mark.parametrize("how", ["kill", "terminate"])
async def test_the_nats_server_restarts_with_32_streams_open(
    system: System, undisturbed: Streams, how: str
) -> None:
    """Its queue is lost, and every chunk of the meantime."""
    await asyncio.to_thread(system.wait, system.is_ready, "readiness")
    streams = Streams(system.url)
    running = asyncio.create_task(streams.run())
    await streams.have_begun()
    getattr(system.service("nats-server"), how)()
    await asyncio.wait_for(running, PATIENCE_S)
    streams.are_those_of(undisturbed)


async def test_an_api_loses_its_connection_with_32_streams_open(
    system: System, undisturbed: Streams
) -> None:
    """Nobody else notices, but for the requests whose chunks find no listener."""
    await asyncio.to_thread(system.wait, system.is_ready, "readiness")
    options = BusOptions.read(system.settings.state_path / "nats" / "api.json")
    proxy = TcpProxy(options.url)
    await proxy.start()
    options = msgspec.structs.replace(options, url=proxy.url)
    settings = Settings(api=ApiSettings(port=free_port(0)))
    url, stop = f"http://127.0.0.1:{settings.api.port}", asyncio.Event()
    api = asyncio.create_task(service.run(settings, options, stop=stop))
    try:
        async with httpx.AsyncClient() as client:
            await is_ready(client, url, 200)
            streams = Streams(url)
            running = asyncio.create_task(streams.run())
            await streams.have_begun()
            await proxy.cut()
            await is_ready(client, url, 503)
            await proxy.start()
            await asyncio.wait_for(running, PATIENCE_S)
        streams.are_those_of(undisturbed)
    finally:
        stop.set()
        await asyncio.wait_for(api, 30)
        await proxy.cut()


async def test_streams_of_a_dead_agent_go_on_at_another_gpu(tmp_path: Path) -> None:
    num = 4
    gpu = '[[gpus]]\nname = "{}"\ndevice = "cpu"\nmemory = "{}B"\nthreads = 1\n'
    gpus = "".join(gpu.format(name, 96 * MIB) for name in ("cpu0", "cpu1"))
    source = write_models(tmp_path / "models")["llama"]
    model = f'[models.llama]\nsource = "{source}"\nmax_batch = {num}\nkv_tokens = 2048\n'
    with System(tmp_path, gpus + model) as system:

        def is_loaded() -> bool:
            where = system.models()["llama"]["gpus"].values()
            return len(where) == 2 and set(where) <= {"host", "resident"}

        await asyncio.to_thread(system.wait, is_loaded, "both agents to hold the host image")
        undisturbed, streams = Streams(system.url, num), Streams(system.url, num)
        await undisturbed.run()
        [served_by] = {one["gpu"] for one in undisturbed.served}
        running = asyncio.create_task(streams.run())
        await streams.have_begun()
        [agent] = [p for p in system.family() if {"--gpu", served_by} <= set(p.cmdline())]
        agent.kill()
        await asyncio.wait_for(running, PATIENCE_S)
        streams.are_those_of(undisturbed)
        assert {one["gpu"] for one in streams.served} == {"cpu0", "cpu1"} - {served_by}


async def is_ready(client: httpx.AsyncClient, url: str, status: int) -> None:
    """Wait until /readyz answers with ``status``."""
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get(f"{url}/readyz")).status_code == status:
                    return
            await asyncio.sleep(0.02)
