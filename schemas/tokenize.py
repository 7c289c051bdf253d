"""api -> agent -> api: texts to token ids and back, by a model's own tokenizer.

Core NATS, request and reply, on the model's subject; one of the agents that have registered the
model answers. No GPU is needed, and no model swapped in.
"""

from typing import Literal, TypeAlias

import msgspec

from schemas.requests import ChatPrompt, TextPrompt


class TokenizeRequest(msgspec.Struct, frozen=True, tag="hotswap.tokenize.v1.tokenize"):
    model: str
    prompt: ChatPrompt | TextPrompt
    token_strs: bool = False  # tell the tokenizer's own name of each token, too


class DetokenizeRequest(msgspec.Struct, frozen=True, tag="hotswap.tokenize.v1.detokenize"):
    model: str
    token_ids: tuple[int, ...]


class Tokenized(msgspec.Struct, frozen=True, tag="hotswap.tokenize.v1.tokenized"):
    token_ids: tuple[int, ...]
    max_model_len: int
    token_strs: tuple[str, ...] = ()


class Detokenized(msgspec.Struct, frozen=True, tag="hotswap.tokenize.v1.detokenized"):
    text: str


class TokenizeFailed(msgspec.Struct, frozen=True, tag="hotswap.tokenize.v1.failed"):
    code: Literal["invalid_prompt", "model_unavailable", "engine_failed"]
    message: str


TokenizeAsk: TypeAlias = TokenizeRequest | DetokenizeRequest
TokenizeAnswer: TypeAlias = Tokenized | Detokenized | TokenizeFailed
