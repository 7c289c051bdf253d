"""Requests of class batch at an agent: over a real nats-server, with a scripted engine worker."""

from schemas.events import RequestEnded, RequestStarted
from schemas.stream import Finished, Started, Tokens
from services.bus import WorkQueue, declare
from tests.integration.agent_kit import Agent, connected, ends, eventually
from tests.integration.bus.kit import holds_only, request
from tests.integration.nats_process import NatsServer


async def test_a_batch_request_is_answered_as_one(agent: Agent) -> None:
    await agent.bring_in("m")
    chunks = await agent.ask("j1", "5", klass="batch")
    await chunks.until(Finished)
    assert [type(chunk) for chunk in chunks.items] == [Started, Tokens, Finished]
    [tokens] = chunks.all(Tokens)
    assert (tokens.index, tokens.token_ids) == (0, (100, 101, 102, 103, 104))
    assert tokens.text == "t0 t1 t2 t3 t4 "
    ended = await agent.events.until(RequestEnded)
    assert (ended.klass, ended.completion_tokens) == ("batch", 5)
    await agent.queue_is_empty()


async def test_interactive_requests_take_the_slots_of_batch_requests(agent: Agent) -> None:
    """Two slots, both with batch requests that would hold them for ever."""
    await agent.bring_in("m", max_batch=2)
    first = await agent.ask("j1", "hold", klass="batch")
    await agent.events.until(RequestStarted, request_id="j1")
    second = await agent.ask("j2", "hold", klass="batch")
    await agent.events.until(RequestStarted, request_id="j2")
    assert agent.control.replicas["m"].status().batch_in_flight == 2
    asked = await agent.ask("r1", "hold")
    await asked.until(Tokens)
    status = agent.control.replicas["m"].status()
    assert (status.in_flight, status.batch_in_flight) == (2, 1)
    assert "j2" not in agent.control.serving.in_flight  # the one that came last gave way
    agent.release()
    await asked.until(Finished)
    await first.until(Finished)
    await agent.events.until(RequestStarted, request_id="j2", attempt=2)
    await eventually(lambda: _holds(agent, "j2"), "j2 to be computed again")
    agent.release()
    await second.until(Finished)
    assert len(ends(second)) == len(ends(asked)) == len(ends(first)) == 1
    await agent.queue_is_empty()


async def _holds(agent: Agent, request_id: str) -> bool:
    flight = agent.control.serving.in_flight.get(request_id)
    return flight is not None and bool(flight.held)


async def test_batch_requests_wait_while_interactive_ones_have_all_slots(agent: Agent) -> None:
    await agent.bring_in("m", max_batch=1)
    asked = await agent.ask("r1", "hold")
    await asked.until(Tokens)
    batch = await agent.ask("j1", "2", klass="batch")
    more = await agent.ask("r2", "2")
    agent.release()
    await more.until(Finished)
    await batch.until(Finished)
    order = [event.request_id for event in agent.events.all(RequestStarted)]
    assert order == ["r1", "r2", "j1"]


async def test_they_outlive_the_death_of_the_server_and_of_whoever_asked(
    nats_server: NatsServer,
) -> None:
    async with connected(nats_server, "api", "scheduler") as buses:
        await declare(buses["api"])
        queue = WorkQueue(buses["api"])
        await queue.enqueue(request("m", klass="batch"))
        await queue.enqueue(request("m"))
    nats_server.restart()
    async with connected(nats_server, "api", "scheduler") as buses:
        await declare(buses["api"])
        await holds_only(WorkQueue(buses["scheduler"]), {})  # interactive: whoever asks, asks again
        assert (await WorkQueue(buses["scheduler"]).depths("batch"))[0] == {"m": 1}


async def test_an_agent_that_loses_the_server_ends_what_it_has_once(
    nats_server: NatsServer, agent: Agent
) -> None:
    await agent.bring_in("m")
    await agent.ask("j1", "hold", klass="batch")
    await eventually(lambda: _holds(agent, "j1"), "j1 to be computed")
    nats_server.restart()
    agent.release()
    async with connected(nats_server, "scheduler") as buses:
        await holds_only_batch(WorkQueue(buses["scheduler"]))
    assert [e.request_id for e in agent.events.all(RequestStarted)] == ["j1"]


async def holds_only_batch(queue: WorkQueue, **depths: int) -> None:
    async def agrees() -> bool:
        return (await queue.depths("batch"))[0] == depths

    await eventually(agrees, f"the queue of class batch to hold {depths}")
