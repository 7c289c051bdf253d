"""An answer in OpenAI's wire form: one JSON object, or the events of a stream.

Pure: pieces and the finished run in, bytes out. `respond` waits and sends.
"""

from collections.abc import Iterable, Iterator

import msgspec
from msgspec import UNSET

from schemas.stream import Finished
from services.api import logprobs, openai
from services.api.answer import Piece
from services.api.call import Call
from services.api.openai import WireFinishReason
from services.api.parsing import Parsed
from services.api.tool_calls import Arguments, CallBegun, Event, Said

_encode = msgspec.json.Encoder().encode


def event_bytes(body: bytes) -> bytes:
    return b"data: " + body + b"\n\n"


def _event(chunk: msgspec.Struct) -> bytes:
    return event_bytes(_encode(chunk))


def _reason(finished: Finished, num_calls: int = 0) -> WireFinishReason:
    # "cancelled" never gets here: the relay runs such a request again, or ends it with an error.
    if finished.finish_reason == "length":
        return "length"
    return "tool_calls" if num_calls else "stop"


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
        message = _message(parsed, text)
        reason = _reason(finished, len(message.tool_calls or ()))
        chat = openai.ChatChoice(message, reason, logprobs=logprobs.of_chat(told))
        return _encode(openai.ChatCompletion(*head, [chat], _usage(finished)))
    choice = openai.TextChoice(text, _reason(finished), logprobs=logprobs.of_text(told))
    return _encode(openai.Completion(*head, [choice], _usage(finished)))


def _message(parsed: Parsed, text: str) -> openai.AnswerMessage:
    if parsed.tool_parser is None:
        return openai.AnswerMessage(text)
    parser = parsed.tool_parser()
    said: list[str] = []
    calls: list[openai.AnswerToolCall] = []
    for event in (*parser.push(text), *parser.finish()):
        match event:
            case Said(more):
                said.append(more)
            case CallBegun(_, call_id, name):
                calls.append(openai.AnswerToolCall(call_id, openai.CalledFunction(name, "")))
            case Arguments(index, more):
                calls[index].function.arguments += more
    if not calls:
        return openai.AnswerMessage("".join(said))
    return openai.AnswerMessage("".join(said) or None, tool_calls=calls)


def _delta(event: Event) -> openai.Delta:
    match event:
        case Said(text):
            return openai.Delta(content=text)
        case CallBegun(index, call_id, name):
            function = openai.DeltaFunction("", name)
            return openai.Delta(
                tool_calls=[openai.DeltaToolCall(index, function, call_id, "function")]
            )
        case Arguments(index, text):
            function = openai.DeltaFunction(text)
            return openai.Delta(tool_calls=[openai.DeltaToolCall(index, function)])


class _ChatChunks:
    """The events of a chat stream: the role, the texts and calls, the finish reason, the usage if
    wanted.
    """

    def __init__(self, parsed: Parsed, call: Call) -> None:
        self._id = _answer_id(parsed, call)
        self._created = int(call.request.created_at)
        self._model = parsed.model
        self._wants_usage = parsed.include_usage
        self._parser = parsed.tool_parser() if parsed.tool_parser else None

    def opening(self) -> Iterator[bytes]:
        yield self._chunk(openai.Delta(role="assistant", content=""))

    def piece(self, piece: Piece) -> bytes:
        told = logprobs.of_chat(piece.logprobs)
        if self._parser is None:
            return self._chunk(openai.Delta(content=piece.text), told=told)
        return self._events(self._parser.push(piece.text), told)

    def _events(self, events: Iterable[Event], told: openai.ChatLogprobs | None = None) -> bytes:
        """Log probabilities go with the first one, or alone where the text is held back."""
        deltas = [_delta(event) for event in events]
        if told and not deltas:
            deltas = [openai.Delta()]
        return b"".join(
            self._chunk(delta, told=None if at else told) for at, delta in enumerate(deltas)
        )

    def closing(self, finished: Finished) -> Iterator[bytes]:
        if self._parser:
            yield self._events(self._parser.finish())
        num_calls = self._parser.num_calls if self._parser else 0
        yield self._chunk(openai.Delta(), _reason(finished, num_calls))
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


def chunks_of(parsed: Parsed, call: Call) -> _ChatChunks:
    return _ChatChunks(parsed, call) if parsed.endpoint == "chat" else _TextChunks(parsed, call)
