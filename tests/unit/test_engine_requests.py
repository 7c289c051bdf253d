"""What a request asks of its prompt, of its text and of its tokens, through a whole batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM

from schemas.requests import ChatMessage, ChatPrompt, GenerateRequest, TextPrompt
from schemas.stream import PromptTold
from services.gpu_agent.engine.batch import Batch
from services.gpu_agent.engine.prompts import InvalidPrompt, ModelText
from services.gpu_agent.ipc import Broke, Done, Produced
from tests.unit import tiny_models
from tests.unit.engine_kit import (
    Answer,
    byte_tokenizer,
    expected_greedy,
    make_batch,
    model_text,
    request,
    run,
)

PROMPT = list(b"the same prompt for all of these, longer than one block of the cache")
TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tiny_models.write(tmp_path_factory.mktemp("models"), "llama")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER.encode(text))


def done(answer: Answer) -> Done:
    assert isinstance(answer.end, Done), answer.end
    return answer.end


def refusal(answer: Answer) -> tuple[str, str]:
    assert isinstance(answer.end, Broke), answer.end
    return answer.end.code, answer.end.message


def first_produced(batch: Batch, ask: GenerateRequest) -> Produced:
    batch.submit(ask)
    while True:
        for message in batch.step():
            if isinstance(message, Produced) and message.request_id == ask.request_id:
                return message


# -- which tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "seed": 3}, {"top_k": 4}])
def test_only_allowed_tokens_are_chosen(llama: Any, settings: dict[str, Any]) -> None:
    allowed = ids_of("abc")
    answers = run(
        make_batch(llama),
        request("some", PROMPT, allowed_token_ids=allowed, max_tokens=12, **settings),
        request("all", PROMPT, max_tokens=12, **settings),
    )
    assert set(answers["some"].tokens) <= set(allowed)
    assert not set(answers["all"].tokens) <= set(allowed)


def test_an_allowed_token_of_another_vocabulary_is_refused(llama: Any) -> None:
    answers = run(make_batch(llama), request("r", PROMPT, allowed_token_ids=(1, 256)))
    code, words = refusal(answers["r"])
    assert code == "invalid_prompt"
    assert "allowed_token_ids names token id 256" in words


def test_bad_words_of_one_token_and_of_several(llama: Any) -> None:
    bias = dict.fromkeys(ids_of("ab"), 100.0)
    ask: dict[str, Any] = {"logit_bias": bias, "frequency_penalty": 2.0, "max_tokens": 12}
    plain = run(make_batch(llama), request("r", PROMPT, **ask))["r"].text
    assert "ab" in plain
    without_a = run(make_batch(llama), request("r", PROMPT, bad_words=("a",), **ask))["r"].text
    assert "a" not in without_a
    assert "b" in without_a
    without_ab = run(make_batch(llama), request("r", PROMPT, bad_words=("ab",), **ask))["r"].text
    assert "ab" not in without_ab
    assert "a" in without_ab


def test_a_bad_word_is_avoided_after_what_was_generated_not_after_the_prompt(llama: Any) -> None:
    bias = dict.fromkeys(ids_of("b"), 100.0)
    ask = request("r", ids_of("...a"), bad_words=("ab",), logit_bias=bias, max_tokens=1)
    assert run(make_batch(llama), ask)["r"].text == "b"


def test_words_are_avoided_at_the_beginning_and_after_a_space() -> None:
    text = ModelText("tiny", _Spaced(), frozenset(), 256)
    assert text.bad_words(["no", " no"]) == [[1], [2], [1], [2]]
    with pytest.raises(InvalidPrompt, match="bad_words: '\\?' has no tokens"):
        text.bad_words(["?"])
    assert model_text().bad_words(["no"]) == [ids_of("no")]  # a space is a token of its own


class _Spaced:
    """A tokenizer whose words have a second form for after a space, as most have."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return {"no": [1], " no": [2]}.get(text, [])


# -- the text ----------------------------------------------------------------------------------


def test_what_ended_the_completion_stays_in_the_text_where_asked(llama: Any) -> None:
    bias = dict.fromkeys(ids_of("x"), 100.0)
    ask: dict[str, Any] = {"logit_bias": bias, "max_tokens": 6}
    batch = make_batch(llama, text=model_text(eos_ids=tuple(ids_of("x"))))
    answers = run(
        batch,
        request("without", PROMPT, stop=("xx",), **ask),
        request("with", PROMPT, stop=("xx", "xxx"), include_stop=True, **ask),
        request("end without", PROMPT, ignore_eos=False, **ask),
        request("end with", PROMPT, ignore_eos=False, include_stop=True, **ask),
    )
    assert {name: one.text for name, one in answers.items()} == {
        "without": "",
        "with": "xx",
        "end without": "",
        "end with": "x",
    }
    assert {done(one).finish_reason for one in answers.values()} == {"stop"}


def test_special_tokens_are_text_only_where_asked(llama: Any) -> None:
    tokenizer = byte_tokenizer()
    [letter] = tokenizer.encode("x")
    # The same id, but special: as end-of-turn markers are.
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("x", special=True)]})
    batch = make_batch(llama, text=ModelText("tiny", tokenizer, frozenset(), 256))
    ask: dict[str, Any] = {"logit_bias": {letter: 100.0}, "max_tokens": 3}
    answers = run(
        batch,
        request("skipped", PROMPT, **ask),
        request("shown", PROMPT, skip_special_tokens=False, **ask),
    )
    assert answers["skipped"].text == ""
    assert answers["shown"].text.replace(" ", "") == "xxx"


# -- the prompt ----------------------------------------------------------------------------------


def test_the_first_token_tells_of_the_prompt_what_was_asked(llama: Any) -> None:
    batch = make_batch(llama)
    told = first_produced(batch, request("plain", TextPrompt("hello")))
    assert told.prompt == PromptTold(5)
    ask = request("all", ids_of("hello"), tell_prompt_ids=True, tell_prompt_text=True)
    told = first_produced(batch, ask)
    assert told.prompt == PromptTold(5, tuple(ids_of("hello")), "hello")
    later = [m for m in batch.step() if isinstance(m, Produced)]
    assert [m.prompt for m in later] == [None] * len(later)


def test_prompts_are_cut_where_asked(llama: Any) -> None:
    batch = make_batch(llama, max_model_len=32)
    long = list(b"0123456789" * 4)

    def told(name: str, **settings: Any) -> tuple[int, ...]:
        ask = request(name, long, tell_prompt_ids=True, max_tokens=4, **settings)
        message = first_produced(batch, ask)
        assert message.prompt
        return message.prompt.token_ids

    assert told("end", truncate_prompt_tokens=5) == tuple(long[-5:])
    assert told("begin", truncate_prompt_tokens=5, truncation_side="right") == tuple(long[:5])
    assert told("fits", truncate_prompt_tokens=-1) == tuple(long[-28:])  # and 4 to come
    others = request("not", long), request("still", long, truncate_prompt_tokens=33)
    answers = run(make_batch(llama, max_model_len=32), *others)
    for name, num in (("not", 40), ("still", 33)):
        code, words = refusal(answers[name])
        assert code == "context_length_exceeded"
        assert f"prompt has {num} tokens; this model's context is 32 tokens" in words


def test_more_tokens_than_there_is_room_for_are_cut_to_the_room(llama: Any) -> None:
    answers = run(make_batch(llama, max_model_len=32), request("r", PROMPT[:20], max_tokens=1000))
    assert len(answers["r"].tokens) == 12
    assert done(answers["r"]).finish_reason == "length"


def test_cached_tokens_are_counted_and_shared_under_one_salt_only(llama: Any) -> None:
    batch = make_batch(llama)
    expected = expected_greedy(llama, PROMPT, 4)
    size = batch.kv.store.block_tokens
    usable = (len(PROMPT) - 1) // size * size
    assert usable > 0
    for name, salt, cached in (
        ("first", "", 0),
        ("second", "", usable),
        ("salted", "s", 0),
        ("same salt", "s", usable),
        ("other salt", "t", 0),
        ("unsalted", "", usable),
    ):
        answer = run(batch, request(name, PROMPT, max_tokens=4, cache_salt=salt))[name]
        assert answer.tokens == expected
        assert done(answer).cached_tokens == cached, name


# -- chats ---------------------------------------------------------------------------------------

HI = (ChatMessage("user", "hi"),)
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '|' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def rendered(prompt: ChatPrompt, template: str = TEMPLATE) -> str:
    tokenizer = byte_tokenizer(template)
    text = ModelText("tiny", tokenizer, frozenset(), 256)
    return text.decode(text.encode(prompt), skip_special_tokens=False)


def test_a_chat_with_and_without_the_beginning_of_an_answer() -> None:
    assert rendered(ChatPrompt(HI)) == "user:hi|assistant:"
    assert rendered(ChatPrompt(HI, add_generation_prompt=False)) == "user:hi|"


def test_the_last_message_of_a_chat_is_continued() -> None:
    begun = (*HI, ChatMessage("assistant", "I am"))
    prompt = ChatPrompt(begun, add_generation_prompt=False, continue_final_message=True)
    assert rendered(prompt) == "user:hi|assistant:I am"


def test_variables_of_the_template() -> None:
    template = TEMPLATE + "{{ mood }}{{ enable_thinking }}{{ reasoning_effort }}"
    prompt = ChatPrompt(HI, template_kwargs={"mood": "!"}, reasoning_effort="low")
    assert rendered(prompt, template) == "user:hi|assistant:!Truelow"
    quiet = ChatPrompt(HI, template_kwargs={"enable_thinking": False}, reasoning_effort="low")
    assert rendered(quiet, template) == "user:hi|assistant:Falselow"
    documents = TEMPLATE + "{% for d in documents or [] %}{{ d.text }}{% endfor %}"
    assert rendered(ChatPrompt(HI, documents=({"text": "doc"},)), documents).endswith("doc")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (ChatPrompt(HI, documents=({"text": "x"},)), "does not know documents: leave it out"),
        (ChatPrompt(HI, reasoning_effort="high"), "does not know reasoning_effort"),
        (ChatPrompt(HI, template_kwargs={"tokenize": True}), "can not have 'tokenize'"),
        (ChatPrompt(HI, template_kwargs={"chat_template": "x"}), "can not have 'chat_template'"),
    ],
)
def test_what_the_template_would_not_look_at_is_refused(prompt: ChatPrompt, words: str) -> None:
    with pytest.raises(InvalidPrompt, match=words):
        rendered(prompt)


def test_a_model_that_does_not_reason_does_not_reason_where_asked_not_to() -> None:
    assert rendered(ChatPrompt(HI, reasoning_effort="none")) == "user:hi|assistant:"
