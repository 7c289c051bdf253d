"""An answer as an HTTP response: one JSON object, or server-sent events.

Nothing is sent before the first token or the end: until then an error still gets its real
status. But a stream that waits for long begins all the same, with comments about its wait
(`services.api.progress`). One that breaks later ends with one `data: {"error": ...}` event.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable

from litestar.response.base import ASGIResponse
from litestar.types import Receive, Scope, Send
from opentelemetry import trace
from opentelemetry.trace import Status, StatusCode

from services.api.call import ClientLeft
from services.api.errors import ApiError
from services.api.fan import Fan, Told
from services.api.forms import chunks_of, event_bytes, whole
from services.api.parsing import Parsed
from services.api.progress import CHECK_S, EVERY_S, QUIET_S, Progress, comment
from services.api.served import answer_headers, served

log = logging.getLogger(__name__)

_DONE = b"data: [DONE]\n\n"


async def respond(
    parsed: Parsed, fan: Fan, receive: Receive, progress: Progress, progress_after_s: float
) -> ASGIResponse:
    """Wait for the first token or the end, and answer from there. Raises ApiError.

    ``receive`` tells when the client goes away, from here to the end of the response. A stream
    begins after ``progress_after_s`` at the latest, and says why nothing comes; 0: it does not.
    """
    watching = asyncio.create_task(watch(receive, fan.close))

    def close() -> None:
        watching.cancel()
        fan.close()  # nothing, where all calls have ended

    try:
        if parsed.stream and progress_after_s and not await fan.has_news(progress_after_s):
            return EventStream(parsed, fan, None, close, progress)
        told = await fan.read()
        if parsed.stream:
            return EventStream(parsed, fan, told, close, progress if progress_after_s else None)
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
        headers=answer_headers(parsed.ignored, fan.lead),
    )


async def watch(receive: Receive, on_left: Callable[[], None]) -> None:
    """The body has been read: the next thing to come is that the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    on_left()


class EventStream(ASGIResponse):
    """The answer as server-sent events. ``first``: what was read already; None: nothing is there
    yet. ``progress``: for comments while nothing comes; None: there are to be none.
    """

    _should_set_content_length = False

    def __init__(
        self,
        parsed: Parsed,
        fan: Fan,
        first: list[Told] | None,
        close: Callable[[], None],
        progress: Progress | None,
    ) -> None:
        headers = answer_headers(parsed.ignored, fan.lead)
        headers |= {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(status_code=200, media_type="text/event-stream", headers=headers)
        self._parsed = parsed
        self._fan = fan
        self._first = first
        self._close = close
        self._progress = progress

    async def send_body(self, send: Send, receive: Receive) -> None:
        chunks = chunks_of(self._parsed, self._fan)
        try:
            told = self._first
            if told is None:
                told = await self._next(send, 0)
            await _send(send, b"".join(chunks.opening()))
            while True:
                # One event per token, but one write for all that came in the meantime.
                body = b"".join(chunks.told(index, what) for index, what in told)
                if self._fan.is_complete:
                    break
                await _send(send, body)
                told = await self._next(send, QUIET_S)
            last = b"".join(chunks.closing())
            await _send(send, body + last + self._last_comment() + _DONE)
        except ApiError as error:
            log.error("request %s broke in mid-stream: %s", self._fan.request_id, error)
            trace.get_current_span().set_status(Status(StatusCode.ERROR, str(error)))
            with contextlib.suppress(OSError):
                await _send(send, event_bytes(error.body))
        except ClientLeft:
            log.info("request %s: the client left", self._fan.request_id)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _next(self, send: Send, quiet_s: float) -> list[Told]:
        """What comes next. Until then comments after ``quiet_s``, when there is something new to
        say, and every second.
        """
        said, silent_s, within_s = None, 0.0, quiet_s
        while self._progress and not await self._fan.has_news(within_s):
            silent_s += within_s
            within_s = CHECK_S
            now = self._progress.of(self._fan.lead)
            if said is None or silent_s >= EVERY_S or now.is_news_after(said):
                await _send(send, comment(now))
                said, silent_s = now, 0.0
        return await self._fan.read()

    def _last_comment(self) -> bytes:
        """How it was served, where neither the headers nor a last chunk could tell."""
        told = served(self._fan.lead) if self._first is None else None
        return comment(told) if told and not self._parsed.include_usage else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _send(send: Send, body: bytes) -> None:
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": True})
