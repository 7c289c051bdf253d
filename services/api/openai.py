"""OpenAI's wire format: what comes in over HTTP and what goes out, as msgspec structs.

Requests list the fields that are implemented; `services.api.fields` knows the others.
Every optional request field may be null, since clients send their defaults that way.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import msgspec
from msgspec import UNSET, UnsetType

from schemas.state import ReplicaState
from schemas.stream import StartKind

Role: TypeAlias = Literal["system", "developer", "user", "assistant", "tool"]
WireFinishReason: TypeAlias = Literal["stop", "length", "tool_calls"]


# -- requests ------------------------------------------------------------------------------


class ContentPart(msgspec.Struct):
    """One part of a message. Only ``type: "text"`` is implemented."""

    type: str
    text: str | None = None


class CalledFunction(msgspec.Struct):
    """``arguments``: JSON text of an object."""

    name: str
    arguments: str


class MessageToolCall(msgspec.Struct):
    """A call in an earlier message of the assistant. Only ``type: "function"`` is implemented."""

    id: str
    function: CalledFunction
    type: str = "function"


class Message(msgspec.Struct):
    """One message of a chat. ``content``: text, or a list of text parts."""

    role: Role
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None  # of the assistant
    tool_call_id: str | None = None  # of the call that a message of role "tool" answers
    function_call: Any = None  # known, so that it can be refused by name


class JsonSchemaFormat(msgspec.Struct):
    """``strict`` changes nothing: the answer always follows the schema."""

    name: str
    schema: dict[str, Any] | bool
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(msgspec.Struct):
    """``type``: "text", "json_object" or "json_schema"."""

    type: str
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True):
    """vLLM's extension: the answer follows exactly one of these."""

    json: dict[str, Any] | bool | str | None = None  # a JSON schema
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None  # GBNF (EBNF), or Lark
    json_object: bool | None = None
    structural_tag: Any = None  # these are known, so that they can be refused by name
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    disable_fallback: bool | None = None  # harmless: there is one library


class ToolFunction(msgspec.Struct):
    """``parameters``: JSON schema of the arguments, an object."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolParam(msgspec.Struct):
    """Only ``type: "function"`` is implemented."""

    type: str
    function: ToolFunction | None = None


class NamedFunction(msgspec.Struct):
    name: str


class NamedTool(msgspec.Struct):
    function: NamedFunction
    type: str = "function"


class AllowedTools(msgspec.Struct):
    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class ToolChoice(msgspec.Struct):
    """``type``: "function", with a name, or "allowed_tools", with a mode and some of the tools."""

    type: str
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against traffic analysis; harmless
    continuous_usage_stats: bool | None = None


class SamplingFields(msgspec.Struct, kw_only=True):
    """What both endpoints take. Ranges are checked in `services.api.parsing`."""

    model: str
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    logit_bias: dict[str, float] | None = None  # token id, as JSON keys are, -> bias
    n: int | None = None  # choices for each prompt
    echo: bool | None = None
    # vLLM's
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    cache_salt: str | None = None
    request_id: str | None = None  # part of the answer's id
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None  # in log probabilities
    timeout: float | None = None  # seconds for the whole answer, then 504
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | bool | str | None = None  # vLLM's older names
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


class ChatCompletionRequest(SamplingFields, kw_only=True):
    """``POST /v1/chat/completions``."""

    messages: list[Message]
    max_completion_tokens: int | None = None  # the newer name of max_tokens; wins over it
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
    tools: list[ToolParam] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None


class CompletionRequest(SamplingFields, kw_only=True):
    """``POST /v1/completions``. ``prompt``: text, token ids, or a list of either kind."""

    prompt: str | list[str | int | list[int]]
    logprobs: bool | int | None = None  # how many alternatives; of the booleans false only
    best_of: int | None = None  # n, since all that were generated are told


class EmbeddingRequest(msgspec.Struct):
    """``POST /v1/embeddings``. ``input``: text, token ids, or a list of either kind."""

    model: str
    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None  # the first so many of each vector, normalised again
    timeout: float | None = None  # seconds for the whole answer, then 504


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """``POST /tokenize``, as vLLM has it: a ``prompt``, or the ``messages`` of a chat."""

    model: str
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None  # true for a prompt, false for a chat
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(msgspec.Struct):
    """``POST /detokenize``, as vLLM has it."""

    model: str
    tokens: list[int]


# -- responses -----------------------------------------------------------------------------


class PromptTokensDetails(msgspec.Struct):
    """``cached_tokens``: what an earlier request had computed already."""

    cached_tokens: int


class Usage(msgspec.Struct):
    """Each prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | UnsetType = UNSET


class Served(msgspec.Struct, omit_defaults=True):
    """What this server adds beside ``usage``: how the request came to its model.

    ``waited_s``: from its admission until the model was there and began with it. ``swap_*``: the
    swap-in that it waited for, if any. ``num_resumed``: how often its agent died and it went on.
    """

    start: StartKind
    gpu: str
    waited_s: float
    swap_s: float | None = None
    swap_bytes: int | None = None
    num_resumed: int = 0


class TopLogprob(msgspec.Struct):
    """A token that could have come. ``bytes`` of one token may be part of a character only."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """One entry for each generated token, the one that ended the answer included."""

    content: list[ChatLogprob]
    refusal: None = None


class TextLogprobs(msgspec.Struct):
    """Four lists with one entry for each generated token.

    ``top_logprobs`` hold the chosen token too, even where it is not among the likeliest.
    """

    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]]


class AnswerToolCall(msgspec.Struct):
    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class AnswerMessage(msgspec.Struct):
    """``content`` is null where there is nothing but calls."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    tool_calls: list[AnswerToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    message: AnswerMessage
    finish_reason: WireFinishReason
    index: int = 0
    logprobs: ChatLogprobs | None = None
    token_ids: Sequence[int] | UnsetType = UNSET  # with return_token_ids


class ChatCompletion(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"
    prompt_token_ids: Sequence[int] | UnsetType = UNSET  # with return_token_ids
    hotswap: Served | UnsetType = UNSET


class TextChoice(msgspec.Struct):
    text: str
    finish_reason: WireFinishReason | None = None
    index: int = 0
    logprobs: TextLogprobs | None = None
    token_ids: Sequence[int] | UnsetType = UNSET  # with return_token_ids
    prompt_token_ids: Sequence[int] | UnsetType = UNSET  # likewise; in a stream once


class Completion(msgspec.Struct):
    """Also the form of a stream's chunks, where ``usage`` is null, or left out."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | UnsetType | None = UNSET
    object: Literal["text_completion"] = "text_completion"
    hotswap: Served | UnsetType = UNSET  # with the usage


class DeltaFunction(msgspec.Struct, omit_defaults=True):
    arguments: str
    name: str | None = None


class DeltaToolCall(msgspec.Struct, omit_defaults=True):
    """A piece of call ``index``; the first one has its id, type and name."""

    index: int
    function: DeltaFunction
    id: str | None = None
    type: str | None = None


class Delta(msgspec.Struct, omit_defaults=True):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[DeltaToolCall] | None = None


class ChatChunkChoice(msgspec.Struct):
    delta: Delta
    finish_reason: WireFinishReason | None = None
    index: int = 0
    logprobs: ChatLogprobs | None = None
    token_ids: Sequence[int] | UnsetType = UNSET  # with return_token_ids


class ChatCompletionChunk(msgspec.Struct):
    """One event of a stream. ``usage`` is there only where the client asked for it."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    prompt_token_ids: Sequence[int] | UnsetType = UNSET  # with return_token_ids; the first only
    hotswap: Served | UnsetType = UNSET  # with the usage


class Embedding(msgspec.Struct):
    """The vector of one input: numbers, or little-endian float32 in base64."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingUsage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct):
    """One vector per input, in their order."""

    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    object: Literal["list"] = "list"
    hotswap: Served | UnsetType = UNSET


class Tokenization(msgspec.Struct):
    """The tokens of a text. ``token_strs``: the tokenizer's own name of each, where asked for."""

    count: int
    max_model_len: int
    tokens: Sequence[int]
    token_strs: Sequence[str] | None = None


class Detokenization(msgspec.Struct):
    """The text of tokens."""

    prompt: str


class HotswapInfo(msgspec.Struct):
    """What this server adds to a model: where it is, and what it takes."""

    status: Literal["pending", "ready", "failed"]
    state: ReplicaState  # of the replica that would answer first
    gpus: dict[str, ReplicaState]
    weight_bytes: int | None
    max_model_len: int | None
    reason: str  # why it failed, else ""
    alias_of: str | UnsetType = UNSET  # the deployment, where this is another name of it


class Model(msgspec.Struct):
    id: str
    created: int
    hotswap: HotswapInfo
    max_model_len: int | None = None  # here too, as vLLM has it: its clients look for it
    object: Literal["model"] = "model"
    owned_by: str = "hotswap"


class ModelList(msgspec.Struct):
    data: list[Model]
    object: Literal["list"] = "list"
