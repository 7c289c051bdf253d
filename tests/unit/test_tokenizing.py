"""Texts to tokens and back beside the engine's loop: a real tokenizer, then a real worker."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from schemas.requests import ChatMessage, ChatPrompt, TextPrompt
from schemas.state import ModelSpec
from schemas.tokenize import (
    Detokenized,
    DetokenizeRequest,
    Tokenized,
    TokenizeFailed,
    TokenizeRequest,
)
from services.gpu_agent import ipc
from services.gpu_agent.engine import tokenizing
from services.gpu_agent.engine.tokenizing import TokenizerDesk
from tests.unit.engine_kit import byte_tokenizer, request, save_tokenizer
from tests.unit.test_worker import Control, spec_of

HI = ChatPrompt((ChatMessage("user", "hi"),))


def hosted(folder: Path, name: str = "m", vocab_size: int = 256) -> Any:
    """What the desk looks at of a model."""
    config = SimpleNamespace(vocab_size=vocab_size, eos_token_id=None)
    return SimpleNamespace(
        spec=ModelSpec(name, str(folder)),
        folder=folder,
        config=SimpleNamespace(get_text_config=lambda: config),
        facts=SimpleNamespace(max_model_len=512),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tokenizer(tmp_path)
    return tmp_path


def test_texts_and_chats(folder: Path) -> None:
    desk, model, tokenizer = TokenizerDesk(), hosted(folder), byte_tokenizer()
    ids = tuple(tokenizer.encode("Grüße"))
    assert desk.answer(model, TokenizeRequest("m", TextPrompt("Grüße"))) == Tokenized(ids, 512)
    assert desk.answer(model, DetokenizeRequest("m", ids)) == Detokenized("Grüße")
    answer = desk.answer(model, TokenizeRequest("m", HI, token_strs=True))
    assert isinstance(answer, Tokenized)
    assert tokenizer.decode(list(answer.token_ids)) == "user:hi\nassistant:"
    assert answer.token_strs[:2] == ("u", "s")
    assert desk.answer(model, TokenizeRequest("m", TextPrompt(""))) == Tokenized((), 512)


@pytest.mark.parametrize(
    ("ask", "code", "words"),
    [
        (DetokenizeRequest("m", (3, 256)), "invalid_prompt", "token id 256 is outside"),
        (
            TokenizeRequest("m", ChatPrompt((ChatMessage("wizard", "x"),))),
            "invalid_prompt",
            "refused the messages: no wizards here",
        ),
        (
            TokenizeRequest("m", ChatPrompt(HI.messages, template_kwargs={"tokenize": True})),
            "invalid_prompt",
            "can not have 'tokenize'",
        ),
    ],
)
def test_what_can_not_be_tokenized_is_named(folder: Path, ask: Any, code: str, words: str) -> None:
    answer = TokenizerDesk().answer(hosted(folder), ask)
    assert isinstance(answer, TokenizeFailed)
    assert answer.code == code
    assert words in answer.message


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    answer = TokenizerDesk().answer(hosted(tmp_path), TokenizeRequest("m", TextPrompt("x")))
    assert isinstance(answer, TokenizeFailed)
    assert answer.code == "model_unavailable"
    assert str(tmp_path) in answer.message


def test_a_tokenizer_that_fails_fails_its_question_alone(folder: Path) -> None:
    desk, model = TokenizerDesk(), hosted(folder)
    broken = TokenizeRequest("m", SimpleNamespace())  # type: ignore[arg-type]
    answer = desk.answer(model, broken)
    assert isinstance(answer, TokenizeFailed)
    assert answer.code == "engine_failed"
    assert isinstance(desk.answer(model, TokenizeRequest("m", TextPrompt("x"))), Tokenized)


def test_a_model_that_was_registered_anew_is_read_anew(folder: Path) -> None:
    desk, ask = TokenizerDesk(), DetokenizeRequest("m", (200,))
    first = hosted(folder)
    assert isinstance(desk.answer(first, ask), Detokenized)
    (folder / "tokenizer.json").unlink()
    assert isinstance(desk.answer(first, ask), Detokenized)  # it was read before
    assert isinstance(desk.answer(hosted(folder), ask), TokenizeFailed)


def test_those_used_longest_ago_are_forgotten(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "MAX_TOKENIZERS", 2)
    desk, models = TokenizerDesk(), {name: hosted(folder, name) for name in "abc"}
    for name in "abac":
        desk.answer(models[name], DetokenizeRequest(name, (1,)))
    assert list(desk._texts) == ["a", "c"]


# -- a real worker -------------------------------------------------------------------------------


@pytest.fixture
def control() -> Iterator[Control]:
    control = Control()
    yield control
    control.close()


def test_a_worker_answers_for_models_that_are_only_registered(
    tmp_path: Path, control: Control
) -> None:
    control.send(ipc.Register(spec_of(tmp_path, "llama")))
    control.expect(ipc.Registered)
    ids = tuple(byte_tokenizer().encode("hi you"))
    control.send(
        ipc.Tokenize(1, TokenizeRequest("llama", TextPrompt("hi you"))),
        ipc.Tokenize(2, DetokenizeRequest("llama", ids)),
    )
    first = control.expect(ipc.TokenizeAnswered)
    assert isinstance(first.answer, Tokenized)
    assert (first.ticket, first.answer.token_ids) == (1, ids)
    assert control.expect(ipc.TokenizeAnswered) == ipc.TokenizeAnswered(2, Detokenized("hi you"))
    control.send(ipc.Tokenize(3, DetokenizeRequest("nobody", ids)))
    last = control.expect(ipc.TokenizeAnswered)
    assert isinstance(last.answer, TokenizeFailed)
    assert "'nobody' is not registered" in last.answer.message


def test_a_long_text_does_not_hold_up_who_is_being_answered(
    tmp_path: Path, control: Control
) -> None:
    control.add(spec_of(tmp_path, "llama"))
    control.swap_in("llama")
    control.send(ipc.Submit(request("r", list(b"go on"), model="llama", max_tokens=200)))
    control.expect(ipc.Begun)
    control.expect(ipc.Produced)
    text = "a long text, " * 100_000
    control.send(ipc.Tokenize(1, TokenizeRequest("llama", TextPrompt(text))))
    num_between = 0
    while not isinstance(message := control.receive(), ipc.TokenizeAnswered | ipc.Done):
        num_between += isinstance(message, ipc.Produced)
    assert num_between > 10  # in the loop it would be the one step that was under way
    if isinstance(message, ipc.Done):
        message = control.expect(ipc.TokenizeAnswered)
    assert isinstance(message.answer, Tokenized)
    assert len(message.answer.token_ids) == len(text)
