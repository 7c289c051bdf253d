"""The api as a process: bus, catalog, relay, HTTP server, and an orderly end.

start   bind the port -> connect -> declare streams -> watch KV -> listen for replies -> serve
stop    accept no more -> open requests may end -> end the rest -> close the bus
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Generator

import uvicorn
from litestar.types import ASGIApp

from services.api.app import build
from services.api.catalog import Catalog
from services.api.progress import Progress
from services.api.relay import Relay
from services.api.waits import Waits
from services.bus import Bus, BusError, BusOptions, declare
from services.settings import Settings

log = logging.getLogger(__name__)

SHUTDOWN_GRACE_S = 10.0
_LAST_WORDS_S = 3  # for writing the errors of the requests that were ended
_BACKLOG = 2048


class ApiStartError(Exception):
    """The api can not start; the message names key and value."""


class Server(uvicorn.Server):
    """The HTTP server as this api sets it up."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="httptools",
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
    listener = listen(api.host, api.port)
    try:
        bus = await Bus.connect(bus_options, service="api")
    except BusError:
        listener.close()
        raise
    waits = Waits(bus)
    after = waits.retry_after_s
    relay = Relay(bus, api.request_timeout_s, api.max_queued_per_model, after)
    catalog = Catalog(bus, relay.model_failed, after)
    progress = Progress(bus, waits, catalog.states)
    try:
        await declare(bus, api.max_queued_per_model)
        await waits.start()
        await catalog.start()
        await progress.start()
        await relay.start()
        app = build(
            bus,
            catalog,
            relay,
            progress,
            max_body_bytes=api.max_body_bytes,
            progress_after_s=api.progress_after_s,
        )
        await _serve(app, listener, relay, stop)
    finally:
        listener.close()
        await relay.drain(0)
        await relay.close()
        await progress.stop()
        await catalog.stop()
        await waits.stop()
        await bus.close()


async def _serve(app: ASGIApp, listener: socket.socket, relay: Relay, stop: asyncio.Event) -> None:
    server = Server(app)
    host, port = listener.getsockname()[:2]
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    stopping = asyncio.create_task(stop.wait())
    log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
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
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        why = error.strerror or error
        raise ApiStartError(
            f"api: can not listen on host = {host!r}, port = {port}: {why}"
        ) from error
