"""Two busy models on a device that holds one: both go on, in turns, and no token is lost.

Real nats-server, real services, real models. The undisturbed answers come from the same system.
"""

import asyncio
from collections.abc import Iterator

import openai
import pytest

from schemas.events import RequestEnded, SwapOutCompleted, WorkerDied
from services.bus import Bus
from tests.integration.agent_kit import Watcher
from tests.integration.system_kit import MIB, System, config_of, write_models

PROMPTS = {"llama": "Once upon a time", "falcon": "def main():\n"}
NUM_TOKENS = 400
BUDGET = 56 * MIB
# Tokens come faster than this: whoever runs is soon ahead, and not for long once it is suspended.
QUICK_TURNS = "[scheduler]\nrun_quantum_s = 0.2\ntoken_target_s = 0.03\n"


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = tmp_path_factory.mktemp("preemption")
    models = write_models(folder / "models")
    there = {name: models[name] for name in PROMPTS}
    with System(folder, config_of(there, f"{BUDGET}B", QUICK_TURNS)) as running:
        running.wait(
            lambda: all(running.models()[name]["state"] == "host" for name in PROMPTS),
            "the models to be loaded",
        )
        yield running


async def answer(system: System, model: str, number: int = 0) -> str:
    """A long greedy answer; ``number`` makes the prompt another one."""
    client = openai.AsyncOpenAI(base_url=f"{system.url}/v1", api_key="-")
    stream = await client.completions.create(
        model=model,
        prompt=PROMPTS[model] + "!" * number,
        max_tokens=NUM_TOKENS,
        temperature=0,
        stream=True,
        timeout=120,
    )
    text = "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])
    await client.close()
    return text


async def watch(system: System) -> Watcher:
    watcher = Watcher(await Bus.connect(system.admin, service="test"))
    await watcher.start()
    return watcher


async def test_two_long_answers_take_turns_and_lose_no_token(system: System) -> None:
    alone = {model: [await answer(system, model, n) for n in range(3)] for model in PROMPTS}
    watcher = await watch(system)
    together = await asyncio.gather(
        *(answer(system, model, n) for model in PROMPTS for n in range(3))
    )
    await watcher.events.until_true(lambda: len(watcher.events.all(RequestEnded)) == 6)
    assert together == [text for model in PROMPTS for text in alone[model]]
    assert all(end.outcome == "length" for end in watcher.events.all(RequestEnded))
    preempted = [e for e in watcher.events.all(SwapOutCompleted) if e.num_suspended]
    assert {event.model for event in preempted} == set(PROMPTS), "both had to give way"
    assert sum(event.trace.suspend_s for event in preempted) > 0
    await watcher.bus.close()


async def test_a_client_that_leaves_while_its_request_is_suspended_ends_it(system: System) -> None:
    watcher = await watch(system)
    busy = asyncio.create_task(answer(system, "llama", 4))
    leaving = asyncio.create_task(answer(system, "falcon", 4))
    await watcher.events.until_true(
        lambda: any(
            e.model == "falcon" and e.num_suspended for e in watcher.events.all(SwapOutCompleted)
        ),
        "falcon to give way",
    )
    leaving.cancel()
    await busy
    await watcher.events.until_true(lambda: len(watcher.events.all(RequestEnded)) == 2)
    outcomes = {e.model: e.outcome for e in watcher.events.all(RequestEnded)}
    assert outcomes == {"llama": "length", "falcon": "cancelled"}
    await watcher.bus.close()


async def test_suspended_requests_survive_their_worker(system: System) -> None:
    alone = {model: await answer(system, model, 5) for model in PROMPTS}
    watcher = await watch(system)
    both = [asyncio.create_task(answer(system, model, 5)) for model in PROMPTS]
    await watcher.events.until_true(
        lambda: any(e.num_suspended for e in watcher.events.all(SwapOutCompleted)), "a preemption"
    )
    system.kill("worker")
    assert await asyncio.gather(*both) == list(alone.values())
    await watcher.events.until_true(lambda: len(watcher.events.all(RequestEnded)) == 2)
    assert len(watcher.events.all(WorkerDied)) == 1
    await watcher.bus.close()
