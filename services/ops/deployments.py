"""`hotswap model ...`: deployments listed, made, changed and removed, and models moved, over NATS.

The same as ``/v1/deployments`` of the api, for whoever has the admin's NATS credentials.
"""

import asyncio
import getpass
import json
import time
import tomllib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import click
import msgspec

from schemas import names
from schemas.admin import (
    AdminAnswer,
    AdminRequest,
    Ask,
    DeleteDeployment,
    MoveDeployment,
    PutDeployment,
    SwapInDeployment,
    SwapOutDeployment,
    action_of,
)
from schemas.state import DeploymentRecord, ReplicaState, ResidencyRecord
from services.api import deployment_settings
from services.api.errors import ApiError
from services.bus import Bucket, Bus, BusOptions, NoResponder

_POLL_S = 0.2
_ON_DEVICE: tuple[ReplicaState, ...] = ("resident", "swapping_in", "draining", "swapping_out")


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Each KEY=VALUE with its value as TOML reads it, else as text; ``default``: None.

    Raises click.BadParameter.
    """
    out: dict[str, Any] = {}
    for pair in pairs:
        key, sep, text = pair.partition("=")
        if not sep or not key.strip():
            raise click.BadParameter(f"{pair!r} must be KEY=VALUE")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        out[key.strip()] = None if value == "default" else value
    return out


async def show(options: BusOptions, as_json: bool) -> None:
    """Print all deployments."""
    async with _connected(options) as desk:
        infos = await desk.infos()
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(infos), indent=2))
        return
    if not infos:
        click.echo("no deployments; make one: hotswap model deploy NAME SOURCE")
        return
    rows = [("deployment", "version", "from", "status", "where", "settings")]
    for info in infos:
        where = ", ".join(f"{gpu}: {state}" for gpu, state in info.gpus.items()) or "-"
        flags = [key for key in ("pinned", "drained") if info.settings[key]]
        flags += [f"alias {alias}" for alias in info.settings["aliases"]]
        status = info.status + (f" ({info.reason})" if info.status == "failed" else "")
        rows.append(
            (info.name, str(info.version), info.origin, status, where, ", ".join(flags) or "-")
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        click.echo(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


def absolute(source: str) -> str:
    """``source`` as agents find it: a folder from here by its whole path."""
    folder = Path(source).expanduser()
    is_folder = source.startswith((".", "/", "~")) or folder.exists()
    return str(folder.absolute()) if is_folder and "://" not in source else source


async def deploy(options: BusOptions, name: str, source: str, pairs: Sequence[str]) -> None:
    """Create ``name``, or replace all of its settings."""
    given = {key: value for key, value in parse_settings(pairs).items() if value is not None}
    spec = _checked(name, {"source": source, **given})
    async with _connected(options) as desk:
        answer = await desk.ask(PutDeployment(spec, _who()))
    click.echo(
        f"{name} is {'deployed' if answer.created else 'updated'}, version {answer.revision}"
    )


async def change(options: BusOptions, name: str, pairs: Sequence[str]) -> None:
    """Change some settings of ``name``."""
    async with _connected(options) as desk:
        record = await desk.record(name)
        spec = _checked(name, deployment_settings.patched(record.spec, parse_settings(pairs)))
        answer = await desk.ask(PutDeployment(spec, _who(), (record.revision,)))
    click.echo(f"{name} is at version {answer.revision}")


async def remove(options: BusOptions, name: str, drain: bool, timeout_s: float) -> None:
    async with _connected(options) as desk:
        await desk.ask(DeleteDeployment(name, _who(), drain=drain))
        await desk.until(name, lambda gpus: not gpus, timeout_s, f"{name} is removed")


async def swap_in(options: BusOptions, name: str, gpu: str, timeout_s: float) -> None:
    async with _connected(options) as desk:
        ask = SwapInDeployment(name, time.time() + timeout_s, _who(), gpu)
        await desk.act(
            ask,
            lambda gpus: any(
                state == "resident" and gpu in ("", one) for one, state in gpus.items()
            ),
            timeout_s,
            f"{name} is resident",
        )


async def swap_out(options: BusOptions, name: str, gpu: str, timeout_s: float) -> None:
    async with _connected(options) as desk:
        await desk.act(
            SwapOutDeployment(name, _who(), gpu),
            lambda gpus: (
                not any(state in _ON_DEVICE and gpu in ("", one) for one, state in gpus.items())
            ),
            timeout_s,
            f"{name} is swapped out",
        )


async def move(options: BusOptions, name: str, source: str, gpu: str, timeout_s: float) -> None:
    async with _connected(options) as desk:
        await desk.act(
            MoveDeployment(name, source, gpu, time.time() + timeout_s, _who()),
            lambda gpus: gpus.get(gpu) == "resident" and gpus.get(source) not in _ON_DEVICE,
            timeout_s,
            f"{name} is on {gpu}",
        )


def _checked(name: str, raw: dict[str, Any]) -> Any:
    try:
        return deployment_settings.parse(name, raw)
    except ApiError as error:
        raise click.ClickException(error.info.message) from error


def _who() -> str:
    try:
        return f"hotswap model, {getpass.getuser()}"
    except (OSError, KeyError):  # no such user, as in some containers
        return "hotswap model"


class _Desk:
    """What is asked of the leader, and what records say of it."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._models = Bucket(bus, names.BUCKET_MODELS, DeploymentRecord)
        self._residency = Bucket(bus, names.BUCKET_RESIDENCY, ResidencyRecord)

    async def ask(self, request: AdminRequest) -> AdminAnswer:
        """Raises click.ClickException where it is refused."""
        subject = names.admin_subject(action_of(request), request.model)
        try:
            answer: AdminAnswer = await self._bus.request(subject, request, AdminAnswer)
        except NoResponder as error:
            raise click.ClickException("no scheduler leads; is `hotswap up` running?") from error
        if answer.outcome not in ("done", "accepted"):
            raise click.ClickException(answer.reason)
        return answer

    async def act(self, ask: Ask, condition: Any, timeout_s: float, words: str) -> None:
        answer = await self.ask(ask)
        if answer.outcome == "done":
            click.echo(answer.reason or words)
            return
        if answer.reason:
            click.echo(answer.reason)
        await self.until(ask.model, condition, timeout_s, words)

    async def until(self, name: str, condition: Any, timeout_s: float, words: str) -> None:
        """Wait until ``condition`` holds for where ``name`` is, then say ``words``."""
        give_up_at = time.monotonic() + timeout_s
        while not condition(gpus := await self.gpus_of(name)):
            if time.monotonic() >= give_up_at:
                where = ", ".join(f"{gpu}: {state}" for gpu, state in gpus.items()) or "nowhere"
                raise click.ClickException(f"not within {timeout_s:g} s; {name} is {where}")
            await asyncio.sleep(_POLL_S)
        click.echo(words)

    async def record(self, name: str) -> DeploymentRecord:
        records = {one.spec.name: one for one in (await self._models.items()).values()}
        if name not in records:
            known = ", ".join(sorted(records)) or "none"
            raise click.ClickException(f"there is no deployment {name!r}; there are: {known}")
        return records[name]

    async def gpus_of(self, name: str) -> dict[str, ReplicaState]:
        records = sorted((await self._residency.items()).items())
        return {one.gpu: one.state for _, one in records if one.model == name}

    async def infos(self) -> list[deployment_settings.DeploymentInfo]:
        records = sorted((await self._models.items()).values(), key=lambda one: one.spec.name)
        return [
            deployment_settings.describe(one, await self.gpus_of(one.spec.name)) for one in records
        ]


@asynccontextmanager
async def _connected(options: BusOptions) -> AsyncIterator[_Desk]:
    bus = await Bus.connect(options, service="model", patience_s=5)
    try:
        yield _Desk(bus)
    finally:
        await bus.close()
