"""api -> agent: one message per request, on the model's work queue.

The request carries its own reply subject: tokens come back there over core NATS, while
the queue's acknowledgement stays between the agent and JetStream.

``tenant``: who it is for, as the id of the client's API key; "" where it gave none. The key itself
never leaves the api.
"""

from typing import Any, Final, Literal, TypeAlias

import msgspec

from schemas.names import RequestClass


class ToolCall(msgspec.Struct, frozen=True, omit_defaults=True):
    """A call that the assistant made earlier in the chat. ``arguments``: JSON text of an object."""

    id: str
    name: str
    arguments: str


class Tool(msgspec.Struct, frozen=True, omit_defaults=True):
    """A function that the model may call. ``parameters``: JSON schema of its arguments, an object;
    None: it takes none. ``strict``: arguments must follow the schema, also where the model chooses.
    """

    name: str
    description: str = ""
    parameters: dict[str, Any] | None = None
    strict: bool = False


class ChatMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    role: str
    content: str
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None  # of the call that a message of role "tool" answers


class ChatPrompt(msgspec.Struct, frozen=True, omit_defaults=True, tag="chat"):
    """Rendered with the model's own chat template, on the agent.

    ``template_kwargs``: further variables of the template. ``reasoning_effort`` and ``documents``
    are variables, too, but asked for by name: a template that does not know them is an error.
    """

    messages: tuple[ChatMessage, ...]
    tools: tuple[Tool, ...] = ()
    add_generation_prompt: bool = True
    continue_final_message: bool = False  # the last message is left open, and the model goes on
    add_special_tokens: bool = False  # besides those that the template writes
    template_kwargs: dict[str, Any] = {}
    documents: tuple[dict[str, Any], ...] = ()
    reasoning_effort: str | None = None


class TextPrompt(msgspec.Struct, frozen=True, omit_defaults=True, tag="text"):
    text: str
    add_special_tokens: bool = True


class TokenPrompt(msgspec.Struct, frozen=True, tag="tokens"):
    token_ids: tuple[int, ...]


Prompt: TypeAlias = ChatPrompt | TextPrompt | TokenPrompt
# Plain values, so that a queued request is no longer than the HTTP body it came in.
EmbedInput: TypeAlias = str | tuple[int, ...]  # text, or token ids


GrammarKind: TypeAlias = Literal[
    "json_schema",
    "json_object",  # any; the text is ""
    "regex",
    "choice",  # one of a JSON array of strings
    "grammar",  # GBNF (EBNF), or Lark as llguidance knows it
    # Calls of the prompt's tools, in the model's own form. Text: a JSON array of their names.
    "tool_call",  # exactly one
    "tool_calls",  # one or more
    "text_or_tool_calls",  # as the model likes; calls that it makes can be parsed
]


class Grammar(msgspec.Struct, frozen=True):
    """What the completion must be: tokens that lead elsewhere are never chosen.

    ``field``: the request's field that asked for it, for error messages.
    """

    kind: GrammarKind
    text: str
    field: str


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How to choose tokens. ``temperature == 0`` is greedy.

    ``seed`` is always set by the api (a random one where the client gave none), so a
    request that has to be run again gives the same tokens again.
    """

    seed: int
    max_tokens: int | None = None  # None: up to the model's context length
    min_tokens: int = 0  # until then neither end-of-sequence nor stop_token_ids are chosen
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    min_p: float = 0.0  # least probability, as a part of the likeliest token's; 0: off
    presence_penalty: float = 0.0  # taken from the logit of every token generated so far
    frequency_penalty: float = 0.0  # likewise, once for each time it was generated
    repetition_penalty: float = 1.0  # logits of prompt and generated tokens are divided by it
    stop_token_ids: tuple[int, ...] = ()  # end the completion, also with ignore_eos
    logit_bias: dict[int, float] = {}  # token id -> added to its logit
    logprobs: int | None = None  # how many alternatives to tell; 0: of the chosen token only
    allowed_token_ids: tuple[int, ...] = ()  # no others are chosen; (): all are allowed
    bad_words: tuple[str, ...] = ()  # the last token of each is never chosen after its others
    include_stop: bool = False  # what ended the completion stays in its text
    skip_special_tokens: bool = True  # in the text
    # Of the prompt. Truncation keeps so many tokens, -1: as many as the model can take.
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] = "left"  # where it cuts
    cache_salt: str = ""  # KV is shared between requests of the same salt only
    tell_prompt_ids: bool = False  # with the first token
    tell_prompt_text: bool = False  # likewise
    grammar: Grammar | None = None


MAX_LOGPROBS: Final = 20

# What a value must lie in, both ends included. The api refuses others by name; the agent checks
# again, since what comes over the bus may be from anybody.
SAMPLING_RANGES: Final[dict[str, tuple[float, float]]] = {
    "temperature": (0, 2),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (0.01, 100),
    "logprobs": (0, MAX_LOGPROBS),
}
LOGIT_BIAS_RANGE: Final = (-100, 100)


class GenerateRequest(msgspec.Struct, frozen=True, tag="hotswap.request.v1.generate"):
    request_id: str
    model: str
    klass: RequestClass
    prompt: Prompt
    sampling: SamplingParams
    reply_to: str  # core NATS subject for `schemas.stream` chunks
    created_at: float  # unix seconds, when the api admitted it
    deadline_at: float  # unix seconds; after this nobody waits for the answer
    tenant: str = ""
    # The first tokens of the answer, where an earlier run gave them: the rest is wanted.
    prefix_token_ids: tuple[int, ...] = ()
    # Deliveries of the same request before this message was queued, where the queue itself was lost
    # and counts from 1 again. Who gets it asks the api first, as for every further delivery.
    attempts_before: int = 0


class EmbedRequest(msgspec.Struct, frozen=True, tag="hotswap.request.v1.embed"):
    """One vector for each of ``inputs``, by a model whose runner is "embed".

    The same queue and the same ends as GenerateRequest.
    """

    request_id: str
    model: str
    klass: RequestClass
    inputs: tuple[EmbedInput, ...]
    reply_to: str  # core NATS subject for `schemas.stream` chunks
    created_at: float  # unix seconds, when the api admitted it
    deadline_at: float  # unix seconds; after this nobody waits for the answer
    dimensions: int | None = None  # None: all; fewer are the first ones, normalised again
    tenant: str = ""
    attempts_before: int = 0  # as in GenerateRequest


Request: TypeAlias = GenerateRequest | EmbedRequest


class VerifyRequest(msgspec.Struct, frozen=True, tag="hotswap.agent.v1.verify"):
    """operator -> agent: compare every page of ``model``'s weights with what was loaded.

    Answered by ModelVerified or VerificationFailed, where the agent holds the weights.
    """

    model: str


class CancelRequest(msgspec.Struct, frozen=True, tag="hotswap.request.v1.cancel"):
    """``gpu``: the request goes on elsewhere, and only this GPU's agent is to forget it, without
    ending it; "" cancels it wherever it is.
    """

    request_id: str
    model: str
    gpu: str = ""
