"""Models that an agent is told to forget, with their requests wherever these are."""

from schemas.commands import Register, SwapOut, Unload
from schemas.events import (
    CommandRejected,
    ModelRegistered,
    ModelUnloaded,
    RequestEnded,
    SwapOutCompleted,
)
from schemas.state import ModelSpec
from schemas.stream import Failed, Finished, Tokens
from tests.integration.agent_kit import GPU, Agent, ends


async def test_a_model_is_forgotten_and_can_be_registered_anew(agent: Agent) -> None:
    await agent.bring_in("m")
    generation = await agent.unload("m")
    rejected = await agent.events.until(CommandRejected, generation=generation)
    assert (rejected.command, rejected.reason) == ("unload", "the replica is resident")
    await agent.swap_out("m")
    await agent.events.until(SwapOutCompleted)
    await agent.watcher.residency_is(m="host")
    generation = await agent.unload("m")
    unloaded = await agent.events.until(ModelUnloaded)
    assert (unloaded.generation, unloaded.num_bytes > 0) == (generation, True)
    await agent.watcher.residency_is()
    assert agent.control.replicas == {}
    await agent.bring_in("m", max_batch=2)
    assert agent.control.replicas["m"].spec.max_batch == 2
    chunks = await agent.ask("r1", "2")
    assert isinstance(await chunks.until(Finished), Finished)


async def test_to_forget_what_is_not_known_is_done_already(agent: Agent) -> None:
    generation = await agent.unload("m")
    unloaded = await agent.events.until(ModelUnloaded)
    assert (unloaded.model, unloaded.generation, unloaded.num_bytes) == ("m", generation, 0)


async def test_suspended_requests_go_back_to_the_queue_and_are_answered_anew(agent: Agent) -> None:
    await agent.bring_in("m")
    chunks = await agent.ask("r1", "hold")
    await chunks.until(Tokens)
    await agent.preempt("m")
    await agent.events.until(SwapOutCompleted, num_suspended=1)
    await agent.unload("m")
    await agent.events.until(ModelUnloaded)
    assert ends(chunks) == []
    await agent.bring_in("m")
    await chunks.until_true(lambda: len(chunks.all(Tokens)) == 2, "its first token once more")
    agent.release()
    await chunks.until(Finished)
    assert len(agent.events.all(RequestEnded)) == 1


async def test_suspended_requests_end_where_that_is_said(agent: Agent) -> None:
    await agent.bring_in("m")
    chunks = await agent.ask("r1", "hold")
    await chunks.until(Tokens)
    await agent.preempt("m")
    await agent.events.until(SwapOutCompleted, num_suspended=1)
    await agent.unload("m", end_requests="its deployment was removed")
    failed = await chunks.until(Failed)
    assert (failed.code, failed.message) == ("model_unavailable", "its deployment was removed")
    await agent.events.until(ModelUnloaded)
    await agent.queue_is_empty()
    assert len(agent.events.all(RequestEnded)) == 1


async def test_running_requests_end_at_once_where_that_is_said(agent: Agent) -> None:
    await agent.bring_in("m")
    logs = [await agent.ask(name, "hold") for name in ("r1", "r2")]
    for chunks in logs:
        await chunks.until(Tokens)
    await agent.send(SwapOut(GPU, "m", agent.epoch, 98, end_requests="gone"))
    for chunks in logs:
        assert (await chunks.until(Failed)).message == "gone"
    await agent.events.until(SwapOutCompleted, generation=98, num_suspended=0)
    await agent.queue_is_empty()
    assert len(agent.events.all(RequestEnded)) == 2


async def test_a_drain_that_is_cut_short_ends_what_it_waited_for(agent: Agent) -> None:
    await agent.bring_in("m")
    chunks = await agent.ask("r1", "hold")
    await chunks.until(Tokens)
    await agent.swap_out("m")
    await agent.watcher.residency_is(m="draining")
    await agent.send(SwapOut(GPU, "m", agent.epoch, 98, end_requests="gone"))
    assert (await chunks.until(Failed)).message == "gone"
    await agent.events.until(SwapOutCompleted, generation=98)


async def test_statuses_tell_what_a_model_was_registered_with(agent: Agent) -> None:
    spec = ModelSpec("m", "fake")
    await agent.send(Register(GPU, "m", agent.epoch, 50, spec, settings="f00"))
    await agent.events.until(ModelRegistered, generation=50)
    other = ModelSpec("m", "fake", max_batch=2)
    await agent.send(Register(GPU, "m", agent.epoch, 51, other, settings="ba4"))
    await agent.events.until(ModelRegistered, generation=51)
    told = [s.replicas[0].settings for s in agent.statuses.items if s.replicas]
    assert told[-1] == "ba4"
    await agent.send(Unload(GPU, "m", agent.epoch, 52))
    await agent.events.until(ModelUnloaded)
    await agent.statuses.until_true(lambda: not agent.statuses.items[-1].replicas, "none")
