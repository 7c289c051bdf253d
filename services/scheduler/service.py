"""The scheduler as a process: bus -> decide -> bus, under a lease.

    demand, events, statuses, leases, timers --> one queue --> decide(state, input, now)
                                                                |- commands to the agents
                                                                |- HS_PLACEMENT: what is wanted
                                                                |- HS_MODELS: what users are told
                                                                |- verdicts: what operators asked
                                                                |- events: what was decided and why
                                                                `- waits: how long it will take

Everything `decide` is told goes through that one queue, so the order in which it was told
is the order in which it decided. What waits there is decided in one go, without giving way in
between but to send commands; nothing is done per input that grows with the number of models.

A leader that can not renew its lease in time steps down and stands by again. Whoever leads
next, under a higher epoch, begins from an empty state and asks for all of it at once:

1. it reads what is deployed (`services.scheduler.deployments`);
2. it listens, and then says that it leads: agents turn away older leaders from then on, and
   answer with their statuses;
3. when those that hold a lease have answered, it asks for the queue's depths.

A defect in `decide` ends the process, with the story in the log; the supervisor's next start
begins afresh.
"""

import asyncio
import contextlib
import functools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import TypeVar, get_args

import msgspec

from schemas import names
from schemas.commands import Command
from schemas.events import (
    Event,
    LeaderElected,
)
from schemas.state import AgentStatus, DeploymentRecord, LeaseRecord, PlacementRecord
from services.bus import (
    Bucket,
    Bus,
    BusError,
    BusOptions,
    Entry,
    LeaseLost,
    WorkQueue,
    Writer,
    declare,
)
from services.bus.connection import Hook, header_of
from services.jobs import unless_set, until_first_ends
from services.scheduler.decide import decide
from services.scheduler.deployments import Deployments
from services.scheduler.desk import Desk
from services.scheduler.inputs import (
    AgentLost,
    Demand,
    DeploymentAdded,
    DeploymentsKnown,
    Input,
    QueueDepths,
    Tick,
)
from services.scheduler.leadership import Leadership
from services.scheduler.spans import SwitchSpans
from services.scheduler.state import ClusterState, PolicyConfig
from services.scheduler.telling import Teller
from services.settings import SchedulerSettings, Settings

log = logging.getLogger(__name__)

T = TypeVar("T")

TICK_S = 0.2
STATUS_PATIENCE_S = 0.25  # for the agents' answers to a new leader
_RETRY_S = 0.5  # where the server does not answer
_TURN_S = 0.02  # inputs are decided in one go for so long; then others have their turn
_NUM_REMEMBERED = 50  # inputs, for the story when `decide` fails
_DECISIONS = names.events_subject("decision_made").removesuffix(">")


async def run(settings: Settings, options: BusOptions, *, stop: asyncio.Event) -> None:
    """Stand by, lead, stand by again where the lease is lost, until ``stop`` is set."""
    async with contextlib.AsyncExitStack() as stack:
        # The lease has a connection of its own: answers about it must not wait behind news.
        buses: list[Bus] = []
        for service in ("scheduler", "scheduler-lease"):
            bus = await unless_set(stop, Bus.connect(options, service=service))
            if bus is None:
                return
            stack.push_async_callback(bus.close)
            buses.append(bus)
        bus, lease_bus = buses
        await unless_set(stop, declare(bus, settings.api.max_queued_per_model))
        while not stop.is_set():
            leadership = Leadership(lease_bus, settings.scheduler.lease_ttl_s)
            await unless_set(stop, leadership.acquire())
            try:
                if leadership.is_held:
                    await _lead(bus, settings, leadership, stop)
            except LeaseLost as error:
                log.error("stepping down: %s", error)
            finally:
                await leadership.give_up()


async def _lead(bus: Bus, settings: Settings, leadership: Leadership, stop: asyncio.Event) -> None:
    """Lead until ``stop`` is set. Raises LeaseLost."""
    log.info("leading, epoch %d", leadership.epoch)
    leader = Leader(bus, settings, leadership)
    try:
        await until_first_ends(
            stop.wait(),
            leadership.keep(),
            leader.run(),
            leader.tick(),
            leader.learn(),
            leader.take_requests(),
            leader.reconcile(),
            *(writer.run() for writer in leader.writers),
        )
    finally:
        await leader.close()


def policy_config(knobs: SchedulerSettings) -> PolicyConfig:
    """The policy as the configuration sets it."""
    return PolicyConfig(
        run_quantum_s=knobs.run_quantum_s,
        ttft_target_s=knobs.ttft_target_s,
        token_target_s=knobs.token_target_s,
        starvation_s=knobs.starvation_s,
        preemption=knobs.preemption,
        replicate=knobs.replicate,
        prefetch=knobs.prefetch,
        migrate=knobs.migrate,
        fair_shares=knobs.fair_shares,
        retry_s=knobs.retry_failed_s,
    )


class Leader:
    """Owns the cluster state. Listeners only put inputs into the queue; `run` decides."""

    def __init__(self, bus: Bus, settings: Settings, leadership: Leadership) -> None:
        self.state = ClusterState(leadership.epoch, policy_config(settings.scheduler))
        self._leadership = leadership
        self._bus = bus
        self._settings = settings
        self._inputs: deque[Input] = deque()
        self._has_inputs = asyncio.Event()
        self._spans = SwitchSpans()
        self._deployments = Deployments(bus, settings)
        self._teller = Teller(
            bus, self.state, self._deployments, self._spans, lambda: leadership.is_held
        )
        self._desk = Desk(
            bus,
            self.state,
            self._deployments,
            self._teller,
            self._tell,
            lambda: leadership.is_held,
            [gpu.name for gpu in settings.gpus],
        )
        self._is_told = asyncio.Event()  # what is deployed
        self._placement = Writer(
            Bucket(bus, names.BUCKET_PLACEMENT, PlacementRecord), lambda: leadership.is_held
        )
        self._unheard: set[str] = set()  # GPUs whose agents hold a lease and have not spoken yet
        self._heard: set[str] = set()
        self._agents_answered = asyncio.Event()
        self._undo: list[Hook] = []  # of what we listen to
        self._lately: deque[tuple[float, Input]] = deque(maxlen=_NUM_REMEMBERED)

    @property
    def writers(self) -> tuple[Writer[DeploymentRecord], Writer[PlacementRecord]]:
        return self._teller.models, self._placement

    async def run(self) -> None:
        """Listen, say that we lead, and decide for ever. Raises LeaseLost."""
        await _patiently(lambda: self._deployments.read(time.time()))
        for spec in self._deployments.specs():
            self._tell(DeploymentAdded(spec))
        self._tell(DeploymentsKnown())
        self._is_told.set()
        bus, undo = self._bus, self._undo.append
        undo(await bus.listen(names.demand_subject(), self._on_demand))
        undo(await bus.listen(names.events_subject(), self._on_event))
        undo(await bus.listen(names.status_subject(), self._on_status))
        leadership = self._leadership
        await self._teller.announce(LeaderElected(leadership.holder, leadership.epoch, time.time()))
        while True:
            await self._has_inputs.wait()
            self._has_inputs.clear()
            while self._inputs:
                await self._decide_in_one_go()
                await asyncio.sleep(0)

    async def _decide_in_one_go(self) -> None:
        inputs, remember, observe = self._inputs, self._lately.append, self._spans.observe
        began_at = now = time.time()
        while inputs and now - began_at < _TURN_S:
            event = inputs.popleft()
            now = time.time()
            remember((now, event))
            for command in self._decide(event, now):
                await self._execute(command, now)
            if self.state.decisions:
                await self._teller.tell_decisions()
            if self.state.verdicts:
                self._desk.announce_verdicts()
            observe(event, now)
        await self._teller.tell_records(now)
        await self._teller.tell_waits(now)

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
            self._tell(Tick())

    async def learn(self) -> None:
        """What earlier leaders wrote, and which agents there are; from then on, which are lost."""
        bucket = Bucket(self._bus, names.BUCKET_LEASES, LeaseRecord)
        self._undo.append(await _patiently(lambda: bucket.watch(self._on_lease)))
        self._unheard -= self._heard
        if not self._unheard:
            self._agents_answered.set()
        await self._is_told.wait()
        await _patiently(self._teller.learn_records)
        await self._teller.tell_records(time.time())
        await asyncio.Event().wait()  # until we are cancelled

    async def take_requests(self) -> None:
        """Store what hotswap.toml changed, then do what operators ask for, for ever."""
        await self._is_told.wait()
        await _patiently(self._desk.store_file)
        self._undo.append(await self._desk.open())
        await asyncio.Event().wait()  # until we are cancelled

    async def reconcile(self) -> None:
        """Compare the demand we believe in with what the queue really holds, for ever."""
        queue = WorkQueue(self._bus)
        # Without them, what they have in flight would count as waiting.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._agents_answered.wait(), STATUS_PATIENCE_S)
        while True:
            try:
                for klass in get_args(names.RequestClass):
                    depths, at = await queue.depths(klass)
                    self._tell(QueueDepths(depths, at, klass))
            except BusError as error:
                log.warning("queue depths unknown: %s", error)
            await asyncio.sleep(self._settings.scheduler.reconcile_s)

    # -- in ------------------------------------------------------------------------------

    def _tell(self, event: Input) -> None:
        self._inputs.append(event)
        self._has_inputs.set()

    def _on_event(self, subject: str, data: bytes, headers: bytes, reply: str) -> None:
        if subject.startswith(_DECISIONS):
            return  # our own, and no news
        try:
            self._tell(_event_decoder.decode(data))
        except msgspec.DecodeError as error:
            log.error("dropped a message on %s: %s", subject, error)

    def _on_demand(self, subject: str, data: bytes, headers: bytes, reply: str) -> None:
        _, _, _, klass, token = subject.split(".")
        stamp = header_of(headers, b"Nats-Time-Stamp")
        request_id = header_of(headers, b"Nats-Msg-Id") or header_of(headers, b"Nats-Sequence")
        self._spans.remember(request_id, headers)
        self._tell(
            Demand(
                request_id=request_id,
                model=_unescape(token),
                klass="batch" if klass == "batch" else "interactive",
                at=datetime.fromisoformat(stamp).timestamp() if stamp else time.time(),
                tenant=header_of(headers, _TENANT),
                window_s=_seconds(header_of(headers, b"Nats-TTL")),
            )
        )

    def _on_status(self, subject: str, data: bytes, headers: bytes, reply: str) -> None:
        try:
            status = _status_decoder.decode(data)
        except msgspec.DecodeError as error:
            log.error("dropped a message on %s: %s", subject, error)
            return
        self._tell(status)
        if not self._agents_answered.is_set():
            self._heard.add(status.gpu)
            if self._unheard and self._unheard <= self._heard:
                self._agents_answered.set()

    async def _on_lease(self, entry: Entry[LeaseRecord]) -> None:
        kind, _, token = entry.key.partition(".")
        if kind != "agent":
            return
        gpu = names.unescape(token)
        if entry.value is None:
            self._unheard.discard(gpu)
            self._tell(AgentLost(gpu))
        elif not self._agents_answered.is_set():
            self._unheard.add(gpu)

    # -- out -----------------------------------------------------------------------------

    async def _execute(self, command: Command, now: float) -> None:
        if not self._leadership.is_held:  # we may have been stopped for a while
            raise LeaseLost("the lease was not renewed in time")
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


_TENANT = names.HEADER_TENANT.encode()
_event_decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)
_status_decoder = msgspec.json.Decoder(AgentStatus)
_unescape = functools.lru_cache(maxsize=16_384)(names.unescape)


def _seconds(ttl: str) -> float:
    """A message's time to live, as in its header; 0: it has none."""
    number = ttl.removesuffix("s")
    return float(number) if number.isdecimal() else 0.0


async def _patiently(ask: Callable[[], Awaitable[T]]) -> T:
    """The answer to ``ask``, asked again for as long as the server gives none."""
    while True:
        try:
            return await ask()
        except (BusError, TimeoutError) as error:
            log.warning("%s; trying again", error)
            await asyncio.sleep(_RETRY_S)
