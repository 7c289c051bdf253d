"""The agent's start, its lease, and its end, over a real nats-server and a fake worker."""

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from schemas import names
from schemas.events import AgentStarted, AgentStopped
from schemas.state import AgentStatus, LeaseRecord
from services.bus import Bucket, Bus, BusError, LeaseLost
from services.gpu_agent import service
from services.settings import GpuSettings, Settings
from tests.integration.agent_kit import GPU, Watcher, connected, eventually, use_fake_worker
from tests.integration.nats_process import NatsServer

FAKE_AGENT = Path(__file__).parent / "fake_agent.py"
LEASE_KEY = names.agent_lease_key(GPU)


class Running:
    """`service.run` in this process."""

    def __init__(self, nats: NatsServer, state_dir: Path) -> None:
        self.stop = asyncio.Event()
        self.task = asyncio.create_task(
            service.run(
                Settings(state_dir=str(state_dir)),
                GpuSettings(name=GPU),
                nats.credentials["agent"],
                stop=self.stop,
            )
        )

    async def end(self) -> None:
        self.stop.set()
        await asyncio.wait_for(self.task, 15)


Start = Callable[..., Running]


@pytest.fixture
async def start(
    nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Start]:
    use_fake_worker(monkeypatch)
    monkeypatch.setattr(service, "_TAKE_PATIENCE_S", 0.3)
    started: list[Running] = []

    def start(state_dir: Path = tmp_path / "state") -> Running:
        started.append(Running(nats_server, state_dir))
        return started[-1]

    yield start
    for running in started:
        running.stop.set()
    for running in started:
        with contextlib.suppress(BusError):
            await asyncio.wait_for(running.task, 15)
    assert not psutil.Process().children()[1:], "a worker outlived its agent"  # [0]: nats-server


@pytest.fixture
async def admin(nats_server: NatsServer) -> AsyncIterator[Bus]:
    async with connected(nats_server, "admin") as buses:
        yield buses["admin"]


@pytest.fixture
async def watcher(admin: Bus) -> Watcher:
    watcher = Watcher(admin)
    await watcher.start()
    return watcher


def leases(bus: Bus) -> Bucket[LeaseRecord]:
    return Bucket(bus, names.BUCKET_LEASES, LeaseRecord)


def workers() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if "fake_worker.py" in " ".join(child.cmdline())
    ]


async def test_an_orderly_life(start: Start, watcher: Watcher) -> None:
    agent = start()
    began = await watcher.events.until(AgentStarted)
    (worker,) = workers()
    await watcher.statuses.until(AgentStatus, instance=began.instance, worker_pid=worker.pid)
    lease = await leases(watcher.bus).get(LEASE_KEY)
    assert lease.value is not None
    assert lease.value.holder == began.instance
    await agent.end()
    stopped = await watcher.events.until(AgentStopped)
    assert stopped.instance == began.instance
    assert (await leases(watcher.bus).get(LEASE_KEY)).value is None
    assert workers() == []


async def test_two_agents_of_one_name(start: Start, watcher: Watcher, tmp_path: Path) -> None:
    first = start()
    began = await watcher.events.until(AgentStarted)
    with pytest.raises(BusError, match=r"another agent of this machine serves GPU 'gpu0'"):
        await start().task
    with pytest.raises(BusError, match=r"another agent serves GPU 'gpu0' already"):
        await start(tmp_path / "elsewhere").task  # as on another machine
    await first.end()
    assert {status.instance for status in watcher.statuses.items} == {began.instance}


async def test_the_worker_starts_while_the_lease_is_awaited(
    start: Start, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_TAKE_PATIENCE_S", 10.0)
    ours = start()
    await watcher.events.until(AgentStarted)
    await ours.end()  # the buckets exist now
    await leases(watcher.bus).put(LEASE_KEY, LeaseRecord(holder="another"))
    num_seen = len(watcher.statuses.items), len(watcher.events.items)
    start()

    async def has_worker() -> bool:
        return bool(workers())

    await eventually(has_worker, "a worker")
    await watcher.bus.flush()
    assert (len(watcher.statuses.items), len(watcher.events.items)) == num_seen
    await leases(watcher.bus).delete(LEASE_KEY)
    await watcher.events.until(AgentStarted, num_seen[1])


async def test_an_agent_that_was_replaced_falls_silent_and_ends(
    start: Start, watcher: Watcher
) -> None:
    agent = start()
    await watcher.events.until(AgentStarted)
    await leases(watcher.bus).put(LEASE_KEY, LeaseRecord(holder="another"))
    with pytest.raises(LeaseLost, match="GPU 'gpu0' was taken over by another agent"):
        await asyncio.wait_for(agent.task, 5)
    lease = await leases(watcher.bus).get(LEASE_KEY)
    assert lease.value == LeaseRecord(holder="another")  # left alone
    assert workers() == []


async def test_an_expired_lease_that_is_free_is_taken_again(start: Start, watcher: Watcher) -> None:
    start()
    began = await watcher.events.until(AgentStarted)
    await leases(watcher.bus).delete(LEASE_KEY)

    async def is_held() -> bool:
        return (await leases(watcher.bus).get(LEASE_KEY)).value is not None

    await eventually(is_held, "the lease")
    seen = len(watcher.statuses.items)
    await watcher.statuses.until(AgentStatus, seen, instance=began.instance)


async def test_stop_while_the_server_is_away(
    start: Start, watcher: Watcher, nats_server: NatsServer
) -> None:
    running = start()
    await watcher.events.until(AgentStarted)
    nats_server.kill()
    began = time.monotonic()
    waiting = start()  # finds no server
    await asyncio.sleep(0)
    await waiting.end()
    await running.end()
    assert time.monotonic() - began < 6
    nats_server.start()


async def test_after_kill_9_the_old_worker_is_gone_before_a_new_one_starts(
    start: Start,
    watcher: Watcher,
    nats_server: NatsServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service, "_TAKE_PATIENCE_S", 10.0)
    monkeypatch.setenv("FAKE_LINGER_S", "1.0")
    monkeypatch.setenv("FAKE_DIARY", str(tmp_path / "diary"))
    state, creds = tmp_path / "state", nats_server.plan.credential_files["agent"]
    old = await asyncio.create_subprocess_exec(sys.executable, FAKE_AGENT, creds, state)
    began = await watcher.events.until(AgentStarted)
    await watcher.statuses.until_true(
        lambda: watcher.statuses.items[-1].worker_pid > 0, "a status with the worker"
    )
    old_worker = watcher.statuses.items[-1].worker_pid
    old.kill()
    await old.wait()
    assert psutil.pid_exists(old_worker)  # it lingers
    start()
    anew = await watcher.events.until(AgentStarted, watcher.events.items.index(began) + 1)
    assert anew.instance != began.instance
    (new_worker,) = workers()
    assert (tmp_path / "diary").read_text().splitlines() == [
        f"{old_worker} begins",
        f"{old_worker} ends",
        f"{new_worker.pid} begins",
    ]
