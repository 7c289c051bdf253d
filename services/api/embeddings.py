"""``POST /v1/embeddings``: its body, and its answer.

There is no stream: nothing is sent before the end, so every error gets its real status.
"""

import asyncio
import base64
import struct
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from litestar.response.base import ASGIResponse
from litestar.types import Receive

from schemas.requests import EmbedInput
from services.api import fields
from services.api.call import Call, ClientLeft
from services.api.errors import invalid
from services.api.forms import served_of
from services.api.openai import Embedding, EmbeddingList, EmbeddingRequest, EmbeddingUsage
from services.api.parsing import Prepare, as_it_came, convert, json_object
from services.api.prompts import bad_token_id
from services.api.relay import Relay
from services.api.respond import watch
from services.api.served import answer_headers
from services.api.vectors import FLOAT_BYTES

MAX_INPUTS = 2048  # as OpenAI


@dataclass(frozen=True)
class ParsedEmbeddings:
    """One valid request. ``ignored``: the fields that nobody here knows."""

    model: str
    inputs: tuple[EmbedInput, ...]
    dimensions: int | None
    encoding: Literal["float", "base64"]
    ignored: list[str]
    timeout_s: float | None = None  # as the body says


def parse_embeddings(body: bytes, prepare: Prepare = as_it_came) -> ParsedEmbeddings:
    """The body of ``POST /v1/embeddings``. Raises ApiError (400)."""
    raw = prepare(json_object(body), "embedding")
    fields.refuse_unsupported(raw, "embedding")
    request = convert(raw, EmbeddingRequest)
    if request.dimensions is not None and request.dimensions < 1:
        words = f"dimensions = {request.dimensions} must be 1 or more."
        raise invalid("dimensions", words)
    return ParsedEmbeddings(
        model=request.model,
        inputs=_inputs(request.input),
        dimensions=request.dimensions,
        encoding=request.encoding_format or "float",
        ignored=fields.ignored(raw, "embedding", request.__struct_fields__),
        timeout_s=request.timeout,
    )


def _inputs(given: str | list[Any]) -> tuple[EmbedInput, ...]:
    """All of one kind: a text or a list of them, a list of token ids or a list of such lists."""
    if isinstance(given, str):
        return (_input("input", given),)
    if given and isinstance(given[0], int):
        return (_input("input", given),)
    if not 1 <= len(given) <= MAX_INPUTS:
        raise invalid("input", f"input has {len(given)} entries; 1 to {MAX_INPUTS} are allowed.")
    return tuple(_input(f"input[{i}]", one) for i, one in enumerate(given))


def _input(where: str, given: str | list[Any] | int) -> EmbedInput:
    if isinstance(given, int):
        words = f"{where} = {given}: token ids and other inputs can not stand in one list."
        raise invalid("input", words, "invalid_type")
    if not given:
        kind = "''" if isinstance(given, str) else "[]"
        raise invalid("input", f"{where} = {kind} must not be empty.")
    if isinstance(given, str):
        return given
    strange = [one for one in given if not isinstance(one, int)]
    if strange:
        words = f"{where} holds {fields.show(strange[0])}, which is no token id."
        raise invalid("input", words, "invalid_type")
    if (wrong := bad_token_id(given)) is not None:
        words = f"{where}: {fields.show(wrong)} is not a token id; they start at 0."
        raise invalid("input", words)
    return tuple(given)


async def respond_embeddings(
    parsed: ParsedEmbeddings, call: Call, relay: Relay, receive: Receive
) -> ASGIResponse:
    """Wait for the end, and answer. Raises ApiError.

    ``receive`` tells when the client goes away.
    """
    watching = asyncio.create_task(watch(receive, lambda: relay.client_left(call)))
    try:
        while await call.read():
            pass  # there is no text
    except ClientLeft:
        return ASGIResponse(status_code=499)  # nobody reads it; the trace shows it
    finally:
        watching.cancel()
        relay.client_left(call)  # nothing, where the call has ended
    return ASGIResponse(body=body_of(parsed, call), headers=answer_headers(parsed.ignored, call))


def body_of(parsed: ParsedEmbeddings, call: Call) -> bytes:
    """The answer as OpenAI's JSON."""
    assert call.vectors is not None
    assert call.finished is not None
    data = [
        Embedding(i, _encoded(vector, parsed.encoding))
        for i, vector in enumerate(call.vectors.whole())
    ]
    num_tokens = call.finished.prompt_tokens
    usage = EmbeddingUsage(num_tokens, num_tokens)
    told = served_of(call)
    return msgspec.json.encode(EmbeddingList(data, parsed.model, usage, hotswap=told))


def _encoded(vector: bytes, encoding: Literal["float", "base64"]) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(vector).decode()
    return list(struct.unpack(f"<{len(vector) // FLOAT_BYTES}f", vector))
