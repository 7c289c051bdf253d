"""An answer in OpenAI's wire form: one JSON object, or the events of a stream.

Pure: what is told of its choices in, bytes out. `respond` waits and sends.
"""

import abc
from collections.abc import Iterator, Sequence

import msgspec
from msgspec import UNSET, UnsetType

from schemas.stream import Finished
from services.api import logprobs, openai
from services.api.answer import Piece
from services.api.call import Call
from services.api.fan import Choices, Told
from services.api.frames import Frame
from services.api.openai import WireFinishReason
from services.api.parsing import Parsed
from services.api.served import served
from services.api.tool_calls import ToolParser
from services.api.tool_forms import delta_of, message_of

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


def _usage(fan: Choices) -> openai.Usage:
    """Of a complete answer."""
    prompt = completion = cached = 0
    for number in range(fan.num_prompts):
        ends = [call.finished for call in fan.choices_of(number) if call.finished]
        prompt += ends[0].prompt_tokens
        completion += sum(end.completion_tokens for end in ends)
        # The least: what was there before the prompt's own choices shared it.
        cached += min(end.cached_tokens for end in ends)
    details = openai.PromptTokensDetails(cached)
    return openai.Usage(prompt, completion, prompt + completion, details)


def served_of(call: Call) -> openai.Served | UnsetType:
    return served(call) or UNSET


def _answer_id(parsed: Parsed, fan: Choices) -> str:
    kind = "chatcmpl-" if parsed.endpoint == "chat" else "cmpl-"
    return kind + (parsed.form.request_id or fan.request_id)


def _created(fan: Choices) -> int:
    return int(fan.calls[0].request.created_at)


def _echo(parsed: Parsed, fan: Choices, index: int) -> str:
    """What goes before the text of a choice."""
    if parsed.form.echoes is None:
        return ""
    known = parsed.form.echoes[fan.prompt_of(index)]
    if known is not None:
        return known
    told = fan.calls[index].answer.prompt
    return told.text if told else ""


def _prompt_ids(parsed: Parsed, fan: Choices, index: int) -> Sequence[int] | UnsetType:
    told = fan.calls[index].answer.prompt
    return told.token_ids if parsed.form.token_ids and told else UNSET


def _end(fan: Choices, index: int) -> Finished:
    finished = fan.calls[index].finished
    assert finished is not None, f"choice {index} of {fan.request_id} is complete but has no end"
    return finished


def whole(parsed: Parsed, fan: Choices, told: list[Told]) -> bytes:
    """The answer that is not streamed; ``told`` is all there was."""
    head = (_answer_id(parsed, fan), _created(fan), parsed.model)
    pieces: list[list[Piece]] = [[] for _ in fan.calls]
    for index, what in told:
        if isinstance(what, Piece):
            pieces[index].append(what)
    if parsed.endpoint == "chat":
        chats = [_chat_choice(parsed, fan, index, pieces[index]) for index in range(len(pieces))]
        chat = openai.ChatCompletion(*head, chats, _usage(fan), hotswap=served_of(fan.lead))
        chat.prompt_token_ids = _prompt_ids(parsed, fan, 0)
        return _encode(chat)
    texts = [_text_choice(parsed, fan, index, pieces[index]) for index in range(len(pieces))]
    return _encode(openai.Completion(*head, texts, _usage(fan), hotswap=served_of(fan.lead)))


def _chat_choice(
    parsed: Parsed, fan: Choices, index: int, pieces: list[Piece]
) -> openai.ChatChoice:
    text = _echo(parsed, fan, index) + "".join(piece.text for piece in pieces)
    told = [one for piece in pieces for one in piece.logprobs]
    message = openai.AnswerMessage(text)
    if parsed.tool_parser:
        message = message_of(parsed.tool_parser(), text)
    return openai.ChatChoice(
        message,
        _reason(_end(fan, index), len(message.tool_calls or ())),
        index,
        logprobs.of_chat(told, parsed.form.logprobs_by_id),
        _token_ids(parsed, pieces),
    )


def _text_choice(
    parsed: Parsed, fan: Choices, index: int, pieces: list[Piece]
) -> openai.TextChoice:
    text = _echo(parsed, fan, index) + "".join(piece.text for piece in pieces)
    told = [one for piece in pieces for one in piece.logprobs]
    return openai.TextChoice(
        text,
        _reason(_end(fan, index)),
        index,
        logprobs.of_text(told, parsed.form.logprobs_by_id),
        _token_ids(parsed, pieces),
        _prompt_ids(parsed, fan, index),
    )


def _token_ids(parsed: Parsed, pieces: Sequence[Piece]) -> Sequence[int] | UnsetType:
    if not parsed.form.token_ids:
        return UNSET
    return [token_id for piece in pieces for token_id in piece.token_ids]


_NOTHING = Piece("")


class _Chunks(abc.ABC):
    """The events of a stream: what opens it, one for each piece and each end, what closes it."""

    def __init__(self, parsed: Parsed, fan: Choices) -> None:
        self._parsed = parsed
        self._fan = fan
        self._head = (_answer_id(parsed, fan), _created(fan), parsed.model)
        self._by_id = parsed.form.logprobs_by_id
        self._wants_ids = parsed.form.token_ids
        # Of chunks before the last: with include_usage each has the field.
        self._no_usage = None if parsed.include_usage else UNSET
        self._num_tokens = 0  # told so far, of all choices
        self._unopened = set(range(len(fan.calls)))  # choices of which nothing was told
        # Whether the events of a choice's tokens are alike but for the text.
        form = parsed.form
        self._is_plain = not (form.token_ids or form.usage_in_chunks or parsed.tool_parser)
        self._frames: dict[int, Frame] = {}  # of choices

    def opening(self) -> Iterator[bytes]:
        return iter(())

    def told(self, index: int, what: Piece | Finished) -> bytes:
        """The event of what came of one choice; none where there is nothing to tell."""
        if isinstance(what, Finished):
            begin = self._begin(index, _NOTHING) if index in self._unopened else _NOTHING
            first = self._chunk(index, begin) if begin.text else b""
            return first + self._chunk(index, _NOTHING, _reason(what))
        self._num_tokens += len(what.token_ids)
        piece = self._begin(index, what) if index in self._unopened else what
        if self._is_plain and piece.text and not piece.logprobs:
            return self._frame(index).fill(piece.text)
        if piece.text or piece.logprobs or (self._wants_ids and piece.token_ids):
            return self._chunk(index, piece)
        return b""

    def closing(self) -> Iterator[bytes]:
        if self._parsed.include_usage:
            yield self._usage_chunk(_usage(self._fan))

    def _begin(self, index: int, piece: Piece) -> Piece:
        """``piece``, the first of its choice, behind the echo."""
        self._unopened.discard(index)
        echo = _echo(self._parsed, self._fan, index)
        return Piece(echo + piece.text, piece.logprobs, piece.token_ids) if echo else piece

    def _frame(self, index: int) -> Frame:
        if (frame := self._frames.get(index)) is None:
            frame = self._frames[index] = Frame(lambda text: self._chunk(index, Piece(text)))
        return frame

    def _usage(self) -> openai.Usage | UnsetType | None:
        """Of a chunk before the last: nothing, or what is told so far where that is asked for."""
        if not self._parsed.form.usage_in_chunks:
            return self._no_usage
        prompt = 0
        for number in range(self._fan.num_prompts):
            known = [call.answer.prompt for call in self._fan.choices_of(number)]
            prompt += next((one.num_tokens for one in known if one), 0)
        return openai.Usage(prompt, self._num_tokens, prompt + self._num_tokens)

    @abc.abstractmethod
    def _chunk(self, index: int, piece: Piece, reason: WireFinishReason | None = None) -> bytes:
        """An event of one choice; an end where there is a ``reason``."""

    @abc.abstractmethod
    def _usage_chunk(self, usage: openai.Usage) -> bytes:
        """The last event, of no choice."""


class _ChatChunks(_Chunks):
    def __init__(self, parsed: Parsed, fan: Choices) -> None:
        super().__init__(parsed, fan)
        make = parsed.tool_parser
        self._parsers = {index: make() for index in range(len(fan.calls))} if make else {}

    def opening(self) -> Iterator[bytes]:
        """Whose words they are, and where asked for what the model was given."""
        asked = self._parsed.form.token_ids
        ids = (_prompt_ids(self._parsed, self._fan, index) for index in range(len(self._fan.calls)))
        prompt_ids = next((one for one in ids if one), UNSET) if asked else UNSET
        for index in range(len(self._fan.calls)):
            choice = openai.ChatChunkChoice(openai.Delta(role="assistant", content=""), index=index)
            yield self._event(choice, prompt_ids if index == 0 else UNSET)

    def _chunk(self, index: int, piece: Piece, reason: WireFinishReason | None = None) -> bytes:
        told = logprobs.of_chat(piece.logprobs, self._by_id)
        ids = piece.token_ids if self._wants_ids and not reason else UNSET
        if parser := self._parsers.get(index):
            return self._calls(parser, index, piece.text, reason, told, ids)
        delta = openai.Delta() if reason else openai.Delta(content=piece.text)
        return self._event(openai.ChatChunkChoice(delta, reason, index, told, ids))

    def _calls(
        self,
        parser: ToolParser,
        index: int,
        text: str,
        reason: WireFinishReason | None,
        told: openai.ChatLogprobs | None,
        ids: Sequence[int] | UnsetType,
    ) -> bytes:
        """The events of text in which there may be calls of tools: any number.

        What is told of tokens goes with the first one, or alone where the text is held back.
        """
        deltas = [delta_of(event) for event in (parser.finish() if reason else parser.push(text))]
        if reason or (not deltas and (told or ids is not UNSET)):
            deltas.append(openai.Delta())
        if reason == "stop" and parser.num_calls:
            reason = "tool_calls"
        choices = [openai.ChatChunkChoice(delta, index=index) for delta in deltas]
        if choices:
            choices[0].logprobs, choices[0].token_ids = told, ids
            choices[-1].finish_reason = reason
        return b"".join(self._event(choice) for choice in choices)

    def _event(
        self, choice: openai.ChatChunkChoice, prompt_ids: Sequence[int] | UnsetType = UNSET
    ) -> bytes:
        chunk = openai.ChatCompletionChunk(*self._head, [choice], self._usage())
        chunk.prompt_token_ids = prompt_ids
        return _event(chunk)

    def _usage_chunk(self, usage: openai.Usage) -> bytes:
        told = served_of(self._fan.lead)
        return _event(openai.ChatCompletionChunk(*self._head, [], usage, hotswap=told))


class _TextChunks(_Chunks):
    def __init__(self, parsed: Parsed, fan: Choices) -> None:
        super().__init__(parsed, fan)
        # Choices that still are to name their prompt's ids.
        self._nameless = set(range(len(fan.calls))) if parsed.form.token_ids else set()

    def _chunk(self, index: int, piece: Piece, reason: WireFinishReason | None = None) -> bytes:
        told = logprobs.of_text(piece.logprobs, self._by_id)
        ids = piece.token_ids if self._wants_ids and not reason else UNSET
        choice = openai.TextChoice(piece.text, reason, index, told, ids)
        if index in self._nameless:
            self._nameless.discard(index)
            choice.prompt_token_ids = _prompt_ids(self._parsed, self._fan, index)
        return _event(openai.Completion(*self._head, [choice], self._usage()))

    def _usage_chunk(self, usage: openai.Usage) -> bytes:
        told = served_of(self._fan.lead)
        return _event(openai.Completion(*self._head, [], usage, hotswap=told))


def chunks_of(parsed: Parsed, fan: Choices) -> _Chunks:
    return _ChatChunks(parsed, fan) if parsed.endpoint == "chat" else _TextChunks(parsed, fan)
