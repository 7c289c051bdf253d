"""agent -> api: the answer to one request, as chunks on its reply subject.

    Started  Tokens*  ( Finished | Failed )        Failed may also come first

``attempt`` counts deliveries of the request. A second attempt starts again from token
0 with the same seed; ``index`` is the position of a chunk's first token, so whoever has
already sent k tokens skips those below k and the client sees one unbroken stream.
"""

from typing import Literal, TypeAlias

import msgspec

from schemas.state import SwapTrace

FinishReason: TypeAlias = Literal["stop", "length", "cancelled"]
StartKind: TypeAlias = Literal["warm", "switch", "cold"]
ErrorCode: TypeAlias = Literal[
    "context_length_exceeded",
    "invalid_prompt",
    "model_unavailable",
    "engine_failed",
    "deadline_exceeded",
    "cancelled",
]


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


class Tokens(msgspec.Struct, frozen=True, tag="hotswap.stream.v1.tokens"):
    request_id: str
    attempt: int
    index: int  # position of token_ids[0] in the completion
    token_ids: tuple[int, ...]
    text: str  # what these tokens add; never half a UTF-8 character


class Finished(msgspec.Struct, frozen=True, tag="hotswap.stream.v1.finished"):
    request_id: str
    attempt: int
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    timing: RequestTiming
    text: str = ""  # what the detokeniser still held back


class Failed(msgspec.Struct, frozen=True, tag="hotswap.stream.v1.failed"):
    request_id: str
    attempt: int
    code: ErrorCode
    message: str


Chunk: TypeAlias = Started | Tokens | Finished | Failed
