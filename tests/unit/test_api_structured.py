"""What an answer must look like, and tools: what is taken, what is refused, and in which words."""

import json
from typing import Any

import pytest

from schemas.requests import ChatPrompt, Grammar, Tool, ToolCall
from services.api.parsing import Parsed
from tests.unit.test_api_parsing import HI, chat, completion, refusal

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
SCHEMA_TEXT = json.dumps(SCHEMA, separators=(",", ":"))
F = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
G = {"type": "function", "function": {"name": "g", "strict": True, "description": "does"}}


def grammar(parsed: Parsed) -> Grammar | None:
    return parsed.sampling.grammar


@pytest.mark.parametrize("parse", [chat, completion])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": None, "structured_outputs": None, "guided_choice": []}, None),
        ({"response_format": {"type": "json_object"}}, ("json_object", "", "response_format")),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA},
                }
            },
            ("json_schema", SCHEMA_TEXT, "response_format.json_schema.schema"),
        ),
        (
            {"structured_outputs": {"json": SCHEMA}},
            ("json_schema", SCHEMA_TEXT, "structured_outputs.json"),
        ),
        (
            {"structured_outputs": {"json": SCHEMA_TEXT}},
            ("json_schema", SCHEMA_TEXT, "structured_outputs.json"),
        ),
        ({"structured_outputs": {"regex": "a+"}}, ("regex", "a+", "structured_outputs.regex")),
        (
            {"structured_outputs": {"choice": ["é", "b"]}},
            ("choice", '["é","b"]', "structured_outputs.choice"),
        ),
        (
            {"structured_outputs": {"grammar": "root ::= x"}},
            ("grammar", "root ::= x", "structured_outputs.grammar"),
        ),
        (
            {"structured_outputs": {"json_object": True, "disable_fallback": True}},
            ("json_object", "", "structured_outputs.json_object"),
        ),
        ({"guided_json": SCHEMA}, ("json_schema", SCHEMA_TEXT, "guided_json")),
        ({"guided_regex": "a"}, ("regex", "a", "guided_regex")),
        ({"guided_choice": ["a"]}, ("choice", '["a"]', "guided_choice")),
        ({"guided_grammar": "x"}, ("grammar", "x", "guided_grammar")),
    ],
)
def test_what_an_answer_must_be(parse: Any, fields: dict[str, Any], expected: Any) -> None:
    parsed = parse(**fields)
    assert grammar(parsed) == (Grammar(*expected) if expected else None)
    assert parsed.ignored == []


@pytest.mark.parametrize("parse", [chat, completion])
@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'xml' is not supported"),
        ({"response_format": {}}, "response_format.type", "required"),
        (
            {
                "response_format": {
                    "type": "json_object",
                    "json_schema": {"name": "x", "schema": {}},
                }
            },
            "response_format.type",
            "does not go with",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": 3}}},
            "response_format.json_schema.schema",
            "= 3",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "asks for nothing"),
        (
            {"structured_outputs": {"structural_tag": "x"}},
            "structured_outputs.structural_tag",
            "not supported",
        ),
        (
            {"structured_outputs": {"whitespace_pattern": " "}},
            "structured_outputs.whitespace_pattern",
            "not supported",
        ),
        (
            {"structured_outputs": {"disable_any_whitespace": True}},
            "structured_outputs.disable_any_whitespace",
            "not supported",
        ),
        ({"structured_outputs": {"regexp": "x"}}, "structured_outputs", "unknown field `regexp`"),
        (
            {"structured_outputs": {"regex": "a", "choice": ["b"]}},
            "structured_outputs.choice",
            "structured_outputs.regex and structured_outputs.choice",
        ),
        (
            {"guided_regex": "a", "response_format": {"type": "json_object"}},
            "guided_regex",
            "response_format and guided_regex both",
        ),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least one"),
        ({"guided_choice": ["a", ""]}, "guided_choice", "no empty one"),
        ({"guided_choice": "a"}, "guided_choice", "'a'"),
        ({"guided_regex": ""}, "guided_regex", "must not be empty"),
        ({"guided_json": "{"}, "guided_json", "is not JSON"),
        ({"guided_json": "[]"}, "guided_json", "must be a JSON schema"),
    ],
)
def test_what_is_refused(parse: Any, fields: dict[str, Any], param: str, words: str) -> None:
    error = refusal(parse, **fields)
    assert error.info.param == param
    assert words in error.info.message


# -- tools ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "names", "expected", "most"),
    [
        ({}, "fg", ("text_or_tool_calls", ["f", "g"]), None),  # g is strict
        ({"tools": [F]}, "f", None, None),
        ({"tools": [F], "tool_choice": "auto", "parallel_tool_calls": False}, "f", None, 1),
        ({"tool_choice": "required"}, "fg", ("tool_calls", ["f", "g"]), None),
        (
            {"tool_choice": "required", "parallel_tool_calls": False},
            "fg",
            ("tool_call", ["f", "g"]),
            1,
        ),
        (
            {"tool_choice": {"type": "function", "function": {"name": "g"}}},
            "fg",
            ("tool_call", ["g"]),
            1,
        ),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {
                        "mode": "required",
                        "tools": [{"type": "function", "function": {"name": "f"}}],
                    },
                }
            },
            "f",
            ("tool_calls", ["f"]),
            None,
        ),
    ],
)
def test_tools(fields: dict[str, Any], names: str, expected: Any, most: int | None) -> None:
    parsed = chat(**{"tools": [F, G]} | fields)
    assert isinstance(parsed.prompts[0], ChatPrompt)
    known = (Tool("f", parameters=SCHEMA), Tool("g", "does", strict=True))
    assert parsed.prompts[0].tools == tuple(tool for tool in known if tool.name in names)
    found = grammar(parsed)
    kind, allowed = expected or (None, None)
    assert (found.kind if found else None) == kind
    assert (json.loads(found.text) if found else None) == allowed
    assert parsed.tool_use
    assert parsed.tool_use.most == most


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
        {"tools": None, "tool_choice": "none"},
        {"tools": [F], "tool_choice": "none"},
    ],
)
def test_no_tools(fields: dict[str, Any]) -> None:
    parsed = chat(**fields)
    assert parsed.tool_use is None
    assert isinstance(parsed.prompts[0], ChatPrompt)
    assert parsed.prompts[0].tools == ()
    assert parsed.ignored == []


def test_a_schema_goes_with_tools_that_are_not_to_be_called() -> None:
    parsed = chat(tools=[F], tool_choice="none", guided_json=SCHEMA)
    assert grammar(parsed) is not None


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": [{"type": "custom"}]}, "tools[0].type", "only function is"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "required"),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools[0].function.name",
            "'a b'",
        ),
        ({"tools": [F, F]}, "tools[1].function.name", "twice"),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}
                ]
            },
            "tools[0].function.parameters",
            "object",
        ),
        ({"tools": [F] * 129}, "tools", "129"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": [F], "tool_choice": "any"}, "tool_choice", "'any'"),
        (
            {"tools": [F], "tool_choice": {"type": "custom", "custom": {"name": "x"}}},
            "tool_choice",
            "not supported",
        ),
        (
            {"tools": [F], "tool_choice": {"type": "function", "function": {"name": "h"}}},
            "tool_choice.function.name",
            "none of the tools: f",
        ),
        (
            {"tools": [F], "response_format": {"type": "json_object"}},
            "response_format",
            "response_format and tools",
        ),
    ],
)
def test_tools_that_are_refused(fields: dict[str, Any], param: str, words: str) -> None:
    error = refusal(chat, **fields)
    assert error.info.param == param
    assert words in error.info.message


def _called(**changes: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": '{"a": 1}'}
    call = {"id": "c1", "type": "function", "function": function} | changes
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def test_calls_and_answers_in_a_chat() -> None:
    answer = {"role": "tool", "tool_call_id": "c1", "content": "42"}
    parsed = chat(messages=[*HI, _called(), answer])
    assert isinstance(parsed.prompts[0], ChatPrompt)
    _, called, answered = parsed.prompts[0].messages
    assert (called.content, called.tool_calls) == ("", (ToolCall("c1", "f", '{"a": 1}'),))
    assert (answered.content, answered.tool_call_id) == ("42", "c1")


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "assistant"}, ".content"),
        ({"role": "tool", "content": "x"}, ".tool_call_id"),
        ({"role": "user", "content": "x", "tool_call_id": "1"}, ".tool_call_id"),
        (_called() | {"role": "user"}, ".tool_calls"),
        (_called(type="custom"), ".tool_calls[0].type"),
        (_called(function={"name": "f", "arguments": "[]"}), ".tool_calls[0].function.arguments"),
        (_called(function={"name": "f", "arguments": "{"}), ".tool_calls[0].function.arguments"),
        (_called(function={"name": "f", "arguments": {}}), ".tool_calls[0].function.arguments"),
        ({"role": "assistant", "content": "", "function_call": {"name": "f"}}, ".function_call"),
    ],
)
def test_messages_that_are_refused(message: dict[str, Any], param: str) -> None:
    assert refusal(chat, messages=[message]).info.param == f"messages[0]{param}"
