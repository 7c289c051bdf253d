"""A TCP proxy that tests may cut: one client's network, while everybody else's goes on."""

import asyncio
import contextlib


class TcpProxy:
    """Passes bytes between ``url`` and whoever connects to `url` here. ``url``: nats://HOST:PORT."""

    def __init__(self, target: str) -> None:
        host, port = target.rpartition("/")[2].rsplit(":", 1)
        self._target = (host, int(port))
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._port = 0

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self._port}"

    async def start(self) -> None:
        """Listen, on the same port as before if it did."""
        self._server = await asyncio.start_server(self._on_client, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        """Break what is connected, and take no more until the next `start`."""
        if self._server:
            self._server.close()
            self._server = None
        for writer in self._writers:
            writer.transport.abort()
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _on_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
            self._writers.add(far_writer)
            await asyncio.gather(_pass(reader, far_writer), _pass(far_reader, writer))
            self._writers.discard(far_writer)
        except OSError:  # the server is away: so are we
            writer.close()
        self._writers.discard(writer)
        self._tasks.discard(task)


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()
