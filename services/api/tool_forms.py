"""Calls of tools in OpenAI's wire form."""

from services.api import openai
from services.api.tool_calls import Arguments, CallBegun, Event, Said, ToolParser


def message_of(parser: ToolParser, text: str) -> openai.AnswerMessage:
    """The message that all of ``text`` is."""
    said: list[str] = []
    calls: list[openai.AnswerToolCall] = []
    for event in (*parser.push(text), *parser.finish()):
        match event:
            case Said(more):
                said.append(more)
            case CallBegun(_, call_id, name):
                calls.append(openai.AnswerToolCall(call_id, openai.CalledFunction(name, "")))
            case Arguments(index, more):
                calls[index].function.arguments += more
    if not calls:
        return openai.AnswerMessage("".join(said))
    return openai.AnswerMessage("".join(said) or None, tool_calls=calls)


def delta_of(event: Event) -> openai.Delta:
    """A piece of a message in a stream."""
    match event:
        case Said(text):
            return openai.Delta(content=text)
        case CallBegun(index, call_id, name):
            function = openai.DeltaFunction("", name)
            return openai.Delta(
                tool_calls=[openai.DeltaToolCall(index, function, call_id, "function")]
            )
        case Arguments(index, text):
            function = openai.DeltaFunction(text)
            return openai.Delta(tool_calls=[openai.DeltaToolCall(index, function)])
