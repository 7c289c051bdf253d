"""``POST /tokenize`` and ``/detokenize``: what is asked for, and who knows.

The api has no tokenizers. The agents have, each that of every model that it has registered, and
one of them answers over the bus: no GPU is waited for, and no model swapped in.
"""

from dataclasses import dataclass

import msgspec

from schemas.names import tokenize_subject
from schemas.requests import ChatPrompt, TextPrompt
from schemas.tokenize import (
    Detokenized,
    DetokenizeRequest,
    TokenizeAnswer,
    TokenizeAsk,
    Tokenized,
    TokenizeFailed,
    TokenizeRequest,
)
from services.api import errors, fields, openai
from services.api.errors import ApiError, invalid
from services.api.openai import Detokenization, Tokenization
from services.api.parsing import convert, json_object, messages_of
from services.api.prompts import template_options
from services.bus import Bus, BusError, BusUnavailable, NoResponder

TIMEOUT_S = 10.0
_MAX_TOKEN_ID = (1 << 31) - 1


@dataclass(frozen=True)
class TokenQuestion:
    """``param``: the field that an agent may find wrong. ``ignored``: fields nobody here knows."""

    ask: TokenizeAsk
    param: str
    ignored: list[str]


def parse_tokenize(body: bytes) -> TokenQuestion:
    """The body of ``POST /tokenize``. Raises ApiError (400)."""
    raw = json_object(body)
    fields.refuse_unsupported(raw, "tokenize")
    request = convert(raw, openai.TokenizeRequest)
    ignored = fields.ignored(raw, "tokenize", request.__struct_fields__)
    ask = TokenizeRequest(request.model, _prompt(request), bool(request.return_token_strs))
    return TokenQuestion(ask, "messages" if request.prompt is None else "prompt", ignored)


def _prompt(request: openai.TokenizeRequest) -> TextPrompt | ChatPrompt:
    if request.messages is None and request.prompt is None:
        raise invalid("prompt", "prompt or messages is required and missing.", "missing_field")
    if request.messages is None:
        assert request.prompt is not None
        return TextPrompt(request.prompt, request.add_special_tokens is not False)
    if request.prompt is not None:
        raise invalid("messages", "prompt and messages can not both be there.")
    options = template_options(
        request.add_generation_prompt,
        request.continue_final_message,
        request.chat_template_kwargs,
    )
    add_special_tokens = bool(request.add_special_tokens)
    messages = messages_of(request.messages)
    return ChatPrompt(messages, add_special_tokens=add_special_tokens, **options)


def parse_detokenize(body: bytes) -> TokenQuestion:
    """The body of ``POST /detokenize``. Raises ApiError (400)."""
    raw = json_object(body)
    fields.refuse_unsupported(raw, "detokenize")
    request = convert(raw, openai.DetokenizeRequest)
    wrong = next((i for i in request.tokens if not 0 <= i <= _MAX_TOKEN_ID), None)
    if wrong is not None:
        raise invalid("tokens", f"tokens: {wrong} is not a token id.")
    ignored = fields.ignored(raw, "detokenize", request.__struct_fields__)
    return TokenQuestion(DetokenizeRequest(request.model, tuple(request.tokens)), "tokens", ignored)


async def ask_tokenizer(
    bus: Bus, question: TokenQuestion, deployment: str
) -> Tokenization | Detokenization:
    """The answer of an agent. ``deployment``: the one that the client named. Raises ApiError."""
    model = question.ask.model
    if not bus.is_connected:
        raise errors.bus_unavailable()
    try:
        answer: TokenizeAnswer = await bus.request(
            tokenize_subject(deployment),
            msgspec.structs.replace(question.ask, model=deployment),
            TokenizeAnswer,
            TIMEOUT_S,
        )
    except NoResponder as error:
        why = "no agent has looked at the model yet"
        raise errors.tokenizer_unavailable(model, why) from error
    except BusUnavailable as error:
        why = f"no agent answered within {TIMEOUT_S:g} s"
        raise errors.tokenizer_unavailable(model, why) from error
    except BusError as error:
        raise errors.bus_unavailable() from error
    match answer:
        case Tokenized(ids, max_model_len, strs):
            wants_strs = isinstance(question.ask, TokenizeRequest) and question.ask.token_strs
            return Tokenization(len(ids), max_model_len, ids, strs if wants_strs else None)
        case Detokenized(text):
            return Detokenization(text)
        case TokenizeFailed("invalid_prompt", message):
            raise ApiError(400, "invalid_prompt", message, param=question.param)
        case TokenizeFailed("model_unavailable", message):
            raise errors.tokenizer_unavailable(model, message)
        case TokenizeFailed(_, message):
            raise errors.engine_failed(message)
