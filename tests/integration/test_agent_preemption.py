"""Requests that are suspended: their model leaves, they stay, go on, and end once."""

import asyncio
import os
import signal

import pytest

from schemas import names
from schemas.events import (
    CommandFailed,
    ModelLoaded,
    ModelRegistered,
    ModelUnloaded,
    RequestEnded,
    RequestStarted,
    SwapInCancelled,
    SwapInCompleted,
    SwapOutCompleted,
    VerificationFailed,
    WorkerDied,
)
from schemas.requests import VerifyRequest
from schemas.state import AgentStatus, Preemption, ReplicaStatus
from schemas.stream import Failed, Finished, Started, Tokens
from tests.integration.agent_kit import GPU, Agent, Log, ends, eventually


async def status_is(agent: Agent, state: str, in_flight: int, after: int = 0) -> ReplicaStatus:
    """Wait for a status of "m" with these."""

    def found() -> list[ReplicaStatus]:
        return [
            replica
            for status in agent.statuses.all(AgentStatus, after)
            for replica in status.replicas
            if (replica.model, replica.state, replica.in_flight) == ("m", state, in_flight)
        ]

    await agent.statuses.until_true(lambda: bool(found()), f"{state} with {in_flight}")
    return found()[0]


async def suspend(agent: Agent, num_requests: int = 1, **how: object) -> list[Log]:
    """Requests r0, r1 ... of "m" in the middle of their answers, and "m" swapped out."""
    await agent.bring_in("m", **how)
    logs = [await agent.ask(f"r{n}", "hold") for n in range(num_requests)]
    for log in logs:
        await log.until(Tokens)
    generation = await agent.preempt("m")
    out = await agent.events.until(SwapOutCompleted)
    assert (out.generation, out.num_suspended) == (generation, num_requests)
    return logs


async def is_in_line(agent: Agent, name: str) -> bool:
    flight = agent.control.serving.in_flight.get(name)
    return flight is not None and not flight.is_submitted


async def is_arriving(agent: Agent) -> bool:
    return agent.control.replicas["m"].is_arriving


async def come_back(agent: Agent) -> None:
    generation = await agent.swap_in("m")
    await agent.events.until(SwapInCompleted, generation=generation)


async def test_a_request_goes_on_where_it_was(agent: Agent) -> None:
    (chunks,) = await suspend(agent)
    await status_is(agent, "host", 1)
    await agent.control.serving.keep_alive()
    waiting = await agent.ask("later", "1")
    await come_back(agent)
    await waiting.until(Finished)  # into a free slot, beside the one that holds again
    assert ends(chunks) == []
    agent.release()
    await chunks.until(Finished)
    assert [type(chunk) for chunk in chunks.items] == [Started, Tokens, Tokens, Finished]
    assert [chunk.index for chunk in chunks.all(Tokens)] == [0, 1]
    assert {chunk.attempt for chunk in chunks.all(Tokens)} == {1}
    await agent.ended(2)
    await agent.queue_is_empty()
    assert len(agent.events.all(RequestEnded, request_id="r0")) == 1
    assert len(agent.events.all(RequestStarted, request_id="r0")) == 1


async def test_suspended_requests_keep_their_slots(agent: Agent) -> None:
    logs = await suspend(agent, 2, max_batch=2)
    third = await agent.ask("third", "1")
    await come_back(agent)
    assert agent.control.replicas["m"].in_flight == {"r0", "r1"}
    agent.release()
    for log in (*logs, third):
        await log.until(Finished)
    await agent.ended(3)


async def test_it_may_leave_more_than_once(agent: Agent) -> None:
    (chunks,) = await suspend(agent)
    for _ in range(2):
        await come_back(agent)
        seen = len(agent.events.items)
        await agent.preempt("m")
        assert (await agent.events.until(SwapOutCompleted, seen)).num_suspended == 1
    seen = len(agent.events.items)
    await agent.preempt("m")  # it is out already
    assert (await agent.events.until(SwapOutCompleted, seen)).num_suspended == 1
    await come_back(agent)
    agent.release()
    await chunks.until(Finished)
    await agent.ended()
    assert len(chunks.all(Started)) == 1


async def test_a_preemption_cuts_a_drain_short(agent: Agent) -> None:
    await agent.bring_in("m")
    chunks = await agent.ask("r1", "hold")
    await chunks.until(Tokens)
    await agent.swap_out("m")
    await status_is(agent, "draining", 1)
    generation = await agent.preempt("m")
    out = await agent.events.until(SwapOutCompleted)
    assert (out.generation, out.num_suspended) == (generation, 1)
    await come_back(agent)
    agent.release()
    await chunks.until(Finished)


async def test_a_preemption_stops_an_arrival(agent: Agent) -> None:
    await agent.register("m", source="slow")
    await agent.events.until(ModelRegistered)
    await agent.load("m")
    await agent.events.until(ModelLoaded)
    chunks = await agent.ask("r1", "2")
    await agent.swap_in("m")
    await agent.events.until(RequestStarted)
    await agent.preempt("m")
    await agent.events.until(SwapInCancelled)
    assert (await agent.events.until(SwapOutCompleted)).num_suspended == 1
    assert chunks.items == []
    await agent.swap_in("m")
    await eventually(lambda: is_arriving(agent), "the model to arrive again")
    agent.release()
    await chunks.until(Finished)
    assert [type(chunk) for chunk in chunks.items] == [Started, Tokens, Tokens, Finished]
    assert len(agent.events.all(RequestStarted)) == 1


@pytest.mark.parametrize("preemption", ["drain"])
async def test_what_must_not_be_interrupted_is_drained(
    agent: Agent, preemption: Preemption
) -> None:
    await agent.bring_in("m", preemption=preemption)
    chunks = await agent.ask("r1", "hold")
    await chunks.until(Tokens)
    await agent.preempt("m")
    await status_is(agent, "draining", 1)
    await agent.preempt("m")  # nothing more comes of it
    agent.release()
    await chunks.until(Finished)
    assert (await agent.events.until(SwapOutCompleted)).num_suspended == 0


async def test_what_the_worker_has_not_got_goes_back_to_the_queue(agent: Agent) -> None:
    """A request that must run alone, because two workers died with it, waits in line."""
    await agent.bring_in("m")
    serving = agent.control.serving
    for _ in range(2):
        serving._suspects.blame("suspect")
    running = await agent.ask("r1", "hold")
    await running.until(Tokens)
    suspect = await agent.ask("suspect", "1")
    await eventually(lambda: is_in_line(agent, "suspect"), "the suspect to wait in line")
    await agent.preempt("m")
    assert (await agent.events.until(SwapOutCompleted)).num_suspended == 1
    await agent.bring_in("n")
    alone = await agent.ask("other", "1", model="n")
    await alone.until(Finished)  # nobody is in its way
    await come_back(agent)
    agent.release()
    await running.until(Finished)
    await suspect.until(Finished)
    await agent.queue_is_empty()


# -- ends while suspended ------------------------------------------------------------------


async def test_cancel(agent: Agent) -> None:
    logs = await suspend(agent, 2)
    seen = len(agent.statuses.items)
    await agent.cancel("r0")
    assert (await logs[0].until(Failed)).code == "cancelled"
    assert (await agent.events.until(RequestEnded)).outcome == "cancelled"
    await agent.cancel("r1")
    await logs[1].until(Failed)
    await status_is(agent, "host", 0, seen)
    await agent.queue_is_empty()
    await come_back(agent)
    await (await agent.ask("r3", "1")).until(Finished)
    await agent.ended(3)
    assert [len(ends(log)) for log in logs] == [1, 1]


async def test_the_worker_dies(agent: Agent) -> None:
    logs = await suspend(agent, 2)
    seen = len(agent.events.items)
    os.kill(agent.control.worker.pid, signal.SIGKILL)
    await agent.events.until(WorkerDied)
    assert agent.control.serving.in_flight == {}
    assert not agent.control.serving._suspects._deaths  # it did not work on them
    await agent.bring_back("m", seen)
    for log in logs:
        await log.until(Tokens, attempt=2)
    agent.release()
    for log in logs:
        await log.until(Finished)
        assert len(ends(log)) == 1
    await agent.ended(2)
    await agent.queue_is_empty()
    assert len(agent.events.all(RequestEnded)) == 2


async def test_the_weights_turn_out_damaged(agent: Agent) -> None:
    (chunks,) = await suspend(agent, source="rotten")
    await agent.watcher.bus.publish(names.verify_subject(GPU), VerifyRequest("m"))
    await agent.events.until(VerificationFailed)
    await agent.events.until_true(lambda: agent.control.replicas["m"].state == "cold")
    await runs_again(agent, chunks)


async def test_the_model_does_not_come_back(agent: Agent) -> None:
    """Nothing changed in the worker: it has to be told to forget them."""
    (chunks,) = await suspend(agent, source="shrunk")
    await agent.swap_in("m")
    await agent.events.until(CommandFailed, command="swap_in")
    await status_is(agent, "host", 0)
    assert agent.control.serving.in_flight == {}
    await come_back(agent)
    await ends_once(agent, chunks)


async def test_the_image_is_dropped(agent: Agent) -> None:
    (chunks,) = await suspend(agent, source="crowded")
    await agent.watcher.bus.publish(names.verify_subject(GPU), VerifyRequest("m"))
    await agent.events.until(ModelUnloaded)
    await status_is(agent, "cold", 0)
    await runs_again(agent, chunks)


async def runs_again(agent: Agent, chunks: Log) -> None:
    """From the queue, once the model is there again; and ends once."""
    assert agent.control.serving.in_flight == {}
    await agent.bring_in("m", source="fake")
    await ends_once(agent, chunks)


async def ends_once(agent: Agent, chunks: Log) -> None:
    """In its second attempt."""
    await chunks.until(Tokens, attempt=2)
    agent.release()
    await chunks.until(Finished)
    await agent.ended()
    await agent.queue_is_empty()
    assert len(ends(chunks)) == 1
    assert len(agent.events.all(RequestEnded)) == 1


async def test_a_stop_does_not_wait_for_them(agent: Agent) -> None:
    (chunks,) = await suspend(agent)
    await asyncio.wait_for(agent.control.drain(60.0), 5)
    assert agent.control.serving.in_flight == {}
    assert ends(chunks) == []
    assert not agent.events.all(RequestEnded)
