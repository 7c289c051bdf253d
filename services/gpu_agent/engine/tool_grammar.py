"""Grammar texts for llguidance: JSON by a schema, and calls of tools in a model's own form.

Calls are written as models were trained to write them, and as chat templates show the earlier
ones of a chat: JSON with one blank after colons and commas, around arguments that follow the
tool's own schema. Markers that are special tokens are named by their ids, `<[5]>`, since special
tokens match no text.

Lark: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

import json
from collections.abc import Sequence
from typing import Any, Final

from schemas.requests import GrammarKind, Tool
from schemas.state import ToolFormat

# Between the parts of JSON. Unbounded, as the standard has it, a model that is unsure of what comes
# next may write blanks until its tokens are used up.
WHITESPACE: Final = r"(\n[ ]{0,32}|[ ]{1,2})"
JSON_OPTIONS: Final[Any] = {"whitespace_pattern": WHITESPACE}  # what llguidance takes
_NO_ARGUMENTS: Final = {"type": "object", "properties": {}, "additionalProperties": False}


def lark_string(text: str) -> str:
    """``text`` as a terminal."""
    return json.dumps(text, ensure_ascii=False)


def tool_grammar(
    kind: GrammarKind, tools: Sequence[Tool], tool_format: ToolFormat, tokenizer: Any
) -> str:
    """Calls of ``tools``, at least one, as ``kind`` says and ``tool_format`` writes them.

    Where the model may also write text, arguments follow the schemas of strict tools only.
    """
    loose = kind == "text_or_tool_calls"
    rules = []
    for number, tool in enumerate(tools):
        schema: Any = {"type": "object"} if loose and not tool.strict else _parameters(tool)
        rules.append(f"args_{number}: {_json(schema)}")
        rules.append(f"call_{number}: {_call(tool.name, f'args_{number}', tool_format)}")
    rules.append("call: " + " | ".join(f"call_{number}" for number in range(len(tools))))
    calls = _calls(tool_format, tokenizer)
    if loose:
        return "\n".join([*_or_text(tool_format, tokenizer), *calls, *rules])
    start = "start: one" if kind == "tool_call" else "start: some"
    return "\n".join([start, *calls, *rules])


def _parameters(tool: Tool) -> Any:
    return _NO_ARGUMENTS if tool.parameters is None else tool.parameters


def _json(schema: Any) -> str:
    if isinstance(schema, dict):
        schema = {**schema, "x-guidance": JSON_OPTIONS}
    return f"%json {json.dumps(schema)}"


def _call(name: str, arguments: str, tool_format: ToolFormat) -> str:
    if tool_format == "mistral2":
        return f"{lark_string(name)} args_mark {arguments}"
    key = "parameters" if tool_format == "llama" else "arguments"
    opening = lark_string(f'{{"name": {json.dumps(name)}, "{key}": ')
    return f'{opening} {arguments} "}}"'


def _calls(tool_format: ToolFormat, tokenizer: Any) -> list[str]:
    """The rules ``one`` and ``some``, of ``call``."""
    match tool_format:
        case "hermes":
            begin, end = (_mark(one, tokenizer) for one in ("<tool_call>", "</tool_call>"))
            return [rf'one: {begin} "\n" call "\n" {end}', r'some: one ("\n" one)*']
        case "llama":
            return ["one: call", 'some: call ("; " call)*']
        case "mistral":
            mark = _mark("[TOOL_CALLS]", tokenizer)
            return [f'one: {mark} "[" call "]"', f'some: {mark} "[" call (", " call)* "]"']
        case "mistral2":
            mark, args = (_mark(one, tokenizer) for one in ("[TOOL_CALLS]", "[ARGS]"))
            return [f"one: {mark} call", "some: one+", f"args_mark: {args}"]
        case _:
            return ['one: "[" call "]"', 'some: "[" call (", " call)* "]"']


def _or_text(tool_format: ToolFormat, tokenizer: Any) -> list[str]:
    """``start``: text, with calls where the marker comes, or calls instead of text."""
    match tool_format:
        case "hermes" | "mistral" | "mistral2":
            word = "<tool_call>" if tool_format == "hermes" else "[TOOL_CALLS]"
            mark = _mark(word, tokenizer)
            if mark.startswith("<["):
                return ["start: TEXT? some? ", r"TEXT: /(.|\n)+/"]
            after = {
                "hermes": r'"\n" call "\n</tool_call>"',
                "mistral": '"[" call (", " call)* "]"',
            }.get(tool_format, "call")
            return [
                "start: part* TEXT",
                r"TEXT: /(.|\n)*/",
                f"mark[lazy]: TEXT {mark}",
                f"part: mark {after}",
            ]
        case "llama":
            return ["start: some | TEXT |", r"TEXT: /[^{](.|\n)*/"]
        case _:
            return ["start: some | TEXT |", r"TEXT: /[^\[](.|\n)*/"]


def _mark(word: str, tokenizer: Any) -> str:
    """A marker: by its id where it is a special token, else its text."""
    token_id = tokenizer.get_vocab().get(word)
    if token_id is not None and word in tokenizer.all_special_tokens:
        return f"<[{token_id}]>"
    return lark_string(word)
