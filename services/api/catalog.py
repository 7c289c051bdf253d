"""What exists and where it is: deployments, residency and leases, watched in KV.

The scheduler writes deployments, agents write residency, both hold leases; this is a read-only
copy. Whoever comes with an API key sees the deployments that it allows, as if there were no others.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import get_args

from schemas import names
from schemas.keys import KeyRecord
from schemas.state import (
    DeploymentRecord,
    LeaseRecord,
    ReplicaState,
    ResidencyRecord,
    Runner,
)
from services.api import errors
from services.api.mirror import Mirror
from services.api.openai import HotswapInfo, Model
from services.api.refusals import model_not_allowed
from services.api.waits import RetryAfter, unknown
from services.bus import Bus
from services.keys import allows

log = logging.getLogger(__name__)

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


class Catalog:
    """``on_unavailable(model, reason)`` is called when a deployment fails or goes away."""

    def __init__(
        self, bus: Bus, on_unavailable: OnUnavailable, retry_after_s: RetryAfter = unknown
    ) -> None:
        self._on_unavailable = on_unavailable
        self._retry_after_s = retry_after_s
        self._deployments = Mirror(bus, names.BUCKET_MODELS, DeploymentRecord, self._on_deployment)
        self._residency = Mirror(
            bus, names.BUCKET_RESIDENCY, ResidencyRecord, lambda key, record: None
        )
        self._leases = Mirror(bus, names.BUCKET_LEASES, LeaseRecord, lambda key, record: None)
        self._undo: list[Callable[[], object]] = []

    async def start(self) -> None:
        """Watch the three buckets; returns once the present values are known. Raises BusError."""
        for mirror in (self._deployments, self._residency, self._leases):
            self._undo += await mirror.start()

    async def stop(self) -> None:
        for undo in self._undo:
            if isinstance(waiting := undo(), Awaitable):
                await waiting

    def require(
        self,
        model: str,
        runner: Runner = "generate",
        dimensions: int = 0,
        *,
        key: KeyRecord | None = None,
    ) -> None:
        """Raise ApiError unless such requests for ``model`` can be queued.

        What no agent has looked at yet may pass; the engine refuses it then. ``dimensions``: that
        vectors must have at least. ``key``: whose request it is.
        """
        if not allows(key, model):
            raise model_not_allowed(key, model)
        record = self._deployments.values.get(names.escape(model)) if model else None
        if record is None:
            raise errors.model_not_found(model, self._names(key))
        if record.status == "failed":
            raise errors.model_unavailable(model, record.reason, self._retry_after_s(model))
        known = record.facts.runner if record.facts else record.spec.runner
        if known not in ("auto", runner):
            raise errors.model_not_supported(model, "embed" if known == "embed" else "generate")
        if record.facts and dimensions > record.facts.dimensions:
            words = f"dimensions = {dimensions}: vectors of model {model!r} have "
            raise errors.invalid("dimensions", f"{words}{record.facts.dimensions}.")

    def models(self, key: KeyRecord | None = None) -> list[Model]:
        """All deployments that ``key`` allows, by name."""
        return [self.model(name) for name in self._names(key)]

    def model(self, name: str, key: KeyRecord | None = None) -> Model:
        """One deployment. Raises ApiError (404)."""
        record = self._deployments.values.get(names.escape(name)) if name else None
        if record is None or not allows(key, name):
            raise errors.model_not_found(name, self._names(key))
        return self._describe(record)

    def max_model_len(self, model: str) -> int | None:
        """The context length of a deployment; None: not known yet."""
        record = self._deployments.values.get(names.escape(model)) if model else None
        return record.facts.max_model_len if record and record.facts else None

    def missing(self) -> list[str]:
        """What is not there yet and must be before requests can be answered."""
        out = []
        if names.LEADER_KEY not in self._leases.values:
            out.append("no scheduler leads")
        if not self._live_gpus():
            out.append("no GPU agent is alive")
        return out

    def _names(self, key: KeyRecord | None) -> list[str]:
        found = (record.spec.name for record in self._deployments.values.values())
        return sorted(name for name in found if allows(key, name))

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
        return Model(
            id=record.spec.name,
            created=record.created_at,
            hotswap=HotswapInfo(
                status=record.status,
                state=min(gpus.values(), key=_NEAREST.index, default="cold"),
                gpus=gpus,
                weight_bytes=facts.weight_bytes if facts else None,
                max_model_len=facts.max_model_len if facts else record.spec.max_model_len,
                reason=record.reason,
            ),
        )

    def _on_deployment(self, key: str, record: DeploymentRecord | None) -> None:
        if record is None:
            self._on_unavailable(names.unescape(key), "its deployment was removed")
        elif record.status == "failed":
            self._on_unavailable(record.spec.name, record.reason)
