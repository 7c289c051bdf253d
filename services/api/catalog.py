"""What exists and where it is: deployments, residency and leases, watched in KV.

The scheduler writes deployments, agents write residency, both hold leases; this is a read-only
copy. After a reconnect every present value comes again, and what did not come is gone
(its expiry may have passed while nobody told us).
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar, get_args

from schemas import names
from schemas.state import (
    DeploymentRecord,
    LeaseRecord,
    ReplicaState,
    ResidencyRecord,
    Runner,
)
from services.api import errors
from services.api.openai import HotswapInfo, Model
from services.api.waits import RetryAfter, unknown
from services.bus import Bucket, Bus, Entry
from services.bus.connection import Hook

log = logging.getLogger(__name__)

T = TypeVar("T")

# Which replica would answer first.
_NEAREST: tuple[ReplicaState, ...] = (
    "resident",
    "swapping_in",
    "host",
    "draining",
    "swapping_out",
    "loading",
    "cold",
    "failed",
)
assert set(_NEAREST) == set(get_args(ReplicaState))

_AGENT_PREFIX = names.agent_lease_key("x").removesuffix("x")

OnUnavailable = Callable[[str, str], None]


class _Mirror(Generic[T]):
    """A bucket's present values by key."""

    def __init__(
        self, bus: Bus, bucket: str, kind: type[T], changed: Callable[[str, T | None], None]
    ) -> None:
        self._bus = bus
        self._bucket = Bucket(bus, bucket, kind)
        self._changed = changed
        self._seen: set[str] = set()
        self.values: dict[str, T] = {}

    async def start(self) -> list[Callable[[], object]]:
        """Watch; returns the undoing of its reconnect hooks and of the watch."""
        before = self._bus.on_reconnect(self._forget_seen)
        stop: Hook = await self._bucket.watch(self._on_entry)
        after = self._bus.on_reconnect(self._drop_unseen)  # hooks run in this order
        return [before, stop, after]

    async def _on_entry(self, entry: Entry[T]) -> None:
        self._seen.add(entry.key)
        if entry.value is None:
            self.values.pop(entry.key, None)
        else:
            self.values[entry.key] = entry.value
        self._changed(entry.key, entry.value)

    async def _forget_seen(self) -> None:
        self._seen.clear()

    async def _drop_unseen(self) -> None:
        for key in [key for key in self.values if key not in self._seen]:
            del self.values[key]
            self._changed(key, None)


class Catalog:
    """``on_unavailable(model, reason)`` is called when a deployment fails or goes away."""

    def __init__(
        self, bus: Bus, on_unavailable: OnUnavailable, retry_after_s: RetryAfter = unknown
    ) -> None:
        self._on_unavailable = on_unavailable
        self._retry_after_s = retry_after_s
        self._deployments = _Mirror(bus, names.BUCKET_MODELS, DeploymentRecord, self._on_deployment)
        self._residency = _Mirror(
            bus, names.BUCKET_RESIDENCY, ResidencyRecord, lambda key, record: None
        )
        self._leases = _Mirror(bus, names.BUCKET_LEASES, LeaseRecord, lambda key, record: None)
        self._undo: list[Callable[[], object]] = []

    async def start(self) -> None:
        """Watch the three buckets; returns once the present values are known. Raises BusError."""
        for mirror in (self._deployments, self._residency, self._leases):
            self._undo += await mirror.start()

    async def stop(self) -> None:
        for undo in self._undo:
            if isinstance(waiting := undo(), Awaitable):
                await waiting

    def require(self, model: str, runner: Runner = "generate", dimensions: int = 0) -> None:
        """Raise ApiError unless such requests for ``model`` can be queued.

        What no agent has looked at yet may pass; the engine refuses it then. ``dimensions``: that
        vectors must have at least.
        """
        record = self._deployments.values.get(names.escape(model)) if model else None
        if record is None:
            existing = sorted(one.spec.name for one in self._deployments.values.values())
            raise errors.model_not_found(model, existing)
        if record.status == "failed":
            raise errors.model_unavailable(model, record.reason, self._retry_after_s(model))
        known = record.facts.runner if record.facts else record.spec.runner
        if known not in ("auto", runner):
            raise errors.model_not_supported(model, "embed" if known == "embed" else "generate")
        if record.facts and dimensions > record.facts.dimensions:
            words = f"dimensions = {dimensions}: vectors of model {model!r} have "
            raise errors.invalid("dimensions", f"{words}{record.facts.dimensions}.")

    def models(self) -> list[Model]:
        """All deployments, by name."""
        records = sorted(self._deployments.values.values(), key=lambda record: record.spec.name)
        return [self._describe(record) for record in records]

    def model(self, name: str) -> Model:
        """One deployment. Raises ApiError (404)."""
        for record in self._deployments.values.values():
            if record.spec.name == name:
                return self._describe(record)
        existing = sorted(one.spec.name for one in self._deployments.values.values())
        raise errors.model_not_found(name, existing)

    def missing(self) -> list[str]:
        """What is not there yet and must be before requests can be answered."""
        out = []
        if names.LEADER_KEY not in self._leases.values:
            out.append("no scheduler leads")
        if not self._live_gpus():
            out.append("no GPU agent is alive")
        return out

    def _live_gpus(self) -> set[str]:
        return {
            names.unescape(key.removeprefix(_AGENT_PREFIX))
            for key in self._leases.values
            if key.startswith(_AGENT_PREFIX)
        }

    def _describe(self, record: DeploymentRecord) -> Model:
        live = self._live_gpus()  # what a dead agent wrote last is not true any more
        gpus = {
            replica.gpu: replica.state
            for _, replica in sorted(self._residency.values.items())
            if replica.model == record.spec.name and replica.gpu in live
        }
        facts = record.facts
        max_model_len = facts.max_model_len if facts else record.spec.max_model_len
        return Model(
            id=record.spec.name,
            created=record.created_at,
            hotswap=HotswapInfo(
                status=record.status,
                state=min(gpus.values(), key=_NEAREST.index, default="cold"),
                gpus=gpus,
                weight_bytes=facts.weight_bytes if facts else None,
                max_model_len=max_model_len,
                reason=record.reason,
            ),
            max_model_len=max_model_len,
        )

    def _on_deployment(self, key: str, record: DeploymentRecord | None) -> None:
        if record is None:
            self._on_unavailable(names.unescape(key), "its deployment was removed")
        elif record.status == "failed":
            self._on_unavailable(record.spec.name, record.reason)
