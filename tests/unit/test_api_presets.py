"""What a deployment sets in request bodies: defaults, overrides, and what may not be set."""

from typing import Any

import msgspec
import pytest

from services.api import presets
from services.api.errors import ApiError
from services.api.fields import Endpoint
from services.api.parsing import parse_chat, parse_completion


def applied(
    raw: dict[str, Any], endpoint: Endpoint = "chat", **both: dict[str, Any]
) -> dict[str, Any]:
    return presets.apply(dict(raw), endpoint, both.get("defaults", {}), both.get("overrides", {}))


def test_a_default_is_used_where_the_client_says_nothing_or_null() -> None:
    defaults = {"temperature": 0.5}
    assert applied({}, defaults=defaults) == {"temperature": 0.5}
    assert applied({"temperature": None}, defaults=defaults) == {"temperature": 0.5}
    assert applied({"temperature": 0}, defaults=defaults) == {"temperature": 0}


def test_an_override_wins_and_null_takes_the_field_out() -> None:
    overrides = {"temperature": 0.5, "seed": None}
    assert applied({"temperature": 1, "seed": 3}, overrides=overrides) == {"temperature": 0.5}


def test_two_names_of_one_thing_are_one() -> None:
    wanted = {"max_tokens": 5}
    asked = {"max_completion_tokens": 9}
    assert applied(asked, defaults=wanted) == asked
    assert applied(asked, overrides=wanted) == wanted
    assert applied({"max_tokens": 9}, defaults={"max_completion_tokens": 5}) == {"max_tokens": 9}


def test_a_field_is_left_out_where_an_endpoint_does_not_know_it() -> None:
    both = {"defaults": {"top_logprobs": 2, "logprobs": True}, "overrides": {"dimensions": 3}}
    assert applied({}, "chat", **both) == {"top_logprobs": 2, "logprobs": True}
    assert applied({}, "embedding", **both) == {"dimensions": 3}


def test_a_parsed_request_is_as_the_deployment_wants_it() -> None:
    def prepare(raw: dict[str, Any], endpoint: Endpoint) -> dict[str, Any]:
        return presets.apply(raw, endpoint, {"max_tokens": 7}, {"top_k": 4, "stop": None})

    sampling = {"max_tokens": 9, "top_k": 1, "stop": "x"}
    body = msgspec.json.encode({"model": "m", "prompt": "x"} | sampling)
    found = parse_completion(body, prepare).sampling
    assert (found.max_tokens, found.top_k, found.stop) == (9, 4, ())
    messages = [{"role": "user", "content": "x"}]
    chat = parse_chat(msgspec.json.encode({"model": "m", "messages": messages}), prepare)
    assert (chat.sampling.max_tokens, chat.ignored) == (7, [])


@pytest.mark.parametrize(
    ("both", "param", "words"),
    [
        ({"defaults": {"temprature": 1}}, "defaults.temprature", "did you mean 'temperature'?"),
        ({"overrides": {"temperature": 9}}, "overrides.temperature", "temperature = 9.0 must be"),
        ({"defaults": {"top_p": "high"}}, "defaults.top_p", "top_p = 'high'"),
        ({"overrides": {"model": "x"}}, "overrides.model", "for the client to say"),
        ({"defaults": {"stream": True}}, "defaults.stream", "for the client to say"),
        ({"defaults": {"use_beam_search": True}}, "defaults.use_beam_search", "not supported"),
    ],
)
def test_what_no_request_may_say_is_refused_when_it_is_set(
    both: dict[str, dict[str, Any]], param: str, words: str
) -> None:
    with pytest.raises(ApiError) as caught:
        presets.check(both.get("defaults", {}), both.get("overrides", {}))
    assert (caught.value.status, caught.value.info.param) == (400, param)
    assert words in caught.value.info.message


def test_what_requests_may_say_can_be_set() -> None:
    presets.check({"temperature": 0.2, "dimensions": 3}, {"seed": None, "max_tokens": 5})
