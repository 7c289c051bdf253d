"""The HTTP side of `bench.api`: raw sockets, so that the client is not what is measured.

One `Connection` is one keep-alive connection, and one request at a time on it. Bytes are kept as
they come; what they say is looked at after the clock has stopped.
"""

import asyncio
import time
from typing import cast

import msgspec

_END = b"0\r\n\r\n"  # of a chunked body
_TOKEN = b'"content":" '


class Connection(asyncio.Protocol):
    """Sends POST requests with JSON bodies, and reads streamed answers."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._transport: asyncio.Transport | None = None
        self._parts: list[bytes] = []
        self._first: asyncio.Future[float] | None = None
        self._end: asyncio.Future[float] | None = None
        self.first_at = 0.0  # perf_counter, of the first token of the last answer

    async def connect(self) -> None:
        """Connect, unless the connection stands: servers close those that are idle for seconds."""
        if self._transport is None or self._transport.is_closing():
            loop = asyncio.get_running_loop()
            await loop.create_connection(lambda: self, "127.0.0.1", self._port)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class

    def send(self, path: str, body: object) -> None:
        """Send a request; `first_token` and `end` are about its answer."""
        assert self._transport, "not connected"
        loop = asyncio.get_running_loop()
        self._parts = []
        self.first_at = 0.0
        self._first, self._end = loop.create_future(), loop.create_future()
        data = msgspec.json.encode(body)
        head = f"POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
        self._transport.write(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)

    def data_received(self, data: bytes) -> None:
        assert self._first
        assert self._end
        self._parts.append(data)
        if not self.first_at:
            if _TOKEN not in (data if len(self._parts) == 1 else self.body):
                return
            self.first_at = time.perf_counter()
            self._first.set_result(self.first_at)
        if data.endswith(_END) or (len(data) < len(_END) and self.body.endswith(_END)):
            self._end.set_result(time.perf_counter())

    def connection_lost(self, exc: Exception | None) -> None:
        for waiting in (self._first, self._end):
            if waiting and not waiting.done():
                waiting.set_exception(ConnectionError(f"closed in mid-answer: {self.body!r}"))
                waiting.exception()  # so that nobody complains where nobody waits

    @property
    def body(self) -> bytes:
        """All of the answer that is here, with its head and chunk sizes."""
        return b"".join(self._parts)

    async def first_token(self) -> float:
        """When the first token came (perf_counter)."""
        assert self._first, "nothing was sent"
        return await self._first

    async def end(self) -> float:
        """When the answer was complete (perf_counter)."""
        assert self._end, "nothing was sent"
        return await self._end

    def events(self) -> bytes:
        """The server-sent events of the answer, without head and chunk sizes."""
        rest = self.body.partition(b"\r\n\r\n")[2]
        events = []
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            num_bytes = int(size, 16)
            events.append(rest[:num_bytes])
            rest = rest[num_bytes + 2 :]
        return b"".join(events)

    def close(self) -> None:
        if self._transport:
            self._transport.abort()
