"""Tools of a chat: what the model may call, must call, and called before.

``tool_choice`` decides what the answer may be:

    none                the tools are not even shown to the model
    auto                as the model likes; where a tool is strict, its arguments follow its schema
    required            one call or more, constrained to names and schemas
    a named tool        exactly one call of it, likewise
"""

import re
from dataclasses import dataclass
from typing import Any

import msgspec

from schemas.requests import Grammar, GrammarKind, Tool, ToolCall
from schemas.state import ToolFormat
from services.api.errors import ApiError, invalid
from services.api.fields import show
from services.api.openai import ChatCompletionRequest, Message, ToolChoice, ToolParam
from services.api.tool_calls import ToolParser

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MAX_TOOLS = 128


@dataclass(frozen=True)
class ToolUse:
    """Tools that the model is shown, and what may come of them."""

    tools: tuple[Tool, ...]
    grammar: Grammar | None  # None: the answer is as the model likes
    most: int | None  # calls in an answer

    def parser(self, tool_format: ToolFormat) -> ToolParser:
        """For one answer of a model that writes calls like this."""
        return ToolParser(tool_format or "json", {tool.name for tool in self.tools}, self.most)


def tool_use_of(request: ChatCompletionRequest) -> ToolUse | None:
    """None where the model is shown no tools. Raises ApiError (400)."""
    tools = _tools(request.tools or [])
    choice = request.tool_choice
    if not tools:
        if choice not in (None, "none", "auto"):
            raise invalid(
                "tool_choice", f"tool_choice = {_show(choice)} needs tools: there are none."
            )
        return None
    mode, names = _choice(choice, [tool.name for tool in tools])
    if mode == "none":
        return None
    most = 1 if request.parallel_tool_calls is False else None
    if isinstance(choice, ToolChoice) and choice.type == "allowed_tools":
        tools = tuple(tool for tool in tools if tool.name in names)
    kind: GrammarKind | None = None
    if mode == "named":
        kind, most = "tool_call", 1
    elif mode == "required":
        kind = "tool_call" if most == 1 else "tool_calls"
    elif any(tool.strict for tool in tools):
        kind = "text_or_tool_calls"
    text = msgspec.json.encode(names).decode()
    return ToolUse(tools, Grammar(kind, text, "tools") if kind else None, most)


def _tools(given: list[ToolParam]) -> tuple[Tool, ...]:
    if len(given) > MAX_TOOLS:
        raise invalid("tools", f"tools has {len(given)} entries; at most {MAX_TOOLS} are allowed.")
    found: dict[str, Tool] = {}
    for i, one in enumerate(given):
        where = f"tools[{i}]"
        if one.type != "function":
            words = f"{where}.type = {show(one.type)} is not supported: only function is."
            raise ApiError(400, "unsupported_parameter", words, param=f"{where}.type")
        function = one.function
        if function is None:
            param = f"{where}.function"
            raise invalid(param, f"{param} is required and missing.", "missing_field")
        param = f"{where}.function.name"
        if not _NAME.fullmatch(function.name):
            words = (
                f"{param} = {show(function.name)} must have 1 to 64 of a-z, A-Z, 0-9, _, - and ."
            )
            raise invalid(param, words)
        if function.name in found:
            raise invalid(param, f"{param} = {show(function.name)} is there twice.")
        if (function.parameters or {}).get("type", "object") != "object":
            param = f"{where}.function.parameters"
            raise invalid(param, f'{param} must be a JSON schema with "type": "object".')
        found[function.name] = Tool(
            name=function.name,
            description=function.description or "",
            parameters=function.parameters,
            strict=bool(function.strict),
        )
    return tuple(found.values())


def _choice(choice: Any, names: list[str]) -> tuple[str, list[str]]:
    """(none, auto, required or named; the tools that may be called)."""
    if not isinstance(choice, ToolChoice):
        return choice or "auto", names
    if choice.type == "function" and choice.function:
        _known(choice.function.name, names, "tool_choice.function.name")
        return "named", [choice.function.name]
    if choice.type == "allowed_tools" and choice.allowed_tools and choice.allowed_tools.tools:
        allowed = [tool.function.name for tool in choice.allowed_tools.tools]
        for i, name in enumerate(allowed):
            _known(name, names, f"tool_choice.allowed_tools.tools[{i}].function.name")
        return choice.allowed_tools.mode, [name for name in names if name in allowed]
    words = f"tool_choice = {_show(choice)} is not supported by this server; send none, auto, "
    words += 'required, {"type": "function", "function": {"name": ...}}, or allowed_tools.'
    raise ApiError(400, "unsupported_parameter", words, param="tool_choice")


def _known(name: str, names: list[str], param: str) -> None:
    if name not in names:
        words = f"{param} = {show(name)} is none of the tools: {', '.join(names)}."
        raise invalid(param, words)


def _show(choice: Any) -> str:
    return show(msgspec.to_builtins(choice))


# -- the chat so far -----------------------------------------------------------------------


def earlier_calls(where: str, message: Message) -> tuple[ToolCall, ...]:
    """The calls in ``message``, whose place in the request is ``where``. Raises ApiError (400)."""
    if not message.tool_calls:
        return ()
    if message.role != "assistant":
        param = f"{where}.tool_calls"
        words = f"{param} is only allowed where role is assistant, not {message.role}."
        raise invalid(param, words)
    found = []
    for i, call in enumerate(message.tool_calls):
        param = f"{where}.tool_calls[{i}]"
        if call.type != "function":
            words = f"{param}.type = {show(call.type)} is not supported: only function is."
            raise ApiError(400, "unsupported_parameter", words, param=f"{param}.type")
        text = call.function.arguments or "{}"
        try:
            is_object = isinstance(msgspec.json.decode(text), dict)
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            is_object = False
        if not is_object:
            param = f"{param}.function.arguments"
            raise invalid(param, f"{param} = {show(text)} must be the JSON text of an object.")
        found.append(ToolCall(call.id, call.function.name, text))
    return tuple(found)


def answered_call(where: str, message: Message) -> str | None:
    """The id of the call that ``message`` answers; only tools do. Raises ApiError (400)."""
    param = f"{where}.tool_call_id"
    if message.role == "tool" and not message.tool_call_id:
        words = f"{param} is required where role is tool: the id of the call that it answers."
        raise invalid(param, words, "missing_field")
    if message.role != "tool" and message.tool_call_id:
        raise invalid(param, f"{param} is only allowed where role is tool, not {message.role}.")
    return message.tool_call_id
