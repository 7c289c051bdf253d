"""Tools in the engine: how templates show that they know them, and calls that always parse."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AddedToken, AutoModelForCausalLM, LlamaConfig

from schemas.requests import ChatMessage, ChatPrompt, Grammar, GrammarKind, Tool, ToolCall
from schemas.state import ToolFormat
from services.api.tool_calls import Arguments, CallBegun, Said, ToolParser
from services.demo.models import CHAT_TEMPLATE as DEMO_TEMPLATE
from services.gpu_agent.engine.prompts import InvalidPrompt, ModelText, NoTools
from services.gpu_agent.ipc import Done
from services.gpu_agent.tool_format import MARKERS, find_tool_format, format_of
from tests.unit.engine_kit import CHAT_TEMPLATE, byte_tokenizer, make_batch, request, run
from tests.unit.tiny_models import LLAMA_LIKE

SHOWS = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + CHAT_TEMPLATE
TEMPLATES: dict[ToolFormat, str] = {
    "": CHAT_TEMPLATE,
    "hermes": SHOWS + "{# <tool_call> #}",
    "llama": SHOWS + '{# {"name": function, "parameters": dictionary} #}',
    "mistral": SHOWS + "{# [TOOL_CALLS] #}",
    "mistral2": SHOWS + "{# [TOOL_CALLS] [ARGS] #}",
    "json": SHOWS,
}
END = 256
DIGIT = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["n"],
    "additionalProperties": False,
}
WORD = {
    "type": "object",
    "properties": {"w": {"$ref": "#/$defs/w"}},
    "required": ["w"],
    "additionalProperties": False,
    "$defs": {"w": {"enum": ["a", "}"]}},
}
TOOLS = (Tool("digit", 'gives "it"', DIGIT), Tool("word", parameters=WORD), Tool("nothing"))


@pytest.mark.parametrize(("form", "template"), TEMPLATES.items())
def test_a_template_tells_the_form(form: ToolFormat, template: str, tmp_path: Path) -> None:
    assert format_of(template) == form
    byte_tokenizer(template).save_pretrained(tmp_path)
    assert find_tool_format(tmp_path) == form


def test_templates_are_found_where_older_and_newer_files_have_them(tmp_path: Path) -> None:
    assert find_tool_format(tmp_path) == ""
    several = [
        {"name": "default", "template": CHAT_TEMPLATE},
        {"name": "tool_use", "template": TEMPLATES["hermes"]},
    ]
    for said, form in ((several, "hermes"), (several[:1], ""), (TEMPLATES["json"], "json")):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": said}))
        assert find_tool_format(tmp_path) == form
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES["llama"])
    assert find_tool_format(tmp_path) == "llama"
    (tmp_path / "tokenizer_config.json").write_text("{")
    (tmp_path / "chat_template.jinja").unlink()
    assert find_tool_format(tmp_path) == ""


def text_of(form: ToolFormat, special: bool) -> ModelText:
    """A byte tokenizer with an end, and with markers as special tokens where ``special``."""
    tokenizer = byte_tokenizer(TEMPLATES[form])
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    added = [AddedToken(marker, special=True) for marker in MARKERS] if special else []
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    return ModelText("tiny", tokenizer, frozenset({END}), 320)


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**LLAMA_LIKE, "vocab_size": 320})).eval()


def calls_in(form: ToolFormat, text: str) -> tuple[str, list[tuple[str, Any]]]:
    parser = ToolParser(form, [tool.name for tool in TOOLS])
    said, calls = "", list[list[str]]()
    for event in (*parser.push(text), *parser.finish()):
        match event:
            case Said(more):
                said += more
            case CallBegun(_, _, name):
                calls.append([name, ""])
            case Arguments(index, more):
                calls[index][1] += more
    return said, [(name, json.loads(arguments)) for name, arguments in calls]


def is_valid(name: str, arguments: Any) -> bool:
    match name:
        case "digit":
            return list(arguments) == ["n"] and arguments["n"] in range(10)
        case "word":
            return list(arguments) == ["w"] and arguments["w"] in ("a", "}")
        case _:
            return name == "nothing" and arguments == {}


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("form", [form for form in TEMPLATES if form])
def test_constrained_calls_always_parse(llama: Any, form: ToolFormat, special: bool) -> None:
    text = text_of(form, special)
    batch = make_batch(llama, text=text, max_batch=8, kv_tokens=8000, max_model_len=2000)
    prompt = ChatPrompt((ChatMessage("user", "go"),), TOOLS)
    kinds: tuple[GrammarKind, ...] = ("tool_call", "tool_calls")
    requests = []
    for kind in kinds:
        for seed in range(2):
            names = ["word"] if kind == "tool_call" else [tool.name for tool in TOOLS]
            wanted = Grammar(kind, json.dumps(names), "tools")
            settings: dict[str, Any] = {"seed": seed, "temperature": 1.0, "max_tokens": 600}
            settings |= {"ignore_eos": False, "logit_bias": {END: 6.0}}
            requests.append(request(f"{kind}{seed}", prompt, grammar=wanted, **settings))
    for name, answer in run(batch, *requests).items():
        assert isinstance(answer.end, Done), answer.end
        assert answer.end.finish_reason == "stop"
        said, calls = calls_in(form, answer.text)
        assert said == ""
        assert len(calls) >= 1
        assert all(is_valid(*call) for call in calls), calls
        if name.startswith("tool_call0"):
            assert [name for name, _ in calls] == ["word"]


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("form", [form for form in TEMPLATES if form])
def test_strict_tools_leave_the_model_free_until_it_calls(
    llama: Any, form: ToolFormat, special: bool
) -> None:
    text = text_of(form, special)
    strict = tuple(Tool(t.name, t.description, t.parameters, True) for t in TOOLS)
    prompt = ChatPrompt((ChatMessage("user", "go"),), strict)
    wanted = Grammar("text_or_tool_calls", json.dumps([t.name for t in TOOLS]), "tools")
    batch = make_batch(llama, text=text, kv_tokens=4000, max_model_len=1900)
    begin = {
        "hermes": "<tool_call>",
        "llama": "{",
        "mistral": "[TOOL_CALLS]",
        "mistral2": "[TOOL_CALLS]",
    }.get(form, "[")
    [first] = text.tokenizer.encode(begin)[:1]
    free = {ord_of(text, char): -100.0 for char in "{[<"}
    asks = [
        request("free", prompt, grammar=wanted, temperature=1.0, max_tokens=30,
                logit_bias=free | ({first: -100.0} if special else {})),
        request("empty", prompt, grammar=wanted, ignore_eos=False, logit_bias={END: 100.0}),
    ]  # fmt: skip
    answers = run(batch, *asks)
    assert answers["empty"].text == ""
    assert len(answers["free"].tokens) == 30
    assert calls_in(form, answers["free"].text)[1] == []


@pytest.mark.parametrize(
    ("form", "begin"), [("hermes", "<tool_call>"), ("mistral", "[TOOL_CALLS]"), ("llama", "{")]
)
def test_a_call_of_a_strict_tool_follows_its_schema(
    llama: Any, form: ToolFormat, begin: str
) -> None:
    text = text_of(form, special=True)
    prompt = ChatPrompt((ChatMessage("user", "go"),), (Tool("word", "", WORD, True),))
    wanted = Grammar("text_or_tool_calls", '["word"]', "tools")
    longing = {ord_of(text, begin): 50.0, END: 20.0}
    settings: dict[str, Any] = {"max_tokens": 200, "ignore_eos": False, "logit_bias": longing}
    answer = run(
        make_batch(llama, text=text, kv_tokens=4000, max_model_len=1900),
        request("a", prompt, grammar=wanted, **settings),
    )["a"]
    assert isinstance(answer.end, Done)
    assert answer.end.finish_reason == "stop"
    said, calls = calls_in(form, answer.text)
    assert said == ""
    assert [is_valid(*call) for call in calls] == [True]


def ord_of(text: ModelText, char: str) -> int:
    [token_id] = text.tokenizer.encode(char)
    return int(token_id)


def test_a_template_sees_tools_calls_and_answers() -> None:
    template = (
        "{% for t in tools %}{{ t['function']['name'] }};{% endfor %}"
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}"
        "{% for c in m['tool_calls'] or [] %}"
        "<tool_call>{{ c['id'] }}{{ c['function']['arguments']['a'] }}{% endfor %}"
        "{{ m['tool_call_id'] }};{% endfor %}"
    )
    text = ModelText("tiny", byte_tokenizer(template), frozenset(), 256)
    prompt = ChatPrompt(
        (
            ChatMessage("user", "hi"),
            ChatMessage("assistant", "", None, (ToolCall("c1", "f", '{"a": 5}'),)),
            ChatMessage("tool", "42", None, (), "c1"),
        ),
        (Tool("f"),),
    )
    shown = text.tokenizer.decode(text.encode(prompt))
    assert shown == "f;user:hi;assistant:<tool_call>c15;tool:42c1;"


def test_arguments_that_are_no_json_are_refused() -> None:
    text = ModelText("tiny", byte_tokenizer(SHOWS), frozenset(), 256)
    call = ToolCall("c1", "f", "{")
    with pytest.raises(InvalidPrompt):
        text.encode(ChatPrompt((ChatMessage("assistant", "", None, (call,)),)))


def test_a_template_without_tools_is_named() -> None:
    text = ModelText("tiny", byte_tokenizer(), frozenset(), 256)
    with pytest.raises(
        NoTools, match="chat template of model 'tiny' does not know tools"
    ) as caught:
        text.encode(ChatPrompt((ChatMessage("user", "hi"),), TOOLS))
    assert caught.value.code == "tools_not_supported"


def test_the_demo_models_know_tools() -> None:
    assert format_of(DEMO_TEMPLATE) == "hermes"
