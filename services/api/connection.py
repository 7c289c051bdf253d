"""One client's connection: uvicorn's, which in itself waits for ever and reads any head.

    accepted | head    | request ............ response | idle        | head ...
             | 408/431 | `guard`, `limits`             | keep_alive_s
                       `-- not taken by the client for write_timeout_s: cut off

Beyond the transport's high-water mark (64 KiB) nothing more of an answer is written until the
client has taken some of it; what comes from the model waits in the `Call`, which is bounded too.
"""

import asyncio
import http
from typing import Any, TypeAlias

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from services.api.errors import RETRY_AFTER_S, ApiError

MAX_HEAD_BYTES = 64 * 1024

ProtocolClass: TypeAlias = type["Connection"]


class Connection(HttpToolsProtocol):
    """With bounds. Made by `bounded`."""

    read_timeout_s: float
    write_timeout_s: float
    max_connections: int

    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _in_head = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            words = f"This server has {self.max_connections} connections, as many as it takes "
            self._refuse(503, "server_overloaded", words + "(api.max_connections); try again.")
            return
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        super().connection_lost(exc)

    # -- heads in --------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self.parser is None or self.transport.is_closing():
            return  # refused already
        before = self._head_bytes if self._in_head else 0
        super().data_received(data)
        self._head_bytes = before + len(data)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES:
            words = f"The request's headers have more than {MAX_HEAD_BYTES} bytes."
            self._refuse(431, "headers_too_large", words)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if not self._in_head:
            self._wait_for_head()

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self._head_timer:
            self._head_timer.cancel()
            self._head_timer = None
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "invalid_http", f"This is no valid HTTP request: {msg}")

    def _wait_for_head(self) -> None:
        self._in_head, self._head_bytes = True, 0
        self._head_timer = self.loop.call_later(self.read_timeout_s, self._on_head_timeout)

    def _on_head_timeout(self) -> None:
        self._head_timer = None
        if self.cycle and not self.cycle.response_complete:  # one begun while an answer goes on
            self._head_timer = self.loop.call_later(self.read_timeout_s, self._on_head_timeout)
            return
        if not self._head_bytes:  # it never said a word
            self.transport.close()
            return
        words = "The request's headers did not come in time (api.read_timeout_s)."
        self._refuse(408, "request_timeout", words)

    # -- answers out -----------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._cut_off_later()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer and not self.transport.is_closing():
            self._write_timer.cancel()
            self._write_timer = None

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._cut_off_later()  # what is still unsent keeps the transport open

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._cut_off_later()

    def _cut_off_later(self) -> None:
        if not self._write_timer:
            self._write_timer = self.loop.call_later(self.write_timeout_s, self.transport.abort)

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer without any request, and close. In the middle of another answer: just close."""
        if self.cycle and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()
            return
        error = ApiError(status, code, message)
        head = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}"]
        head += ["content-type: application/json", f"content-length: {len(error.body)}"]
        head += ["connection: close"]
        if status == 503:
            head += [f"retry-after: {RETRY_AFTER_S}"]
        self._stop_timers()
        self.transport.write("\r\n".join([*head, "", ""]).encode() + error.body)
        self.transport.close()
        self._cut_off_later()

    def _stop_timers(self) -> None:
        for timer in (self._head_timer, self._write_timer):
            if timer:
                timer.cancel()
        self._head_timer = self._write_timer = None


def bounded(read_timeout_s: float, write_timeout_s: float, max_connections: int) -> ProtocolClass:
    """A class of connections with these bounds, for `uvicorn.Config`."""
    bounds: dict[str, Any] = {
        "read_timeout_s": read_timeout_s,
        "write_timeout_s": write_timeout_s,
        "max_connections": max_connections,
    }
    return type("BoundedConnection", (Connection,), bounds)
