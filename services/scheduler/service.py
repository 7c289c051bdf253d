"""The scheduler as a process: bus -> decide -> bus, under a lease.

    demand, events, statuses, leases, timers --> one queue --> decide(state, input, now)
                                                                |- commands to the agents
                                                                |- HS_PLACEMENT: what is wanted
                                                                `- HS_MODELS: what users are told

Everything `decide` is told goes through that one queue, so the order in which it was told
is the order in which it decided. A leader that can not renew its lease in time steps down and
stands by again: whoever leads next, under a higher epoch, begins from an empty state and
learns it from heartbeats and the queue. A defect in `decide` ends the process, with the story
in the log; the supervisor's next start begins afresh.
"""

import asyncio
import logging
import os
import time
from collections import deque
from datetime import datetime

import msgspec

from schemas import names
from schemas.commands import Command
from schemas.events import DeploymentFailed, Event, LeaderElected, kind_of
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
from services.bus.connection import Hook, RawMessage
from services.jobs import unless_set, until_first_ends
from services.scheduler.decide import decide
from services.scheduler.inputs import AgentLost, Demand, DeploymentAdded, Input, QueueDepths, Tick
from services.scheduler.spans import SwitchSpans
from services.scheduler.state import ClusterState, PolicyConfig
from services.settings import Settings

log = logging.getLogger(__name__)

TICK_S = 0.2
STANDBY_POLL_S = 0.05
_STANDBY_RETRY_S = 0.5  # where the server does not answer
_NUM_REMEMBERED = 50  # inputs, for the story when `decide` fails


async def run(settings: Settings, options: BusOptions, *, stop: asyncio.Event) -> None:
    """Stand by, lead, stand by again where the lease is lost, until ``stop`` is set."""
    bus = await unless_set(stop, Bus.connect(options, service="scheduler"))
    if bus is None:
        return
    try:
        await unless_set(stop, declare(bus, settings.api.max_queued_per_model))
        while not stop.is_set():
            # A holder of its own each time, or a lease we lost would look like ours.
            holder = os.urandom(6).hex()
            lease = Lease(bus, names.LEADER_KEY, holder, settings.scheduler.lease_ttl_s)
            renewed_at = await unless_set(stop, _acquire(lease))
            if renewed_at is None:
                break
            try:
                await _lead(bus, settings, lease, renewed_at, stop)
            except LeaseLost as error:
                log.error("stepping down: %s", error)
            finally:
                if bus.is_connected:
                    await lease.release()
    finally:
        await bus.close()


async def _acquire(lease: Lease) -> float:
    """Wait until the lease is ours; returns since when at least (by the monotonic clock)."""
    told = False
    while True:
        asked_at = time.monotonic()
        try:
            if await lease.try_acquire():
                return asked_at
        except BusError as error:
            log.warning("standing by: %s", error)
            await asyncio.sleep(_STANDBY_RETRY_S)
        if not told:
            log.info("standing by: another scheduler leads, or led until just now")
            told = True
        await asyncio.sleep(STANDBY_POLL_S)


async def _lead(
    bus: Bus, settings: Settings, lease: Lease, renewed_at: float, stop: asyncio.Event
) -> None:
    """Lead until ``stop`` is set. Raises LeaseLost."""
    log.info("leading, epoch %d", lease.epoch)
    leader = Leader(bus, settings, lease.epoch)
    elected = LeaderElected(lease.holder, lease.epoch, time.time())
    try:
        await bus.publish(names.event_subject(kind_of(elected)), elected)
        await until_first_ends(
            stop.wait(),
            _renew(lease, renewed_at),
            leader.run(),
            leader.tick(),
            leader.reconcile(),
            *(writer.run() for writer in leader.writers),
        )
    finally:
        await leader.close()


async def _renew(lease: Lease, renewed_at: float) -> None:
    """Renew for ever. Raises LeaseLost as soon as somebody else may have the lease."""
    valid_until = renewed_at + lease.ttl_s
    while True:
        await asyncio.sleep(lease.ttl_s / 4)
        asked_at = time.monotonic()
        try:
            await asyncio.wait_for(lease.renew(), valid_until - asked_at)
            valid_until = asked_at + lease.ttl_s
        except LeaseLost:
            raise
        except (BusError, TimeoutError) as error:
            if time.monotonic() >= valid_until:
                raise LeaseLost(
                    f"lease {lease.key} could not be renewed for {lease.ttl_s} s"
                ) from error
            log.warning("lease not renewed yet: %s", error)


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
        self._undo: list[Hook] = []  # of what we listen to
        self._lately: deque[tuple[float, Input]] = deque(maxlen=_NUM_REMEMBERED)

    @property
    def writers(self) -> tuple[Writer[DeploymentRecord], Writer[PlacementRecord]]:
        return self._models, self._placement

    async def run(self) -> None:
        """Listen, and decide for ever."""
        await self._forget_removed_models()
        for spec in self._settings.model_specs():
            self._inputs.put_nowait(DeploymentAdded(spec))
        bus, leases = self._bus, Bucket(self._bus, names.BUCKET_LEASES, LeaseRecord)
        undo = self._undo.append
        undo(await bus.subscribe_raw(names.demand_subject(), self._on_demand))
        undo(await bus.subscribe(f"{names.PREFIX}.events.>", Event, self._on_event))
        undo(await bus.subscribe(names.status_subject(), AgentStatus, self._on_status))
        undo(await leases.watch(self._on_lease))
        while True:
            event = await self._inputs.get()
            now = time.time()
            self._lately.append((now, event))
            for command in self._decide(event, now):
                await self._execute(command, now)
            self._spans.observe(event, now)
            await self._publish_deployments(now)

    async def close(self) -> None:
        """Listen no more: the next leader in this process has a state of its own."""
        for undo in self._undo:
            await undo()
        self._spans.close(time.time())

    def _decide(self, event: Input, now: float) -> list[Command]:
        try:
            return decide(self.state, event, now)
        except Exception:
            log.critical("decide failed; the scheduler ends\n%s", self._story())
            raise

    def _story(self) -> str:
        """What led here: the last inputs, and each replica's recent life."""
        lines = [f"the last {len(self._lately)} inputs, newest last:"]
        lines += [f"  {at:.3f} {msgspec.json.encode(event).decode()}" for at, event in self._lately]
        for agent in self.state.agents.values():
            for replica in agent.replicas.values():
                lines.append(f"{replica.life.name}: {replica.state}, pending {replica.pending}")
                lines += [f"  {line}" for line in replica.life.history]
        return "\n".join(lines)

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
            try:
                await self._bus.publish(names.command_subject(command.gpu), command)
            except BusError as error:  # `decide` repeats what stays unanswered
                log.error("the command was lost: %s", error)
        record = PlacementRecord(
            gpu=command.gpu,
            model=command.model,
            desired=self.state.agents[command.gpu].replicas[command.model].desired,
            generation=command.generation,
            epoch=command.epoch,
        )
        self._placement.put(names.replica_key(command.gpu, command.model), record)

    async def _publish_deployments(self, now: float) -> None:
        """Write every deployment whose record changed, and tell of those that failed."""
        for name, spec in self.state.deployments.items():
            view = self.state.deployment_view(name)
            record = DeploymentRecord(spec, view.status, view.reason, view.facts, self._created_at)
            if self._published.get(name) != record:
                self._published[name] = record
                self._models.put(names.escape(name), record)
                if record.status == "failed":
                    await self._tell(DeploymentFailed(name, now, record.reason))

    async def _tell(self, event: DeploymentFailed) -> None:
        try:
            await self._bus.publish(names.event_subject(kind_of(event), model=event.model), event)
        except BusError as error:
            log.error("lost the event %s: %s", event, error)

    async def _forget_removed_models(self) -> None:
        """Records of models that the configuration no longer names."""
        bucket = Bucket(self._bus, names.BUCKET_MODELS, DeploymentRecord)
        for key, record in (await bucket.items()).items():
            if record.spec.name not in self._settings.models:
                await bucket.delete(key)
            else:
                self._created_at = min(self._created_at, record.created_at or self._created_at)
