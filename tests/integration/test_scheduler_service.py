"""The scheduler's service over a real nats-server, with a scripted agent."""

import asyncio
import itertools
import logging
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from schemas import names
from schemas.commands import Command, Load, SwapIn, SwapOut
from schemas.events import (
    DecisionMade,
    LeaderElected,
    RequestEnded,
    RequestWithdrawn,
    SwapOutCompleted,
    kind_of,
)
from schemas.requests import GenerateRequest, SamplingParams, TextPrompt
from schemas.state import DeploymentRecord, LeaseRecord, PlacementRecord, PredictedWait
from services import telemetry
from services.bus import Bucket, Bus, Message, WorkQueue
from services.ops.explain import read_decisions
from services.scheduler import service
from services.scheduler.decide import decide
from services.scheduler.inputs import Demand, Input
from services.scheduler.state import ClusterState
from services.settings import ModelSettings, SchedulerSettings, Settings, dump
from tests.integration.agent_kit import Log, Watcher, connected, eventually
from tests.integration.nats_process import NatsServer
from tests.integration.scripted_gpu import GPU, ScriptedGpu

TTL_S = 1
SETTINGS = Settings(
    scheduler=SchedulerSettings(lease_ttl_s=TTL_S, run_quantum_s=0.05, reconcile_s=0.2),
    models={"a": ModelSettings(source="/models/a"), "b": ModelSettings(source="/models/b")},
)


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Finished spans of this test alone: the global provider can be set only once."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "tracer", provider.get_tracer("test"))
    return exporter


class Cluster:
    """One scheduler in this process, one GPU, and an api's voice."""

    def __init__(self, nats: NatsServer, buses: dict[str, Bus], watcher: Watcher) -> None:
        self.nats = nats
        self.admin = buses["admin"]
        self.api = buses["api"]
        self.events = watcher.events
        self.gpu = ScriptedGpu(buses["agent"])
        self.queue = WorkQueue(buses["api"])
        self.sequence = 0  # of the last request in the queue
        self.stop = asyncio.Event()
        self.scheduler: asyncio.Task[None] | None = None

    def start_scheduler(self) -> None:
        options = self.nats.credentials["scheduler"]
        self.scheduler = asyncio.create_task(service.run(SETTINGS, options, stop=self.stop))

    async def are_loaded(self) -> None:
        for model in SETTINGS.models:
            await self.gpu.commands.until(Load, model=model)

    async def ask(self, name: str, model: str, tenant: str = "") -> trace.SpanContext:
        """Queue a request under a span of its own; returns that span's context."""
        outer = trace.SpanContext(
            trace_id=hash(name) % 2**128 or 1,
            span_id=7,
            is_remote=False,
            trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED),
        )
        now = time.time()
        request = GenerateRequest(
            name,
            model,
            "interactive",
            TextPrompt("x"),
            SamplingParams(seed=1),
            "_INBOX_api.none",
            now,
            now + 60,
            tenant,
        )
        with trace.use_span(trace.NonRecordingSpan(outer)):
            self.sequence = await self.queue.enqueue(request)
        return outer

    async def take_back(self, name: str, model: str) -> None:
        """Withdraw the request that was asked last, as an api does whose client left."""
        assert await self.queue.withdraw(self.sequence)
        event = RequestWithdrawn(model, name, time.time(), "client_left")
        await self.api.publish(names.event_subject(kind_of(event), model=model), event)

    async def leader(self, after: int = 0) -> LeaderElected:
        return await self.events.until(LeaderElected, after)


@pytest.fixture
async def cluster(nats_server: NatsServer, spans: InMemorySpanExporter) -> AsyncIterator[Cluster]:
    async with connected(nats_server, "admin", "agent", "api") as buses:
        watcher = Watcher(buses["admin"])
        await watcher.start()
        cluster = Cluster(nats_server, buses, watcher)
        await cluster.gpu.start()
        yield cluster
        cluster.stop.set()
        if cluster.scheduler and not cluster.scheduler.done():
            await asyncio.wait_for(cluster.scheduler, 15)
        await cluster.gpu.stop()


def records(bucket: Bucket[PlacementRecord]) -> Callable[[dict[str, str]], Awaitable[None]]:
    async def are(expected: dict[str, str]) -> None:
        async def check() -> bool:
            return {r.model: r.desired for r in (await bucket.items()).values()} == expected

        await eventually(check, f"placement {expected}")

    return are


async def test_demand_brings_a_model_in(cluster: Cluster, spans: InMemorySpanExporter) -> None:
    cluster.start_scheduler()
    await cluster.are_loaded()
    first = await cluster.ask("r1", "a")
    await cluster.events.until(RequestEnded, request_id="r1")
    second = await cluster.ask("r2", "b")
    await cluster.events.until(RequestEnded, request_id="r2")
    swaps = [m for m in cluster.gpu.messages if isinstance(m.body, SwapIn | SwapOut)]
    assert [(type(m.body), m.body.model, m.body.request_id) for m in swaps] == [  # type: ignore[union-attr]
        (SwapIn, "a", "r1"),
        (SwapOut, "a", "r2"),
        (SwapIn, "b", "r2"),
    ]

    async def both_ended() -> bool:
        return len(spans.get_finished_spans()) == 2

    await eventually(both_ended, "two spans")
    for outer, name, carried in ((first, "r1", swaps[:1]), (second, "r2", swaps[1:])):
        (span,) = [
            s
            for s in spans.get_finished_spans()
            if (s.attributes or {})["hotswap.request_id"] == name
        ]
        assert span.name == telemetry.SPAN_SWITCH
        assert span.parent is not None
        assert (span.parent.trace_id, span.parent.span_id) == (outer.trace_id, outer.span_id)
        assert span.attributes
        assert span.attributes["hotswap.model"] == {"r1": "a", "r2": "b"}[name]
        assert span.context is not None
        for message in carried:
            theirs = trace.get_current_span(message.context).get_span_context()
            assert (theirs.trace_id, theirs.span_id) == (
                span.context.trace_id,
                span.context.span_id,
            )


async def test_demand_says_who_it_is_for(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Demand | RequestEnded] = []
    states: list[ClusterState] = []

    def noting(state: ClusterState, event: Input, now: float) -> list[Command]:
        commands = decide(state, event, now)
        if isinstance(event, Demand | RequestEnded):
            told.append(event)
            states.append(state)
        return commands

    monkeypatch.setattr(service, "decide", noting)
    cluster.start_scheduler()
    await cluster.are_loaded()
    for name, tenant in (("r1", "2c70e12b7a0646f9"), ("r2", "")):
        await cluster.ask(name, "a", tenant)
        await cluster.events.until(RequestEnded, request_id=name)

    async def all_told() -> bool:
        return len(told) == 4

    await eventually(all_told, "two demands and two ends")
    assert {(type(event), event.request_id, event.tenant) for event in told} == {
        (kind, name, tenant)
        for kind in (Demand, RequestEnded)
        for name, tenant in (("r1", "2c70e12b7a0646f9"), ("r2", ""))
    }
    assert set(states[-1].shares.accounts) <= {"2c70e12b7a0646f9", ""}


async def test_decisions_are_kept_in_the_stream_with_their_reasons(
    cluster: Cluster, spans: InMemorySpanExporter
) -> None:
    cluster.start_scheduler()
    await cluster.are_loaded()
    await cluster.ask("r1", "a")
    await cluster.events.until(RequestEnded, request_id="r1")
    await cluster.ask("r2", "b")
    await cluster.events.until(RequestEnded, request_id="r2")
    await cluster.events.until(DecisionMade, model="b", action="swap_in")
    about_a = await read_decisions(cluster.admin, "a", 9, time.time())
    assert [(one.model, one.action) for one in about_a] == [
        ("a", "load"),
        ("a", "swap_in"),
        ("b", "evict"),
    ]
    evict = about_a[-1]
    assert (evict.gpu, evict.request_id, evict.urgency) == (GPU, "r2", "in_time")
    assert evict.reason == f"idle on {GPU}, and first to leave: a"
    assert [(victim.model, victim.how) for victim in evict.victims] == [("a", "idle")]
    assert [(one.gpu, one.victims) for one in evict.candidates] == [(GPU, ("a",))]
    assert evict.predicted_wait_s is not None  # the swap-in before has been measured
    assert evict.predicted_wait_s >= 0
    last = await read_decisions(cluster.admin, "b", 1, time.time())
    assert [(one.action, one.request_id) for one in last] == [("swap_in", "r2")]

    async def both_ended() -> bool:
        return len(spans.get_finished_spans()) == 2

    await eventually(both_ended, "two spans")
    _, switch = spans.get_finished_spans()
    assert switch.attributes
    found = {name: switch.attributes[f"hotswap.{name}"] for name in ("action", "reason", "victims")}
    assert found == {"action": "evict", "reason": evict.reason, "victims": "a (idle)"}
    assert (switch.attributes["hotswap.candidates"], switch.attributes["hotswap.urgency"]) == (
        1,
        "in_time",
    )
    assert switch.attributes["hotswap.predicted_wait_s"] == evict.predicted_wait_s
    assert [event.name for event in switch.events] == ["decision"]
    assert (switch.events[0].attributes or {})["hotswap.action"] == "swap_in"


async def test_who_waits_is_told_how_long_about_once_a_second(cluster: Cluster) -> None:
    told = Log()

    async def on_wait(message: Message[PredictedWait]) -> None:
        await told.add(message.body)

    await cluster.api.subscribe(names.wait_subject(), PredictedWait, on_wait)
    await cluster.api.flush()
    cluster.start_scheduler()
    await cluster.are_loaded()
    await cluster.ask("r1", "a")
    await cluster.events.until(RequestEnded, request_id="r1")
    cluster.gpu.is_stuck = True
    asked_at = time.time()
    seen = len(told.items)
    await cluster.ask("r2", "b")
    await told.until_true(lambda: len(told.all(PredictedWait, seen, model="b")) == 3, "three waits")
    waits = told.all(PredictedWait, seen, model="b")
    assert {(wait.num_waiters, wait.num_suspended) for wait in waits} == {(1, 0)}
    assert all(abs(wait.since - asked_at) < 1.0 for wait in waits)
    assert all(later.at - wait.at >= 1.0 for wait, later in itertools.pairwise(waits))
    await cluster.take_back("r2", "b")
    await cluster.events.until(SwapOutCompleted, model="b")


async def test_what_is_wanted_and_what_users_are_told(cluster: Cluster) -> None:
    cluster.start_scheduler()
    await cluster.are_loaded()
    await cluster.ask("r1", "a")
    await cluster.events.until(RequestEnded, request_id="r1")
    are = records(Bucket(cluster.admin, names.BUCKET_PLACEMENT, PlacementRecord))
    await are({"a": "resident", "b": "host"})
    deployments = Bucket(cluster.admin, names.BUCKET_MODELS, DeploymentRecord)

    async def are_ready() -> bool:
        found = {r.spec.name: r.status for r in (await deployments.items()).values()}
        return found == {"a": "ready", "b": "ready"}

    await eventually(are_ready, "ready deployments")


async def test_a_swap_in_that_nobody_waits_for_is_called_off(cluster: Cluster) -> None:
    cluster.start_scheduler()
    await cluster.are_loaded()
    cluster.gpu.is_stuck = True
    await cluster.ask("r1", "a")
    swap_in = await cluster.gpu.commands.until(SwapIn, model="a")
    assert 0 < swap_in.waiting_since <= swap_in.decided_at <= time.time()
    await cluster.take_back("r1", "a")
    called_off = await cluster.gpu.commands.until(SwapOut, model="a")
    assert called_off.generation == swap_in.generation + 1
    await cluster.events.until(SwapOutCompleted, model="a")
    cluster.gpu.is_stuck = False
    await cluster.ask("r2", "a")
    await cluster.events.until(RequestEnded, request_id="r2")


async def test_a_standby_takes_over_after_kill_9(cluster: Cluster, tmp_path: Path) -> None:
    config = tmp_path / "hotswap.toml"
    config.write_text(dump(SETTINGS))
    creds = cluster.nats.plan.credential_files["scheduler"]
    command = [sys.executable, "-m", "services.cli", "scheduler"]
    first = await asyncio.create_subprocess_exec(
        *command, "--config", str(config), "--creds", str(creds)
    )
    old = await cluster.leader()
    await cluster.are_loaded()
    await cluster.ask("r1", "a")
    await cluster.events.until(RequestEnded, request_id="r1")
    cluster.start_scheduler()
    seen = len(cluster.events.items)
    first.kill()
    killed_at = time.monotonic()
    new = await cluster.leader(seen)
    assert time.monotonic() - killed_at < TTL_S + 3
    assert new.epoch > old.epoch
    await cluster.ask("r2", "b")
    await cluster.events.until(RequestEnded, request_id="r2")
    assert cluster.gpu.commands.all(SwapIn, model="b")[0].epoch == new.epoch
    await first.wait()


async def has_stepped_down(caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> bool:
        return "stepping down" in caplog.text

    await eventually(check, "the leader to step down")


async def test_a_leader_that_lost_its_lease_stands_by(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.start_scheduler()
    await cluster.are_loaded()
    old = await cluster.leader()
    leases = Bucket(cluster.admin, names.BUCKET_LEASES, LeaseRecord)
    await leases.put(names.LEADER_KEY, LeaseRecord(holder="another"))
    await has_stepped_down(caplog)
    await cluster.ask("r1", "b")  # nobody's business now
    seen = len(cluster.events.items)
    await leases.delete(names.LEADER_KEY)
    new = await cluster.leader(seen)
    assert new.epoch > old.epoch
    assert new.holder != old.holder
    await cluster.events.until(RequestEnded, request_id="r1")
    assert [swap.epoch for swap in cluster.gpu.commands.all(SwapIn, model="b")] == [new.epoch]


async def test_a_leader_that_can_not_renew_steps_down(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.start_scheduler()
    await cluster.are_loaded()
    seen = len(cluster.events.items)
    await asyncio.to_thread(cluster.nats.kill)
    await has_stepped_down(caplog)
    await asyncio.to_thread(cluster.nats.start)
    await cluster.leader(seen)
    await cluster.ask("r1", "a")
    await cluster.events.until(RequestEnded, request_id="r1")


async def test_a_defect_in_decide_ends_the_process_with_its_story(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(state: ClusterState, event: Input, now: float) -> list[Command]:
        if isinstance(event, Demand):
            raise ZeroDivisionError("a defect")
        return decide(state, event, now)

    monkeypatch.setattr(service, "decide", broken)
    cluster.start_scheduler()
    await cluster.are_loaded()
    await cluster.ask("r1", "a")
    assert cluster.scheduler
    with caplog.at_level(logging.CRITICAL), pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(asyncio.shield(cluster.scheduler), 10)
    (record,) = [r for r in caplog.records if r.levelno == logging.CRITICAL]
    story = record.getMessage()
    assert '"request_id":"r1"' in story
    assert f"{GPU}/a: host" in story
    assert "--load-->" in story


async def test_stop_without_a_server(cluster: Cluster) -> None:
    cluster.start_scheduler()
    await cluster.leader()
    cluster.nats.kill()
    began = time.monotonic()
    cluster.stop.set()
    assert cluster.scheduler
    await cluster.scheduler
    waiting = asyncio.create_task(
        service.run(SETTINGS, cluster.nats.credentials["scheduler"], stop=(late := asyncio.Event()))
    )
    await asyncio.sleep(0)
    late.set()
    await waiting
    assert time.monotonic() - began < 5
    cluster.nats.start()

    async def are_connected() -> bool:
        return all(bus.is_connected for bus in (cluster.admin, cluster.api, cluster.gpu.bus))

    await eventually(are_connected, "the others to be connected again")
