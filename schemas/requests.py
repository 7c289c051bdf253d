"""api -> agent: one message per request, on the model's work queue.

The request carries its own reply subject: tokens come back there over core NATS, while
the queue's acknowledgement stays between the agent and JetStream.
"""

from typing import TypeAlias

import msgspec

from schemas.names import RequestClass


class ChatMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    role: str
    content: str
    name: str | None = None


class ChatPrompt(msgspec.Struct, frozen=True, tag="chat"):
    """Rendered with the model's own chat template, on the agent."""

    messages: tuple[ChatMessage, ...]


class TextPrompt(msgspec.Struct, frozen=True, tag="text"):
    text: str


class TokenPrompt(msgspec.Struct, frozen=True, tag="tokens"):
    token_ids: tuple[int, ...]


Prompt: TypeAlias = ChatPrompt | TextPrompt | TokenPrompt


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How to choose tokens. ``temperature == 0`` is greedy.

    ``seed`` is always set by the api (a random one where the client gave none), so a
    request that has to be run again gives the same tokens again.
    """

    seed: int
    max_tokens: int | None = None  # None: up to the model's context length
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


class GenerateRequest(msgspec.Struct, frozen=True, tag="hotswap.request.v1.generate"):
    request_id: str
    model: str
    klass: RequestClass
    prompt: Prompt
    sampling: SamplingParams
    reply_to: str  # core NATS subject for `schemas.stream` chunks
    created_at: float  # unix seconds, when the api admitted it
    deadline_at: float  # unix seconds; after this nobody waits for the answer


class VerifyRequest(msgspec.Struct, frozen=True, tag="hotswap.agent.v1.verify"):
    """operator -> agent: compare every page of ``model``'s weights with what was loaded.

    Answered by ModelVerified or VerificationFailed, where the agent holds the weights.
    """

    model: str


class CancelRequest(msgspec.Struct, frozen=True, tag="hotswap.request.v1.cancel"):
    request_id: str
    model: str
