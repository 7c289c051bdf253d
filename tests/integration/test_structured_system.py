"""Structured output and tools through the whole system, by the official client.

The model is untrained and its tokenizer has 32,768 entries: what it says is noise, so that answers
follow a schema only where the engine makes them.
"""

import json
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from services.demo.models import EOS, VOCAB_SIZE, train_tokenizer
from tests.integration.system_kit import System, config_of

HI: Any = [{"role": "user", "content": "Who are you?"}]
MODEL = "noise"


class Pet(pydantic.BaseModel):
    kind: Literal["cat", "dog"]
    age: int = pydantic.Field(ge=0, le=30)


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(pattern="^[A-Z][a-z]{2,8}$")
    pets: list[Pet] = pydantic.Field(min_length=1, max_length=2)


class Weather(pydantic.BaseModel):
    """The weather in a city."""

    city: Literal["Bern", "Rome"]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = tmp_path_factory.mktemp("structured")
    place = folder / MODEL
    _write_model(place)
    with System(folder, config_of({MODEL: place}, "256MiB")) as running:
        yield running


def _write_model(place: Path) -> None:
    tokenizer = train_tokenizer()
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE + 64,  # as many models have: rows that no token belongs to
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.convert_tokens_to_ids(EOS),
        bos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(place)
    tokenizer.save_pretrained(place)


@pytest.fixture
async def client(system: System) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{system.url}/v1", api_key="-", max_retries=0) as one:
        yield one


async def test_answers_that_follow_a_schema(client: openai.AsyncOpenAI) -> None:
    for seed in range(2):
        answer = await client.chat.completions.parse(
            model=MODEL, messages=HI, response_format=Person, seed=seed, max_tokens=300
        )
        assert isinstance(answer.choices[0].message.parsed, Person)
        assert answer.choices[0].finish_reason == "stop"
    stream = await client.completions.create(
        model=MODEL,
        prompt="A number:",
        stream=True,
        max_tokens=50,
        extra_body={"structured_outputs": {"regex": "[0-9]{3}-[a-f]{4}"}},
    )
    text = "".join([chunk.choices[0].text async for chunk in stream])
    assert re.fullmatch("[0-9]{3}-[a-f]{4}", text)


async def test_tools_that_must_be_called(client: openai.AsyncOpenAI) -> None:
    tool: Any = openai.pydantic_function_tool(Weather)
    asked: Any = {"model": MODEL, "messages": HI, "tools": [tool], "max_tokens": 200}
    whole = await client.chat.completions.create(
        **asked, tool_choice={"type": "function", "function": {"name": "Weather"}}
    )
    message = whole.choices[0].message
    assert (whole.choices[0].finish_reason, message.content) == ("tool_calls", None)
    [call] = message.tool_calls or []
    assert call.type == "function"
    assert Weather.model_validate_json(call.function.arguments)
    # what came of it goes back into the chat
    history = [*HI, message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    parts: dict[int, list[str]] = {}
    reasons = []
    asked |= {"messages": history, "tool_choice": "required", "parallel_tool_calls": False}
    async for chunk in await client.chat.completions.create(**asked, stream=True):
        reasons.append(chunk.choices[0].finish_reason)
        for piece in chunk.choices[0].delta.tool_calls or ():
            assert piece.function
            parts.setdefault(piece.index, []).append(piece.function.arguments or "")
    assert reasons[-1] == "tool_calls"
    assert list(parts) == [0]
    assert Weather.model_validate(json.loads("".join(parts[0])))
    free = await client.chat.completions.create(**{**asked, "tool_choice": "auto", "max_tokens": 9})
    assert free.choices[0].message.content is not None or free.choices[0].message.tool_calls


async def test_a_schema_that_can_not_be_followed_is_named(client: openai.AsyncOpenAI) -> None:
    schema: Any = {"name": "x", "schema": {"type": "array", "uniqueItems": True}}
    with pytest.raises(openai.BadRequestError, match="uniqueItems") as caught:
        await client.chat.completions.create(
            model=MODEL,
            messages=HI,
            response_format={"type": "json_schema", "json_schema": schema},
        )
    assert caught.value.param == "response_format.json_schema.schema"
    assert caught.value.code == "invalid_grammar"
