"""A call's answer as an HTTP response: one JSON object, or server-sent events.

Nothing is sent before the first token or the end: until then an error still gets its real
status. A stream that breaks later ends with one `data: {"error": ...}` event.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator

import msgspec
from litestar.response.base import ASGIResponse
from litestar.types import Receive, Scope, Send
from msgspec import UNSET
from opentelemetry import trace
from opentelemetry.trace import Status, StatusCode

from schemas.stream import Finished
from services.api import logprobs, openai
from services.api.answer import Piece
from services.api.call import Call, ClientLeft
from services.api.errors import ApiError
from services.api.fields import ignored_header
from services.api.openai import WireFinishReason
from services.api.parsing import Parsed
from services.api.relay import Relay

log = logging.getLogger(__name__)

_encode = msgspec.json.Encoder().encode
_DONE = b"data: [DONE]\n\n"


async def respond(parsed: Parsed, call: Call, relay: Relay, receive: Receive) -> ASGIResponse:
    """Wait for the first token or the end, and answer from there. Raises ApiError.

    ``receive`` tells when the client goes away, from here to the end of the response.
    """
    watching = asyncio.create_task(watch(receive, relay, call))

    def close() -> None:
        watching.cancel()
        relay.client_left(call)  # nothing, where the call has ended

    try:
        pieces = await call.read()
        if parsed.stream:
            return EventStream(parsed, call, pieces, close)
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
        body=_whole(parsed, call, pieces), headers=answer_headers(parsed.ignored, call)
    )


async def watch(receive: Receive, relay: Relay, call: Call) -> None:
    """The body has been read: the next thing to come is that the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    relay.client_left(call)


def answer_headers(ignored: list[str], call: Call) -> dict[str, str]:
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
    """The answer as server-sent events. ``first``: the pieces read already."""

    _should_set_content_length = False

    def __init__(
        self, parsed: Parsed, call: Call, first: list[Piece], close: Callable[[], None]
    ) -> None:
        headers = answer_headers(parsed.ignored, call)
        headers |= {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(status_code=200, media_type="text/event-stream", headers=headers)
        self._parsed = parsed
        self._call = call
        self._first = first
        self._close = close

    async def send_body(self, send: Send, receive: Receive) -> None:
        chunks = _chunks_of(self._parsed, self._call)
        try:
            await _send(send, b"".join(chunks.opening()))
            pieces = self._first
            while pieces:
                # One event per token, but one write for all that came in the meantime.
                told = (piece for piece in pieces if piece.text or piece.logprobs)
                await _send(send, b"".join(chunks.piece(piece) for piece in told))
                pieces = await self._call.read()
            await _send(send, b"".join(chunks.closing(_finished(self._call))) + _DONE)
        except ApiError as error:
            log.error("request %s broke in mid-stream: %s", self._call.request_id, error)
            trace.get_current_span().set_status(Status(StatusCode.ERROR, str(error)))
            with contextlib.suppress(OSError):
                await _send(send, _event_bytes(error.body))
        except ClientLeft:
            log.info("request %s: the client left", self._call.request_id)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _send(send: Send, body: bytes) -> None:
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": True})


def _event_bytes(body: bytes) -> bytes:
    return b"data: " + body + b"\n\n"


def _event(chunk: msgspec.Struct) -> bytes:
    return _event_bytes(_encode(chunk))


def _finished(call: Call) -> Finished:
    assert call.finished is not None, f"request {call.request_id} is read to its end but has none"
    return call.finished


def _reason(finished: Finished) -> WireFinishReason:
    # "cancelled" never gets here: the relay runs such a request again, or ends it with an error.
    return "length" if finished.finish_reason == "length" else "stop"


def _usage(finished: Finished) -> openai.Usage:
    prompt, completion = finished.prompt_tokens, finished.completion_tokens
    return openai.Usage(prompt, completion, prompt + completion)


def _answer_id(parsed: Parsed, call: Call) -> str:
    return ("chatcmpl-" if parsed.endpoint == "chat" else "cmpl-") + call.request_id


def _whole(parsed: Parsed, call: Call, pieces: list[Piece]) -> bytes:
    """The answer that is not streamed."""
    finished = _finished(call)
    head = (_answer_id(parsed, call), int(call.request.created_at), parsed.model)
    text = "".join(piece.text for piece in pieces)
    told = [one for piece in pieces for one in piece.logprobs]
    if parsed.endpoint == "chat":
        chat = openai.ChatChoice(
            openai.AnswerMessage(text), _reason(finished), logprobs=logprobs.of_chat(told)
        )
        return _encode(openai.ChatCompletion(*head, [chat], _usage(finished)))
    choice = openai.TextChoice(text, _reason(finished), logprobs=logprobs.of_text(told))
    return _encode(openai.Completion(*head, [choice], _usage(finished)))


class _ChatChunks:
    """The events of a chat stream: the role, the texts, the finish reason, the usage if wanted."""

    def __init__(self, parsed: Parsed, call: Call) -> None:
        self._id = _answer_id(parsed, call)
        self._created = int(call.request.created_at)
        self._model = parsed.model
        self._wants_usage = parsed.include_usage

    def opening(self) -> Iterator[bytes]:
        yield self._chunk(openai.Delta(role="assistant", content=""))

    def piece(self, piece: Piece) -> bytes:
        told = logprobs.of_chat(piece.logprobs)
        return self._chunk(openai.Delta(content=piece.text), told=told)

    def closing(self, finished: Finished) -> Iterator[bytes]:
        yield self._chunk(openai.Delta(), _reason(finished))
        if self._wants_usage:
            yield _event(
                openai.ChatCompletionChunk(
                    self._id, self._created, self._model, [], _usage(finished)
                )
            )

    def _chunk(
        self,
        delta: openai.Delta,
        reason: WireFinishReason | None = None,
        told: openai.ChatLogprobs | None = None,
    ) -> bytes:
        choices = [openai.ChatChunkChoice(delta, reason, logprobs=told)]
        # With include_usage every chunk has the field, null until the last.
        usage = None if self._wants_usage else UNSET
        return _event(
            openai.ChatCompletionChunk(self._id, self._created, self._model, choices, usage)
        )


class _TextChunks(_ChatChunks):
    """The events of a completions stream: like a chat's, without roles."""

    def opening(self) -> Iterator[bytes]:
        return iter(())

    def piece(self, piece: Piece) -> bytes:
        return self._text_chunk(piece.text, told=logprobs.of_text(piece.logprobs))

    def closing(self, finished: Finished) -> Iterator[bytes]:
        yield self._text_chunk("", _reason(finished))
        if self._wants_usage:
            yield _event(
                openai.Completion(self._id, self._created, self._model, [], _usage(finished))
            )

    def _text_chunk(
        self,
        text: str,
        reason: WireFinishReason | None = None,
        told: openai.TextLogprobs | None = None,
    ) -> bytes:
        usage = None if self._wants_usage else UNSET
        choices = [openai.TextChoice(text, reason, logprobs=told)]
        return _event(openai.Completion(self._id, self._created, self._model, choices, usage))


def _chunks_of(parsed: Parsed, call: Call) -> _ChatChunks:
    return _ChatChunks(parsed, call) if parsed.endpoint == "chat" else _TextChunks(parsed, call)
