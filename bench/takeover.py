"""Schedulers that are killed, with -9: how fast the next one leads, and that nothing is lost.

1. takeover   a leader and a standby, real processes; the leader is killed at a random moment. When
              does the standby lead, against the TTL counted from the dead leader's last renewal,
              and when does it command for a request that waits? (The agents are scripted.)
2. swaps      the whole system on the CPU device, three models of which one fits, requests for all
              of them all the time; the leader is killed in the middle of a swap, again and again.
              Every request ends once, no status has more bytes in use than there are, and in the
              end the leader believes what a fresh one would.
3. dead       no scheduler at all for a while: requests for the resident model go on.

``takeover``, ``swaps`` (with ``dead``) as an argument: only that part.
"""

import asyncio
import contextlib
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
from transformers import LlamaConfig

from bench._models import write, write_tokenizer
from bench._scheduler_rig import FakeAgents, Rig, Service, open_rig, status_of
from bench.harness import Bench
from schemas import names
from schemas.commands import SwapIn, SwapOut
from schemas.events import Event, LeaderElected, RequestEnded, RequestWithdrawn
from schemas.requests import GenerateRequest, SamplingParams, TextPrompt
from schemas.state import AgentStatus, LeaseRecord
from services.bus import Bucket, Entry, Message, WorkQueue
from services.demo.models import DemoModel
from services.ops.nats_server import free_port
from services.scheduler import service
from services.scheduler.decide import decide
from services.scheduler.inputs import DeploymentAdded, Input, QueueDepths
from services.scheduler.state import ClusterState
from services.settings import ApiSettings, GpuSettings, ModelSettings, SchedulerSettings, Settings

TTL_S = 1
LATE_AT_MOST_S = 0.05
ROUNDS, QUICK_ROUNDS = 20, 4
KILLS, QUICK_KILLS = 50, 5
DEAD_S, QUICK_DEAD_S = 60.0, 5.0
LAST_SWAPS = 6  # under the leader whose belief is looked at
NUM_CLIENTS = 3
MODELS = ("one", "two", "three")
QUIET_S = 3.0  # without a request: every swap has ended, every status has come

SCHEDULER = SchedulerSettings(lease_ttl_s=TTL_S, run_quantum_s=0.2, reconcile_s=0.5)


# -- 1. takeover -----------------------------------------------------------------------------


async def takeovers(bench: Bench, rounds: int) -> None:
    since_kill: list[float] = []
    late: list[float] = []
    to_command: list[float] = []
    async with open_rig() as rig:
        probes = [f"probe-{n}" for n in range(rounds)]
        models = {name: ModelSettings(source="/none", preload=False) for name in probes}
        settings = Settings(scheduler=SCHEDULER, models=models)
        agents = FakeAgents(rig.bus, [status_of("gpu0", [], probes, [], num_free=rounds)])
        await agents.start()
        renewed_at = 0.0

        async def on_lease(entry: Entry[LeaseRecord]) -> None:
            nonlocal renewed_at
            if entry.value:
                renewed_at = time.monotonic()

        await Bucket(rig.bus, names.BUCKET_LEASES, LeaseRecord).watch(
            on_lease, key=names.LEADER_KEY
        )
        queue = WorkQueue(rig.bus)
        leader = await rig.start("scheduler", settings)
        await rig.seen.until(LeaderElected)
        for probe in probes:
            standby = await rig.start("scheduler", settings)
            await standby.says("standing by")
            await asyncio.sleep(0.2 + random.random() * TTL_S / 2)
            killed_at = time.monotonic()
            await leader.kill()
            sequence = await queue.enqueue(request_for(probe))
            last_renewal = renewed_at
            elected_at, _ = await rig.seen.until(LeaderElected, killed_at)
            commanded_at, _ = await rig.seen.until(SwapIn, killed_at, model=probe)
            await queue.withdraw(sequence)
            since_kill.append(elected_at - killed_at)
            late.append(elected_at - last_renewal - TTL_S)
            to_command.append(commanded_at - elected_at)
            leader = standby
        await agents.end()
    bench.value("TTL of the lease", TTL_S, "s")
    bench.value("kill -> next leader, median", sorted(since_kill)[rounds // 2], "s")
    bench.value("kill -> next leader, worst", max(since_kill), "s")
    bench.value("last renewal + TTL -> next leader, median", sorted(late)[rounds // 2], "s")
    bench.value("next leader -> first command, median", sorted(to_command)[rounds // 2], "s")
    bench.value("next leader -> first command, worst", max(to_command), "s")
    bench.target(
        "last renewal + TTL -> next leader, worst", max(late), at_most=LATE_AT_MOST_S, unit="s"
    )
    bench.target(
        "kill -> next leader, over the TTL, worst",
        max(since_kill) - TTL_S,
        at_most=LATE_AT_MOST_S,
        unit="s",
    )


def request_for(model: str) -> GenerateRequest:
    now = time.time()
    return GenerateRequest(
        f"ask-{model}",
        model,
        "interactive",
        TextPrompt("x"),
        SamplingParams(seed=1),
        "_INBOX_api.none",
        now,
        now + 60,
    )


# -- 2. swaps --------------------------------------------------------------------------------


def write_models(folder: Path) -> dict[str, ModelSettings]:
    """Three Llamas of about 38 MB."""
    out = {}
    for seed, name in enumerate(MODELS):
        config = LlamaConfig(
            vocab_size=2048,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=8,
            num_attention_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            architectures=["LlamaForCausalLM"],
            dtype="float32",
        )
        spec = write(DemoModel(name, seed, config), folder)
        write_tokenizer(Path(spec.source))
        out[name] = ModelSettings(source=spec.source, kv_tokens=spec.kv_tokens)
    return out


class Watch:
    """What the bus says about requests, bytes and who leads."""

    def __init__(self) -> None:
        self.ends: Counter[str] = Counter()
        self.num_over_budget = 0
        self.num_statuses = 0
        self.statuses: dict[str, AgentStatus] = {}

    async def start(self, rig: Rig) -> None:
        async def on_event(message: Message[Event]) -> None:
            if isinstance(message.body, RequestEnded | RequestWithdrawn):
                self.ends[message.body.request_id] += 1

        async def on_status(message: Message[AgentStatus]) -> None:
            status = self.statuses[message.body.gpu] = message.body
            self.num_statuses += 1
            self.num_over_budget += status.used_bytes > status.budget_bytes

        await rig.bus.subscribe(names.events_subject(), Event, on_event)
        await rig.bus.subscribe(names.status_subject(), AgentStatus, on_status)
        await rig.bus.flush()

    def resident(self) -> list[str]:
        statuses = self.statuses.values()
        return [r.model for s in statuses for r in s.replicas if r.state == "resident"]


class Clients:
    """Requests over HTTP; every one is counted by how it ended."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.outcomes: Counter[str] = Counter()
        self.slowest_s = 0.0

    async def ask(self, client: httpx.AsyncClient, model: str) -> str:
        body = {"model": model, "prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0}
        began = time.monotonic()
        try:
            answer = await client.post(f"{self.url}/v1/completions", json=body)
            outcome = str(answer.status_code)
            if answer.status_code != 200 and not self.outcomes[outcome]:
                print(f"{model}: {outcome} {answer.text[:300]}", file=sys.stderr)
        except httpx.HTTPError as error:
            outcome = type(error).__name__
        self.slowest_s = max(self.slowest_s, time.monotonic() - began)
        self.outcomes[outcome] += 1
        return outcome

    @contextlib.asynccontextmanager
    async def keep_asking(self) -> AsyncIterator[None]:
        """All models, all the time; in the end waits for what is under way."""
        stop = asyncio.Event()

        async def one(seed: int) -> None:
            order = random.Random(seed)
            async with httpx.AsyncClient(timeout=120) as client:
                while not stop.is_set():
                    await self.ask(client, order.choice(MODELS))
                    await asyncio.sleep(order.random() * 0.1)

        async with asyncio.TaskGroup() as group:
            for seed in range(NUM_CLIENTS):
                group.create_task(one(seed))
            yield
            stop.set()


class KeptLeader(service.Leader):
    """One whose state can be looked at."""

    state_of_last: ClusterState

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        KeptLeader.state_of_last = self.state


async def swaps(bench: Bench, kills: int, dead_s: float) -> None:
    async with open_rig() as rig:
        models = await asyncio.to_thread(write_models, rig.folder / "models")
        settings = Settings(
            state_dir=str(rig.folder / "state"),
            api=ApiSettings(port=free_port(0)),
            gpus=(GpuSettings(name="cpu0", device="cpu", memory="60MiB"),),
            scheduler=SCHEDULER,
            models=models,
        )
        watch, clients = Watch(), Clients(f"http://127.0.0.1:{settings.api.port}")
        await watch.start(rig)
        await rig.start("agent", settings)
        await rig.start("api", settings)
        schedulers = [await rig.start("scheduler", settings) for _ in range(2)]
        await ready(clients, watch)
        async with clients.keep_asking():
            for number in range(kills):
                await kill_in_a_swap(rig, schedulers)
                schedulers.append(await rig.start("scheduler", settings))
                if sys.stderr.isatty():
                    print(f"\rkill {number + 1} of {kills}", end="", file=sys.stderr)
        busy = clients.outcomes.copy()

        for scheduler in schedulers:
            await scheduler.kill()
        warm = await requests_without_a_scheduler(clients, watch, dead_s)

        difference = await last_leader(rig, settings, clients)
        doubled = sum(count > 1 for count in watch.ends.values())
        total = clients.outcomes.total()
        bench.value("requests while leaders were killed", busy.total())
        bench.value("warm requests without a scheduler", warm.total())
        bench.value("slowest request", clients.slowest_s, "s")
        bench.value("statuses", watch.num_statuses)
        bench.target("leaders killed in a swap", kills, at_least=kills)
        bench.target("requests that failed", total - clients.outcomes["200"], at_most=0)
        bench.target("requests without an end", total - len(watch.ends), at_most=0)
        bench.target("requests with two ends", doubled, at_most=0)
        bench.target("statuses over the budget", watch.num_over_budget, at_most=0)
        bench.target("differences from a fresh belief", len(difference), at_most=0)
        bench.target("failed warm requests", warm.total() - warm["200"], at_most=0)
        for line in difference:
            print(line, file=sys.stderr)


async def ready(clients: Clients, watch: Watch) -> None:
    async with httpx.AsyncClient(timeout=120) as client:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get(f"{clients.url}/readyz")).status_code == 200:
                    break
            await asyncio.sleep(0.1)
        for model in MODELS:
            await clients.ask(client, model)


async def kill_in_a_swap(rig: Rig, schedulers: list[Service]) -> None:
    """Wait for the leader's next swap, and a little; then kill it, and wait for the next one."""
    _, command = await rig.seen.until(random.choice((SwapIn, SwapOut)), time.monotonic())
    assert isinstance(command, SwapIn | SwapOut)
    await asyncio.sleep(random.random() * 0.02)
    leader = next(s for s in schedulers if f"leading, epoch {command.epoch}" in s.log())
    killed_at = time.monotonic()
    await leader.kill()
    schedulers.remove(leader)
    await rig.seen.until(LeaderElected, killed_at)


async def requests_without_a_scheduler(
    clients: Clients, watch: Watch, dead_s: float
) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    until = time.monotonic() + dead_s
    async with httpx.AsyncClient(timeout=120) as client:
        await asyncio.sleep(TTL_S)  # the last heartbeats, of what the dead leader commanded
        (model, *_) = watch.resident()
        while time.monotonic() < until:
            outcomes[await clients.ask(client, model)] += 1
    return outcomes


async def last_leader(rig: Rig, settings: Settings, clients: Clients) -> list[str]:
    """Lead for some swaps in this process; how the belief differs from a fresh one, then."""
    service.Leader = KeptLeader  # type: ignore[misc,assignment]
    stop = asyncio.Event()
    options = rig.plan.credentials["scheduler"]
    leading = asyncio.create_task(service.run(settings, options, stop=stop))
    async with clients.keep_asking():
        for _ in range(LAST_SWAPS):
            await rig.seen.until(SwapIn, time.monotonic())
    await asyncio.sleep(QUIET_S)
    fresh = ClusterState(1, KeptLeader.state_of_last.config)
    statuses: dict[str, AgentStatus] = {}
    heard = asyncio.Event()

    async def on_status(message: Message[AgentStatus]) -> None:
        statuses[message.body.gpu] = message.body
        heard.set()

    undo = await rig.bus.subscribe(names.status_subject(), AgentStatus, on_status)
    await heard.wait()
    await undo()
    now = time.time()
    inputs: list[Input] = [DeploymentAdded(spec) for spec in settings.model_specs()]
    inputs += statuses.values()
    inputs.append(QueueDepths(*await WorkQueue(rig.bus).depths()))
    for one in inputs:
        decide(fresh, one, now)
    kept = KeptLeader.state_of_last
    kept.validate()
    difference = [
        f"{what}: the leader has {belief(kept).get(what)}, a fresh one {belief(fresh).get(what)}"
        for what in sorted(belief(kept).keys() | belief(fresh).keys())
        if belief(kept).get(what) != belief(fresh).get(what)
    ]
    stop.set()
    await leading
    return difference


def belief(state: ClusterState) -> dict[str, str]:
    """Where each model is, and who waits, in words."""
    out = {
        f"{agent.gpu}/{replica.model}": f"{replica.state}, {replica.in_flight} in flight"
        for agent in state.agents.values()
        for replica in agent.replicas.values()
    }
    return out | {f"waiting for {model}": f"{len(line)}" for model, line in state.waiting.items()}


def main(argv: list[str]) -> int:
    parts = {"takeover", "swaps"} & set(argv) or {"takeover", "swaps"}
    options = [arg for arg in argv if arg not in ("takeover", "swaps")]
    bench = Bench("takeover", "schedulers that are killed", options, rounds=ROUNDS)
    if "takeover" in parts:
        asyncio.run(takeovers(bench, QUICK_ROUNDS if bench.quick else bench.rounds))
    if "swaps" in parts:
        how = (QUICK_KILLS, QUICK_DEAD_S) if bench.quick else (KILLS, DEAD_S)
        asyncio.run(swaps(bench, *how))
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
