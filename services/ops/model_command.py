"""The `hotswap model` commands: see `services.ops.deployments`."""

import asyncio
from types import ModuleType

import click

from services.bus import BusOptions

# Set by the group from --config, --nats and --creds: what its commands connect with.
_pass_options = click.make_pass_decorator(BusOptions)
_timeout = click.option(
    "--timeout", "timeout_s", default=60.0, show_default=True, help="Seconds to wait until done."
)
_gpu = click.option("--gpu", default="", help="Which GPU; else any, or every one.")


def _jobs() -> ModuleType:
    """What the commands do. It needs the api's modules, which other commands can do without."""
    from services.ops import deployments

    return deployments


def add_commands(group: click.Group) -> None:
    """Give ``group`` the commands of this file; it must leave a `BusOptions` as context object."""
    for command in (
        show,
        deploy,
        set_,
        undeploy,
        swap_in,
        swap_out,
        move,
        drain,
        undrain,
        pin,
        unpin,
    ):
        group.add_command(command)


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@_pass_options
def show(options: BusOptions, as_json: bool) -> None:
    """List the deployments, with their versions and where they are."""
    asyncio.run(_jobs().show(options, as_json))


@click.command()
@click.argument("name")
@click.argument("source")
@click.option("--set", "pairs", multiple=True, metavar="KEY=VALUE", help="A setting, as in TOML.")
@_pass_options
def deploy(options: BusOptions, name: str, source: str, pairs: tuple[str, ...]) -> None:
    """Deploy SOURCE (a folder, a hub id, s3://...) as NAME, or replace all settings of NAME."""
    asyncio.run(_jobs().deploy(options, name, _jobs().absolute(source), pairs))


@click.command("set")
@click.argument("name")
@click.argument("pairs", nargs=-1, required=True, metavar="KEY=VALUE...")
@_pass_options
def set_(options: BusOptions, name: str, pairs: tuple[str, ...]) -> None:
    """Change settings of NAME while it serves. Values are as in TOML; KEY=default: the default."""
    asyncio.run(_jobs().change(options, name, pairs))


@click.command()
@click.argument("name")
@click.option("--drain/--no-drain", default=True, show_default=True, help="Let answers end.")
@_timeout
@_pass_options
def undeploy(options: BusOptions, name: str, drain: bool, timeout_s: float) -> None:
    """Remove NAME: no more requests, then out of every memory."""
    asyncio.run(_jobs().remove(options, name, drain, timeout_s))


@click.command("swap-in")
@click.argument("name")
@_gpu
@_timeout
@_pass_options
def swap_in(options: BusOptions, name: str, gpu: str, timeout_s: float) -> None:
    """Bring NAME in though nobody waits for it."""
    asyncio.run(_jobs().swap_in(options, name, gpu, timeout_s))


@click.command("swap-out")
@click.argument("name")
@_gpu
@_timeout
@_pass_options
def swap_out(options: BusOptions, name: str, gpu: str, timeout_s: float) -> None:
    """Have NAME leave GPU memory when its answers have ended; the next request brings it back."""
    asyncio.run(_jobs().swap_out(options, name, gpu, timeout_s))


@click.command()
@click.argument("name")
@click.argument("source", metavar="FROM")
@click.argument("gpu", metavar="TO")
@_timeout
@_pass_options
def move(options: BusOptions, name: str, source: str, gpu: str, timeout_s: float) -> None:
    """Move NAME from one GPU to another; it serves all the while."""
    asyncio.run(_jobs().move(options, name, source, gpu, timeout_s))


def _setting(command: str, words: str, pair: str) -> click.Command:
    @click.command(command, help=words)
    @click.argument("name")
    @_pass_options
    def run(options: BusOptions, name: str) -> None:
        asyncio.run(_jobs().change(options, name, (pair,)))

    return run


drain = _setting("drain", "Take no new requests for NAME until undrained.", "drained=true")
undrain = _setting("undrain", "Take requests for NAME again.", "drained=false")
pin = _setting("pin", "Keep NAME in GPU memory whatever others need.", "pinned=true")
unpin = _setting("unpin", "Let NAME leave GPU memory for others again.", "pinned=false")
