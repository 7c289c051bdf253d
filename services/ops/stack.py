"""The whole system on one machine: nats-server, scheduler, agents, api, in that order.

What can be seen to be wrong before anything runs is said before anything runs: a port in use,
credentials that can not be read, a server that does not answer.
"""

import asyncio
import logging
import socket
import ssl
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from services.bus import Bus, BusOptions
from services.ops import nats_server
from services.ops.supervisor import Child, Supervisor
from services.settings import GpuSettings, Settings, SettingsError

log = logging.getLogger(__name__)

SHUTDOWN_GRACE_S = 20.0
NATS_PATIENCE_S = 5.0


class StackError(Exception):
    """The system did not come up; the message says which part and where to look."""


@dataclass(frozen=True)
class Endpoints:
    """Where the running system listens, and the credentials of its bus users."""

    api_url: str
    nats_url: str
    credential_files: dict[str, Path]

    def options(self, user: str) -> BusOptions:
        return BusOptions.read(self.credential_files[user], url=self.nats_url)


async def start(
    supervisor: Supervisor, settings: Settings, config_file: Path, gpus: list[GpuSettings]
) -> Endpoints:
    """Start every process of ``settings``. Raises SettingsError, NatsServerError, BusError,
    StackError.

    With ``nats.url`` set no server is started, and ``nats.creds`` serves all services.
    """
    _check_port_free(settings.api.host, settings.api.port)
    _warn_of_missing_folders(settings)
    if settings.nats.url:
        files = dict.fromkeys(nats_server.USERS, Path(settings.nats.creds))
        nats_url = settings.nats.url
        options = BusOptions.read(Path(settings.nats.creds), nats_url, settings.nats.tls_ca)
        await (await Bus.connect(options, service="up", patience_s=NATS_PATIENCE_S)).close()
    else:
        plan = _write_nats_config(settings)
        files, nats_url = plan.credential_files, plan.credentials["admin"].url
        await _start(supervisor, Child("nats-server", plan.command(), grace_s=5.0))

    def service(name: str, user: str, *arguments: str) -> Child:
        command = [sys.executable, "-m", "services.cli", user, *arguments]
        command += ["--config", str(config_file), "--nats", nats_url, "--creds", str(files[user])]
        return Child(name, command, grace_s=SHUTDOWN_GRACE_S)

    await _start(supervisor, service("scheduler", "scheduler"))
    for gpu in gpus:
        await _start(supervisor, service(f"agent-{gpu.name}", "agent", "--gpu", gpu.name))
    await _start(supervisor, service("api", "api"))
    scheme = "https" if settings.api.tls_cert else "http"
    url = f"{scheme}://{_reachable(settings.api.host)}:{settings.api.port}"
    return Endpoints(url, nats_url, files)


def _write_nats_config(settings: Settings) -> nats_server.NatsPlan:
    nats = settings.nats
    tls = nats_server.ServerTls(nats.tls_cert, nats.tls_key, nats.tls_ca) if nats.tls_cert else None
    if tls:
        tls.check()
    try:
        return nats_server.write_config(
            settings.state_path / "nats",
            host=nats.host,
            port=nats_server.free_port(nats.port, nats.host),
            http_host="127.0.0.1",
            http_port=nats_server.free_port(nats.http_port),
            advertised_host=nats.advertised_host or _reachable(nats.host),
            tls=tls,
        )
    except OSError as error:
        raise StackError(f"state_dir = {settings.state_dir!r} can not be used: {error}") from error


async def _start(supervisor: Supervisor, child: Child) -> None:
    try:
        await supervisor.start(child)
    except OSError as error:
        raise StackError(f"{child.name} can not be started: {error}") from error


async def wait_ready(supervisor: Supervisor, endpoints: Endpoints, patience_s: float = 120) -> None:
    """Wait until the api says it is ready. Raises StackError, at once where a child keeps dying."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + patience_s
    why = "no answer"
    while loop.time() < deadline:
        why = await asyncio.to_thread(_probe, f"{endpoints.api_url}/readyz")
        if not why:
            return
        for child in supervisor.children:
            if child.num_starts >= 4:
                raise StackError(f"{child.name} does not start; its log says why")
        await asyncio.sleep(0.1)
    raise StackError(f"not ready after {patience_s:g} s: {why}")


def _probe(url: str) -> str:
    """Empty when ready, else the reason."""
    # It is our own child, and its certificate may well name another host.
    context = ssl._create_unverified_context() if url.startswith("https:") else None
    try:
        with urllib.request.urlopen(url, timeout=2, context=context):
            return ""
    except urllib.error.HTTPError as error:
        return error.read().decode(errors="replace")[:500]
    except OSError as error:
        return str(error)


def _reachable(host: str) -> str:
    """``host`` as it goes into a URL: an address to listen on everywhere is no address to ask."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def _check_port_free(host: str, port: int) -> None:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise SettingsError(f"api.host = {host!r}: {error.strerror}") from error
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise SettingsError(
                f"api.port = {port}: can not listen on {host}:{port}: {error.strerror}. "
                "Stop what listens there, or choose another port"
            ) from error


def _warn_of_missing_folders(settings: Settings) -> None:
    """One model that can not be read keeps nothing else from being served."""
    for name, model in settings.models.items():
        if model.source.startswith("/") and not Path(model.source).exists():
            log.warning("models.%s: source = %r does not exist", name, model.source)
