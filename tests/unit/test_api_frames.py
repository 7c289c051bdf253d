"""A filled-in event is the event as it would have been encoded whole."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.api.frames import Frame
from services.api.openai import ChatChunkChoice, ChatCompletionChunk, Completion, Delta, TextChoice


@given(st.text(), st.text())
def test_as_if_encoded_whole(text: str, model: str) -> None:
    def chat(text: str) -> bytes:
        choices = [ChatChunkChoice(Delta(content=text))]
        return msgspec.json.encode(ChatCompletionChunk("chatcmpl-1", 1, model, choices, None))

    def completion(text: str) -> bytes:
        return msgspec.json.encode(Completion("cmpl-1", 1, model, [TextChoice(text)]))

    for make in (chat, completion):
        assert Frame(make).fill(text) == make(text)


def test_a_name_that_looks_like_the_mark() -> None:
    def make(text: str) -> bytes:
        choices = [ChatChunkChoice(Delta(content=text))]
        return msgspec.json.encode(ChatCompletionChunk("i", 1, "\0text\0", choices))

    assert Frame(make).fill("x") == make("x")


def test_an_event_without_a_text_is_refused() -> None:
    with pytest.raises(ValueError, match="no place"):
        Frame(lambda text: b"{}")
