"""Pipelined swap-ins as control sees them: requests meanwhile, call-offs, damage, lost images."""

import time

import pytest

from schemas import names
from schemas.commands import SwapIn
from schemas.events import (
    CommandFailed,
    CommandRejected,
    FirstTokenSent,
    ModelLoaded,
    ModelRegistered,
    ModelUnloaded,
    ModelVerified,
    RequestEnded,
    RequestStarted,
    SwapInCancelled,
    SwapInCompleted,
    SwapOutCompleted,
    VerificationFailed,
)
from schemas.requests import VerifyRequest
from schemas.state import AgentStatus
from schemas.stream import Failed, Finished, Started, Tokens
from services.gpu_agent.outcomes import MAX_CORRUPTIONS
from tests.integration.agent_kit import GPU, Agent


async def host(agent: Agent, source: str) -> None:
    """Have model "m" in host memory."""
    await agent.register("m", source=source)
    await agent.events.until(ModelRegistered)
    await agent.load("m")
    await agent.events.until(ModelLoaded)


async def state_is(agent: Agent, state: str, after: int = 0) -> AgentStatus:
    def is_so() -> bool:
        new = agent.statuses.items[after:]
        return any(r.state == state for status in new for r in status.replicas)

    await agent.statuses.until_true(is_so, state)
    return agent.statuses.items[-1]  # type: ignore[no-any-return]


async def test_requests_are_taken_while_the_weights_arrive(agent: Agent) -> None:
    await host(agent, "slow")
    chunks = await agent.ask("r1", "2")
    await agent.swap_in("m")
    await agent.events.until(RequestStarted, request_id="r1")
    assert agent.control.replicas["m"].state == "swapping_in"
    assert chunks.items == []  # the swap's trace is not known yet
    agent.release()
    await chunks.until(Finished)
    assert [type(c) for c in chunks.items] == [Started, Tokens, Tokens, Finished]
    (started,) = chunks.all(Started)
    assert started.start == "switch"
    assert started.swap is not None
    assert started.swap.num_bytes > 0
    first = await agent.events.until(FirstTokenSent)
    assert (first.request_id, first.model) == ("r1", "m")
    kinds = [type(event) for event in agent.events.items]
    assert kinds.index(SwapInCompleted) < kinds.index(FirstTokenSent)
    await agent.ask("r2", "1")
    await agent.ended(2)
    assert len(agent.events.all(FirstTokenSent)) == 1


async def test_what_came_before_a_swap_in_is_in_its_trace(agent: Agent) -> None:
    await host(agent, "fake")
    at = agent.statuses.items[-1]
    assert at.host_used_bytes > 0
    now = time.time()
    await agent.send(
        SwapIn(GPU, "m", agent.epoch, 99, waiting_since=now - 3.0, decided_at=now - 2.0)
    )
    trace = (await agent.events.until(SwapInCompleted)).trace
    assert trace.decision_s == pytest.approx(1.0)
    assert trace.drain_s >= 2.0


async def test_a_swap_out_calls_an_arrival_off(agent: Agent) -> None:
    await host(agent, "slow")
    await agent.swap_in("m")
    await state_is(agent, "swapping_in")
    generation = await agent.swap_out("m")
    off = await agent.events.until(SwapInCancelled)
    out = await agent.events.until(SwapOutCompleted)
    assert (off.generation, out.generation) == (generation, generation)
    assert not agent.events.all(SwapInCompleted)
    # In the queue, untouched, until it is swapped in again.
    chunks = await agent.ask("r1", "1")
    await agent.swap_in("m")
    await agent.events.until(RequestStarted)
    agent.release()
    await chunks.until(Finished)


async def test_a_call_off_waits_for_requests_that_were_taken(agent: Agent) -> None:
    await host(agent, "slow")
    chunks = await agent.ask("r1", "2")
    await agent.swap_in("m")
    await agent.events.until(RequestStarted)
    await agent.swap_out("m")
    await state_is(agent, "draining")
    agent.release()
    await chunks.until(Finished)
    await agent.events.until(SwapOutCompleted)
    assert agent.control.replicas["m"].state == "host"
    assert not agent.events.all(SwapInCancelled)


async def test_the_only_request_of_an_arrival_is_cancelled(agent: Agent) -> None:
    await host(agent, "slow")
    chunks = await agent.ask("r1", "2")
    await agent.swap_in("m")
    await agent.events.until(RequestStarted)
    await agent.cancel("r1")
    assert (await chunks.until(Failed)).code == "cancelled"
    assert (await agent.events.until(RequestEnded)).outcome == "cancelled"
    await agent.swap_out("m")
    await agent.events.until(SwapInCancelled)


async def test_damaged_weights_are_loaded_again_and_requests_wait(agent: Agent) -> None:
    await host(agent, "damaged")
    chunks = await agent.ask("r1", "1")
    for count in range(1, MAX_CORRUPTIONS + 1):
        seen = len(agent.events.items)
        generation = await agent.swap_in("m")
        failed = await agent.events.until(VerificationFailed, seen)
        assert (failed.check, failed.generation) == ("page", generation)
        if count < MAX_CORRUPTIONS:
            await agent.events.until(CommandRejected, seen, generation=generation)
            assert agent.control.replicas["m"].state == "cold"
            await agent.load("m")
            await agent.events.until(ModelLoaded, seen)
    await agent.events.until(CommandFailed, seen, command="swap_in")
    assert agent.control.replicas["m"].state == "failed"
    assert chunks.items == []
    await agent.bring_in("m", source="repaired")
    await chunks.until(Finished)
    await agent.ended()
    assert len(agent.events.all(RequestEnded)) == 1


@pytest.mark.parametrize("num_corruptions", [0, MAX_CORRUPTIONS])
async def test_an_image_that_was_dropped_under_a_swap_in(
    agent: Agent, num_corruptions: int
) -> None:
    await host(agent, "dropped")
    agent.control.replicas["m"].num_corruptions = num_corruptions  # of earlier: no matter here
    generation = await agent.swap_in("m")
    rejected = await agent.events.until(CommandRejected, generation=generation)
    assert "made room" in rejected.reason
    assert agent.control.replicas["m"].state == "cold"
    assert not agent.events.all(CommandFailed)
    assert not agent.events.all(ModelUnloaded)


async def test_verify_on_demand(agent: Agent) -> None:
    async def verify() -> None:
        await agent.watcher.bus.publish(names.verify_subject(GPU), VerifyRequest("m"))

    await agent.bring_in("m", source="rotten")
    running = await agent.ask("r1", "hold")
    await running.until(Tokens)
    seen = len(running.items)
    await verify()
    assert "rotten" in (await agent.events.until(VerificationFailed)).reason
    await agent.events.until_true(lambda: agent.control.replicas["m"].state == "cold")
    assert agent.control.serving.in_flight == {}  # back in the queue
    await agent.bring_in("m", source="fake")
    await verify()
    assert (await agent.events.until(ModelVerified)).num_pages == 7
    await running.until(Tokens, seen)
    agent.release()
    await running.until(Finished)
