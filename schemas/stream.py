"""agent -> api: the answer to one request, as chunks on its reply subject.

    Started  ( Tokens* | Vectors* )  ( Finished | Failed )        Failed may also come first

``attempt`` counts deliveries of the request. From the second one on the agent asks first what the
api has of the answer, and begins behind that:

    agent                          api
      | -- Resuming ---------------> |        an earlier attempt sent t0 t1 t2
      | <------------- ResumeFrom -- |        run, t0 t1 t2
      | -- Started, t3, t4 ... ----> |

``index`` is the position of a chunk's first token, so whoever has already sent k tokens skips
those below k and the client sees one unbroken stream.
Vectors answer an EmbedRequest: those of a later attempt replace those of an earlier one.
"""

from typing import Literal, TypeAlias

import msgspec

from schemas.state import SwapTrace

FinishReason: TypeAlias = Literal["stop", "length", "cancelled"]
StartKind: TypeAlias = Literal["warm", "switch", "cold"]
ErrorCode: TypeAlias = Literal[
    "context_length_exceeded",
    "invalid_prompt",
    "invalid_grammar",  # SamplingParams.grammar is not one, or too complex
    "tools_not_supported",  # by the model's chat template
    "model_not_supported",  # it embeds and was asked to generate, or the reverse
    "model_unavailable",
    "engine_failed",
    "deadline_exceeded",
    "cancelled",
]


# In base64, and with all else, a chunk of this size stays below 1 MB, what a NATS server allows
# unless configured otherwise.
VECTORS_BYTES = 512 * 1024


class RequestTiming(msgspec.Struct, frozen=True):
    """Seconds spent in each stage of one request, all measured by the agent."""

    queue_wait_s: float = 0.0  # admitted by the api -> pulled by the agent (swap included)
    prefill_s: float = 0.0
    decode_s: float = 0.0


class Started(msgspec.Struct, frozen=True, tag="hotswap.stream.v1.started"):
    request_id: str
    gpu: str
    attempt: int
    start: StartKind
    swap: SwapTrace | None = None  # the swap-in this request waited for, if any


class TokenLogprob(msgspec.Struct, frozen=True, omit_defaults=True):
    r"""One token and the natural logarithm of its probability, -9999 or more.

    ``text`` is the token's own, special tokens included. Where its bytes are no whole characters
    they are in ``raw``, and ``text`` shows them as \xNN.
    """

    token_id: int
    logprob: float
    text: str
    raw: bytes = b""


class TokenLogprobs(msgspec.Struct, frozen=True, omit_defaults=True):
    """A chosen token, and the likeliest tokens in its place.

    Of the model's own distribution: before penalties, biases, temperature and filters.
    """

    chosen: TokenLogprob
    offset: int  # characters of the completion before this token
    top: tuple[TokenLogprob, ...] = ()  # likeliest first


class PromptTold(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of the prompt. Its ids and its text only where the request asks for them."""

    num_tokens: int
    token_ids: tuple[int, ...] = ()
    text: str = ""


class Tokens(msgspec.Struct, frozen=True, omit_defaults=True, tag="hotswap.stream.v1.tokens"):
    request_id: str
    attempt: int
    index: int  # position of token_ids[0] in the completion
    token_ids: tuple[int, ...]
    text: str  # what these tokens add; never half a UTF-8 character
    logprobs: tuple[TokenLogprobs, ...] = ()  # of each of token_ids, where the request asks
    prompt: PromptTold | None = None  # where index is 0


class Vectors(msgspec.Struct, frozen=True, tag="hotswap.stream.v1.vectors"):
    """Embeddings of consecutive inputs, at most VECTORS_BYTES of them in one chunk."""

    request_id: str
    attempt: int
    index: int  # position of the first one's input in the request
    dimensions: int  # of each vector
    data: bytes  # vector after vector, little-endian float32


class Finished(msgspec.Struct, frozen=True, tag="hotswap.stream.v1.finished"):
    request_id: str
    attempt: int
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    timing: RequestTiming
    text: str = ""  # what the detokeniser still held back
    cached_tokens: int = 0  # of the prompt, whose KV was there already


class Failed(msgspec.Struct, frozen=True, tag="hotswap.stream.v1.failed"):
    request_id: str
    attempt: int
    code: ErrorCode
    message: str


class Resuming(msgspec.Struct, frozen=True, tag="hotswap.stream.v1.resuming"):
    """This agent was given a request that may have run before. Answered by ResumeFrom."""

    request_id: str
    gpu: str
    attempt: int


Chunk: TypeAlias = Started | Tokens | Vectors | Finished | Failed | Resuming


class ResumeFrom(msgspec.Struct, frozen=True, tag="hotswap.stream.v1.resume_from"):
    """api -> agent, on the reply subject of Resuming.

    ``verdict``: "run" it behind ``token_ids``; "cancel" it, since nobody waits for it any more; or
    "drop" it: it has ended, and was told so.
    """

    request_id: str
    verdict: Literal["run", "cancel", "drop"]
    token_ids: tuple[int, ...] = ()
