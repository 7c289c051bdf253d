"""Leaders that die, that are stopped, that do not notice: real scheduler processes over a real
nats-server and an agent with a scripted engine worker.
"""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from schemas import names
from schemas.commands import Command, SwapIn
from schemas.events import (
    CommandRejected,
    LeaderElected,
    ModelLoaded,
    RequestEnded,
    SwapInCompleted,
    kind_of,
)
from schemas.state import AgentStatus, LeaseRecord
from schemas.stream import Finished
from services.bus import Bucket, Message, declare
from services.gpu_agent.control import AgentControl
from services.scheduler import service
from services.scheduler.leadership import Leadership
from services.settings import GpuSettings, ModelSettings, SchedulerSettings, Settings, dump
from tests.integration.agent_kit import GPU, Agent, Log, Watcher, connected, ends
from tests.integration.nats_process import NatsServer

SETTINGS = Settings(
    scheduler=SchedulerSettings(lease_ttl_s=1, reconcile_s=0.2),
    models={name: ModelSettings(source="fake") for name in ("a", "b")},
)


class Scheduler:
    """A `hotswap scheduler` process, and what it logs."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines = Log()
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr
        async for line in self.process.stderr:
            await self.lines.add(line.decode())

    async def says(self, words: str, after: int = 0) -> None:
        await self.lines.until_true(
            lambda: any(words in line for line in self.lines.items[after:]), words
        )

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        await self._reading


class Schedulers:
    """Starts them; none outlives its test."""

    def __init__(self, nats: NatsServer, folder: Path) -> None:
        config = folder / "hotswap.toml"
        config.write_text(dump(SETTINGS))
        creds = nats.plan.credential_files["scheduler"]
        self._command = [sys.executable, "-m", "services.cli", "scheduler"]
        self._command += ["--config", str(config), "--creds", str(creds)]
        self._started: list[Scheduler] = []

    async def start(self) -> Scheduler:
        process = await asyncio.create_subprocess_exec(
            *self._command, stderr=asyncio.subprocess.PIPE
        )
        self._started.append(Scheduler(process))
        return self._started[-1]

    async def leader_and_standby(self, events: Log) -> tuple[Scheduler, Scheduler, LeaderElected]:
        leader = await self.start()
        elected = await events.until(LeaderElected)
        standby = await self.start()
        await standby.says("standing by")
        return leader, standby, elected

    async def end(self) -> None:
        for scheduler in self._started:
            await scheduler.kill()


@pytest.fixture
async def schedulers(nats_server: NatsServer, tmp_path: Path) -> AsyncIterator[Schedulers]:
    schedulers = Schedulers(nats_server, tmp_path)
    yield schedulers
    await schedulers.end()


@pytest.fixture
async def commands(agent: Agent) -> Log:
    """Every command on the bus, whoever sent it."""
    log = Log()

    async def on_command(message: Message[Command]) -> None:
        await log.add(message.body)

    await agent.watcher.bus.subscribe(names.command_subject(GPU), Command, on_command)
    await agent.watcher.bus.flush()
    return log


async def answered(agent: Agent, name: str, model: str) -> None:
    """Ask ``model``, and wait until the request has ended well."""
    chunks = await agent.ask(name, "3", model)
    await chunks.until_true(lambda: bool(ends(chunks)), f"an end of {name}")
    assert isinstance(ends(chunks)[0], Finished), ends(chunks)


async def test_kill_9_of_the_leader(agent: Agent, schedulers: Schedulers) -> None:
    leader, _, old = await schedulers.leader_and_standby(agent.events)
    await answered(agent, "first", "a")
    await agent.events.until(ModelLoaded, model="b")
    seen = len(agent.events.items)
    await leader.kill()
    waiting = await agent.ask("waits", "3", "b")
    number = 0
    while not (elected := agent.events.all(LeaderElected, seen)):
        await answered(agent, f"warm{number}", "a")  # nobody leads, and nothing is amiss
        number += 1
    assert number
    assert elected[0].epoch > old.epoch
    await waiting.until(Finished)
    assert len(ends(waiting)) == 1
    assert len(agent.events.all(RequestEnded, request_id="waits")) <= 1


async def test_of_those_that_start_at_once_one_leads(agent: Agent, schedulers: Schedulers) -> None:
    both = [await schedulers.start() for _ in range(2)]
    first = await agent.events.until(LeaderElected)
    await answered(agent, "first", "a")
    for scheduler in both:
        await scheduler.says("standing by")  # each did, and one of them still does
    assert agent.events.all(LeaderElected) == [first]
    leading = [s for s in both if any("leading, epoch" in line for line in s.lines.items)]
    assert len(leading) == 1
    seen = len(agent.events.items)
    await leading[0].kill()
    second = await agent.events.until(LeaderElected, seen)
    assert second.holder != first.holder
    assert second.epoch > first.epoch
    await answered(agent, "second", "b")


async def test_a_leader_that_was_stopped_does_not_command(
    agent: Agent, schedulers: Schedulers, commands: Log
) -> None:
    stopped, standby, old = await schedulers.leader_and_standby(agent.events)
    await answered(agent, "first", "a")
    await agent.events.until(ModelLoaded, model="b")
    seen = len(agent.events.items)
    stopped.process.send_signal(signal.SIGSTOP)
    await agent.ask("waits", "3", "b")  # it will find this demand when it goes on
    new = await agent.events.until(LeaderElected, seen)
    await agent.events.until(RequestEnded, request_id="waits")
    stopped.process.send_signal(signal.SIGCONT)
    await stopped.says("stepping down")
    rejected = {event.generation for event in agent.events.all(CommandRejected, model="b")}
    obeyed = [one for one in commands.all(SwapIn, model="b") if one.generation not in rejected]
    assert [command.epoch for command in obeyed] == [new.epoch]
    assert new.epoch > old.epoch

    seen = len(agent.events.items)  # and it takes its turn again
    await standby.kill()
    again = await agent.events.until(LeaderElected, seen)
    assert again.epoch > new.epoch
    assert again.holder not in (old.holder, new.holder)
    await answered(agent, "last", "b")


async def test_a_leader_that_does_not_notice_is_fenced_off(
    agent: Agent,
    nats_server: NatsServer,
    schedulers: Schedulers,
    commands: Log,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if it were stopped between its last look at the clock and each of its commands."""
    monkeypatch.setattr(Leadership, "is_held", True)
    monkeypatch.setattr(Leadership, "keep", lambda _: asyncio.Event().wait())
    stop = asyncio.Event()
    options = nats_server.credentials["scheduler"]
    unaware = asyncio.create_task(service.run(SETTINGS, options, stop=stop))
    old = await agent.events.until(LeaderElected)
    for model in SETTINGS.models:
        await agent.events.until(ModelLoaded, model=model)
    seen = len(agent.events.items)
    await schedulers.start()
    new = await agent.events.until(LeaderElected, seen)
    await answered(agent, "waits", "b")
    await commands.until(SwapIn, model="b", epoch=old.epoch)  # it did command
    words = f"epoch {old.epoch} is older than {new.epoch}"
    await agent.events.until(CommandRejected, model="b", reason=words)
    (completed,) = agent.events.all(SwapInCompleted, model="b")
    (obeyed,) = commands.all(SwapIn, model="b", epoch=new.epoch)
    assert completed.generation == obeyed.generation
    stop.set()
    await unaware


# -- the agents' part ------------------------------------------------------------------------


async def elect(agent: Agent, epoch: int) -> None:
    elected = LeaderElected("h", epoch, 0.0)
    bus = agent.watcher.bus
    await bus.publish(names.event_subject(kind_of(elected)), elected)
    await agent.events.until(LeaderElected, epoch=epoch)  # the agent has it, or will before us


async def test_agents_answer_a_new_leader_and_turn_away_older_ones(agent: Agent) -> None:
    await agent.events.until_true(lambda: bool(agent.events.items), "the agent to be up")
    seen = len(agent.statuses.items)
    await elect(agent, 7)
    await agent.statuses.until(AgentStatus, seen)  # nothing else happens here: it is the answer
    agent.epoch = 6
    generation = await agent.register("m")  # before any command of epoch 7
    rejected = await agent.events.until(CommandRejected, generation=generation)
    assert rejected.reason == "epoch 6 is older than 7"
    await elect(agent, 5)  # nor does an older leader come back
    agent.epoch = 7
    await agent.bring_in("m")


async def test_agents_that_were_not_there_learn_who_leads(nats_server: NatsServer) -> None:
    """One that starts, and one that was cut off from the bus, before it hears any command."""
    async with connected(nats_server, "admin", "agent", "scheduler", "api") as buses:
        watcher = Watcher(buses["admin"])
        leases = Bucket(buses["admin"], names.BUCKET_LEASES, LeaseRecord)
        await declare(buses["admin"])
        await leases.put(names.LEADER_KEY, LeaseRecord("h", epoch=9))
        await watcher.start()
        control = AgentControl(buses["agent"], GpuSettings(name=GPU, device="cpu"), "i1")
        agent = Agent(control, buses, watcher)
        await control.open()
        await buses["agent"].flush()  # it listens by now
        agent.epoch = 8
        generation = await agent.register("m")
        rejected = await agent.events.until(CommandRejected, generation=generation)
        assert rejected.reason == "epoch 8 is older than 9"

        await leases.put(names.LEADER_KEY, LeaseRecord("i", epoch=12))
        learnt = Log()
        buses["agent"].on_reconnect(lambda: learnt.add("the last hook"))
        await asyncio.to_thread(nats_server.restart)
        await learnt.until(str)
        await buses["agent"].flush()
        agent.epoch = 11
        generation = await agent.register("m")
        rejected = await agent.events.until(CommandRejected, generation=generation)
        assert rejected.reason == "epoch 11 is older than 12"
        await control.stop()
