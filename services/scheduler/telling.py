"""What the scheduler tells: its decisions, how long who waits will wait, and records for users.

    DecisionMade, DeploymentFailed, LeaderElected   events, kept in HS_EVENTS
    PredictedWait                                   core NATS, about once a second
    DeploymentRecord                                HS_MODELS, whenever it changed

Nothing is decided by any of it, and nobody waits for it: what the server does not take is lost.
"""

import logging
from collections.abc import Callable

from schemas import names
from schemas.events import DecisionMade, DeploymentFailed, LeaderElected, SchedulerEvent, kind_of
from schemas.state import DeploymentRecord
from services.bus import Bucket, Bus, BusError, Writer
from services.scheduler import waits
from services.scheduler.deployments import Deployments
from services.scheduler.spans import SwitchSpans
from services.scheduler.state import ClusterState

log = logging.getLogger(__name__)

_WAITS_EACH_S = 1.0  # those who wait are told how long,
_MOST_WAITS = 64  # so many models at a time: of a long line in turns


class Teller:
    """``models``: the writer of HS_MODELS, to be run. ``is_held``: whether we still lead."""

    def __init__(
        self,
        bus: Bus,
        state: ClusterState,
        deployments: Deployments,
        spans: SwitchSpans,
        is_held: Callable[[], bool],
    ) -> None:
        self.models = Writer(Bucket(bus, names.BUCKET_MODELS, DeploymentRecord), is_held)
        self._bus = bus
        self._state = state
        self._deployments = deployments
        self._spans = spans
        self._written: dict[str, DeploymentRecord] = {}
        self._changed: dict[str, None] = {}  # models whose record may have changed
        self._records_known = False  # what earlier leaders wrote
        self._waits_at = 0.0  # when those who wait were told how long
        self._next_wait = 0  # number of the first model that is told next

    async def announce(self, event: SchedulerEvent) -> None:
        gpu = event.gpu if isinstance(event, DecisionMade) else ""
        model = "" if isinstance(event, LeaderElected) else event.model
        try:
            await self._bus.publish(names.event_subject(kind_of(event), gpu, model), event)
        except BusError as error:
            log.error("lost the event %s: %s", event, error)

    async def tell_decisions(self) -> None:
        """Those made since this was called last."""
        for decision in self._state.decisions.take():
            self._spans.explain(decision)
            await self.announce(decision)

    async def tell_waits(self, now: float) -> None:
        """How long models will be waited for, if any are and it is time to say so again."""
        state = self._state
        if not (state.waiting or state.line) or now - self._waits_at < _WAITS_EACH_S:
            return
        self._waits_at = now
        told = waits.predictions(state, now, self._next_wait, _MOST_WAITS)
        self._next_wait += _MOST_WAITS
        for wait in told:
            try:
                await self._bus.publish(names.wait_subject(wait.model), wait)
            except BusError as error:
                log.warning("lost the predicted wait for %s: %s", wait.model, error)

    async def tell_records(self, now: float) -> None:
        """Write the deployments whose record has changed, and tell of those that failed."""
        self._changed.update(dict.fromkeys(self._state.take_touched()))
        if not self._records_known:
            return
        changed, self._changed = self._changed, {}
        for name in changed:
            version = self._deployments.get(name)
            if version is None or name not in self._state.deployments:
                continue
            view, desired = self._state.deployment_view(name), version.desired
            record = DeploymentRecord(
                desired.spec,
                view.status,
                view.reason,
                view.facts,
                created_at=desired.created_at,
                revision=version.revision,
                origin=desired.origin,
                updated_at=desired.updated_at,
                updated_by=desired.updated_by,
            )
            if self._written.get(name) != record:
                self._written[name] = record
                self.models.put(names.escape(name), record)
                if record.status == "failed":
                    await self.announce(DeploymentFailed(name, now, record.reason))

    def touch(self, name: str) -> None:
        """Look at its record again."""
        self._changed[name] = None

    def forget_record(self, name: str) -> None:
        """``name`` is deployed no more."""
        self._written.pop(name, None)
        self.models.delete(names.escape(name))

    async def learn_records(self) -> None:
        """Forget records of models that are not deployed any more. Raises BusError."""
        bucket = Bucket(self._bus, names.BUCKET_MODELS, DeploymentRecord)
        for key, record in (await bucket.items()).items():
            if record.spec.name not in self._deployments:
                await bucket.delete(key)
        self._records_known = True
