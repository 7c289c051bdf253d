"""What becomes of requests when the worker dies, the server restarts, or the agent stops."""

import asyncio
import os
import signal
from pathlib import Path

from schemas.events import RequestEnded, RequestStarted, WorkerDied
from schemas.state import AgentStatus
from schemas.stream import Failed, Finished, Started, Tokens
from services.bus import Delivery, Puller
from services.gpu_agent.suspects import MAX_CRASHES
from tests.integration.agent_kit import Agent, ends, eventually
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
        await log.until(Finished)
        assert len(log.all(Started)) == 2
    await agent.ended(3)
    await agent.queue_is_empty()


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
