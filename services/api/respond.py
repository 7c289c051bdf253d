"""A call's answer as an HTTP response: one JSON object, or server-sent events.

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

from schemas.stream import Finished
from services.api.answer import Piece
from services.api.call import Call, ClientLeft
from services.api.errors import ApiError
from services.api.forms import chunks_of, event_bytes, whole
from services.api.parsing import Parsed
from services.api.progress import CHECK_S, EVERY_S, QUIET_S, Progress, comment
from services.api.relay import Relay
from services.api.served import answer_headers, served

log = logging.getLogger(__name__)

_DONE = b"data: [DONE]\n\n"


async def respond(
    parsed: Parsed,
    call: Call,
    relay: Relay,
    receive: Receive,
    progress: Progress,
    progress_after_s: float,
) -> ASGIResponse:
    """Wait for the first token or the end, and answer from there. Raises ApiError.

    ``receive`` tells when the client goes away, from here to the end of the response. A stream
    begins after ``progress_after_s`` at the latest, and says why nothing comes; 0: it does not.
    """
    watching = asyncio.create_task(watch(receive, relay, call))

    def close() -> None:
        watching.cancel()
        relay.client_left(call)  # nothing, where the call has ended

    try:
        if parsed.stream and progress_after_s and not await call.has_news(progress_after_s):
            return EventStream(parsed, call, None, close, progress)
        pieces = await call.read()
        if parsed.stream:
            return EventStream(parsed, call, pieces, close, progress if progress_after_s else None)
        while more := await call.read():
            pieces += more
    except ClientLeft:
        close()
        return ASGIResponse(status_code=499)  # nobody reads it; the trace shows it
    except BaseException:
        close()
        raise
    close()
    return ASGIResponse(
        body=whole(parsed, call, pieces, _finished(call)),
        headers=answer_headers(parsed.ignored, call),
    )


async def watch(receive: Receive, relay: Relay, call: Call) -> None:
    """The body has been read: the next thing to come is that the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    relay.client_left(call)


class EventStream(ASGIResponse):
    """The answer as server-sent events. ``first``: the pieces read already; None: there are none
    yet. ``progress``: for comments while nothing comes; None: there are to be none.
    """

    _should_set_content_length = False

    def __init__(
        self,
        parsed: Parsed,
        call: Call,
        first: list[Piece] | None,
        close: Callable[[], None],
        progress: Progress | None,
    ) -> None:
        headers = answer_headers(parsed.ignored, call)
        headers |= {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(status_code=200, media_type="text/event-stream", headers=headers)
        self._parsed = parsed
        self._call = call
        self._first = first
        self._close = close
        self._progress = progress

    async def send_body(self, send: Send, receive: Receive) -> None:
        chunks = chunks_of(self._parsed, self._call)
        try:
            pieces = self._first
            if pieces is None:
                pieces = await self._next(send, 0)
            await _send(send, b"".join(chunks.opening()))
            while pieces:
                # One event per token, but one write for all that came in the meantime.
                told = (piece for piece in pieces if piece.text or piece.logprobs)
                await _send(send, b"".join(chunks.piece(piece) for piece in told))
                pieces = await self._next(send, QUIET_S)
            last = b"".join(chunks.closing(_finished(self._call)))
            await _send(send, last + self._last_comment() + _DONE)
        except ApiError as error:
            log.error("request %s broke in mid-stream: %s", self._call.request_id, error)
            trace.get_current_span().set_status(Status(StatusCode.ERROR, str(error)))
            with contextlib.suppress(OSError):
                await _send(send, event_bytes(error.body))
        except ClientLeft:
            log.info("request %s: the client left", self._call.request_id)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _next(self, send: Send, quiet_s: float) -> list[Piece]:
        """What comes next. Until then comments after ``quiet_s``, when there is something new to
        say, and every second.
        """
        told, silent_s, within_s = None, 0.0, quiet_s
        while self._progress and not await self._call.has_news(within_s):
            silent_s += within_s
            within_s = CHECK_S
            now = self._progress.of(self._call)
            if told is None or silent_s >= EVERY_S or now.is_news_after(told):
                await _send(send, comment(now))
                told, silent_s = now, 0.0
        return await self._call.read()

    def _last_comment(self) -> bytes:
        """How it was served, where neither the headers nor a last chunk could tell."""
        told = served(self._call) if self._first is None else None
        return comment(told) if told and not self._parsed.include_usage else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _send(send: Send, body: bytes) -> None:
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": True})


def _finished(call: Call) -> Finished:
    assert call.finished is not None, f"request {call.request_id} is read to its end but has none"
    return call.finished
