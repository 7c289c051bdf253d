"""The scheduler as a process: bus -> decide -> bus, under a lease.

    demand, events, statuses, leases, timers --> one queue --> decide(state, input, now)
                                                                |- commands to the agents
                                                                |- HS_PLACEMENT: what is wanted
                                                                `- HS_MODELS: what users are told

Everything `decide` is told goes through that one queue, so the order in which it was told
is the order in which it decided. A leader that loses its lease ends; the supervisor's next
start, or a standby, begins from an empty state and learns it from heartbeats and the queue.
"""

import asyncio
import logging
import os
import time
from datetime import datetime

from schemas import names
from schemas.commands import Command
from schemas.events import Event, LeaderElected, kind_of
from schemas.state import AgentStatus, DeploymentRecord, LeaseRecord, PlacementRecord
from services.bus import (
    Bucket,
    Bus,
    BusError,
    BusOptions,
    Entry,
    Lease,
    LeaseLost,
    Message,
    WorkQueue,
    Writer,
    declare,
)
from services.bus.connection import RawMessage
from services.scheduler.decide import decide
from services.scheduler.inputs import AgentLost, Demand, DeploymentAdded, Input, QueueDepths, Tick
from services.scheduler.spans import SwitchSpans
from services.scheduler.state import ClusterState, PolicyConfig
from services.settings import Settings

log = logging.getLogger(__name__)

TICK_S = 0.2
STANDBY_POLL_S = 0.05

_DESIRED = {"Register": "cold", "Load": "host", "SwapIn": "resident", "SwapOut": "host"}


async def run(settings: Settings, options: BusOptions, *, stop: asyncio.Event) -> None:
    """Stand by, lead, until ``stop`` is set. Raises LeaseLost where another one took over."""
    bus = await Bus.connect(options, service="scheduler")
    await declare(bus, settings.api.max_queued_per_model)
    holder = os.urandom(6).hex()
    lease = Lease(bus, names.LEADER_KEY, holder, settings.scheduler.lease_ttl_s)
    try:
        if not await _acquire(lease, stop):
            return
        log.info("leading, epoch %d", lease.epoch)
        leader = Leader(bus, settings, lease.epoch)
        elected = LeaderElected(holder, lease.epoch, time.time())
        await bus.publish(names.event_subject(kind_of(elected)), elected)
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(job)
                for job in (_renew(lease), leader.run(), leader.tick(), leader.reconcile())
            ]
            running += [tasks.create_task(writer.run()) for writer in leader.writers]
            await stop.wait()
            for task in running:
                task.cancel()
    finally:
        if lease.epoch:
            await lease.release()
        await bus.close()


async def _acquire(lease: Lease, stop: asyncio.Event) -> bool:
    """Poll until the lease is ours; False where ``stop`` came first."""
    told = False
    while not stop.is_set():
        try:
            if await lease.try_acquire():
                return True
        except BusError as error:
            log.warning("standing by: %s", error)
        if not told:
            log.info("standing by: another scheduler leads, or led until just now")
            told = True
        await asyncio.sleep(STANDBY_POLL_S)
    return False


async def _renew(lease: Lease) -> None:
    while True:
        await asyncio.sleep(lease.ttl_s / 4)
        try:
            await lease.renew()
        except LeaseLost:
            # The server was away for longer than the TTL and came back without the lease: if
            # nobody else took it we still lead, under the epoch that our commands carry.
            epoch = lease.epoch
            if not await lease.try_acquire():
                raise
            lease.epoch = epoch
        except BusError as error:
            log.warning("lease not renewed: %s", error)


class Leader:
    """Owns the cluster state. Handlers only put inputs into the queue; `run` decides."""

    def __init__(self, bus: Bus, settings: Settings, epoch: int) -> None:
        config = PolicyConfig(
            run_quantum_s=settings.scheduler.run_quantum_s,
            retry_s=settings.scheduler.retry_failed_s,
        )
        self.state = ClusterState(epoch, config)
        self._bus = bus
        self._settings = settings
        self._inputs: asyncio.Queue[Input] = asyncio.Queue()
        self._spans = SwitchSpans()
        self._models = Writer(Bucket(bus, names.BUCKET_MODELS, DeploymentRecord))
        self._placement = Writer(Bucket(bus, names.BUCKET_PLACEMENT, PlacementRecord))
        self._published: dict[str, DeploymentRecord] = {}
        self._created_at = int(time.time())

    @property
    def writers(self) -> tuple[Writer[DeploymentRecord], Writer[PlacementRecord]]:
        return self._models, self._placement

    async def run(self) -> None:
        """Listen, and decide for ever."""
        await self._forget_removed_models()
        for spec in self._settings.model_specs():
            self._inputs.put_nowait(DeploymentAdded(spec))
        await self._bus.subscribe_raw(names.demand_subject(), self._on_demand)
        await self._bus.subscribe(f"{names.PREFIX}.events.>", Event, self._on_event)
        await self._bus.subscribe(names.status_subject(), AgentStatus, self._on_status)
        leases = Bucket(self._bus, names.BUCKET_LEASES, LeaseRecord)
        await leases.watch(self._on_lease)
        while True:
            event = await self._inputs.get()
            now = time.time()
            for command in decide(self.state, event, now):
                await self._execute(command, now)
            self._spans.observe(event, now)
            self._publish_deployments()

    async def tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._inputs.put_nowait(Tick())

    async def reconcile(self) -> None:
        """Compare the demand we believe in with what the queue really holds, for ever."""
        queue = WorkQueue(self._bus)
        while True:
            try:
                depths, at = await queue.depths()
                self._inputs.put_nowait(QueueDepths(depths, at))
            except BusError as error:
                log.warning("queue depths unknown: %s", error)
            await asyncio.sleep(self._settings.scheduler.reconcile_s)

    # -- in ------------------------------------------------------------------------------

    async def _on_event(self, message: Message[Event]) -> None:
        self._inputs.put_nowait(message.body)

    async def _on_demand(self, raw: RawMessage) -> None:
        _, _, _, klass, token = raw.subject.split(".")
        stamp = raw.headers.get("Nats-Time-Stamp")
        demand = Demand(
            request_id=raw.headers.get("Nats-Msg-Id", raw.headers.get("Nats-Sequence", "")),
            model=names.unescape(token),
            klass="batch" if klass == "batch" else "interactive",
            at=datetime.fromisoformat(stamp).timestamp() if stamp else time.time(),
        )
        self._spans.remember(demand.request_id, raw.headers)
        self._inputs.put_nowait(demand)

    async def _on_status(self, message: Message[AgentStatus]) -> None:
        self._inputs.put_nowait(message.body)

    async def _on_lease(self, entry: Entry[LeaseRecord]) -> None:
        kind, _, token = entry.key.partition(".")
        if kind == "agent" and entry.value is None:
            self._inputs.put_nowait(AgentLost(names.unescape(token)))

    # -- out -----------------------------------------------------------------------------

    async def _execute(self, command: Command, now: float) -> None:
        kind = type(command).__name__
        log.info(
            "%s %s on %s (generation %d)", kind, command.model, command.gpu, command.generation
        )
        with self._spans.around(command, now):
            await self._bus.publish(names.command_subject(command.gpu), command)
        record = PlacementRecord(
            gpu=command.gpu,
            model=command.model,
            desired=_DESIRED[kind],  # type: ignore[arg-type]
            generation=command.generation,
            epoch=command.epoch,
        )
        self._placement.put(names.replica_key(command.gpu, command.model), record)

    def _publish_deployments(self) -> None:
        """Write every deployment whose record changed."""
        for name, spec in self.state.deployments.items():
            view = self.state.deployment_view(name)
            record = DeploymentRecord(spec, view.status, view.reason, view.facts, self._created_at)
            if self._published.get(name) != record:
                self._published[name] = record
                self._models.put(names.escape(name), record)

    async def _forget_removed_models(self) -> None:
        """Records of models that the configuration no longer names."""
        bucket = Bucket(self._bus, names.BUCKET_MODELS, DeploymentRecord)
        for key, record in (await bucket.items()).items():
            if record.spec.name not in self._settings.models:
                await bucket.delete(key)
            else:
                self._created_at = min(self._created_at, record.created_at or self._created_at)
