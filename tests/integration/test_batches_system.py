"""Batches through the whole system: real nats-server, real services, real models, kill -9.

Two models that never fit together. What interactive requests are answered is the measure: greedy,
so a batch must say the same.
"""

import asyncio
import json
from collections.abc import Iterator
from typing import Literal

import openai
import pytest
from openai.types import Batch

from schemas.events import RequestEnded, SwapInCompleted
from services.bus import Bus
from tests.integration.agent_kit import Watcher
from tests.integration.system_kit import MIB, System, config_of, write_models

MODELS = ("llama", "falcon")
NUM_LINES = 40
NUM_TOKENS = 40
PATIENCE_S = 120.0
ENDPOINT: Literal["/v1/completions"] = "/v1/completions"


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = tmp_path_factory.mktemp("batches")
    models = write_models(folder / "models")
    there = {name: models[name] for name in MODELS}
    with System(folder, config_of(there, f"{56 * MIB}B")) as running:
        running.wait(
            lambda: all(running.models()[name]["state"] == "host" for name in MODELS),
            "the models to be loaded",
        )
        yield running


def client_of(system: System) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{system.url}/v1", api_key="-", max_retries=20)


def asked(number: int, num_tokens: int = NUM_TOKENS) -> dict[str, object]:
    """Line ``number``: the models take turns, and each prompt comes four times."""
    return {
        "model": MODELS[number % 2],
        "prompt": f"Once upon a time, {number % 10}",
        "max_tokens": num_tokens,
        "temperature": 0,
    }


async def submit(client: openai.AsyncOpenAI, bodies: list[dict[str, object]]) -> Batch:
    lines = [
        {"custom_id": f"line-{i}", "method": "POST", "url": ENDPOINT, "body": body}
        for i, body in enumerate(bodies)
    ]
    data = b"\n".join(json.dumps(line).encode() for line in lines)
    file = await client.files.create(file=("in.jsonl", data), purpose="batch")
    return await client.batches.create(
        input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h"
    )


async def ended(client: openai.AsyncOpenAI, batch: Batch) -> Batch:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            now = await client.batches.retrieve(batch.id)
            if now.status in ("completed", "failed", "expired", "cancelled"):
                return now
            await asyncio.sleep(0.1)


async def texts_of(client: openai.AsyncOpenAI, batch: Batch) -> dict[str, str]:
    assert batch.status == "completed", batch
    assert batch.error_file_id is None
    assert batch.output_file_id is not None
    lines = [json.loads(t) for t in (await client.files.content(batch.output_file_id)).iter_lines()]
    texts = {one["custom_id"]: one["response"]["body"]["choices"][0]["text"] for one in lines}
    assert len(texts) == len(lines), "a line was answered twice"
    return texts


async def watch(system: System) -> Watcher:
    watcher = Watcher(await Bus.connect(system.admin, service="test"))
    await watcher.start()
    return watcher


def num_ended(watcher: Watcher) -> int:
    return len({e.request_id for e in watcher.events.all(RequestEnded, klass="batch")})


async def has_ended(watcher: Watcher, num: int) -> None:
    """Wait until so many lines have ended."""
    words = f"{num} ends"
    await watcher.events.until_true(lambda: num_ended(watcher) >= num, words, PATIENCE_S)


async def test_a_batch_outlives_every_service_and_says_what_interactive_requests_say(
    system: System,
) -> None:
    client = client_of(system)
    told = await asyncio.gather(*(client.completions.create(**asked(n)) for n in range(10)))  # type: ignore[call-overload]
    alone = {str(asked(n)): answer.choices[0].text for n, answer in enumerate(told)}
    watcher = await watch(system)
    batch = await submit(client, [asked(number) for number in range(NUM_LINES)])
    for victim, after in (("nats-server", 1), ("agent", 9), ("api", 17)):
        await has_ended(watcher, after)
        assert num_ended(watcher) < NUM_LINES
        system.kill(victim)
    done = await ended(client, batch)
    assert done.request_counts is not None
    counts = done.request_counts.to_dict()
    assert counts == {"total": NUM_LINES, "completed": NUM_LINES, "failed": 0}
    texts = await texts_of(client, done)
    expected = {f"line-{i}": alone[str(asked(i))] for i in range(NUM_LINES)}
    assert texts == expected
    await watcher.bus.close()
    await client.close()


async def test_interactive_requests_come_before_what_is_left_of_a_batch(system: System) -> None:
    """Of the model that works it off, and of the one that has to be swapped in for it."""
    client = client_of(system)
    watcher = await watch(system)
    bodies = [asked(2 * number, 60) for number in range(32)]  # all of llama
    batch = await submit(client, bodies)
    await has_ended(watcher, 1)
    for number in (0, 1):
        await client.completions.create(**asked(number, 4))  # type: ignore[call-overload]
    done = await ended(client, batch)
    assert len(await texts_of(client, done)) == len(bodies)
    order = [event.klass for event in watcher.events.all(RequestEnded)]
    last = max(i for i, klass in enumerate(order) if klass == "interactive")
    assert order.count("interactive") == 2
    assert order[last:].count("batch") >= 8, order  # those that ran, and those that waited
    swapped = [event.model for event in watcher.events.all(SwapInCompleted)]
    assert swapped.count("falcon") == 1
    assert swapped[-1] == "llama"
    await watcher.bus.close()
    await client.close()
