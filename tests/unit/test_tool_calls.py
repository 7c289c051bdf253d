"""Calls told apart from text, in every form and however the text is cut."""

import json
from typing import Any

import pytest

from schemas.state import ToolFormat
from services.api.tool_calls import Arguments, CallBegun, Said, ToolParser

ARGS = '{"city": "Bern }\\"]", "days": [1, {"x": 2}]}'
NAMES = ("f", "g")
Found = tuple[str, list[tuple[str, str]]]


def parse(form: ToolFormat, pieces: list[str], most: int | None = None) -> Found:
    """(text, calls as (name, arguments)), with the order of events checked."""
    parser = ToolParser(form, NAMES, most)
    said, calls, ids = "", list[list[str]](), set()
    events = [event for piece in pieces for event in parser.push(piece)] + parser.finish()
    for event in events:
        match event:
            case Said(text):
                assert text
                said += text
            case CallBegun(index, call_id, name):
                assert index == len(calls)
                ids.add(call_id)
                calls.append([name, ""])
            case Arguments(index, text):
                assert index == len(calls) - 1
                calls[index][1] += text
    assert len(ids) == len(calls)
    return said, [(name, arguments) for name, arguments in calls]


def hermes(*calls: tuple[str, str]) -> str:
    forms = (f'<tool_call>\n{{"name": "{n}", "arguments": {a}}}\n</tool_call>' for n, a in calls)
    return "\n".join(forms)


def array(*calls: tuple[str, str], more: str = "") -> str:
    return "[" + ", ".join(f'{{"name": "{n}", "arguments": {a}{more}}}' for n, a in calls) + "]"


def llama(*calls: tuple[str, str]) -> str:
    return "; ".join(f'{{"name": "{n}", "parameters": {a}}}' for n, a in calls)


TWO = (("f", ARGS), ("g", "{}"))
CASES: list[tuple[ToolFormat, str, Found]] = [
    ("hermes", hermes(*TWO), ("", list(TWO))),
    ("hermes", f"Let me see.\n{hermes(*TWO)}", ("Let me see.", list(TWO))),
    ("hermes", f"a < b {hermes(TWO[0])} and so", ("a < b and so", [TWO[0]])),
    ("hermes", " no <tool call> here\n", (" no <tool call> here\n", [])),
    ("hermes", "<tool_call>\nnot JSON\n</tool_call>", ("<tool_call>\nnot JSON\n</tool_call>", [])),
    ("hermes", f'<tool_call>{{"arguments": {ARGS}, "name": "f"}}</tool_call>', ("", [TWO[0]])),
    ("hermes", f'<tool_call>{{"name": "f", "arguments": {json.dumps(ARGS)}}}', ("", [TWO[0]])),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a', ("", [("f", '{"a')])),
    ("hermes", '<tool_call>{"name": "f', ('<tool_call>{"name": "f', [])),
    ("hermes", '<tool_call>{"name": 1}</tool_call>', ('<tool_call>{"name": 1}</tool_call>', [])),
    ("hermes", '<tool_call>[{"name": "f", "arguments": {}}]', None),  # type: ignore[list-item]
    ("llama", llama(*TWO), ("", list(TWO))),
    ("llama", f"<|python_tag|>{llama(TWO[0])}", ("", [TWO[0]])),
    ("llama", "\n" + llama(TWO[0]), ("", [TWO[0]])),
    ("llama", llama(("unknown", "{}")), (llama(("unknown", "{}")), [])),
    ("llama", '{"answer": 42}', ('{"answer": 42}', [])),
    ("llama", f"Here: {llama(TWO[0])}", (f"Here: {llama(TWO[0])}", [])),
    ("llama", "plain\ntext ", ("plain\ntext ", [])),
    ("llama", "  ", ("  ", [])),
    ("mistral", f"[TOOL_CALLS]{array(*TWO)}", ("", list(TWO))),
    ("mistral", f"[TOOL_CALLS] {array(*TWO, more=', ' + chr(34) + 'id' + chr(34) + ': 1')}", None),  # type: ignore[list-item]
    ("mistral", "[TOOL_", ("[TOOL_", [])),
    ("mistral2", f"Yes.[TOOL_CALLS]f[ARGS]{ARGS}[TOOL_CALLS]g[ARGS]{{}}", ("Yes.", list(TWO))),
    ("mistral2", f"[TOOL_CALLS]f[CALL_ID]abc123def[ARGS]{ARGS}", ("", [TWO[0]])),
    ("mistral2", "[TOOL_CALLS]what is that?", ("[TOOL_CALLS]what is that?", [])),
    ("json", array(*TWO), ("", list(TWO))),
    ("json", f'{{"name": "g", "arguments": {ARGS}}}', ("", [("g", ARGS)])),
    ("json", "[1, 2]", ("[1, 2]", [])),
]


@pytest.mark.parametrize(("form", "text", "expected"), CASES)
def test_however_the_text_is_cut(form: ToolFormat, text: str, expected: Any) -> None:
    whole = parse(form, [text])
    if expected is not None:
        assert (whole[0], [(n, _same(a)) for n, a in whole[1]]) == (
            expected[0],
            [(n, _same(a)) for n, a in expected[1]],
        )
    assert parse(form, list(text)) == whole
    for at in range(1, len(text)):
        assert parse(form, [text[:at], text[at:]]) == whole


def _same(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def test_calls_beyond_the_most_are_dropped() -> None:
    assert parse("hermes", list(hermes(*TWO)), most=1) == ("", [TWO[0]])
    assert parse("mistral", [f"[TOOL_CALLS]{array(*TWO)}"], most=1) == ("", [TWO[0]])


def test_text_is_not_held_back_longer_than_it_must() -> None:
    parser = ToolParser("hermes", NAMES)
    assert parser.push("Hello <") == [Said("Hello")]
    assert parser.push("b") == [Said(" <b")]
    parser.push('<tool_call>{"name": "f", "arguments": {"a": ')
    assert parser.push("1") == [Arguments(0, "1")]


def test_ids_are_what_templates_take() -> None:
    [begun, _] = ToolParser("mistral", NAMES).push(f"[TOOL_CALLS]{array(TWO[1])}")
    assert isinstance(begun, CallBegun)
    assert len(begun.id) == 9
    assert begun.id.isalnum()
