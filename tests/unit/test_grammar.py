"""Completions that follow a grammar: random models emit noise, so the masks alone do it."""

import json
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from schemas.requests import Grammar, GrammarKind
from services.gpu_agent.engine.grammar import Grammars
from services.gpu_agent.ipc import Broke, Done
from tests.unit.engine_kit import Answer, Answers, make_batch, model_text, request, run
from tests.unit.tiny_models import LLAMA_LIKE

PROMPT = [1, 2, 3, 4, 5]
END = 7  # of the models that have an end: a control character, which JSON has none of

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
        "address": {"$ref": "#/$defs/address"},
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
    "$defs": {
        "address": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["zip"],
            "additionalProperties": False,
        }
    },
}


def grammar(kind: GrammarKind, what: Any) -> Grammar:
    return Grammar(kind, what if isinstance(what, str) else json.dumps(what), "response_format")


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA_LIKE)).eval()


def is_person(text: str) -> bool:
    person = json.loads(text)
    return (
        list(person) == ["name", "age", "tags", "address"]
        and isinstance(person["name"], str)
        and len(person["name"]) <= 8
        and type(person["age"]) is int
        and 0 <= person["age"] <= 120
        and 1 <= len(person["tags"]) <= 3
        and set(person["tags"]) <= {"a", "b"}
        and re.fullmatch("[0-9]{5}", person["address"]["zip"]) is not None
    )


CASES: list[tuple[GrammarKind, Any, Callable[[str], bool]]] = [
    ("json_schema", PERSON, is_person),
    ("json_schema", {"type": "boolean"}, lambda text: json.loads(text) in (True, False)),
    (
        "json_schema",
        {"type": "array", "items": {"type": "null"}, "minItems": 2, "maxItems": 2},
        lambda text: json.loads(text) == [None, None],
    ),
    ("regex", "[ab]{3}-é", lambda text: re.fullmatch("[ab]{3}-é", text) is not None),
    ("choice", ["red", 'gr"een\\', "blau\n"], lambda text: text in {"red", 'gr"een\\', "blau\n"}),
    (
        "grammar",
        'root ::= "x" [0-9] | "y"',
        lambda text: re.fullmatch("x[0-9]|y", text) is not None,
    ),
    ("grammar", 'start: "x" /[0-9]/', lambda text: re.fullmatch("x[0-9]", text) is not None),
]


@pytest.mark.parametrize("has_end", [True, False])
def test_every_completion_follows_its_grammar(llama: Any, has_end: bool) -> None:
    batch = make_batch(llama, text=model_text(eos_ids=(END,) if has_end else ()), max_batch=8)
    requests, checks = [], {}
    for number, (kind, what, check) in enumerate(CASES):
        for seed in range(3):
            name = f"{number}.{seed}"
            checks[name] = check
            settings: dict[str, Any] = {"seed": seed, "temperature": 1.0, "max_tokens": 200}
            settings["ignore_eos"] = bool(seed % 2)
            requests.append(request(name, PROMPT, grammar=grammar(kind, what), **settings))
    # among others, who have none and must not notice
    free = request("free", PROMPT, temperature=1.0, seed=3, max_tokens=40)
    alone = run(make_batch(llama), free)["free"].tokens
    answers = run(batch, *requests, free)
    assert answers["free"].tokens == alone
    for name, check in checks.items():
        assert _end(answers[name]).finish_reason == "stop"
        assert check(answers[name].text), (name, answers[name].text)


def _end(answer: Answer) -> Done:
    assert isinstance(answer.end, Done), answer.end
    return answer.end


def test_a_parked_row_goes_on_in_its_grammar(llama: Any) -> None:
    settings: dict[str, Any] = {"temperature": 1.0, "max_tokens": 120, "ignore_eos": False}
    requests = [
        request(f"r{n}", PROMPT, seed=n, grammar=grammar("json_schema", PERSON), **settings)
        for n in range(4)
    ]
    text = model_text(eos_ids=(END,))
    roomy = run(make_batch(llama, text=text), *requests)
    tight = make_batch(llama, text=text, kv_tokens=144, max_model_len=140)
    answers = run(tight, *requests)
    assert tight.num_parked > 0
    assert {name: one.tokens for name, one in answers.items()} == {
        name: one.tokens for name, one in roomy.items()
    }
    assert all(is_person(answer.text) for answer in answers.values())


@pytest.mark.parametrize("name", ["greedy", "biased", "held back", "told"])
def test_other_settings_give_way_to_the_grammar(llama: Any, name: str) -> None:
    settings: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0.0},
        "biased": {"logit_bias": {ord("y"): -100.0, ord("q"): 100.0}, "repetition_penalty": 2.0},
        "held back": {"min_tokens": 50, "ignore_eos": True, "presence_penalty": 2.0},
        "told": {"temperature": 1.0, "logprobs": 2},
    }
    batch = make_batch(llama, text=model_text(eos_ids=(END,)))
    only = grammar("regex", "yy")
    answer = run(batch, request("a", PROMPT, grammar=only, **settings[name]))["a"]
    assert (answer.text, _end(answer).finish_reason) == ("yy", "stop")


def test_an_end_is_chosen_only_where_the_grammar_may_end(llama: Any) -> None:
    batch = make_batch(llama, text=model_text(eos_ids=(END,)))
    longing: dict[str, Any] = {"logit_bias": {END: 100.0}, "max_tokens": 20}
    plus = grammar("regex", "a+")
    one = run(batch, request("a", PROMPT, grammar=plus, ignore_eos=False, **longing))["a"]
    assert (one.text, one.tokens[-1]) == ("a", END)
    more = run(batch, request("b", PROMPT, grammar=plus, ignore_eos=True, **longing))["b"]
    assert (more.text, _end(more).finish_reason) == ("a" * 20, "length")
    least = request("c", PROMPT, grammar=plus, ignore_eos=False, min_tokens=5, **longing)
    assert run(batch, least)["c"].text == "a" * 5
    stopped = request("d", PROMPT, grammar=plus, stop=("aaa",), **longing)
    assert run(batch, stopped)["d"].text == ""


@pytest.mark.parametrize(
    ("kind", "what", "said"),
    [
        ("json_schema", {"type": "string", "not": {"const": "x"}}, 'Unimplemented keys: ["not"]'),
        ("json_schema", {"type": "sting"}, "Invalid type: sting"),
        ("json_schema", {"$ref": "#/$defs/nowhere"}, "nowhere"),
        ("json_schema", {"type": "integer", "minimum": 3, "maximum": 1}, "Unsatisfiable"),
        ("regex", "a(b", "unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("grammar", "root ::= missing", "missing"),
        ("grammar", "no grammar at all", "Expected"),
    ],
)
def test_what_is_no_grammar_is_refused_alone(
    llama: Any, kind: GrammarKind, what: Any, said: str
) -> None:
    batch = make_batch(llama)
    bad = request("bad", PROMPT, grammar=grammar(kind, what))
    answers = run(batch, bad, request("good", PROMPT, grammar=grammar("regex", "abc")))
    end = answers["bad"].end
    assert isinstance(end, Broke)
    assert end.code == "invalid_grammar"
    assert end.message.startswith("response_format can not be followed: ")
    assert said in end.message
    assert answers["good"].text == "abc"


def test_a_request_waits_for_its_grammar_and_others_do_not(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, told = threading.Event(), threading.Event()
    build = Grammars._build

    def slow(self: Grammars, *what: Any) -> Any:
        assert gate.wait(30)
        return build(self, *what)

    monkeypatch.setattr(Grammars, "_build", slow)
    batch = make_batch(llama, on_ready=told.set)
    answers = Answers()

    def is_busy() -> bool:
        return batch.is_busy

    answers.take(batch.submit(request("slow", PROMPT, grammar=grammar("regex", "abc"))))
    assert not is_busy()
    answers.take(batch.submit(request("quick", PROMPT, max_tokens=3)))
    assert is_busy()
    while is_busy():
        answers.take(batch.step())
    assert list(answers) == ["quick"]
    assert not told.is_set()
    gate.set()
    assert told.wait(30)
    assert is_busy()
    assert run(batch, answers=answers)["slow"].text == "abc"
    # it is known from now on: nothing to wait for
    monkeypatch.setattr(Grammars, "_build", None)
    assert run(batch, request("again", PROMPT, grammar=grammar("regex", "abc")))["again"].text


def test_a_request_that_waits_for_its_grammar_can_be_cancelled(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    monkeypatch.setattr(Grammars, "_build", lambda *_: gate.wait(30))
    batch = make_batch(llama)
    batch.submit(request("a", PROMPT, grammar=grammar("regex", "abc")))
    [done] = batch.cancel("a")
    assert isinstance(done, Done)
    assert done.finish_reason == "cancelled"
    assert batch.num_requests == 0
    gate.set()


def test_tokens_may_be_counted_before_the_grammar_is_there() -> None:
    text = model_text()
    grammars = Grammars(text.tokenizer, text.eos_ids, text.vocab_size, "")
    ready = threading.Event()
    constraint = grammars.open(grammar("regex", "ab[cd]"), (), ready.set)
    for token_id in text.tokenizer.encode("ab"):
        constraint.count(token_id)
    assert ready.wait(30)
    allowed = constraint.apply(torch.zeros((1, 300)))[0] == 0
    letters = [i for i in range(300) if allowed[i]]
    assert text.tokenizer.decode(letters) == "cd"
    constraint.count(letters[0])
    assert constraint.is_over
