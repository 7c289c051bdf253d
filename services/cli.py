"""The `hotswap` command line."""

import asyncio
import logging
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import click

from services import settings, telemetry
from services.bus import BusError, BusOptions
from services.keys import FIRST_KEY_FILE
from services.ops import model_command, nats_server, stack
from services.ops.keys import KEY_COMMANDS
from services.ops.supervisor import Supervisor, stop_on_signals
from services.scheduler.simulate.command import simulate
from services.scheduler.simulate.traces_command import traffic
from services.settings import GpuSettings, ModelSettings, Settings, SettingsError

log = logging.getLogger("hotswap")

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

CONFIG_NAME = "hotswap.toml"

config_option = click.option(
    "--config",
    "config_file",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path(CONFIG_NAME),
    show_default=True,
    help="The configuration file.",
)


def bus_options(command: F) -> F:
    """--nats and --creds, for a server of your own instead of the embedded one."""
    for option in (
        click.option("--creds", type=click.Path(path_type=Path), help="JSON credentials file."),
        click.option("--nats", "nats_url", help="URL of a running NATS server."),
    ):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="hotswap")
def cli() -> None:
    """Many models, few GPUs: hot-swapped behind one OpenAI-compatible API.

    \b
    hotswap demo             see it work, on any machine
    hotswap up               serve the models of hotswap.toml
    hotswap status           what is resident where
    hotswap model            deploy, change, move and remove models while everything runs
    hotswap explain MODEL    what the scheduler decided about a model, and why
    hotswap trace            where the time of a request went
    hotswap verify           check a model's weights in memory against what was loaded
    hotswap keys             make, list and withdraw API keys
    hotswap simulate         traffic of a day on simulated GPUs; how many GPUs are needed
    hotswap traffic          public traces made into traffic for hotswap simulate

    \b
    Exit status:
      0    done, or stopped by Ctrl-C or SIGTERM while serving
      1    an error, told in one line: configuration, NATS server, a part that does not start
      2    wrong usage of the command line
      130  interrupted before it was done
    """


cli.add_command(simulate)
cli.add_command(traffic)


@cli.command()
@config_option
@bus_options
def up(config_file: Path, nats_url: str | None, creds: Path | None) -> None:
    """Serve the models of the configuration file, until Ctrl-C.

    Starts a NATS server (unless --nats names one), the scheduler, one agent per GPU and the
    HTTP API; restarts any of them that dies; stops all in order.
    """
    config = _load(config_file)
    if nats_url or config.nats.url:
        config = _with_nats(config, nats_url, creds)
    telemetry.set_up("up", span_folder=None, otlp_endpoint="", log_level=config.telemetry.log_level)
    asyncio.run(_up(config, config_file))


async def _up(config: Settings, config_file: Path) -> None:
    stop = stop_on_signals()
    supervisor = Supervisor()
    try:
        endpoints = await stack.start(supervisor, config, config_file, _gpus(config))
        ready = asyncio.create_task(stack.wait_ready(supervisor, endpoints))
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait((ready, stopped), return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            ready.result()
            click.echo(
                f"\nhotswap is ready: {len(config.models)} models at {endpoints.api_url}/v1\n"
                f"  try    curl {endpoints.api_url}/v1/models\n"
                f"  docs   {endpoints.api_url}/schema\n"
                f"  bus    {endpoints.nats_url}, {endpoints.credential_files['admin']}\n"
                f"{_about_keys(config)}"
            )
        else:
            ready.cancel()
        await stopped
        click.echo("stopping ...")
    finally:
        await supervisor.stop()


def _about_keys(config: Settings) -> str:
    if not config.api.requires_keys:
        return ""
    first = config.state_path / FIRST_KEY_FILE
    if not first.exists():
        return "  keys   hotswap keys create NAME\n"
    return f"  keys   Authorization: Bearer KEY; the first KEY is in {first}\n"


@cli.command()
@click.option(
    "--dir",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(".hotswap/demo"),
    show_default=True,
    help="Where the demo keeps its models, logs and spans.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write results there.")
def demo(folder: Path, json_file: Path | None) -> None:
    """Three models on a device that holds one and a half: cold, switched and warm requests.

    Makes three small models (once), starts the whole system, and measures time to first
    token when the model comes from disk, when another model held the memory, and when it
    was there already.
    """
    from services.demo import main as main_job

    asyncio.run(main_job.run(folder.absolute(), json_file))


@cli.command()
@config_option
@bus_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def status(config_file: Path, nats_url: str | None, creds: Path | None, as_json: bool) -> None:
    """Show every GPU and where each model is."""
    from services.ops import status as status_view

    config = _load(config_file)
    asyncio.run(status_view.run(_bus_options(config, nats_url, creds, "admin"), as_json))


@cli.command()
@config_option
@bus_options
@click.argument("model")
@click.option("--timeout", "timeout_s", default=300.0, show_default=True, help="Seconds to wait.")
def verify(
    config_file: Path, nats_url: str | None, creds: Path | None, model: str, timeout_s: float
) -> None:
    """Check every page of MODEL's weights, wherever they are in memory, against what was loaded.

    Damaged weights are dropped and loaded again from their files; the exit status is 1 then.
    """
    from services.ops import verify as verify_view

    options = _bus_options(_load(config_file), nats_url, creds, "admin")
    sys.exit(asyncio.run(verify_view.run(options, model, timeout_s)))


@cli.command()
@config_option
@bus_options
@click.argument("model")
@click.option(
    "--last", type=click.IntRange(1), default=5, show_default=True, help="So many decisions."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def explain(
    config_file: Path,
    nats_url: str | None,
    creds: Path | None,
    model: str,
    last: int,
    as_json: bool,
) -> None:
    """Say where MODEL is, who waits for it and how long, and why it was brought in or had to leave.

    Each decision names the GPUs that were looked at. What they cost is in seconds; of ranks 1 to 3,
    which hurt nobody, the cheapest is taken, of the others the lowest.
    """
    from services.ops import explain as explain_view

    options = _bus_options(_load(config_file), nats_url, creds, "admin")
    asyncio.run(explain_view.run(options, model, last, as_json))


@cli.group()
@config_option
@bus_options
@click.pass_context
def model(
    context: click.Context, config_file: Path, nats_url: str | None, creds: Path | None
) -> None:
    """Deployments, changed while everything runs; what /v1/deployments does over HTTP.

    Changes are kept: hotswap.toml says of a model again what it said before only where its table
    in the file is changed.
    """
    context.obj = _bus_options(_load(config_file), nats_url, creds, "admin")


model_command.add_commands(model)


@cli.command()
@config_option
@click.argument("trace_id", required=False)
@click.option("--last", default=1, show_default=True, help="Show this many of the newest traces.")
def trace(config_file: Path, trace_id: str | None, last: int) -> None:
    """Print a request's trace as a tree: TRACE_ID (or its start), or the newest.

    The id is in every answer's x-trace-id header.
    """
    from services.ops import trace_view

    config = _load(config_file)
    trace_view.show(config.state_path / "spans", trace_id, last)


@cli.group()
@config_option
@bus_options
@click.pass_context
def keys(
    context: click.Context, config_file: Path, nats_url: str | None, creds: Path | None
) -> None:
    """Make, list, change and withdraw API keys. Changes apply at once.

    \b
    hotswap keys create ada --model 'llama*' --requests-per-minute 60
    hotswap keys create ops --admin
    hotswap keys --config other.toml list
    """
    context.obj = lambda: _bus_options(_load(config_file), nats_url, creds, "admin")


for command in KEY_COMMANDS:
    keys.add_command(command)


@cli.command()
@config_option
@bus_options
def api(config_file: Path, nats_url: str | None, creds: Path | None) -> None:
    """Run the HTTP API alone. Any number may run."""
    config, options = _prepare("api", config_file, nats_url, creds)
    from services.api.service import run

    _serve(lambda stop: run(config, options, stop=stop))


@cli.command()
@config_option
@bus_options
def scheduler(config_file: Path, nats_url: str | None, creds: Path | None) -> None:
    """Run the scheduler alone. Of several, one leads and the others stand by."""
    config, options = _prepare("scheduler", config_file, nats_url, creds)
    from services.scheduler.service import run

    _serve(lambda stop: run(config, options, stop=stop))


@cli.command()
@config_option
@bus_options
@click.option("--gpu", "gpu_name", help="Which GPU of the configuration. Default: the only one.")
def agent(
    config_file: Path, nats_url: str | None, creds: Path | None, gpu_name: str | None
) -> None:
    """Run the agent of one GPU alone."""
    config = _load(config_file)
    gpus = {gpu.name: gpu for gpu in _gpus(config)}
    if gpu_name is None and len(gpus) == 1:
        gpu_name = next(iter(gpus))
    if gpu_name not in gpus:
        raise SettingsError(f"--gpu must name one of: {', '.join(gpus)}")
    config, options = _prepare("agent", config_file, nats_url, creds, f"agent-{gpu_name}")
    from services.gpu_agent.service import run

    _serve(lambda stop: run(config, gpus[gpu_name], options, stop=stop))


@cli.command("nats-config")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--listen", default="0.0.0.0", show_default=True, help="Address to listen on.")
@click.option("--host", default="nats", show_default=True, help="Name the services reach it by.")
@click.option("--port", default=4222, show_default=True)
@click.option("--http-port", default=8222, show_default=True, help="Monitoring port.")
@click.option("--store", default="/data", show_default=True, help="JetStream's folder.")
@click.option("--tls-cert", default="", help="The server's certificate: a PEM file, as it sees it.")
@click.option("--tls-key", default="", help="Its key.")
@click.option("--tls-ca", default="", help="What clients check it with. Default: the system's.")
def nats_config(
    out: Path,
    listen: str,
    host: str,
    port: int,
    http_port: int,
    store: str,
    tls_cert: str,
    tls_key: str,
    tls_ca: str,
) -> None:
    """Write nats-server.conf and a credentials file per service into a folder.

    For a NATS server of your own; `hotswap up` does this for its embedded one. Without --tls-cert
    and --tls-key passwords and prompts cross the network in the clear: only for one of its own.
    """
    if bool(tls_cert) != bool(tls_key):
        raise click.UsageError("--tls-cert and --tls-key: give both, or neither")
    tls = nats_server.ServerTls(tls_cert, tls_key, tls_ca) if tls_cert else None
    if not tls and not settings.is_loopback(listen):
        click.echo("no TLS: let nobody else onto this server's network", err=True)
    plan = nats_server.write_config(
        out,
        host=listen,
        port=port,
        http_port=http_port,
        store_dir=Path(store),
        advertised_host=host,
        tls=tls,
    )
    click.echo(f"wrote {plan.config_file} and {', '.join(f'{u}.json' for u in nats_server.USERS)}")


@cli.command("demo-models")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
def demo_models(out: Path) -> None:
    """Make the three small demo models (Llama, Mistral, Falcon) into a folder."""
    from services.demo.models import make_demo_models

    def on_progress(what: str, done: int, total: int) -> None:
        click.echo(f"[{done}/{total}] {what}")

    for folder in make_demo_models(out, on_progress):
        click.echo(folder)


# -- what the commands share -------------------------------------------------------------


def _load(config_file: Path) -> Settings:
    if not config_file.exists():
        raise SettingsError(
            f"{config_file} does not exist. Copy deploy/config.example.toml to it and name your "
            "models, give another file with --config, or try `hotswap demo`"
        )
    config = settings.load(config_file)
    for name, model in config.models.items():
        if model.defaults or model.overrides:
            _check_presets(config_file, name, model)
    return config


def _check_presets(config_file: Path, name: str, model: ModelSettings) -> None:
    """What the api would refuse of them, at once."""
    from services.api import presets
    from services.api.errors import ApiError

    try:
        presets.check(model.defaults, model.overrides)
    except ApiError as error:
        raise SettingsError(f"{config_file}: models.{name}: {error.info.message}") from error


def _with_nats(config: Settings, nats_url: str | None, creds: Path | None) -> Settings:
    import msgspec

    url = nats_url or config.nats.url
    file = str(creds) if creds else config.nats.creds
    if not file:
        raise SettingsError(f"nats: {url} needs credentials: give --creds FILE, or set nats.creds")
    nats = msgspec.structs.replace(config.nats, url=url, creds=file)
    return msgspec.structs.replace(config, nats=nats)


def _bus_options(
    config: Settings, nats_url: str | None, creds: Path | None, user: str
) -> BusOptions:
    """--creds, else nats.creds, else what `hotswap up` left in the state folder."""
    file = creds or (Path(config.nats.creds) if config.nats.creds else None)
    if file is None:
        file = config.state_path / "nats" / f"{user}.json"
        if not file.exists():
            raise BusError(
                f"no NATS credentials: {file} does not exist. Is `hotswap up` running with this "
                "configuration? Else give --nats URL --creds FILE"
            )
    return BusOptions.read(file, nats_url or config.nats.url or None, config.nats.tls_ca)


def _prepare(
    user: str,
    config_file: Path,
    nats_url: str | None,
    creds: Path | None,
    service: str | None = None,
) -> tuple[Settings, BusOptions]:
    config = _load(config_file)
    telemetry.set_up(
        service or user,
        span_folder=config.state_path / "spans" if config.telemetry.span_files else None,
        otlp_endpoint=config.telemetry.otlp_endpoint,
        log_level=config.telemetry.log_level,
    )
    return config, _bus_options(config, nats_url, creds, user)


def _gpus(config: Settings) -> list[GpuSettings]:
    if config.gpus:
        return list(config.gpus)
    from services.gpu_agent.detect import detect_gpus

    return detect_gpus()


def _serve(run: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    """Run one service until SIGINT or SIGTERM."""
    import uvloop

    async def main() -> None:
        await run(stop_on_signals())

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())
    finally:
        telemetry.shut_down()


def main() -> None:
    """Entry point: known errors become one line and exit status 1."""
    try:
        cli(standalone_mode=False)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except (SettingsError, BusError, nats_server.NatsServerError, stack.StackError) as error:
        click.echo(f"hotswap: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
