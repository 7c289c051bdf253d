"""What becomes of requests when the worker dies, the server restarts, or the agent stops."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from schemas.events import RequestEnded, RequestStarted, WorkerDied
from schemas.state import AgentStatus
from schemas.stream import Failed, Finished, Resuming, Started, Tokens
from services.bus import Delivery, Puller
from services.gpu_agent import resuming
from services.gpu_agent.suspects import MAX_CRASHES
from tests.integration.agent_kit import GPU, Agent, ends, eventually
from tests.integration.nats_process import NatsServer


async def _now(value: bool) -> bool:
    return value


async def test_requests_outlive_their_worker(agent: Agent) -> None:
    await agent.bring_in("m")
    logs = [await agent.ask(f"r{n}", "hold") for n in range(3)]
    for log in logs:
        await log.until(Tokens)
    seen = len(agent.events.items)
    os.kill(agent.control.worker.pid, signal.SIGKILL)
    died = await agent.events.until(WorkerDied)
    assert "SIGKILL" in died.reason
    await agent.statuses.until(AgentStatus, worker_pid=0, used_bytes=0)
    await agent.bring_back("m", seen)
    for log in logs:
        # A third attempt, where the dead worker's pull got it once more and handed it back.
        await log.until_true(lambda: log.all(Tokens)[-1].attempt > 1, "another attempt")  # noqa: B023
    agent.release()
    for log in logs:
        end = await log.until(Finished)
        assert len(log.all(Started)) == 2
        # What the client had was not computed again.
        assert [(one.index, one.attempt > 1) for one in log.all(Tokens)] == [(0, False), (1, True)]
        assert (end.completion_tokens, len(log.all(Resuming)) > 0) == (2, True)
    await agent.ended(3)
    assert {one.prefix_tokens for one in agent.events.all(RequestEnded)} == {1}
    await agent.queue_is_empty()


async def test_an_api_that_does_not_answer_costs_time_only(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resuming, "PATIENCE_S", 0.05)
    await agent.bring_in("m")
    log = await agent.ask("r", "3", answers=False, attempts_before=2)
    assert (await log.until(Resuming)).attempt == 3
    await log.until(Finished)
    assert [one.index for one in log.all(Tokens)] == [0, 1, 2]
    await agent.queue_is_empty()


async def test_an_api_that_died_is_not_computed_for(agent: Agent) -> None:
    await agent.bring_in("m")
    await agent.ask("r", "hold", listen=False, attempts_before=1)
    ended = await agent.events.until(RequestEnded)
    assert (ended.outcome, ended.completion_tokens) == ("cancelled", 0)
    assert not agent.events.all(RequestStarted)
    await agent.queue_is_empty()


async def test_what_nobody_waits_for_is_not_run_again(agent: Agent) -> None:
    await agent.bring_in("m")
    log = await agent.ask("r", "hold", verdict="cancel", attempts_before=1)
    assert (await log.until(Failed)).code == "cancelled"
    assert (await agent.events.until(RequestEnded)).outcome == "cancelled"
    await agent.queue_is_empty()


async def test_what_has_ended_is_only_acknowledged(agent: Agent) -> None:
    await agent.bring_in("m")
    log = await agent.ask("r", "hold", verdict="drop", attempts_before=1)
    await log.until(Resuming)
    await agent.queue_is_empty()
    after = await agent.ask("r2", "1")
    await after.until(Finished)
    await agent.ended(1)
    assert [one.request_id for one in agent.events.all(RequestEnded)] == ["r2"]
    assert ends(log) == []


async def test_a_request_that_goes_on_elsewhere_is_let_go(agent: Agent) -> None:
    await agent.bring_in("m")
    log = await agent.ask("r", "hold")
    await log.until(Tokens)
    delivery = agent.control.serving.in_flight["r"].delivery
    await agent.cancel("r", gpu="another")
    await agent.cancel("r", gpu=GPU)
    await eventually(lambda: _now(not agent.control.serving.in_flight), "the request to be let go")
    await delivery.ack()  # as the other agent does
    after = await agent.ask("r2", "1")
    await after.until(Finished)
    await agent.ended(1)
    assert [one.request_id for one in agent.events.all(RequestEnded)] == ["r2"]
    assert ends(log) == []


async def test_only_the_poison_fails(agent: Agent, tmp_path: Path) -> None:
    """The others were beside it when the worker died, at most twice: then it runs alone."""
    calm = tmp_path / "calm"
    await agent.bring_in("m")
    others = [await agent.ask(f"r{n}", str(calm)) for n in range(2)]
    for log in others:
        await log.until(Tokens)
    poison = await agent.ask("poison", "die")
    for death in range(1, MAX_CRASHES + 1):
        await agent.events.until_true(
            lambda: len(agent.events.all(WorkerDied)) == death,  # noqa: B023
            f"death {death}",
        )
        if death == MAX_CRASHES - 1:
            calm.touch()
        seen = agent.events.items.index(agent.events.all(WorkerDied)[-1]) + 1
        await agent.bring_back("m", seen)
    failed = await poison.until(Failed)
    assert failed.code == "engine_failed"
    assert f"{MAX_CRASHES} times" in failed.message
    for log in others:
        await log.until(Finished)
        assert len(ends(log)) == 1
    await agent.ended(3)
    await agent.queue_is_empty()
    assert len(agent.events.all(WorkerDied)) == MAX_CRASHES
    outcomes = [event.outcome for event in agent.events.all(RequestEnded)]
    assert sorted(outcomes) == ["failed", "length", "length"]


async def test_a_nats_restart_ends_each_request_once(agent: Agent, nats_server: NatsServer) -> None:
    """The memory stream is lost; what runs goes on, and what is pulled again is not run twice."""
    await agent.bring_in("m")
    log = await agent.ask("r1", "hold")
    await log.until(Tokens)
    old = agent.control.serving.in_flight["r1"].delivery
    await asyncio.to_thread(nats_server.restart)
    serving = agent.control.serving
    await eventually(lambda: _now(old._is_stale), "the old delivery to be void")
    again = await agent.ask("r1", "hold")  # as the api does after a reconnect
    await eventually(lambda: _now(serving.in_flight["r1"].delivery is not old), "redelivery")
    agent.release()
    await again.until(Finished)
    await agent.queue_is_empty()
    after = await agent.ask("r2", "2")
    await after.until(Finished)
    await agent.events.until(RequestEnded, request_id="r2")
    assert len(agent.events.all(RequestEnded, request_id="r1")) == 1
    assert len(agent.events.all(RequestStarted, request_id="r1")) == 1


async def test_a_stop_hands_back_what_still_runs(agent: Agent) -> None:
    await agent.bring_in("m")
    chunks = await agent.ask("r1", "hold")
    await chunks.until(Tokens)
    await agent.control.drain(0.0)
    assert agent.control.serving.in_flight == {}
    deliveries: asyncio.Queue[Delivery] = asyncio.Queue()
    puller = Puller(agent._buses["agent"], "m", deliveries.put)
    await puller.start()
    await puller.want(1)
    delivery = await asyncio.wait_for(deliveries.get(), 3)  # at once, not after its ack wait
    assert (delivery.request.request_id, delivery.num_delivered) == ("r1", 2)
    await delivery.ack()
    puller.stop()
    assert ends(chunks) == []
    assert not agent.events.all(RequestEnded)
