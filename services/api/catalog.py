"""What exists and where it is: deployments, residency and leases, watched in KV.

The scheduler writes deployments, agents write residency, both hold leases; this is a read-only
copy. Whoever comes with an API key sees the deployments that it allows, as if there were no others.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from msgspec import UNSET

from schemas import names
from schemas.keys import KeyRecord
from schemas.state import (
    DeploymentRecord,
    LeaseRecord,
    ReplicaState,
    ResidencyRecord,
    Runner,
    ToolFormat,
)
from services.api import errors, presets
from services.api.deployment_settings import nearest
from services.api.fields import Endpoint
from services.api.mirror import Mirror
from services.api.openai import HotswapInfo, Model
from services.api.refusals import model_not_allowed
from services.api.waits import RetryAfter, unknown
from services.bus import Bus
from services.keys import allows

log = logging.getLogger(__name__)


_AGENT_PREFIX = names.agent_lease_key("x").removesuffix("x")

OnUnavailable = Callable[[str, str], None]
_REMOVED = "its deployment was removed"


def _nothing(model: str, reason: str) -> None:
    """Nobody wants to be told."""


class Catalog:
    """``on_unavailable(model, reason)`` is called when a deployment fails or goes away,
    ``on_gone`` when nobody can go on with a request for one that was removed.
    """

    def __init__(
        self,
        bus: Bus,
        on_unavailable: OnUnavailable,
        retry_after_s: RetryAfter = unknown,
        on_gone: OnUnavailable = _nothing,
    ) -> None:
        self._on_unavailable = on_unavailable
        self._on_gone = on_gone
        self._retry_after_s = retry_after_s
        self._deployments = Mirror(bus, names.BUCKET_MODELS, DeploymentRecord, self._on_deployment)
        self._residency = Mirror(
            bus, names.BUCKET_RESIDENCY, ResidencyRecord, lambda key, record: self._moved()
        )
        self._leases = Mirror(
            bus, names.BUCKET_LEASES, LeaseRecord, lambda key, record: self._end_gone()
        )
        self._leaving: dict[str, None] = {}  # deployments that were removed, and are somewhere yet
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

    def require(
        self,
        model: str,
        runner: Runner | Literal["any"] = "generate",
        dimensions: int = 0,
        *,
        key: KeyRecord | None = None,
    ) -> str:
        """The name of the deployment that ``model`` is a name or an alias of.

        Raises ApiError unless such requests for it can be queued. What no agent has looked at yet
        may pass; the engine refuses it then. ``runner``: what the model must be for.
        ``dimensions``: that vectors must have at least. ``key``: whose request it is.
        """
        record = self.find(model)
        if not (self.allows(key, record) if record else allows(key, model)):
            raise model_not_allowed(key, model)
        if record is None:
            raise errors.model_not_found(model, self._names(key))
        if record.spec.drained:
            words = "an operator has drained it, so it takes no new requests"
            raise errors.model_unavailable(model, words)
        if record.status == "failed":
            raise errors.model_unavailable(model, record.reason, self._retry_after_s(model))
        known = record.facts.runner if record.facts else record.spec.runner
        if known != "auto" and runner not in ("any", known):
            raise errors.model_not_supported(model, "embed" if known == "embed" else "generate")
        if record.facts and dimensions > record.facts.dimensions:
            words = f"dimensions = {dimensions}: vectors of model {model!r} have "
            raise errors.invalid("dimensions", f"{words}{record.facts.dimensions}.")
        return record.spec.name

    def require_tools(self, model: str) -> None:
        """Raise ApiError where ``model`` is known to know no tools."""
        record = self.find(model)
        if record and record.facts and not record.facts.tool_format:
            raise errors.tools_not_supported(model)

    def tool_format(self, model: str) -> ToolFormat:
        """How ``model`` writes calls of tools; "" where that is not known."""
        record = self.find(model)
        return record.facts.tool_format if record and record.facts else ""

    def records(self) -> list[DeploymentRecord]:
        """All deployments, by name."""
        return sorted(self._deployments.values.values(), key=lambda record: record.spec.name)

    def record(self, name: str) -> DeploymentRecord:
        """The deployment ``name``, by no alias. Raises ApiError (404)."""
        record = self._deployments.values.get(names.escape(name)) if name else None
        if record is None:
            raise errors.deployment_not_found(name, [one.spec.name for one in self.records()])
        return record

    def allows(self, key: KeyRecord | None, record: DeploymentRecord) -> bool:
        """Whether ``key`` allows the deployment, by its name or one of its aliases."""
        return any(allows(key, name) for name in (record.spec.name, *record.spec.aliases))

    def models(self, key: KeyRecord | None = None) -> list[Model]:
        """All deployments that ``key`` allows, by name; each alias after its deployment."""
        return [
            self._describe(record, name)
            for record in self.records()
            if self.allows(key, record)
            for name in (record.spec.name, *record.spec.aliases)
        ]

    def model(self, name: str, key: KeyRecord | None = None) -> Model:
        """One deployment, by name or alias. Raises ApiError (404)."""
        record = self.find(name)
        if record is None or not self.allows(key, record):
            raise errors.model_not_found(name, self._names(key))
        return self._describe(record, name)

    def max_model_len(self, model: str) -> int | None:
        """The context length of a deployment; None: not known yet."""
        record = self.find(model)
        return record.facts.max_model_len if record and record.facts else None

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

    def _moved(self) -> None:
        self._wake()
        self._end_gone()

    def _end_gone(self) -> None:
        """Running requests of a removed deployment may end where it is; then nobody has them."""
        for name in list(self._leaving):
            if names.escape(name) in self._deployments.values:
                del self._leaving[name]
            elif set(self.states(name).values()) <= {"cold", "failed"}:
                del self._leaving[name]
                self._on_gone(name, _REMOVED)

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

    def _names(self, key: KeyRecord | None) -> list[str]:
        return [record.spec.name for record in self.records() if self.allows(key, record)]

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
            self._on_unavailable(name, _REMOVED)
            self._leaving[name] = None
            self._end_gone()
        elif record.status == "failed":
            self._on_unavailable(record.spec.name, record.reason)
