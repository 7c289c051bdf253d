"""What exists and where it is: deployments, residency and leases, watched in KV.

The scheduler writes deployments, agents write residency, both hold leases; this is a read-only
copy. After a reconnect every present value comes again, and what did not come is gone
(its expiry may have passed while nobody told us).
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

from msgspec import UNSET

from schemas import names
from schemas.state import (
    DeploymentRecord,
    LeaseRecord,
    ReplicaState,
    ResidencyRecord,
    Runner,
)
from services.api import errors, presets
from services.api.deployment_settings import nearest
from services.api.fields import Endpoint
from services.api.openai import HotswapInfo, Model
from services.api.waits import RetryAfter, unknown
from services.bus import Bucket, Bus, Entry
from services.bus.connection import Hook

log = logging.getLogger(__name__)

T = TypeVar("T")

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
            bus, names.BUCKET_RESIDENCY, ResidencyRecord, lambda key, record: self._wake()
        )
        self._leases = _Mirror(bus, names.BUCKET_LEASES, LeaseRecord, lambda key, record: None)
        self._undo: list[Callable[[], object]] = []
        self._aliases: dict[str, str] = {}  # alias -> deployment
        self._awaited: set[asyncio.Event] = set()  # by those who wait for a change

    async def start(self) -> None:
        """Watch the three buckets; returns once the present values are known. Raises BusError."""
        for mirror in (self._deployments, self._residency, self._leases):
            self._undo += await mirror.start()

    async def stop(self) -> None:
        for undo in self._undo:
            if isinstance(waiting := undo(), Awaitable):
                await waiting

    def find(self, model: str) -> DeploymentRecord | None:
        """The deployment that ``model`` is a name or an alias of."""
        name = self._aliases.get(model, model)
        return self._deployments.values.get(names.escape(name)) if name else None

    def prepare(self, raw: dict[str, Any], endpoint: Endpoint) -> dict[str, Any]:
        """The request body ``raw`` with what its deployment's settings say of it."""
        model = raw.get("model")
        record = self.find(model) if isinstance(model, str) else None
        if record is None or not (record.spec.defaults or record.spec.overrides):
            return raw
        return presets.apply(raw, endpoint, record.spec.defaults, record.spec.overrides)

    def require(self, model: str, runner: Runner = "generate", dimensions: int = 0) -> str:
        """The name of the deployment that ``model`` is a name or an alias of.

        Raises ApiError unless such requests for it can be queued. What no agent has looked at yet
        may pass; the engine refuses it then. ``dimensions``: that vectors must have at least.
        """
        record = self.find(model)
        if record is None:
            existing = sorted(one.spec.name for one in self._deployments.values.values())
            raise errors.model_not_found(model, existing)
        if record.spec.drained:
            words = "an operator has drained it, so it takes no new requests"
            raise errors.model_unavailable(model, words)
        if record.status == "failed":
            raise errors.model_unavailable(model, record.reason, self._retry_after_s(model))
        known = record.facts.runner if record.facts else record.spec.runner
        if known not in ("auto", runner):
            raise errors.model_not_supported(model, "embed" if known == "embed" else "generate")
        if record.facts and dimensions > record.facts.dimensions:
            words = f"dimensions = {dimensions}: vectors of model {model!r} have "
            raise errors.invalid("dimensions", f"{words}{record.facts.dimensions}.")
        return record.spec.name

    def records(self) -> list[DeploymentRecord]:
        """All deployments, by name."""
        return sorted(self._deployments.values.values(), key=lambda record: record.spec.name)

    def record(self, name: str) -> DeploymentRecord:
        """The deployment ``name``, by no alias. Raises ApiError (404)."""
        record = self._deployments.values.get(names.escape(name)) if name else None
        if record is None:
            raise errors.deployment_not_found(name, [one.spec.name for one in self.records()])
        return record

    def models(self) -> list[Model]:
        """All deployments, by name; each alias after its deployment."""
        return [
            self._describe(record, name)
            for record in self.records()
            for name in (record.spec.name, *record.spec.aliases)
        ]

    def model(self, name: str) -> Model:
        """One deployment, by name or alias. Raises ApiError (404)."""
        record = self.find(name)
        if record is None:
            raise errors.model_not_found(name, [one.spec.name for one in self.records()])
        return self._describe(record, name)

    async def until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until ``condition`` holds, looked at after each change; whether it does."""
        changed = asyncio.Event()
        self._awaited.add(changed)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    while not condition():
                        await changed.wait()
                        changed.clear()
            return condition()
        finally:
            self._awaited.discard(changed)

    def _wake(self) -> None:
        for changed in self._awaited:
            changed.set()

    def states(self, model: str) -> dict[str, ReplicaState]:
        """Of its replicas, by GPU."""
        live = self._live_gpus()  # what a dead agent wrote last is not true any more
        return {
            replica.gpu: replica.state
            for _, replica in sorted(self._residency.values.items())
            if replica.model == model and replica.gpu in live
        }

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

    def _describe(self, record: DeploymentRecord, name: str) -> Model:
        gpus = self.states(record.spec.name)
        facts = record.facts
        max_model_len = facts.max_model_len if facts else record.spec.max_model_len
        return Model(
            id=name,
            created=record.created_at,
            hotswap=HotswapInfo(
                status=record.status,
                state=nearest(gpus),
                gpus=gpus,
                weight_bytes=facts.weight_bytes if facts else None,
                max_model_len=max_model_len,
                reason=record.reason,
                alias_of=UNSET if name == record.spec.name else record.spec.name,
            ),
            max_model_len=max_model_len,
        )

    def _on_deployment(self, key: str, record: DeploymentRecord | None) -> None:
        name = names.unescape(key)
        self._aliases = {alias: owner for alias, owner in self._aliases.items() if owner != name}
        if record is not None:
            self._aliases |= dict.fromkeys(record.spec.aliases, name)
        self._wake()
        if record is None:
            self._on_unavailable(names.unescape(key), "its deployment was removed")
        elif record.status == "failed":
            self._on_unavailable(record.spec.name, record.reason)
