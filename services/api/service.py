"""The api as a process: bus, catalog, relay, HTTP server, and an orderly end.

start   bind the port, read certificates -> connect -> declare streams -> watch KV ->
        listen for replies -> serve, and drive batches if no other api does
stop    accept no more -> open requests may end -> end the rest -> close the bus
"""

import asyncio
import contextlib
import logging
import resource
import socket
import ssl
from collections.abc import Generator
from functools import partial

import uvicorn
from litestar.types import ASGIApp

from schemas import names
from schemas.batches import BatchRecord
from services.api.admission import Admission
from services.api.app import ENVELOPE_BYTES, build
from services.api.batches.driver import Driver
from services.api.batches.files import Files
from services.api.batches.http import Store
from services.api.catalog import Catalog
from services.api.connection import bounded
from services.api.guard import Guard
from services.api.keyring import Keyring
from services.api.limits import OpenRequests
from services.api.progress import Progress
from services.api.quotas import Quotas
from services.api.relay import Relay
from services.api.waits import Waits
from services.bus import Bucket, Bus, BusError, BusOptions, declare
from services.keys import FIRST_KEY_FILE, BadKey
from services.settings import ApiSettings, Settings, SettingsError, is_loopback

log = logging.getLogger(__name__)

SHUTDOWN_GRACE_S = 10.0
_LAST_WORDS_S = 3  # for writing the errors of the requests that were ended
_BACKLOG = 2048
_OTHER_FILES = 100  # besides connections
# A client whose machine or network is gone says nothing: it is noticed within a minute.
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)


class ApiStartError(SettingsError):
    """The api can not start; the message names key and value."""


class Server(uvicorn.Server):
    """The HTTP server as this api sets it up."""

    def __init__(
        self, app: ASGIApp, api: ApiSettings, certificate: ssl.SSLContext | None = None
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=bounded(api.read_timeout_s, api.write_timeout_s, api.max_connections),
                ssl_context_factory=(lambda config, default: certificate) if certificate else None,
                timeout_keep_alive=api.keep_alive_s,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                backlog=_BACKLOG,
                timeout_graceful_shutdown=int(SHUTDOWN_GRACE_S) + _LAST_WORDS_S,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave the signals alone: the caller has its own, and sets ``stop``."""
        yield


async def run(settings: Settings, bus_options: BusOptions, *, stop: asyncio.Event) -> None:
    """Serve until ``stop`` is set. Raises BusError or ApiStartError where it can not start."""
    api = settings.api
    certificate = _certificate(api)
    _allow_files(api.max_connections + _OTHER_FILES)
    listener = listen(api.host, api.port)
    _say_who_may_come(api)
    try:
        bus = await Bus.connect(bus_options, service="api")
    except BusError:
        listener.close()
        raise
    waits = Waits(bus)
    after = waits.retry_after_s
    quotas = Quotas()
    keyring = Keyring(bus, required=api.requires_keys, gone=quotas.forget)
    catalog = Catalog(
        bus,
        lambda model, why: relay.model_failed(model, why),
        after,
        lambda model, why: relay.model_gone(model, why),
    )
    admission = Admission(keyring, quotas, catalog, api.max_prompt_chars)
    limits = (api.request_timeout_s, api.max_queued_per_model, after)
    relay = Relay(bus, *limits, admit=admission.admit, ended=admission.ended)
    room = OpenRequests(api.max_open_requests, api.max_open_body_bytes, api.read_timeout_s)
    progress = Progress(bus, waits, catalog.states)
    store = Store(Files(bus), Bucket(bus, names.BUCKET_BATCHES, BatchRecord), api.max_file_bytes)
    max_body_bytes = min(api.max_body_bytes, bus.max_payload - ENVELOPE_BYTES)
    driver = Driver(bus, catalog, store.files, store.batches, max_body_bytes, admission.admit)
    driving: asyncio.Task[None] | None = None
    try:
        await declare(bus, api.max_queued_per_model)
        await waits.start()
        await catalog.start()
        await progress.start()
        await keyring.start()
        await _make_first_key(keyring, settings)
        await relay.start()
        app = build(
            bus,
            catalog,
            relay,
            progress,
            store,
            keyring,
            max_body_bytes=api.max_body_bytes,
            progress_after_s=api.progress_after_s,
            guard=partial(Guard, keyring=keyring, quotas=quotas, open_requests=room),
        )
        driving = asyncio.create_task(driver.run())
        await _serve(app, listener, relay, stop, api, certificate)
    finally:
        listener.close()
        if driving:
            driving.cancel()
            await asyncio.gather(driving, return_exceptions=True)
        await relay.drain(0)
        await relay.close()
        await progress.stop()
        await keyring.stop()
        await catalog.stop()
        await waits.stop()
        await bus.close()


async def _serve(
    app: ASGIApp,
    listener: socket.socket,
    relay: Relay,
    stop: asyncio.Event,
    api: ApiSettings,
    certificate: ssl.SSLContext | None,
) -> None:
    server = Server(app, api, certificate)
    host, port = listener.getsockname()[:2]
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    stopping = asyncio.create_task(stop.wait())
    scheme = "https" if certificate else "http"
    log.info("listening on %s://%s:%d", scheme, f"[{host}]" if ":" in host else host, port)
    try:
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        if not serving.done():
            await relay.drain(SHUTDOWN_GRACE_S)
        await serving  # raises what made it end by itself
    finally:
        stopping.cancel()
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, so that a port in use is a clear error. Port 0: any free one."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        why = error.strerror or error
        raise ApiStartError(
            f"api: can not listen on host = {host!r}, port = {port}: {why}"
        ) from error
    for level, option, value in _KEEPALIVE:  # connections inherit them
        listener.setsockopt(level, option, value)
    return listener


def _certificate(api: ApiSettings) -> ssl.SSLContext | None:
    """None: plain HTTP."""
    if not api.tls_cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(api.tls_cert, api.tls_key)
    except (OSError, ValueError) as error:  # SSLError is an OSError
        why = error.strerror if isinstance(error, FileNotFoundError) else error
        raise ApiStartError(
            f"api: tls_cert = {api.tls_cert!r}, tls_key = {api.tls_key!r} can not be used: {why}. "
            "Both must be PEM files, and belong together"
        ) from error
    return context


def _allow_files(num: int) -> None:
    """Every connection is an open file; many systems allow 1024 unless they are asked."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < num:
        soft = num if hard == resource.RLIM_INFINITY else min(num, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft < num:
        words = "this process may open %d files (ulimit -n): too few for api.max_connections"
        log.warning(words, soft)


def _say_who_may_come(api: ApiSettings) -> None:
    if api.requires_keys:
        if not is_loopback(api.host) and not api.tls_cert:
            log.warning("keys and prompts go over the network in the clear: set api.tls_cert")
        return
    words = "API keys are off (api.auth = %r): whoever reaches %s:%d may use every model and change"
    words += " everything. "
    what = (api.auth, api.host, api.port)
    if is_loopback(api.host):
        log.warning(words + "That is whoever is on this machine", *what)
    else:
        log.error(words + "THAT IS NOT ONLY THIS MACHINE: set api.auth = 'on'", *what)


async def _make_first_key(keyring: Keyring, settings: Settings) -> None:
    try:
        await keyring.make_first_key(settings.state_path)
    except (OSError, BadKey) as error:
        file = settings.state_path / FIRST_KEY_FILE
        raise ApiStartError(f"api: no first API key can be made in {file}: {error}") from error
