"""An answer as an HTTP response: one JSON object, or server-sent events.

Nothing is sent before the first token or the end: until then an error still gets its real
status. A stream that breaks later ends with one `data: {"error": ...}` event.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable

from litestar.response.base import ASGIResponse
from litestar.types import Receive, Scope, Send
from opentelemetry import trace
from opentelemetry.trace import Status, StatusCode

from services.api.call import Call, ClientLeft
from services.api.errors import ApiError
from services.api.fan import Fan, Told
from services.api.fields import ignored_header
from services.api.forms import chunks_of, event_bytes, whole
from services.api.parsing import Parsed

log = logging.getLogger(__name__)

_DONE = b"data: [DONE]\n\n"


async def respond(parsed: Parsed, fan: Fan, receive: Receive) -> ASGIResponse:
    """Wait for the first token or the end, and answer from there. Raises ApiError.

    ``receive`` tells when the client goes away, from here to the end of the response.
    """
    watching = asyncio.create_task(watch(receive, fan.close))

    def close() -> None:
        watching.cancel()
        fan.close()  # nothing, where all calls have ended

    try:
        told = await fan.read()
        if parsed.stream:
            return EventStream(parsed, fan, told, close)
        while more := await fan.read():
            told += more
    except ClientLeft:
        close()
        return ASGIResponse(status_code=499)  # nobody reads it; the trace shows it
    except BaseException:
        close()
        raise
    close()
    return ASGIResponse(
        body=whole(parsed, fan, told),
        headers=answer_headers(parsed.ignored, fan),
    )


async def watch(receive: Receive, on_left: Callable[[], None]) -> None:
    """The body has been read: the next thing to come is that the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    on_left()


def answer_headers(ignored: list[str], call: Call | Fan) -> dict[str, str]:
    """What this server adds: how the request was started, and what a swap cost."""
    headers = ignored_header(ignored)
    if started := call.started:
        headers["x-hotswap-start"] = started.start
        headers["x-hotswap-gpu"] = started.gpu
        if started.swap:
            headers["x-hotswap-swap-bytes"] = str(started.swap.num_bytes)
            headers["x-hotswap-swap-seconds"] = f"{started.swap.total_s:.6f}"
    return headers


class EventStream(ASGIResponse):
    """The answer as server-sent events. ``first``: what was read already."""

    _should_set_content_length = False

    def __init__(
        self, parsed: Parsed, fan: Fan, first: list[Told], close: Callable[[], None]
    ) -> None:
        headers = answer_headers(parsed.ignored, fan)
        headers |= {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(status_code=200, media_type="text/event-stream", headers=headers)
        self._parsed = parsed
        self._fan = fan
        self._first = first
        self._close = close

    async def send_body(self, send: Send, receive: Receive) -> None:
        chunks = chunks_of(self._parsed, self._fan)
        try:
            await _send(send, b"".join(chunks.opening()))
            told = self._first
            while True:
                # One event per token, but one write for all that came in the meantime.
                body = b"".join(chunks.told(index, what) for index, what in told)
                if self._fan.is_complete:
                    break
                await _send(send, body)
                told = await self._fan.read()
            await _send(send, body + b"".join(chunks.closing()) + _DONE)
        except ApiError as error:
            log.error("request %s broke in mid-stream: %s", self._fan.request_id, error)
            trace.get_current_span().set_status(Status(StatusCode.ERROR, str(error)))
            with contextlib.suppress(OSError):
                await _send(send, event_bytes(error.body))
        except ClientLeft:
            log.info("request %s: the client left", self._fan.request_id)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _send(send: Send, body: bytes) -> None:
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": True})
