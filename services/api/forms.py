"""An answer in OpenAI's wire form: one JSON object, or the events of a stream.

Pure: pieces and the finished run in, bytes out. `respond` waits and sends.
"""

from collections.abc import Iterator

import msgspec
from msgspec import UNSET

from schemas.stream import Finished
from services.api import logprobs, openai
from services.api.answer import Piece
from services.api.call import Call
from services.api.frames import Frame
from services.api.openai import WireFinishReason
from services.api.parsing import Parsed

_encode = msgspec.json.Encoder().encode


def event_bytes(body: bytes) -> bytes:
    return b"data: " + body + b"\n\n"


def _event(chunk: msgspec.Struct) -> bytes:
    return event_bytes(_encode(chunk))


def _reason(finished: Finished) -> WireFinishReason:
    # "cancelled" never gets here: the relay runs such a request again, or ends it with an error.
    return "length" if finished.finish_reason == "length" else "stop"


def _usage(finished: Finished) -> openai.Usage:
    prompt, completion = finished.prompt_tokens, finished.completion_tokens
    return openai.Usage(prompt, completion, prompt + completion)


def _answer_id(parsed: Parsed, call: Call) -> str:
    return ("chatcmpl-" if parsed.endpoint == "chat" else "cmpl-") + call.request_id


def whole(parsed: Parsed, call: Call, pieces: list[Piece], finished: Finished) -> bytes:
    """The answer that is not streamed."""
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
        self._frame = Frame(self._of_text)

    def opening(self) -> Iterator[bytes]:
        yield self._chunk(openai.Delta(role="assistant", content=""))

    def _of_text(self, text: str) -> bytes:
        return self._chunk(openai.Delta(content=text))

    def piece(self, piece: Piece) -> bytes:
        if not piece.logprobs:
            return self._frame.fill(piece.text)
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

    def _of_text(self, text: str) -> bytes:
        return self._text_chunk(text)

    def piece(self, piece: Piece) -> bytes:
        if not piece.logprobs:
            return self._frame.fill(piece.text)
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


def chunks_of(parsed: Parsed, call: Call) -> _ChatChunks:
    return _ChatChunks(parsed, call) if parsed.endpoint == "chat" else _TextChunks(parsed, call)
