"""What clients and operators may say of a deployment, and what they are told: pure.

Settings are those of ``[models.NAME]`` in hotswap.toml, with the same names, checks and words.
"""

import re
from typing import Any, Literal

import msgspec

from schemas.state import DeploymentRecord, ModelFacts, ModelSpec, ReplicaState
from services import settings
from services.api import presets
from services.api.errors import invalid
from services.api.places import nearest
from services.settings import ModelSettings, SettingsError


class DeploymentInfo(msgspec.Struct):
    """A deployment: what is wanted of it (``settings``, at ``version``), and what came of it.

    ``origin``: of hotswap.toml, or made here. ``gpus``: where it is; ``state``: of the replica that
    would answer first. Times are unix seconds.
    """

    name: str
    version: int
    settings: dict[str, Any]
    origin: Literal["file", "api"]
    status: Literal["pending", "ready", "failed"]
    reason: str  # why it is not ready, else ""
    state: ReplicaState
    gpus: dict[str, ReplicaState]
    facts: ModelFacts | None
    created_at: int
    updated_at: float
    updated_by: str
    object: Literal["deployment"] = "deployment"


class DeploymentList(msgspec.Struct):
    """All deployments, by name."""

    data: list[DeploymentInfo]
    object: Literal["list"] = "list"


class ActionResult(msgspec.Struct):
    """What became of an action. ``accepted``: it goes on, for the reason that is given."""

    outcome: Literal["done", "accepted"]
    reason: str
    deployment: DeploymentInfo | None  # None: it is gone


def describe(record: DeploymentRecord, gpus: dict[str, ReplicaState]) -> DeploymentInfo:
    return DeploymentInfo(
        name=record.spec.name,
        version=record.revision,
        settings=settings_of(record.spec),
        origin=record.origin,
        status=record.status,
        reason=record.reason,
        state=nearest(gpus),
        gpus=gpus,
        facts=record.facts,
        created_at=record.created_at,
        updated_at=record.updated_at,
        updated_by=record.updated_by,
    )


def settings_of(spec: ModelSpec) -> dict[str, Any]:
    """All settings of ``spec``, as plain values that `parse` takes."""
    return {key: msgspec.to_builtins(getattr(spec, key)) for key in ModelSettings.__struct_fields__}


def parse(name: str, raw: Any) -> ModelSpec:
    """``raw`` as the settings of ``name``. Raises ApiError (400) that names key and value."""
    if not settings.is_name(name) or name != name.strip("/ "):
        words = f"The name {name!r} must have 1 to 200 characters, and no / or space at its ends."
        raise invalid("name", words)
    try:
        model = settings.parse_model(raw)
    except SettingsError as error:
        found = re.match(r"(?:unknown key )?([\w.]+) = ", str(error))
        missing = re.search(r"missing required field `(\w+)`", str(error))
        if missing:
            raise invalid(missing[1], f"{missing[1]} is required and missing.") from error
        raise invalid(found[1] if found else None, f"{error}.") from error
    if model.source.startswith((".", "~")):
        words = (
            f"source = {model.source!r}: write a folder as an absolute path; it is read by agents."
        )
        raise invalid("source", words)
    presets.check(model.defaults, model.overrides)
    return model.spec(name)


def patched(spec: ModelSpec, patch: dict[str, Any]) -> dict[str, Any]:
    """The settings of ``spec`` with the keys in ``patch`` replaced; null: the default again."""
    merged = settings_of(spec) | patch
    return {key: value for key, value in merged.items() if value is not None}
