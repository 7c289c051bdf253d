"""Tools and grammars over real HTTP, by the official client, in OpenAI's forms."""

import asyncio
from typing import Any

import msgspec
import openai
import pytest

from schemas.requests import ChatPrompt, Tool
from tests.integration.api_stack import MODEL, Stack, error_of, events_of
from tests.integration.scripted_agent import FACTS

HI: Any = [{"role": "user", "content": "hi"}]
TOOLS: Any = [
    {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "g"}},
]
CALLS = (
    "Wait.\n<tool_",
    'call>\n{"name": "f", "arguments": {"a"',
    ': 1}}\n</tool_call>\n<tool_call>{"name": "g", "argu',
    'ments": {}}</tool_call>',
)


@pytest.fixture
async def knows_tools(stack: Stack) -> Stack:
    await stack.scheduler.deploy(MODEL, msgspec.structs.replace(FACTS, tool_format="hermes"))
    await stack.agent.pull(MODEL)
    return stack


async def test_whole_calls(knows_tools: Stack) -> None:
    stack = knows_tools
    asking = asyncio.create_task(
        stack.openai.chat.completions.create(model=MODEL, messages=HI, tools=TOOLS)
    )
    delivery = await stack.agent.next()
    await stack.agent.answer(delivery, *CALLS)
    assert delivery.request.prompt == ChatPrompt(
        delivery.request.prompt.messages,  # type: ignore[union-attr]
        (Tool("f", parameters={"type": "object"}), Tool("g")),
    )
    [choice] = (await asking).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Wait.")
    first, second = (call.model_dump() for call in choice.message.tool_calls or [])
    assert first["type"] == second["type"] == "function"
    assert first["function"] == {"name": "f", "arguments": '{"a": 1}'}
    assert second["function"] == {"name": "g", "arguments": "{}"}
    assert first["id"] != second["id"]


async def test_streamed_calls_have_openais_exact_form(knows_tools: Stack) -> None:
    stack = knows_tools
    asking = asyncio.create_task(stack.ask(stream=True, tools=TOOLS))
    await stack.agent.answer(await stack.agent.next(), *CALLS)
    *chunks, done = events_of((await asking).text)
    assert done == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    ids = [call["id"] for d in deltas for call in d.get("tool_calls", []) if "id" in call]
    assert [delta.get("tool_calls", [delta])[0] for delta in deltas] == [
        {"role": "assistant", "content": ""},
        {"content": "Wait."},
        _begun(0, ids[0], "f"),
        {"index": 0, "function": {"arguments": '{"a"'}},
        {"index": 0, "function": {"arguments": ": 1}"}},
        _begun(1, ids[1], "g"),
        {"index": 1, "function": {"arguments": "{}"}},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] == [None, "tool_calls"]


def _begun(index: int, call_id: str, name: str) -> dict[str, Any]:
    function = {"name": name, "arguments": ""}
    return {"index": index, "id": call_id, "type": "function", "function": function}


async def test_text_where_tools_are_offered(knows_tools: Stack) -> None:
    stack = knows_tools
    asking = asyncio.create_task(stack.ask(tools=TOOLS))
    await stack.agent.answer(await stack.agent.next(), "No <", "call>", rest=" needed")
    [choice] = (await asking).json()["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"] == {
        "content": "No <call> needed",
        "role": "assistant",
        "refusal": None,
    }


async def test_a_model_without_tools_refuses_them_before_any_swap(stack: Stack) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await stack.openai.chat.completions.create(model=MODEL, messages=HI, tools=TOOLS)
    assert (caught.value.param, caught.value.code) == ("tools", "tools_not_supported")
    await stack.queue_holds(0)


async def test_what_the_agent_can_not_follow_names_the_field(stack: Stack) -> None:
    await stack.agent.pull(MODEL)
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}
    asking = asyncio.create_task(stack.ask(response_format=schema))
    delivery = await stack.agent.next()
    grammar = delivery.request.sampling.grammar
    assert grammar
    assert (grammar.kind, grammar.text) == ("json_schema", '{"not":{}}')
    await stack.agent.failed(delivery, "invalid_grammar", "Unimplemented keys")
    answer = await asking
    assert answer.status_code == 400
    error = error_of(answer)
    assert (error["code"], error["param"]) == (
        "invalid_grammar",
        "response_format.json_schema.schema",
    )
