"""kill -9 of one service while requests run: it comes back, and no request hangs.

What streams lose by the death of an agent, a worker or the NATS server: test_unbroken_streams.
"""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.system_kit import MIB, System, config_of, write_models

PATIENCE_S = 90.0


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = tmp_path_factory.mktemp("failures")
    models = write_models(folder / "models")
    with System(folder, config_of(models, f"{56 * MIB}B")) as running:
        yield running


async def stream(system: System, model: str, max_tokens: int, begun: asyncio.Event) -> str:
    """One streamed request: "tokens" where it ended whole, else the error's words."""
    body = {
        "model": model,
        "prompt": "count",
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
    }
    try:
        async with (
            httpx.AsyncClient(timeout=PATIENCE_S) as client,
            client.stream("POST", f"{system.url}/v1/completions", json=body) as response,
        ):
            if response.status_code != 200:
                return (await response.aread()).decode()
            async for line in response.aiter_lines():
                if "error" in line:
                    return line
                if line == "data: [DONE]":
                    return "tokens"
                if line:
                    begun.set()
            return "the stream ended early"
    except httpx.HTTPError as error:
        return f"connection: {error!r}"


async def run_and_kill(system: System, victim: str, num_requests: int = 6) -> list[str]:
    """Kill ``victim`` when the first tokens flow; how each request ended."""
    await asyncio.to_thread(system.wait, system.is_ready, "readiness")
    old_pid = system.service(victim).pid
    begun = asyncio.Event()
    models = ("llama", "llama", "llama", "mistral", "mistral", "falcon")[:num_requests]
    jobs = [asyncio.create_task(stream(system, model, 150, begun)) for model in models]
    await asyncio.wait_for(begun.wait(), PATIENCE_S)
    system.kill(victim)
    ends = await asyncio.wait_for(asyncio.gather(*jobs), PATIENCE_S)

    def is_back() -> bool:
        try:
            return system.service(victim).pid != old_pid and system.is_ready()
        except AssertionError:
            return False

    await asyncio.to_thread(system.wait, is_back, f"{victim} to be restarted")
    return ends


async def ask_again(system: System) -> None:
    for model in ("llama", "mistral", "falcon"):
        status, answer = await asyncio.to_thread(system.complete, model)
        assert status == 200, answer


async def test_scheduler(system: System) -> None:
    """Nobody notices: it is on no warm path, and its successor finds the demand."""
    assert await run_and_kill(system, "scheduler") == ["tokens"] * 6
    await ask_again(system)


async def test_warm_requests_go_on_while_the_scheduler_is_down(system: System) -> None:
    assert (await asyncio.to_thread(system.complete, "llama"))[0] == 200
    process = system.service("scheduler")
    process.suspend()  # down, and not restarted
    try:
        for _ in range(5):
            began = time.monotonic()
            status, _ = await asyncio.to_thread(system.complete, "llama")
            assert status == 200
            assert time.monotonic() - began < 10
    finally:
        process.resume()
    await ask_again(system)


async def test_agent(system: System) -> None:
    ends = await run_and_kill(system, "agent")
    assert ends == ["tokens"] * 6
    await ask_again(system)


async def test_api(system: System) -> None:
    """Its clients lose their connections; the agents stop working for them."""
    ends = await run_and_kill(system, "api")
    assert all(end.startswith("connection:") for end in ends), ends
    await ask_again(system)

    def is_idle() -> bool:
        return sum(replica.in_flight for replica in system.status().replicas) == 0

    await asyncio.to_thread(system.wait, is_idle, "abandoned requests to be cancelled", 20)


def test_orderly_stop(tmp_path: Path) -> None:
    """SIGTERM ends everything, with status 0, and nothing is left running (see System.stop)."""
    models: dict[str, Any] = write_models(tmp_path / "models")
    with System(tmp_path, config_of(models, f"{56 * MIB}B")) as running:
        assert running.complete("llama")[0] == 200
    assert running._process is not None
    assert running._process.returncode == 0
