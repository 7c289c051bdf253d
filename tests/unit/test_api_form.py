"""How many choices, of which prompts, and what is told of them: taken, and refused by name."""

import json
from typing import Any

import pytest

from schemas.requests import ChatMessage, ChatPrompt, TextPrompt
from services.api import prompts
from services.api.errors import ApiError
from services.api.form import MAX_CHOICES, AnswerForm
from services.api.parsing import Parsed, parse_chat, parse_completion
from services.gpu_agent.engine import prompts as engine_prompts

HI = [{"role": "user", "content": "hi"}]


def chat(**more: Any) -> Parsed:
    return parse_chat(json.dumps({"model": "m", "messages": HI} | more).encode())


def completion(**more: Any) -> Parsed:
    return parse_completion(json.dumps({"model": "m", "prompt": "hi"} | more).encode())


@pytest.mark.parametrize("parse", [chat, completion])
def test_nothing_is_asked_for_where_nothing_is_said(parse: Any) -> None:
    neutral = {
        "n": 1,
        "echo": False,
        "return_token_ids": False,
        "return_tokens_as_token_ids": False,
        "include_stop_str_in_output": False,
        "skip_special_tokens": True,
        "bad_words": [],
        "allowed_token_ids": [],
    }
    plain = parse(seed=1)
    assert plain.form == AnswerForm()
    assert parse(seed=1, **neutral) == plain
    assert (
        parse(seed=1, **dict.fromkeys((*neutral, "truncate_prompt_tokens", "cache_salt"))) == plain
    )


@pytest.mark.parametrize("parse", [chat, completion])
def test_all_that_both_endpoints_take(parse: Any) -> None:
    parsed = parse(
        n=3,
        return_token_ids=True,
        return_tokens_as_token_ids=True,
        request_id="mine",
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
        allowed_token_ids=[1, 2],
        bad_words=["no", " never"],
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        truncate_prompt_tokens=-1,
        truncation_side="right",
        cache_salt="mine",
    )
    assert parsed.form == AnswerForm(3, None, True, True, True, "mine")
    sampling = parsed.sampling
    assert (sampling.allowed_token_ids, sampling.bad_words) == ((1, 2), ("no", " never"))
    assert (sampling.include_stop, sampling.skip_special_tokens) == (True, False)
    assert (sampling.truncate_prompt_tokens, sampling.truncation_side) == (-1, "right")
    assert (sampling.cache_salt, sampling.tell_prompt_ids) == ("mine", True)
    assert parsed.include_usage
    assert parsed.ignored == []


def test_echo_of_prompts_that_are_text_and_of_others() -> None:
    parsed = completion(prompt=["a", [1, 2], "b"], echo=True)
    assert parsed.form.echoes == ("a", None, "b")
    assert parsed.sampling.tell_prompt_text  # only a tokenizer knows
    assert not completion(prompt=["a", "b"], echo=True).sampling.tell_prompt_text


def test_echo_of_a_chat_is_the_message_that_is_continued() -> None:
    begun = [*HI, {"role": "assistant", "content": "I am"}]
    assert chat(messages=begun, echo=True, continue_final_message=True).form.echoes == ("I am",)
    assert chat(echo=True).form.echoes == ("",)


def test_special_tokens_of_prompts() -> None:
    assert completion(add_special_tokens=False).prompts == (TextPrompt("hi", False),)
    assert chat(add_special_tokens=True).prompts == (
        ChatPrompt((ChatMessage("user", "hi"),), add_special_tokens=True),
    )


def test_how_a_chat_is_rendered() -> None:
    [prompt] = chat(
        continue_final_message=True,
        chat_template_kwargs={"enable_thinking": False},
        documents=[{"title": "t", "text": "x"}],
        reasoning_effort="low",
    ).prompts
    assert prompt == ChatPrompt(
        (ChatMessage("user", "hi"),),
        add_generation_prompt=False,
        continue_final_message=True,
        template_kwargs={"enable_thinking": False},
        documents=({"title": "t", "text": "x"},),
        reasoning_effort="low",
    )
    [open_ended] = chat(add_generation_prompt=False).prompts
    assert isinstance(open_ended, ChatPrompt)
    assert not open_ended.add_generation_prompt


def test_no_argument_of_the_function_that_renders_passes_for_a_variable() -> None:
    """The api names them without transformers; the agent asks transformers."""
    assert engine_prompts._TEMPLATE_ARGUMENTS <= prompts.RESERVED


@pytest.mark.parametrize(
    ("parse", "more", "param", "code", "words"),
    [
        (chat, {"n": 0}, "n", "invalid_value", "n = 0 must be between 1 and 128."),
        (completion, {"n": 129}, "n", "invalid_value", "n = 129 must be between 1 and 128."),
        (chat, {"n": "2"}, "n", "invalid_type", "n = '2': Expected `int | null`"),
        (
            completion,
            {"n": 128, "prompt": ["x"] * 5},
            "n",
            "invalid_value",
            f"are 640; at most {MAX_CHOICES} are allowed in one request.",
        ),
        (
            completion,
            {"best_of": 3, "n": 2},
            "best_of",
            "unsupported_parameter",
            "best_of = 3 is not supported by this server unless it is n = 2",
        ),
        (
            completion,
            {"echo": True, "logprobs": 1},
            "echo",
            "unsupported_parameter",
            "echo = true with logprobs is not supported",
        ),
        (
            chat,
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
            "invalid_value",
            "can not both be true",
        ),
        (
            chat,
            {"chat_template_kwargs": {"tokenize": True}},
            "chat_template_kwargs",
            "invalid_value",
            "can not have 'tokenize'",
        ),
        (
            chat,
            {"chat_template": "{{ 1 }}"},
            "chat_template",
            "unsupported_parameter",
            "chat_template = '{{ 1 }}' is not supported by this server; leave it out.",
        ),
        (
            chat,
            {"reasoning_effort": "huge"},
            "reasoning_effort",
            "invalid_type",
            "Invalid enum value 'huge'",
        ),
        (
            completion,
            {"truncate_prompt_tokens": 0},
            "truncate_prompt_tokens",
            "invalid_value",
            "truncate_prompt_tokens = 0 must be a number of tokens, or -1",
        ),
        (
            completion,
            {"truncation_side": "middle"},
            "truncation_side",
            "invalid_type",
            "truncation_side = 'middle'",
        ),
        (completion, {"cache_salt": ""}, "cache_salt", "invalid_value", "has 0 characters"),
        (completion, {"request_id": ""}, "request_id", "invalid_value", "has 0 characters"),
        (completion, {"bad_words": ["x", " "]}, "bad_words", "invalid_value", "an empty string"),
        (
            completion,
            {"allowed_token_ids": [1, -5]},
            "allowed_token_ids",
            "invalid_value",
            "allowed_token_ids: -5 is not a token id.",
        ),
        (
            chat,
            {"stream": True, "stream_options": {"include_usage": 3}},
            "stream_options.include_usage",
            "invalid_type",
            "stream_options.include_usage = 3",
        ),
        (
            chat,
            {"stream_options": {}},
            "stream_options",
            "invalid_value",
            "stream_options is only allowed where stream is true.",
        ),
    ],
)
def test_each_refusal(parse: Any, more: dict[str, Any], param: str, code: str, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse(**more)
    error = caught.value
    assert (error.status, error.info.code, error.info.param) == (400, code, param)
    assert error.info.type == "invalid_request_error"
    assert words in error.info.message


def test_best_of_as_many_as_are_told_is_fine() -> None:
    assert completion(best_of=1).form.n == 1
    assert completion(best_of=2, n=2).form.n == 2
