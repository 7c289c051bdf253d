"""`hotswap keys`: API keys in the bucket HS_KEYS, by an operator with NATS credentials.

Works whether an api runs or not; every running one follows the bucket. A key is shown once.
"""

import asyncio
import contextlib
import json
import re
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import click
import msgspec
from rich.console import Console
from rich.table import Table

from schemas import names
from schemas.keys import KeyRecord
from services import keys
from services.bus import Bucket, Bus, BusOptions
from services.bus.topology import declare_bucket

F = TypeVar("F", bound=Callable[..., Any])
Connect = Callable[[], BusOptions]  # what `hotswap keys` leaves for its commands

_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class _Lifetime(click.ParamType[int | None]):
    """``30d`` as unix seconds from now; ``never`` as None."""

    name = "LIFETIME"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | None:
        if value == "never":
            return None
        match = re.fullmatch(r"(\d{1,6})([smhdw])", str(value))
        if not match:
            self.fail(f"{value!r} is not like 12h, 30d or never", param, ctx)
        return int(time.time()) + int(match[1]) * _UNIT_S[match[2]]


class _Limit(click.ParamType[int | None]):
    """A number; ``none`` as None."""

    name = "N|none"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | None:
        if value == "none":
            return None
        if not re.fullmatch(r"\d{1,12}", str(value)):
            self.fail(f"{value!r} is neither a number nor none", param, ctx)
        return int(value)


def _fields(command: F) -> F:
    """What may be said of a key; what is left out of a change stays as it is."""
    for option in (
        click.option("--expires", "expires_at", type=_Lifetime(), help="E.g. 12h, 30d or never."),
        click.option("--max-concurrent", type=_Limit(), help="Requests at once."),
        click.option("--tokens-per-minute", type=_Limit(), help="Of prompts and answers."),
        click.option("--requests-per-minute", type=_Limit(), help="Per api process."),
        click.option(
            "--model", "models", multiple=True, help="A deployment it may use, or a pattern; again."
        ),
    ):
        command = option(command)
    return command


def _said(context: click.Context, fields: dict[str, Any]) -> dict[str, Any]:
    """The options that were given on the command line."""
    given = click.core.ParameterSource.COMMANDLINE
    return {
        name: value for name, value in fields.items() if context.get_parameter_source(name) == given
    }


@click.command()
@click.argument("name")
@click.option("--admin", is_flag=True, help="May also change deployments and keys.")
@click.option("--stdin", is_flag=True, help="Take the key from standard input: one you have.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_fields
@click.pass_context
def create(
    context: click.Context, /, name: str, admin: bool, stdin: bool, as_json: bool, **fields: Any
) -> None:
    """Make a key for NAME (a person or a program) and print it, this once."""
    given = sys.stdin.readline().strip() if stdin else ""
    if stdin and not given:
        raise click.UsageError("--stdin: no key came")
    with _usage_errors():
        role = "admin" if admin else "user"
        key, record = keys.make(name, key=given, role=role, **_said(context, fields))

    async def write(bucket: Bucket[KeyRecord]) -> None:
        if (await bucket.get(record.id)).value is not None:
            raise click.ClickException(f"there is such a key already: {record.id}")
        await bucket.put(record.id, record)

    asyncio.run(_with_bucket(context.obj, write))
    if as_json:
        click.echo(json.dumps({**_told(record), "key": key}, indent=2))
    else:
        click.echo(key)
        click.echo(f"{record.role} key {record.id} for {name}; it is not shown again", err=True)


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.pass_context
def list_(context: click.Context, as_json: bool) -> None:
    """Show all keys, without the keys themselves."""
    found: list[KeyRecord] = []

    async def read(bucket: Bucket[KeyRecord]) -> None:
        found.extend((await bucket.items()).values())

    asyncio.run(_with_bucket(context.obj, read))
    found.sort(key=lambda record: (record.created_at, record.id))
    if as_json:
        click.echo(json.dumps([_told(record) for record in found], indent=2))
    else:
        Console().print(_table(found))


@click.command()
@click.argument("key")
@click.option("--name", help="Another name.")
@click.option("--all-models", is_flag=True, help="No restriction to models any more.")
@click.option("--enable/--disable", "enabled", default=None, help="Switch it on, or off for now.")
@click.option("--role", type=click.Choice(["user", "admin"]), help="What it may do.")
@_fields
@click.pass_context
def change(
    context: click.Context, /, key: str, all_models: bool, enabled: bool | None, **fields: Any
) -> None:
    """Change KEY (an id, or a name) in what is said; the rest stays."""
    said = _said(context, fields)
    if enabled is not None:
        said["disabled"] = not enabled
    if all_models:
        said["models"] = ()
    if not said:
        raise click.UsageError("nothing to change; see --help")

    async def write(bucket: Bucket[KeyRecord]) -> None:
        record, revision = await _find(bucket, key)
        with _usage_errors():
            record = keys.changed(record, **said)
        await bucket.put(record.id, record, expect=revision)
        click.echo(f"changed {keys.describe(record)}")

    asyncio.run(_with_bucket(context.obj, write))


@click.command()
@click.argument("key")
@click.pass_context
def revoke(context: click.Context, key: str) -> None:
    """Withdraw KEY (an id, or a name) for good. Requests that are under way may end."""

    async def write(bucket: Bucket[KeyRecord]) -> None:
        record, revision = await _find(bucket, key)
        await bucket.delete(record.id, expect=revision)
        click.echo(f"withdrew {keys.describe(record)}")

    asyncio.run(_with_bucket(context.obj, write))


KEY_COMMANDS = (create, list_, change, revoke)


async def _with_bucket(
    connect: Connect, work: Callable[[Bucket[KeyRecord]], Awaitable[None]], patience_s: float = 5.0
) -> None:
    bus = await Bus.connect(connect(), service="keys", patience_s=patience_s)
    try:
        await declare_bucket(bus, names.BUCKET_KEYS)  # no service may have run yet
        await work(Bucket(bus, names.BUCKET_KEYS, KeyRecord))
    finally:
        await bus.close()


async def _find(bucket: Bucket[KeyRecord], name_or_id: str) -> tuple[KeyRecord, int]:
    """The key and its revision. Raises ClickException where it is not one key."""
    found = keys.by_name((await bucket.items()).values(), name_or_id)
    if len(found) > 1:
        ids = ", ".join(record.id for record in found)
        raise click.ClickException(f"{name_or_id!r} is the name of several keys; say which: {ids}")
    if found:
        entry = await bucket.get(found[0].id)
        if entry.value:
            return entry.value, entry.revision
    raise click.ClickException(f"there is no key {name_or_id!r}; see `hotswap keys list`")


def _told(record: KeyRecord) -> dict[str, Any]:
    told: dict[str, Any] = msgspec.to_builtins(msgspec.structs.asdict(record))
    del told["hash"]
    return told


def _table(records: list[KeyRecord]) -> Table:
    table = Table()
    table.add_column("id", no_wrap=True)  # it is copied from here
    for column in ("name", "role", "models", "requests/min", "tokens/min", "at once", "until"):
        table.add_column(column, overflow="fold")
    now = time.time()
    for record in records:
        until = "never" if record.expires_at is None else _date(record.expires_at)
        if keys.has_expired(record, now):
            until = f"expired {until}"
        limits = [str(getattr(record, field) or "-") for field in keys.LIMITS]
        models = ", ".join(record.models) or "all"
        state = "off" if record.disabled else until
        table.add_row(record.id, record.name, record.role, models, *limits, state)
    return table


def _date(at: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


@contextlib.contextmanager
def _usage_errors() -> Iterator[None]:
    try:
        yield
    except keys.BadKey as error:
        raise click.UsageError(str(error)) from error
