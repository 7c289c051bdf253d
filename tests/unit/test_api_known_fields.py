"""Every field of OpenAI's and vLLM's request schemas is known here by name.

OpenAI's come from the installed client, so a new version with new fields fails this test. vLLM's
are written down: of its ``entrypoints/openai/*/protocol.py``, ``pooling`` and ``serve/tokenize``,
November 2026.
"""

import json
from collections.abc import Callable
from typing import Any, get_args

import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import ChatCompletionStreamOptionsParam
from openai.types.chat import completion_create_params as chat

from services.api import fields
from services.api.embeddings import parse_embeddings
from services.api.errors import ApiError
from services.api.fields import Endpoint
from services.api.openai import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    StreamOptions,
    TokenizeRequest,
)
from services.api.parsing import parse_chat, parse_completion
from services.api.tokenize import parse_detokenize, parse_tokenize

_BOTH = """
    add_special_tokens allowed_token_ids bad_words cache_salt ec_transfer_params echo ignore_eos
    include_stop_str_in_output kv_transfer_params length_penalty logprob_token_ids min_p min_tokens
    n priority prompt_logprobs repetition_detection repetition_penalty request_id response_format
    return_mm_kwargs return_token_ids return_token_offsets return_tokens_as_token_ids
    routed_experts_prompt_start session_id skip_special_tokens spaces_between_special_tokens
    stop_token_ids stream_interval structured_outputs thinking_token_budget top_k
    truncate_prompt_tokens truncation_side use_beam_search user vllm_xargs watermarking
"""
_CHAT = """
    add_generation_prompt chat_template chat_template_kwargs continue_final_message documents
    include_reasoning media_io_kwargs mm_processor_kwargs parallel_tool_calls reasoning_effort
    return_prompt_text
"""
_TEXT = "best_of prompt_embeds suffix"
_EMBEDDING = """
    add_special_tokens cache_salt dimensions embed_dtype encoding_format endianness input messages
    mm_processor_kwargs model normalize padding priority request_id truncate_prompt_tokens
    truncation_side use_activation user
"""
_TOKENIZE = """
    add_generation_prompt add_special_tokens chat_template chat_template_kwargs
    continue_final_message media_io_kwargs messages mm_processor_kwargs model prompt
    return_token_strs tools
"""
VLLM: dict[Endpoint, set[str]] = {
    "chat": {*_BOTH.split(), *_CHAT.split()},
    "completion": {*_BOTH.split(), *_TEXT.split()},
    "embedding": set(_EMBEDDING.split()),
    "tokenize": set(_TOKENIZE.split()),
    "detokenize": {"model", "tokens"},
}
OPENAI: dict[Endpoint, set[str]] = {
    "chat": set(chat.CompletionCreateParamsBase.__annotations__),
    "completion": set(completion_create_params.CompletionCreateParamsBase.__annotations__),
    "embedding": set(embedding_create_params.EmbeddingCreateParams.__annotations__),
    "tokenize": set(),
    "detokenize": set(),
}
STRUCTS: dict[Endpoint, tuple[type[Any], Callable[[bytes], Any], dict[str, Any]]] = {
    "chat": (
        ChatCompletionRequest,
        parse_chat,
        {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    ),
    "completion": (CompletionRequest, parse_completion, {"model": "m", "prompt": "hi"}),
    "embedding": (EmbeddingRequest, parse_embeddings, {"model": "m", "input": "hi"}),
    "tokenize": (TokenizeRequest, parse_tokenize, {"model": "m", "prompt": "hi"}),
    "detokenize": (DetokenizeRequest, parse_detokenize, {"model": "m", "tokens": [1]}),
}


@pytest.mark.parametrize("endpoint", STRUCTS)
def test_every_field_is_implemented_or_harmless_or_refused_by_name(endpoint: Endpoint) -> None:
    wanted = OPENAI[endpoint] | VLLM[endpoint]
    implemented = set(STRUCTS[endpoint][0].__struct_fields__)
    refused, harmless = set(fields.unsupported(endpoint)), fields.harmless(endpoint)
    assert wanted - implemented - refused - harmless == set()
    assert implemented & refused == set()
    assert refused & harmless == set()


def test_every_stream_option_is_known() -> None:
    wanted = {*ChatCompletionStreamOptionsParam.__annotations__, "continuous_usage_stats"}
    assert wanted <= set(StreamOptions.__struct_fields__)
    assert set(StreamOptions.__struct_fields__) == fields.STREAM_OPTIONS
    _, parse, body = STRUCTS["chat"]
    asked = body | {"stream": True, "stream_options": {"include_usage": True, "made_up": 1}}
    assert parse(json.dumps(asked).encode()).ignored == ["stream_options.made_up"]


@pytest.mark.parametrize(
    ("endpoint", "name"),
    [(one, name) for one in STRUCTS for name in sorted(fields.unsupported(one))],
)
def test_each_field_that_is_not_implemented_is_refused_by_name(
    endpoint: Endpoint, name: str
) -> None:
    _, parse, body = STRUCTS[endpoint]
    with pytest.raises(ApiError) as caught:
        parse(json.dumps(body | {name: {"do": "something"}}).encode())
    error = caught.value
    assert (error.status, error.info.code, error.info.param) == (400, "unsupported_parameter", name)
    wanted = f"{name} = {{'do': 'something'}} is not supported by this server; leave it out"
    assert error.info.message.startswith(wanted)


@pytest.mark.parametrize("endpoint", STRUCTS)
def test_harmless_fields_pass_whatever_they_say_and_are_not_called_unknown(
    endpoint: Endpoint,
) -> None:
    _, parse, body = STRUCTS[endpoint]
    said = {name: {"do": "something"} for name in fields.harmless(endpoint)}
    said = {name: value for name, value in said.items() if name not in body}
    assert parse(json.dumps(body | said).encode()).ignored == []


def test_all_endpoints_are_tested_here() -> None:
    assert set(STRUCTS) == set(get_args(Endpoint))
