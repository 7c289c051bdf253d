"""One line of a batch: its request out, its answer in, and the line that it becomes.

The same bodies are taken and given as over HTTP. Each run of a request is put together on its own,
and the first one that is complete counts.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import TypeAlias

import msgspec

from schemas.batches import BatchEndpoint
from schemas.requests import EmbedRequest, GenerateRequest, Request
from schemas.stream import Chunk, Failed, Finished, Tokens, Vectors
from services.api import errors
from services.api.answer import Diverged, Piece
from services.api.batches.lines import Line
from services.api.call import Call
from services.api.catalog import Catalog
from services.api.embeddings import ParsedEmbeddings, body_of, parse_embeddings
from services.api.errors import ApiError
from services.api.fan import Choices, Told
from services.api.forms import whole
from services.api.parsing import Parsed, Prepare, as_it_came, parse_chat, parse_completion

Ask: TypeAlias = Parsed | ParsedEmbeddings

CANCELLED = "batch_cancelled"
EXPIRED = "batch_expired"
_WORDS = {
    CANCELLED: "This request was not executed: its batch was cancelled before.",
    EXPIRED: "This request could not be executed before the completion window expired.",
}


def parse(endpoint: BatchEndpoint, line: Line, batch: str, prepare: Prepare = as_it_came) -> Ask:
    """What ``line`` asks for, of one prompt and for one choice. Raises ApiError.

    Where it names no seed it gets one that is its own for ever: run again, it is the same.
    """
    if endpoint == "/v1/embeddings":
        return parse_embeddings(line.body, prepare)
    read = parse_chat if endpoint == "/v1/chat/completions" else parse_completion
    parsed = read(line.body, prepare)
    if parsed.stream:
        raise errors.invalid("stream", "stream = true is not possible in a batch: leave it out.")
    if parsed.form.n > 1 or len(parsed.prompts) > 1:
        param = "n" if parsed.form.n > 1 else "prompt"
        raise errors.invalid(param, "A line of a batch has one answer: write one line for each.")
    if not parsed.is_seeded:
        digest = hashlib.sha256(f"{batch}/{line.number}".encode()).digest()
        seed = int.from_bytes(digest[:8]) >> 1
        parsed = replace(parsed, sampling=msgspec.structs.replace(parsed.sampling, seed=seed))
    return parsed


def require(catalog: Catalog, ask: Ask) -> str:
    """The deployment that is asked. Raises ApiError unless such requests can be queued now."""
    if isinstance(ask, ParsedEmbeddings):
        return catalog.require(ask.model, "embed", ask.dimensions or 0)
    return catalog.require(ask.model)


def request_of(
    ask: Ask,
    deployment: str,
    request_id: str,
    reply_to: str,
    created_at: float,
    deadline_at: float,
    tenant: str,
) -> Request:
    """The request as it is queued, for ``deployment``. Times: unix seconds."""
    if isinstance(ask, ParsedEmbeddings):
        return EmbedRequest(
            request_id=request_id,
            model=deployment,
            klass="batch",
            inputs=ask.inputs,
            reply_to=reply_to,
            created_at=created_at,
            deadline_at=deadline_at,
            dimensions=ask.dimensions,
            tenant=tenant,
        )
    return GenerateRequest(
        request_id=request_id,
        model=deployment,
        klass="batch",
        prompt=ask.prompts[0],
        sampling=ask.sampling,
        reply_to=reply_to,
        created_at=created_at,
        deadline_at=deadline_at,
        tenant=tenant,
    )


@dataclass(frozen=True)
class Again:
    """The run ended without a complete answer, which is nobody's fault."""

    why: str


class RunAnswer:
    """The answer of one run, from its chunks."""

    def __init__(self, ask: Ask, request: Request) -> None:
        self._ask = ask
        self._request = request
        self._attempt = 0
        self._begin()

    def _begin(self) -> None:
        self._call = Call(self._request)
        self._pieces: list[Piece] = []

    def add(self, chunk: Chunk) -> bytes | ApiError | Again | None:
        """The whole body once it is complete, or why there is none; None: more is to come."""
        if chunk.attempt < self._attempt:
            return None  # from an agent that lost the request
        if chunk.attempt > self._attempt:
            self._attempt = chunk.attempt
            self._begin()
        match chunk:
            case Tokens():
                try:
                    piece = self._call.answer.add(chunk)
                except Diverged as error:
                    return Again(str(error))
                if piece is not None:
                    self._pieces.append(piece)
            case Vectors():
                if self._call.vectors:
                    self._call.vectors.add(chunk)
            case Finished():
                return self._finished(chunk)
            case Failed() if chunk.code == "cancelled":
                return Again(chunk.message)
            case Failed():
                return errors.from_failure(chunk.code, chunk.message, self._call.param)
        return None

    def _finished(self, chunk: Finished) -> bytes | Again:
        call = self._call
        if chunk.finish_reason == "cancelled":
            return Again("the agent cancelled it")
        missing = call.vectors.num_missing if call.vectors else call.answer.missing(chunk)
        if missing:
            return Again(f"{missing} parts of the answer were lost on the way")
        if text := call.answer.finish(chunk):
            self._pieces.append(Piece(text))
        call.end(chunk)
        if isinstance(self._ask, ParsedEmbeddings):
            return body_of(self._ask, call)
        told: list[Told] = [*((0, piece) for piece in self._pieces), (0, chunk)]
        return whole(self._ask, Choices(self._ask, self._request.request_id, [call]), told)


# -- lines of the output -------------------------------------------------------------------


class _Response(msgspec.Struct):
    status_code: int
    request_id: str
    body: msgspec.Raw


class _LineError(msgspec.Struct):
    code: str
    message: str


class _Output(msgspec.Struct):
    id: str
    custom_id: str
    response: _Response | None
    error: _LineError | None


_encode = msgspec.json.Encoder().encode


def answered(line: Line, request_id: str, status: int, body: bytes) -> bytes:
    """``line`` as a line of the output, or of the error file where ``status`` is not 200."""
    response = _Response(status, request_id, msgspec.Raw(body))
    return _encode(_Output(f"batch_req_{request_id}", line.custom_id, response, None)) + b"\n"


def not_run(line: Line, request_id: str, code: str) -> bytes:
    """``line`` as a line of the error file. ``code``: CANCELLED or EXPIRED."""
    error = _LineError(code, _WORDS[code])
    return _encode(_Output(f"batch_req_{request_id}", line.custom_id, None, error)) + b"\n"
