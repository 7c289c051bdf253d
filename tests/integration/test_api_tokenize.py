"""``/tokenize`` and ``/detokenize`` over real HTTP and NATS, with a scripted agent."""

import asyncio
from typing import Any

import msgspec
import pytest

from schemas.names import TOKENIZE_GROUP, tokenize_subject
from schemas.requests import ChatMessage, ChatPrompt, TextPrompt
from schemas.tokenize import (
    Detokenized,
    DetokenizeRequest,
    TokenizeAnswer,
    TokenizeAsk,
    Tokenized,
    TokenizeFailed,
    TokenizeRequest,
)
from services.api import tokenize
from services.bus.connection import RawMessage
from tests.integration.api_stack import MODEL, Stack, error_of

HI = [{"role": "user", "content": "hi"}]


class Tokenizer:
    """The agent's part: notes what is asked, and says what the test gave it to say."""

    def __init__(self, stack: Stack) -> None:
        self.asked: list[TokenizeAsk] = []
        self.answer: TokenizeAnswer | None = Tokenized((1, 2, 3), 512)
        self._bus = stack.agent.bus

    async def start(self) -> "Tokenizer":
        await self._bus.subscribe_raw(tokenize_subject(MODEL), self._on_ask, queue=TOKENIZE_GROUP)
        await self._bus.flush()
        return self

    async def _on_ask(self, raw: RawMessage) -> None:
        self.asked.append(msgspec.json.decode(raw.data, type=TokenizeAsk))
        if self.answer:
            await self._bus.publish(raw.reply, self.answer)


@pytest.mark.parametrize("path", ["/tokenize", "/v1/tokenize"])
async def test_a_text_and_a_chat(stack: Stack, path: str) -> None:
    tokenizer = await Tokenizer(stack).start()
    answer = await stack.http.post(path, json={"model": MODEL, "prompt": "hi", "made_up": 1})
    assert answer.status_code == 200
    assert answer.json() == {
        "count": 3,
        "max_model_len": 512,
        "tokens": [1, 2, 3],
        "token_strs": None,
    }
    assert answer.headers["x-hotswap-ignored-fields"] == "made_up"
    tokenizer.answer = Tokenized((1,), 512, ("hi",))
    more: dict[str, Any] = {"return_token_strs": True, "add_special_tokens": False}
    answer = await stack.http.post(path, json={"model": MODEL, "prompt": "hi"} | more)
    assert answer.json()["token_strs"] == ["hi"]
    more = {"continue_final_message": True, "chat_template_kwargs": {"a": 1}}
    await stack.http.post(path, json={"model": MODEL, "messages": HI} | more)
    assert tokenizer.asked == [
        TokenizeRequest(MODEL, TextPrompt("hi")),
        TokenizeRequest(MODEL, TextPrompt("hi", add_special_tokens=False), token_strs=True),
        TokenizeRequest(
            MODEL,
            ChatPrompt(
                (ChatMessage("user", "hi"),),
                add_generation_prompt=False,
                continue_final_message=True,
                template_kwargs={"a": 1},
            ),
        ),
    ]


@pytest.mark.parametrize("path", ["/detokenize", "/v1/detokenize"])
async def test_tokens(stack: Stack, path: str) -> None:
    tokenizer = await Tokenizer(stack).start()
    tokenizer.answer = Detokenized("Grüße")
    answer = await stack.http.post(path, json={"model": MODEL, "tokens": [7, 8]})
    assert (answer.status_code, answer.json()) == (200, {"prompt": "Grüße"})
    assert tokenizer.asked == [DetokenizeRequest(MODEL, (7, 8))]


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param", "words"),
    [
        ("tokenize", {}, 400, "missing_field", "prompt", "prompt or messages is required"),
        ("tokenize", {"prompt": "x", "messages": HI}, 400, "invalid_value", "messages", "not both"),
        ("tokenize", {"messages": []}, 400, "invalid_value", "messages", "at least one message"),
        ("tokenize", {"prompt": ["x"]}, 400, "invalid_type", "prompt", "prompt = ['x']"),
        (
            "tokenize",
            {"messages": HI, "chat_template": "x"},
            400,
            "unsupported_parameter",
            "chat_template",
            "chat_template = 'x' is not supported",
        ),
        (
            "tokenize",
            {"messages": HI, "tools": [{}]},
            400,
            "unsupported_parameter",
            "tools",
            "tools = [{}] is not supported",
        ),
        (
            "tokenize",
            {"messages": HI, "continue_final_message": True, "add_generation_prompt": True},
            400,
            "invalid_value",
            "continue_final_message",
            "can not both be true",
        ),
        ("detokenize", {}, 400, "missing_field", "tokens", "tokens is required and missing"),
        ("detokenize", {"tokens": [-1]}, 400, "invalid_value", "tokens", "-1 is not a token id"),
        ("detokenize", {"tokens": "x"}, 400, "invalid_type", "tokens", "tokens = 'x'"),
        ("tokenize", {"model": "no", "prompt": "x"}, 404, "model_not_found", "model", "'no'"),
    ],
)
async def test_refusals(
    stack: Stack, path: str, body: dict[str, Any], status: int, code: str, param: str, words: str
) -> None:
    answer = await stack.http.post(f"/v1/{path}", json={"model": MODEL} | body)
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert words in error["message"]


@pytest.mark.parametrize(
    ("failure", "status", "code", "param"),
    [
        (TokenizeFailed("invalid_prompt", "it says: no"), 400, "invalid_prompt", "prompt"),
        (TokenizeFailed("model_unavailable", "it says: no"), 503, "tokenizer_unavailable", None),
        (TokenizeFailed("engine_failed", "it says: no"), 500, "engine_failed", None),
    ],
)
async def test_what_an_agent_refuses(
    stack: Stack, failure: TokenizeFailed, status: int, code: str, param: str | None
) -> None:
    tokenizer = await Tokenizer(stack).start()
    tokenizer.answer = failure
    answer = await stack.http.post("/tokenize", json={"model": MODEL, "prompt": "x"})
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert "it says: no" in error["message"]


async def test_where_no_agent_has_the_model_and_where_none_answers(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"model": MODEL, "prompt": "x"}
    answer = await stack.http.post("/tokenize", json=body)
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (503, "tokenizer_unavailable")
    assert "no agent has looked at the model yet; try again" in error["message"]
    assert int(answer.headers["retry-after"]) > 0
    monkeypatch.setattr(tokenize, "TIMEOUT_S", 0.1)
    tokenizer = await Tokenizer(stack).start()
    tokenizer.answer = None
    answer = await stack.http.post("/tokenize", json=body)
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (503, "tokenizer_unavailable")
    assert "no agent answered within 0.1 s" in error["message"]


async def test_a_deployment_that_failed_says_why(stack: Stack) -> None:
    await stack.scheduler.fail(MODEL, "it needs 9 GB")
    async with asyncio.timeout(10):
        while True:
            answer = await stack.http.post("/tokenize", json={"model": MODEL, "prompt": "x"})
            if "it needs 9 GB" in error_of(answer)["message"]:
                break
    assert (answer.status_code, error_of(answer)["code"]) == (503, "model_unavailable")
