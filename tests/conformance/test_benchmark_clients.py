"""Load generators in the style of `vllm bench serve` and `benchmark_serving.py`.

Those are not installed here (docs/results/vllm-bench-serve.txt is the record of a real run), so
this sends what they send and reads what they read, in the way they do: bytes as they come, split at
blank lines, `data: ` in front, no other library.
"""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.conformance.willing_agent import ANSWER, CHAT

COMMON = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
COMPLETION = {"prompt": "x " * 64, "repetition_penalty": 1.0, "logprobs": None, "max_tokens": 4}
CHATTING = {
    "messages": [{"role": "user", "content": [{"type": "text", "text": "x " * 64}]}],
    "max_completion_tokens": 4,
}


@dataclass
class Output:
    """What a load generator notes of one request."""

    status: int = 0
    text: str = ""
    num_events: int = 0  # with choices: what it counts times between tokens by
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    choices: list[dict[str, Any]] = field(default_factory=list)
    is_done: bool = False


async def ask(url: str, path: str, body: dict[str, Any]) -> Output:
    """One request on a connection of its own."""
    at = urlsplit(url)
    reader, writer = await asyncio.open_connection(at.hostname, at.port)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer -\r\nConnection: close\r\n"
    head += (
        f"x-request-id: bench-1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    )
    writer.write(f"{head}\r\n\r\n".encode() + data)
    status = await reader.readline()
    while (await reader.readline()).strip():
        pass
    output, text = Output(int(status.split()[1])), ""
    while size := int(await reader.readline(), 16):  # a chunk of the body
        text += (await reader.readexactly(size)).decode()  # no chunk ends in a character
        while "\n\n" in text:
            message, text = text.split("\n\n", 1)
            _note(output, message.strip())
        await reader.readline()
    writer.close()
    assert not text.strip()
    return output


def _note(output: Output, message: str) -> None:
    if not message or message.startswith(":"):
        return
    chunk = message.removeprefix("data: ")
    if chunk == "[DONE]":
        output.is_done = True
        return
    assert not output.is_done
    told = json.loads(chunk)
    if choices := told.get("choices"):
        output.num_events += 1
        output.choices.append(choices[0])
        delta = choices[0].get("delta")
        output.text += (choices[0].get("text") if delta is None else delta.get("content")) or ""
    elif usage := told.get("usage"):
        output.output_tokens = usage["completion_tokens"]
        output.prompt_tokens = usage["prompt_tokens"]


@pytest.mark.parametrize(
    ("path", "payload", "num_extra"),
    # Events without a token: the finish reason; for chats also the role.
    [("/v1/completions", COMPLETION, 1), ("/v1/chat/completions", CHATTING, 2)],
)
@pytest.mark.parametrize(
    "more", [{}, {"min_tokens": 4}, {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0}]
)
async def test_a_load_generator(
    api_url: str, path: str, payload: dict[str, Any], num_extra: int, more: dict[str, Any]
) -> None:
    body = {"model": CHAT} | payload | COMMON | more
    output = await ask(api_url, path, body)
    assert output.status == 200
    assert output.text == "".join(ANSWER[:4])
    assert output.is_done
    assert output.num_events == 4 + num_extra  # an event for each token
    assert (output.prompt_tokens, output.output_tokens) == (7, 4)
    assert output.choices[-1]["finish_reason"] == "length"


async def test_with_log_probabilities(api_url: str) -> None:
    body = {"model": CHAT} | COMPLETION | COMMON | {"logprobs": 5}
    told = [one["logprobs"] for one in (await ask(api_url, "/v1/completions", body)).choices[:-1]]
    assert [one["tokens"] for one in told] == [[text] for text in ANSWER[:4]]
    body = {"model": CHAT} | CHATTING | COMMON | {"logprobs": True, "top_logprobs": 5}
    choices = (await ask(api_url, "/v1/chat/completions", body)).choices[1:-1]
    assert [one["logprobs"]["content"][0]["token"] for one in choices] == list(ANSWER[:4])


async def test_many_at_once(api_url: str) -> None:
    """As with --max-concurrency: every one is answered whole."""
    room = asyncio.Semaphore(4)

    async def one(i: int) -> Output:
        path, payload = [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHATTING)][i % 2]
        async with room:
            return await ask(api_url, path, {"model": CHAT} | payload | COMMON)

    outputs = await asyncio.gather(*(one(i) for i in range(40)))
    assert {output.text for output in outputs} == {"".join(ANSWER[:4])}
    assert all(output.is_done for output in outputs)


async def test_what_they_ask_for_before_they_begin(api_url: str) -> None:
    async with httpx.AsyncClient(base_url=api_url, timeout=20) as http:
        for path in ("/health", "/ping", "/version"):
            assert (await http.get(path)).status_code == 200
        models = (await http.get("/v1/models")).json()["data"]
        lengths = {one["id"]: one["max_model_len"] for one in models}
    assert lengths[CHAT] == 512
