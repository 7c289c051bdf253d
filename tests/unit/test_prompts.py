"""Prompts to ids: every kind, and every way that one may be wrong."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from schemas.requests import ChatMessage, ChatPrompt, TextPrompt, TokenPrompt
from services.gpu_agent.engine.prompts import BadTokenizer, InvalidPrompt, ModelText
from tests.unit.engine_kit import byte_tokenizer, save_tokenizer


def config(vocab_size: int = 256, eos: int | list[int] | None = 2) -> Any:
    text = SimpleNamespace(vocab_size=vocab_size, eos_token_id=eos)
    return SimpleNamespace(get_text_config=lambda: text)


@pytest.fixture
def text(tmp_path: Path) -> ModelText:
    save_tokenizer(tmp_path)
    return ModelText.read("tiny", tmp_path, config(), trust_remote_code=False)


def test_text_and_token_prompts(text: ModelText) -> None:
    ids = text.encode(TextPrompt("hi you"))
    assert text.tokenizer.decode(ids) == "hi you"
    assert text.encode(TokenPrompt((5, 0, 255))) == [5, 0, 255]


def test_a_chat_goes_through_the_template(text: ModelText) -> None:
    chat = ChatPrompt((ChatMessage("system", "be nice"), ChatMessage("user", "hi", name="Ann")))
    assert text.tokenizer.decode(text.encode(chat)) == "system:be nice\nuser:hi\nassistant:"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (TextPrompt(""), "the prompt is empty"),
        (TokenPrompt(()), "the prompt is empty"),
        (TokenPrompt((1, 256)), "token id 256 is outside the vocabulary"),
        (TokenPrompt((-1,)), "ids 0 to 255"),
        (ChatPrompt(()), "the chat has no messages"),
        (ChatPrompt((ChatMessage("wizard", "hex"),)), "refused the messages: no wizards here"),
    ],
)
def test_wrong_prompts_are_named(text: ModelText, prompt: Any, words: str) -> None:
    with pytest.raises(InvalidPrompt, match=words):
        text.encode(prompt)


def test_a_model_without_a_chat_template_says_so() -> None:
    text = ModelText("base", byte_tokenizer(None), frozenset(), 256)
    with pytest.raises(InvalidPrompt, match="'base' has no chat template: use the completions"):
        text.encode(ChatPrompt((ChatMessage("user", "hi"),)))


def test_a_tokenizer_larger_than_the_embedding_is_caught() -> None:
    text = ModelText("small", byte_tokenizer(), frozenset(), 10)
    with pytest.raises(InvalidPrompt, match="outside the vocabulary of model 'small'"):
        text.encode(TextPrompt("zzz"))


@pytest.mark.parametrize(
    ("in_config", "in_generation", "expected"),
    [(2, None, {2}), (None, None, set()), (2, [7, 9], {7, 9}), ([1, 2], None, {1, 2}), (3, 4, {4})],
)
def test_end_of_sequence_ids(
    tmp_path: Path, in_config: Any, in_generation: Any, expected: set[int]
) -> None:
    save_tokenizer(tmp_path)
    if in_generation is not None:
        path = tmp_path / "generation_config.json"
        path.write_text(json.dumps({"eos_token_id": in_generation}))
    text = ModelText.read("tiny", tmp_path, config(eos=in_config), trust_remote_code=False)
    assert text.eos_ids == expected


@pytest.mark.parametrize("damage", ["missing", "not json", "{}"])
def test_bad_tokenizer_files_are_named(tmp_path: Path, damage: str) -> None:
    if damage != "missing":
        save_tokenizer(tmp_path)
        (tmp_path / "tokenizer.json").write_text(damage)
    with pytest.raises(BadTokenizer, match=str(tmp_path)):
        ModelText.read("tiny", tmp_path, config(), trust_remote_code=False)
