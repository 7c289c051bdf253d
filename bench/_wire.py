"""A nats-server of its own for a benchmark, and two parties on it, typed and raw."""

import asyncio
import contextlib
import tempfile
import time
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncIterator
from pathlib import Path

import nats
from nats.aio.client import Client

from services.bus import Bus, BusOptions
from services.ops.nats_server import free_port, write_config


class Turns:
    """Counts messages in, and tells when as many as expected have come."""

    def __init__(self) -> None:
        self._left = 0
        self._done: asyncio.Future[None] | None = None

    def expect(self, num_messages: int) -> "asyncio.Future[None]":
        """Done once ``num_messages`` more have come."""
        self._left = num_messages
        self._done = asyncio.get_running_loop().create_future()
        return self._done

    def come(self) -> None:
        """One message is here."""
        self._left -= 1
        if self._left == 0 and self._done and not self._done.done():
            self._done.set_result(None)


class Wire:
    """One connection per party and kind. ``near`` measures, ``far`` answers."""

    def __init__(self, near: Bus, far: Bus, raw_near: Client, raw_far: Client) -> None:
        self.near = near
        self.far = far
        self.raw_near = raw_near
        self.raw_far = raw_far

    async def flush(self) -> None:
        """Wait until the server knows every subscription."""
        for bus in (self.near, self.far):
            await bus.flush()
        for client in (self.raw_near, self.raw_far):
            await client.flush()


@contextlib.asynccontextmanager
async def open_wire() -> AsyncIterator[Wire]:
    """Start a nats-server on free ports, connect, and stop it in the end."""
    with tempfile.TemporaryDirectory(prefix="hotswap-bench-") as folder:
        plan = write_config(Path(folder), port=free_port(0), http_port=free_port(0))
        async with contextlib.AsyncExitStack() as stack:
            server = await asyncio.create_subprocess_exec(
                *plan.command(), stdout=DEVNULL, stderr=DEVNULL
            )
            stack.push_async_callback(server.wait)
            stack.callback(server.terminate)
            user = plan.credentials["admin"]
            buses = [await Bus.connect(user, service=f"bench-{n}") for n in range(2)]
            clients = [await _raw(user) for _ in range(2)]
            for close in (*(bus.close for bus in buses), *(client.close for client in clients)):
                stack.push_async_callback(close)
            yield Wire(buses[0], buses[1], clients[0], clients[1])


async def _raw(user: BusOptions) -> Client:
    return await nats.connect(user.url, user=user.user, password=user.password)


def per(num_times: int, began: float) -> float:
    """Seconds each of ``num_times`` took since ``began``."""
    return (time.perf_counter() - began) / num_times
