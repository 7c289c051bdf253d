"""HTTP bodies into requests: what is taken, what is refused, and in which words."""

import json
from typing import Any

import pytest

from schemas.requests import ChatMessage, ChatPrompt, TextPrompt, TokenPrompt
from services.api import fields
from services.api.errors import ApiError
from services.api.parsing import Parsed, parse_chat, parse_completion

HI = [{"role": "user", "content": "hi"}]


def chat(**more: Any) -> Parsed:
    return parse_chat(json.dumps({"model": "m", "messages": HI} | more).encode())


def completion(**more: Any) -> Parsed:
    return parse_completion(json.dumps({"model": "m", "prompt": "hi"} | more).encode())


def refusal(parse: Any, **more: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(**more)
    assert caught.value.status == 400
    return caught.value


def test_defaults() -> None:
    parsed = chat()
    assert parsed.prompts == (ChatPrompt((ChatMessage("user", "hi"),)),)
    assert (parsed.stream, parsed.include_usage, parsed.ignored) == (False, False, [])
    sampling = parsed.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (None, 1.0, 1.0)
    assert (sampling.top_k, sampling.stop, sampling.ignore_eos) == (0, (), False)
    assert completion().sampling.max_tokens == 16


def test_a_seed_is_chosen_where_none_is_given() -> None:
    assert chat().sampling.seed != chat().sampling.seed
    assert chat(seed=7).sampling.seed == 7
    assert chat(seed=-1).sampling.seed >= 0


def test_null_means_default() -> None:
    names = ("max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options")
    parsed = chat(**dict.fromkeys(names), n=None, tools=None, logprobs=None)
    assert parsed.sampling.temperature == 1.0


def test_everything_that_is_implemented() -> None:
    parsed = chat(
        max_tokens=9,
        max_completion_tokens=5,
        min_tokens=2,
        temperature=0,
        top_p=0.5,
        top_k=-1,
        stop=["a", "b"],
        ignore_eos=True,
        stream=True,
        stream_options={"include_usage": True},
    )
    sampling = parsed.sampling
    assert (sampling.max_tokens, sampling.min_tokens, sampling.temperature) == (5, 2, 0.0)
    assert (sampling.top_p, sampling.top_k, sampling.stop) == (0.5, 0, ("a", "b"))
    assert (sampling.ignore_eos, parsed.stream, parsed.include_usage) == (True, True, True)


@pytest.mark.parametrize("parse", [chat, completion])
def test_penalties_biases_and_stop_tokens(parse: Any) -> None:
    sampling = parse(
        min_p=0.1,
        presence_penalty=-2,
        frequency_penalty=1.5,
        repetition_penalty=1.2,
        stop_token_ids=[7, 8],
        logit_bias={"0": -100, "50256": 3.5},
    ).sampling
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.2)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-2.0, 1.5)
    assert sampling.stop_token_ids == (7, 8)
    assert sampling.logit_bias == {0: -100.0, 50256: 3.5}


@pytest.mark.parametrize("parse", [chat, completion])
def test_settings_that_change_nothing_are_those_left_out(parse: Any) -> None:
    neutral = {
        "min_p": 0,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "repetition_penalty": 1,
        "stop_token_ids": [],
        "logit_bias": {},
        "logprobs": False,
    }
    plain = parse(seed=1).sampling
    assert parse(seed=1, **neutral).sampling == plain
    assert parse(seed=1, **dict.fromkeys(neutral)).sampling == plain


@pytest.mark.parametrize(
    ("parse", "more", "wanted"),
    [
        (chat, {}, None),
        (chat, {"logprobs": False, "top_logprobs": 0}, None),
        (chat, {"logprobs": True}, 0),
        (chat, {"logprobs": True, "top_logprobs": 20}, 20),
        (completion, {}, None),
        (completion, {"logprobs": 0}, 0),
        (completion, {"logprobs": 5}, 5),
    ],
)
def test_log_probabilities(parse: Any, more: dict[str, Any], wanted: int | None) -> None:
    assert parse(**more).sampling.logprobs == wanted


@pytest.mark.parametrize("value", [True, -1, 21])
def test_a_completion_asks_for_a_number_of_alternatives(value: Any) -> None:
    error = refusal(completion, logprobs=value)
    assert error.info.param == "logprobs"


def test_messages() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    parsed = chat(
        messages=[
            {"role": "developer", "content": "x"},
            {"role": "user", "content": parts, "name": "Ann"},
            {"role": "tool", "content": "y", "tool_call_id": "1"},
        ]
    )
    [prompt] = parsed.prompts
    assert prompt == ChatPrompt(
        (
            ChatMessage("system", "x"),
            ChatMessage("user", "a\nb", "Ann"),
            ChatMessage("tool", "y", None, (), "1"),
        )
    )


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("x", (TextPrompt("x"),)),
        (["x"], (TextPrompt("x"),)),
        ([1, 2], (TokenPrompt((1, 2)),)),
        ([7], (TokenPrompt((7,)),)),
        ([[1, 2]], (TokenPrompt((1, 2)),)),
        (["a", "", "b"], (TextPrompt("a"), TextPrompt(""), TextPrompt("b"))),
        ([[1], [2, 3]], (TokenPrompt((1,)), TokenPrompt((2, 3)))),
        (["a", [1]], (TextPrompt("a"), TokenPrompt((1,)))),
    ],
)
def test_prompts(prompt: Any, wanted: Any) -> None:
    assert completion(prompt=prompt).prompts == wanted


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON"),
        (b'{"model": ', "not valid JSON"),
        (b'"\xff"', "not valid JSON"),
        (b"[1]", "must be a JSON object"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_not_a_json_object(body: bytes, words: str) -> None:
    with pytest.raises(ApiError, match=words) as caught:
        parse_chat(body)
    assert caught.value.info.code == "invalid_json"


@pytest.mark.parametrize(
    ("more", "param", "words"),
    [
        ({"model": 3}, "model", "model = 3: Expected `str`"),
        ({"temperature": "hot"}, "temperature", "temperature = 'hot': Expected `float"),
        ({"stream": "yes"}, "stream", "stream = 'yes'"),
        ({"messages": "hi"}, "messages", "messages = 'hi'"),
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": [{"role": "me", "content": ""}]}, "messages[0].role", "'me'"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "required and missing"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
        ({"temperature": 2.5}, "temperature", "temperature = 2.5 must be between 0 and 2"),
        ({"top_p": 1.5}, "top_p", "top_p = 1.5 must be between 0 and 1"),
        ({"top_p": 0}, "top_p", "top_p = 0"),
        ({"top_k": -2}, "top_k", "top_k = -2 must be between"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens = 0 must be between 1"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", "max_completion_tokens = -1"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "greater than max_tokens = 4"),
        ({"seed": 2**70}, "seed", "seed = 1180591620717411303424 must be between"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "must not be empty"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "where stream is true"),
        ({"min_p": -0.1}, "min_p", "min_p = -0.1 must be between 0 and 1"),
        ({"presence_penalty": 2.1}, "presence_penalty", "must be between -2 and 2"),
        ({"frequency_penalty": -3}, "frequency_penalty", "must be between -2 and 2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "must be between 0.01 and 100"),
        ({"stop_token_ids": [3, -1]}, "stop_token_ids", "-1 is not a token id"),
        ({"stop_token_ids": "x"}, "stop_token_ids", "stop_token_ids = 'x'"),
        ({"logit_bias": {"3": 101}}, "logit_bias", "token 3 = 101.0 must be between -100 and 100"),
        ({"logit_bias": {"the": 1}}, "logit_bias", "the key 'the'; its keys must be token ids"),
        ({"logit_bias": {"03": 1}}, "logit_bias", "the key '03'"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "must be token ids"),
        ({"logit_bias": {"3": "big"}}, "logit_bias", "logit_bias = {'3': 'big'}: Expected `float`"),
        ({"logit_bias": [3]}, "logit_bias", "logit_bias = [3]"),
        ({"logprobs": 3}, "logprobs", "logprobs = 3: Expected `bool"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "must be between 0 and 20"),
        ({"top_logprobs": 2}, "top_logprobs", "only allowed where logprobs is true"),
    ],
)
def test_wrong_types_and_values(more: dict[str, Any], param: str, words: str) -> None:
    error = refusal(chat, **more)
    assert error.info.param == param
    assert words in error.info.message


@pytest.mark.parametrize(
    ("prompt", "code", "words"),
    [
        ([], "invalid_value", "prompt = [] must hold text or token ids"),
        ([[]], "invalid_value", "prompt[0] = [] must hold text or token ids"),
        ([1, "a"], "invalid_type", "prompt holds 'a' among token ids"),
        (["a", 1], "invalid_type", "prompt[1] = 1: token ids and other prompts can not stand"),
        ([-1], "invalid_value", "prompt: -1 is not a token id"),
        (["a", [3, -2]], "invalid_value", "prompt[1]: -2 is not a token id"),
        (["a"] * 513, "invalid_value", "prompt has 513 entries; at most 512"),
        (7, "invalid_type", "prompt = 7"),
    ],
)
def test_prompts_that_are_refused(prompt: Any, code: str, words: str) -> None:
    error = refusal(completion, prompt=prompt)
    assert (error.info.param, error.info.code) == ("prompt", code)
    assert words in error.info.message


@pytest.mark.parametrize(
    ("parse", "field", "value"),
    [
        (chat, "functions", [{"name": "f"}]),
        (chat, "function_call", "f"),
        (chat, "structural_tag", "{}"),
        (chat, "guided_whitespace_pattern", " "),
        (chat, "store", True),
        (chat, "prompt_logprobs", 1),
        (completion, "best_of", 2),
        (completion, "suffix", "x"),
        (completion, "length_penalty", 2),
    ],
)
def test_what_is_known_but_not_implemented_is_named(parse: Any, field: str, value: Any) -> None:
    error = refusal(parse, **{field: value})
    assert (error.info.param, error.info.code) == (field, "unsupported_parameter")
    assert error.info.message.startswith(f"{field} = ")


@pytest.mark.parametrize("endpoint", ["chat", "completion"])
def test_neutral_values_are_fine(endpoint: fields.Endpoint) -> None:
    parse = chat if endpoint == "chat" else completion
    for name, neutral in fields.unsupported(endpoint).items():
        for value in (*neutral, None):
            assert parse(**{name: value}).ignored == [], name
    assert parse(user="u", metadata={"a": "b"}, store=False, n=1).ignored == []


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "image_url", "image_url": {"url": "x"}}],
        [{"type": "text"}],
    ],
)
def test_parts_that_are_refused(content: Any) -> None:
    error = refusal(chat, messages=[{"role": "user", "content": content}])
    assert (error.info.param or "").startswith("messages[0].content[0]")


def test_unknown_fields_are_named_in_a_safe_header() -> None:
    parsed = chat(**{"made_up": 1, "a\r\nset-cookie: x": 2, "ü": 3})
    assert parsed.ignored == ["made_up", "a\r\nset-cookie: x", "ü"]
    header = fields.ignored_header(parsed.ignored)[fields.IGNORED_HEADER]
    assert header == "made_up, a%0D%0Aset-cookie:%20x, %C3%BC"
    assert fields.ignored_header([]) == {}
    assert fields.ignored_header(["x"] * 50)[fields.IGNORED_HEADER].count("x") == 20
