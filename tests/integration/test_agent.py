"""AgentControl over a real nats-server, with a scripted engine worker."""

from schemas.commands import Register, SwapIn
from schemas.events import (
    AgentStarted,
    CommandFailed,
    CommandRejected,
    LoadProgressed,
    ModelLoaded,
    ModelRegistered,
    RequestEnded,
    RequestStarted,
    SwapInCompleted,
    SwapOutCompleted,
)
from schemas.state import AgentStatus, ModelSpec
from schemas.stream import Failed, Finished, Started, Tokens
from services.bus import Delivery
from tests.integration.agent_kit import (
    GPU,
    Agent,
    ends,
)
from tests.integration.fake_worker import BUDGET_BYTES, PAGE_BYTES

# -- commands ------------------------------------------------------------------------------


async def test_a_model_comes_and_goes(agent: Agent) -> None:
    await agent.bring_in("m")
    swapped_out = await agent.swap_out("m")
    out = await agent.events.until(SwapOutCompleted, model="m")
    assert out.generation == swapped_out
    kinds = [type(event) for event in agent.events.items]
    assert kinds == [
        AgentStarted,
        ModelRegistered,
        LoadProgressed,
        ModelLoaded,
        SwapInCompleted,
        SwapOutCompleted,
    ]
    status = agent.statuses.items[-1]
    assert (status.gpu, status.instance, status.budget_bytes) == (GPU, "i1", BUDGET_BYTES)
    states = [status.replicas[0].state for status in agent.statuses.items if status.replicas]
    assert list(dict.fromkeys(states)) == [
        "cold",
        "loading",
        "host",
        "swapping_in",
        "resident",
        "draining",
        "swapping_out",
    ]
    used = {
        status.used_bytes
        for status in agent.statuses.items
        if status.replicas and status.replicas[0].state == "resident"
    }
    assert used == {2 * PAGE_BYTES}
    await agent.statuses.until(AgentStatus, used_bytes=0, after=len(agent.statuses.items) - 1)
    await agent.watcher.residency_is(m="host")


async def test_what_is_so_already_is_answered_at_once(agent: Agent) -> None:
    await agent.bring_in("m")
    seen = len(agent.events.items)
    loaded, swapped_in = await agent.load("m"), await agent.swap_in("m")
    assert (await agent.events.until(ModelLoaded, seen)).generation == loaded
    assert (await agent.events.until(SwapInCompleted, seen)).generation == swapped_in
    await agent.swap_out("m")
    await agent.events.until(SwapOutCompleted, seen)
    seen = len(agent.events.items)
    swapped_out = await agent.swap_out("m")
    assert (await agent.events.until(SwapOutCompleted, seen)).generation == swapped_out
    await agent.register("m")
    assert (await agent.events.until(ModelRegistered, seen)).facts
    assert not agent.events.all(CommandRejected)


async def test_stale_and_unknown_commands_are_rejected(agent: Agent) -> None:
    agent.epoch = 5
    await agent.bring_in("m")
    await agent.send(SwapIn(GPU, "m", epoch=4, generation=99))
    assert "epoch 4" in (await agent.events.until(CommandRejected, generation=99)).reason
    for command in (
        SwapIn(GPU, "m", epoch=5, generation=0),
        Register(GPU, "m", epoch=5, generation=0, spec=ModelSpec(name="m", source="fake")),
    ):
        seen = len(agent.events.items)
        await agent.send(command)
        rejected = await agent.events.until(CommandRejected, seen)
        assert "generation 0 is older" in rejected.reason
    generation = await agent.load("nobody")
    rejected = await agent.events.until(CommandRejected, generation=generation)
    assert "not registered" in rejected.reason
    await agent.register("n")
    await agent.events.until(ModelRegistered, model="n")
    generation = await agent.swap_in("n")
    rejected = await agent.events.until(CommandRejected, generation=generation)
    assert "is cold" in rejected.reason
    assert agent.control.replicas["m"].state == "resident"


async def test_a_failed_swap_in_changes_nothing(agent: Agent) -> None:
    await agent.register("big", source="too-large")
    await agent.events.until(ModelRegistered, model="big")
    await agent.load("big")
    await agent.events.until(ModelLoaded, model="big")
    await agent.swap_in("big")
    failed = await agent.events.until(CommandFailed)
    assert (failed.command, failed.model) == ("swap_in", "big")
    assert "OutOfPages" in failed.reason
    assert agent.control.replicas["big"].state == "host"
    assert agent.control.outcomes.memory.device_bytes == 0
    await agent.bring_in("m")
    chunks = await agent.ask("r1", "1")
    await chunks.until(Finished)


async def test_a_model_that_can_not_be_read_may_be_repaired(agent: Agent) -> None:
    await agent.register("m", source="broken")
    failed = await agent.events.until(CommandFailed)
    assert (failed.command, failed.reason) == ("register", "no safetensors file")
    generation = await agent.load("m")
    rejected = await agent.events.until(CommandRejected, generation=generation)
    assert "no safetensors file" in rejected.reason
    await agent.bring_in("m", source="repaired")


# -- requests ------------------------------------------------------------------------------


async def test_the_chunks_of_an_answer(agent: Agent) -> None:
    await agent.bring_in("m")
    chunks = await agent.ask("r1", "3", tenant="2c70e12b7a0646f9")
    await chunks.until(Finished)
    await agent.queue_is_empty()
    assert [type(chunk) for chunk in chunks.items] == [Started, Tokens, Tokens, Tokens, Finished]
    assert [c.index for c in chunks.all(Tokens)] == [0, 1, 2]
    assert chunks.all(Started)[0].start == "warm"
    assert chunks.all(Finished)[0].completion_tokens == 3
    started = await agent.events.until(RequestStarted, request_id="r1")
    ended = await agent.events.until(RequestEnded, request_id="r1")
    assert (started.attempt, started.queue_wait_s >= 0) == (1, True)
    assert started.tenant == ended.tenant == "2c70e12b7a0646f9"
    assert (ended.outcome, ended.prompt_tokens, ended.completion_tokens) == ("length", 3, 3)


async def test_no_more_than_its_batch_is_pulled(agent: Agent) -> None:
    await agent.bring_in("m", max_batch=2)
    logs = [await agent.ask(f"r{n}", "hold") for n in range(3)]
    await logs[0].until(Tokens)
    await logs[1].until(Tokens)
    assert agent.control.replicas["m"].in_flight == {"r0", "r1"}
    agent.release()
    await logs[2].until(Tokens)
    agent.release()
    for log in logs:
        await log.until(Finished)
    await agent.ended(3)


async def test_cancel(agent: Agent) -> None:
    await agent.bring_in("m")
    chunks = await agent.ask("r1", "hold")
    await chunks.until(Tokens)
    await agent.cancel("r1")
    assert (await chunks.until(Failed)).code == "cancelled"
    assert (await agent.events.until(RequestEnded)).outcome == "cancelled"
    await agent.queue_is_empty()


async def test_a_request_that_nobody_listens_to_is_cancelled(agent: Agent) -> None:
    await agent.bring_in("m")
    await agent.ask("r1", "hold", listen=False)
    assert (await agent.events.until(RequestEnded)).outcome == "cancelled"
    await agent.queue_is_empty()


async def test_a_deadline_that_passed_in_the_queue(agent: Agent) -> None:
    await agent.bring_in("m")
    chunks = await agent.ask("r1", "1", left_s=-0.5)
    assert (await chunks.until(Failed)).code == "deadline_exceeded"
    ended = await agent.events.until(RequestEnded)
    assert (ended.outcome, ended.error) == ("failed", "deadline_exceeded")
    assert not agent.events.all(RequestStarted)


async def test_a_drain_waits_and_takes_nothing_new(agent: Agent) -> None:
    await agent.bring_in("m")
    running = await agent.ask("r1", "hold")
    await running.until(Tokens)
    await agent.swap_out("m")
    await agent.statuses.until_true(
        lambda: agent.statuses.items[-1].replicas[0].state == "draining", "draining"
    )
    waiting = await agent.ask("r2", "1")
    assert not agent.events.all(SwapOutCompleted)
    agent.release()
    await running.until(Finished)
    out = await agent.events.until(SwapOutCompleted)
    assert out.trace.drain_s > 0
    assert waiting.items == []  # it is in the queue, untouched
    await agent.swap_in("m")
    await waiting.until(Finished)
    assert waiting.all(Started)[0].start == "switch"
    await agent.queue_is_empty()
    await agent.ended(2)
    for name in ("r1", "r2"):
        assert len(agent.events.all(RequestEnded, request_id=name)) == 1


async def test_an_ended_request_that_comes_again_gets_its_end_again(agent: Agent) -> None:
    """Its acknowledgement was lost, and its last chunk perhaps too."""
    await agent.bring_in("m")
    deliveries: list[Delivery] = []
    serving, replica = agent.control.serving, agent.control.replicas["m"]
    take = serving.on_delivery
    chunks = await agent.ask("r1", "hold")
    await chunks.until(Tokens)
    deliveries.append(serving.in_flight["r1"].delivery)
    agent.release()
    first = await chunks.until(Finished)
    await agent.events.until(RequestEnded)
    await take(replica, deliveries[0])
    await chunks.until_true(lambda: len(ends(chunks)) == 2, "the end once more")
    assert ends(chunks) == [first, first]
    await agent.queue_is_empty()
    assert len(agent.events.all(RequestEnded)) == 1
    assert len(agent.events.all(RequestStarted)) == 1
