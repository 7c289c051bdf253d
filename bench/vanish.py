"""Clients that vanish: a thousand streams, half of them cut off in the middle, again and again.

    python -m bench.vanish [--quick] [--json FILE]

One api process with API keys on, a nats-server, and a fake agent that decodes all streams in step.
In each round all clients stream, half of them are gone at once (their sockets are reset), the
agent counts what it still computes for them, and the other half reads to the end. Then the api must
hold what it held before: file descriptors, NATS subscriptions (inboxes), queued requests, memory.
The first rounds warm up: what they leave (allocators, caches) is the baseline of the others.

Then some clients stall: they stream, and read nothing more. The agent goes on with tokens a
thousand times longer than usual, until each of them has been cut off. What the api keeps for one
of them is the text of its answer (to go on elsewhere, if need be) and what it has not read.
"""

import asyncio
import contextlib
import gc
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import httpx
import psutil

from bench._scheduler_rig import Rig, open_rig
from bench._vanish_rig import TEXT, Agent, Client, Held, held
from bench.harness import Bench
from schemas import names
from schemas.keys import KeyRecord
from services.bus import Bucket
from services.keys import make
from services.ops.nats_server import free_port
from services.settings import ApiSettings, Settings

NUM_CLIENTS, QUICK_CLIENTS = 1000, 200
ROUNDS, QUICK_ROUNDS = 5, 2
WARM_UP, QUICK_WARM_UP = 1, 3  # rounds: what is remembered of the last 2,048 requests is full then
STEP_S = 0.5  # of the fake agent, for all its streams; one stream alone would take a tenth
MORE_STEPS = 4  # for those who stay
CONNECT_AT_ONCE = 50
SETTLE_S = 20.0
AT_REST_S = 4.0
PATIENCE_S = 300.0  # on a busy machine
MOST_GROWTH = 1.05  # of memory, over the rounds after those that warm up
NUM_STALLED, QUICK_STALLED = 50, 20
STALL_STEP_S = 0.025
STALL_TEXT = "word " * 1600  # so that the buffers of the kernel are full in a moment
STALL_TIMEOUT_S = 2.0  # api.write_timeout_s
MOST_PER_STALLED = 5.0  # MB


class Round:
    """One round, and what came of it."""

    def __init__(self, num_clients: int) -> None:
        self.num_clients = num_clients
        self.cancel_s: list[float] = []  # from a reset to the agent's cancellation
        self.late_tokens: list[int] = []  # computed for somebody who had gone
        self.num_whole = 0
        self.num_uncancelled = 0
        self.peak_rss = 0

    async def run(self, agent: Agent, port: int, key: str, process: psutil.Process) -> None:
        agent.length = None
        clients = [Client(port, key) for _ in range(self.num_clients)]
        for i in range(0, len(clients), CONNECT_AT_ONCE):
            await asyncio.gather(*(c.begin() for c in clients[i : i + CONNECT_AT_ONCE]))
        leaving, staying = clients[::2], clients[1::2]
        reading = [asyncio.create_task(client.finish()) for client in staying]
        await _steps(agent, 2)
        self.peak_rss = process.memory_info().rss
        gone_at = {}
        for client in leaving:
            agent.tokens_after[client.request_id] = 0
            gone_at[client.request_id] = time.monotonic()
            client.vanish()
        await _until(lambda: gone_at.keys() <= agent.cancelled_at.keys())
        await _steps(agent, 2)
        for request_id, at in gone_at.items():
            self.late_tokens.append(agent.tokens_after.pop(request_id))
            if cancelled_at := agent.cancelled_at.pop(request_id, None):
                self.cancel_s.append(cancelled_at - at)
            else:
                self.num_uncancelled += 1
        rows = agent.rows.values()
        agent.length = max((row.num_tokens for row in rows), default=0) + MORE_STEPS
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*reading)
        self.num_whole = sum(c.text == TEXT * agent.length for c in staying)


async def _steps(agent: Agent, num: int) -> None:
    """Until so many more have been finished."""
    goal = agent.num_steps + num
    await _until(lambda: agent.num_steps >= goal, PATIENCE_S)


async def _until(condition: Callable[[], bool], patience_s: float = SETTLE_S) -> None:
    """Returns after ``patience_s`` all the same: what is missing then is counted."""
    give_up_at = time.monotonic() + patience_s
    while True:
        if condition() or time.monotonic() > give_up_at:
            return
        await asyncio.sleep(0.01)


async def vanish(bench: Bench) -> None:
    num_clients = QUICK_CLIENTS if bench.quick else NUM_CLIENTS
    num_rounds = QUICK_ROUNDS if bench.quick else bench.rounds
    warm_up = QUICK_WARM_UP if bench.quick else WARM_UP
    _allow_files(2 * num_clients + 200)
    async with open_rig() as rig:
        port, key, process = await _start(rig)
        http_port = int(_monitoring(rig))
        agent = Agent(rig.bus, STEP_S)
        await agent.start()
        await _ready(port)
        rounds: list[Round] = []
        after: list[Held] = []
        fresh = await _at_rest(rig, process, http_port)
        for number in range(warm_up + num_rounds):
            now = Round(num_clients)
            await now.run(agent, port, key, process)
            goal = after[0] if after else fresh
            after.append(await _settled(rig, process, http_port, goal))
            rounds.append(now)
            if sys.stderr.isatty():
                print(f"\rround {number + 1} of {warm_up + num_rounds}", end="", file=sys.stderr)
        _report(bench, fresh, rounds, after[warm_up - 1 :])
        await stall(bench, agent, port, key, process)
        end = await _settled(rig, process, http_port, fresh)
        left = end.num_fds - fresh.num_fds + end.num_subscriptions - fresh.num_subscriptions
        bench.target("left of stalled clients", left + end.num_requests, at_most=0)
        await agent.stop()


async def stall(bench: Bench, agent: Agent, port: int, key: str, process: psutil.Process) -> None:
    """Clients that stop reading, and what the api keeps for them until they are cut off."""
    num = QUICK_STALLED if bench.quick else NUM_STALLED
    agent.length, agent.step_s = None, STALL_STEP_S
    clients = [Client(port, key, window=4096) for _ in range(num)]
    await asyncio.gather(*(client.begin() for client in clients))
    before, peak = process.memory_info().rss, 0
    agent.text = STALL_TEXT
    open_ids = {client.request_id for client in clients}

    def all_cut_off() -> bool:
        nonlocal peak
        peak = max(peak, process.memory_info().rss)
        return open_ids <= agent.cancelled_at.keys()

    began_at = time.monotonic()
    await _until(all_cut_off, PATIENCE_S)
    bench.value("clients that stall", num)
    bench.value("until the last of them was cut off", time.monotonic() - began_at, "s")
    bench.target("stalled clients that were not cut off", len(agent.rows), at_most=0)
    each = max(0, peak - before) / 1e6 / num
    bench.target("memory kept for each at most", each, at_most=MOST_PER_STALLED, unit="MB")
    for client in clients:
        client.vanish()


async def _start(rig: Rig) -> tuple[int, str, psutil.Process]:
    """An api that asks for keys; its port, a key, its process."""
    key, record = make("bench")
    await Bucket(rig.bus, names.BUCKET_KEYS, KeyRecord).put(record.id, record)
    port = free_port(0)
    api = ApiSettings(port=port, auth="on", write_timeout_s=STALL_TIMEOUT_S)
    settings = Settings(state_dir=str(rig.folder / "state"), api=api)
    service = await rig.start("api", settings)
    return port, key, psutil.Process(service.process.pid)


def _monitoring(rig: Rig) -> str:
    text = rig.plan.config_file.read_text()
    return text.partition('http: "')[2].partition('"')[0].rpartition(":")[2]


async def _ready(port: int) -> None:
    async with httpx.AsyncClient(timeout=10) as client, asyncio.timeout(60):
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get(f"http://127.0.0.1:{port}/readyz")).status_code == 200:
                    return
            await asyncio.sleep(0.1)


async def _at_rest(rig: Rig, process: psutil.Process, http_port: int) -> Held:
    """What the api holds once it has started all that it starts."""
    last = await held(rig.bus, process, http_port)
    while True:
        await asyncio.sleep(AT_REST_S)
        now = await held(rig.bus, process, http_port)
        if replace(now, rss=0) == replace(last, rss=0):
            return now
        last = now


async def _settled(rig: Rig, process: psutil.Process, http_port: int, goal: Held) -> Held:
    """What the api holds once it is back at ``goal`` but for memory, or after `SETTLE_S`."""
    gc.collect()  # our own sockets
    give_up_at = time.monotonic() + SETTLE_S
    while True:
        now = await held(rig.bus, process, http_port)
        if replace(now, rss=0) == replace(goal, rss=0) or time.monotonic() > give_up_at:
            return now
        await asyncio.sleep(0.1)


def _report(bench: Bench, fresh: Held, rounds: list[Round], after: list[Held]) -> None:
    cancel_s = sorted(s for one in rounds for s in one.cancel_s)
    late = [n for one in rounds for n in one.late_tokens]
    last, first = after[-1], after[0]
    half = rounds[0].num_clients // 2
    bench.value("clients per round", rounds[0].num_clients)
    bench.value("rounds after the first ones", len(after) - 1)
    bench.value("decode step of the agent", STEP_S, "s")
    if cancel_s:
        bench.value("reset -> cancelled at the agent, median", cancel_s[len(cancel_s) // 2], "s")
        bench.value("reset -> cancelled at the agent, slowest", cancel_s[-1], "s")
    bench.value("tokens computed for nobody, mean per client", sum(late) / max(1, len(late)))
    bench.value("memory before the first client", fresh.rss / 1e6, "MB")
    bench.value("memory with all streams open", max(r.peak_rss for r in rounds) / 1e6, "MB")
    bench.value("memory after warming up", first.rss / 1e6, "MB")
    bench.value("memory after the last round", last.rss / 1e6, "MB")
    bench.target(
        "streams that were not cancelled", sum(r.num_uncancelled for r in rounds), at_most=0
    )
    bench.target("most tokens computed for one that left", max(late, default=0), at_most=1)
    broken = sum(half - one.num_whole for one in rounds)
    bench.target("streams of the others that were not whole", broken, at_most=0)
    bench.target("file descriptors left open", last.num_fds - fresh.num_fds, at_most=0)
    subscriptions = last.num_subscriptions - fresh.num_subscriptions
    bench.target("subscriptions left", subscriptions, at_most=0)
    bench.target("requests left in the queue", last.num_requests, at_most=0)
    bench.target(
        "memory after the last round over after warming up",
        last.rss / first.rss,
        at_most=MOST_GROWTH,
        unit="x",
    )


def _allow_files(num: int) -> None:
    """So many open files, for us and what we start."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < num:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(num, hard), hard))


def main(argv: list[str]) -> int:
    bench = Bench("vanish", "clients that vanish in mid-stream", argv, rounds=ROUNDS)
    asyncio.run(vanish(bench))
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
