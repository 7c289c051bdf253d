"""An HTTP body -> what to generate. Every refusal names the field and its value.

    bytes -> JSON object -> known but unsupported fields refused -> typed struct -> ranges -> Parsed

The body is decoded to plain values first: only they can show which fields came that no
struct has, and what value a wrong field had.
"""

import contextlib
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import msgspec

from schemas.requests import (
    LOGIT_BIAS_RANGE,
    MAX_LOGPROBS,
    SAMPLING_RANGES,
    ChatMessage,
    Grammar,
    Prompt,
    SamplingParams,
)
from services.api import fields, prompts
from services.api.errors import ApiError, invalid
from services.api.fields import Endpoint, show
from services.api.form import AnswerForm, form_of
from services.api.openai import ChatCompletionRequest, CompletionRequest, Message, SamplingFields
from services.api.structured import grammar_of
from services.api.tool_calls import ToolParser
from services.api.tools import ToolUse, answered_call, earlier_calls, tool_use_of

T = TypeVar("T")
Prepare: TypeAlias = Callable[[dict[str, Any], Endpoint], dict[str, Any]]

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default on /v1/completions; chat has none
MAX_STOPS = 4

SEED_BITS = (1 << 63) - 1
_MIN_SEED, _MAX_SEED = -(1 << 63), (1 << 63) - 1
_MAX_COUNT = (1 << 31) - 1  # more tokens than any model holds
_TOKEN_ID = re.compile("0|[1-9][0-9]{0,9}")  # as a JSON key


def as_it_came(raw: dict[str, Any], endpoint: Endpoint) -> dict[str, Any]:
    """A `Prepare` that changes nothing. Others put in what a deployment's settings say."""
    return raw


@dataclass(frozen=True)
class Parsed:
    """One valid request: ``form.n`` choices for each of ``prompts``.

    ``is_seeded``: the client chose the seed. ``ignored``: the fields that nobody here knows.
    ``tool_use``: None where the model is shown no tools; else ``tool_parser`` makes what tells
    calls from text, once the model's way to write them is known.
    """

    endpoint: Endpoint
    model: str
    prompts: tuple[Prompt, ...]
    sampling: SamplingParams
    is_seeded: bool
    stream: bool
    include_usage: bool
    form: AnswerForm
    ignored: list[str]
    timeout_s: float | None = None  # as the body says
    tool_use: ToolUse | None = None
    tool_parser: Callable[[], ToolParser] | None = None


def parse_chat(body: bytes, prepare: Prepare = as_it_came) -> Parsed:
    """The body of ``POST /v1/chat/completions``. Raises ApiError (400)."""
    raw = prepare(json_object(body), "chat")
    fields.refuse_unsupported(raw, "chat")
    request = convert(raw, ChatCompletionRequest)
    messages = messages_of(request.messages)
    key = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    tool_use = tool_use_of(request)
    prompt = prompts.of_chat(request, messages, tool_use.tools if tool_use else ())
    return _parsed("chat", request, raw, (prompt,), key, getattr(request, key), tool_use)


def parse_completion(body: bytes, prepare: Prepare = as_it_came) -> Parsed:
    """The body of ``POST /v1/completions``. Raises ApiError (400)."""
    raw = prepare(json_object(body), "completion")
    fields.refuse_unsupported(raw, "completion")
    request = convert(raw, CompletionRequest)
    max_tokens = DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    given = prompts.of_completion(request)
    return _parsed("completion", request, raw, given, "max_tokens", max_tokens)


def _parsed(
    endpoint: Endpoint,
    request: SamplingFields,
    raw: dict[str, Any],
    given: tuple[Prompt, ...],
    max_key: str,
    max_tokens: int | None,
    tool_use: ToolUse | None = None,
) -> Parsed:
    options = request.stream_options
    if options and not request.stream:
        raise invalid("stream_options", "stream_options is only allowed where stream is true.")
    form = form_of(request, given)
    sampling = _sampling(request, max_key, max_tokens, tool_use)
    return Parsed(
        endpoint=endpoint,
        model=request.model,
        prompts=given,
        sampling=prompts.with_options(sampling, request, form),
        is_seeded=request.seed is not None,
        stream=bool(request.stream),
        include_usage=bool(options and options.include_usage),
        form=form,
        ignored=fields.ignored(raw, endpoint, request.__struct_fields__),
        timeout_s=request.timeout,
        tool_use=tool_use,
    )


# -- bytes to typed structs ----------------------------------------------------------------


def json_object(body: bytes) -> dict[str, Any]:
    """``body`` as plain values. Raises ApiError (400)."""
    try:
        raw = msgspec.json.decode(body)
    except RecursionError as error:
        raise invalid(None, "The request body is nested too deeply.", "invalid_json") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        message = f"The request body is not valid JSON: {error}."
        raise invalid(None, message, "invalid_json") from error
    if not isinstance(raw, dict):
        message = f"The request body must be a JSON object, not {show(raw)}."
        raise invalid(None, message, "invalid_json")
    return raw


def convert(raw: dict[str, Any], kind: type[T]) -> T:
    """``raw`` as a wire struct. Raises ApiError (400) that names the field and its value."""
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        # JSON has one kind of number: 1.0 may stand for 1, also where msgspec does not see it.
        with contextlib.suppress(msgspec.ValidationError):
            return msgspec.convert(_whole_numbers(raw), kind)
        raise _explain(error, raw) from error


def _whole_numbers(value: Any) -> Any:
    """``value`` with integers for floats that are whole."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _whole_numbers(one) for key, one in value.items()}
    return [_whole_numbers(one) for one in value] if isinstance(value, list) else value


def _explain(error: msgspec.ValidationError, raw: dict[str, Any]) -> ApiError:
    """msgspec's words, with the field as OpenAI names it and the value that came."""
    words, _, where = str(error).partition(" - at `$")
    path = re.findall(r"\w+", where)  # ``$.messages[0].role`` -> messages, 0, role
    param = where.strip("`.").removesuffix("[...]")  # of a mapping, msgspec tells no key
    if missing := re.search(r"missing required field `(.+?)`", words):
        param = f"{param}.{missing[1]}" if param else missing[1]
        return invalid(param, f"{param} is required and missing.", "missing_field")
    value: Any = raw
    for part in path:
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (KeyError, IndexError, ValueError, TypeError):  # msgspec writes [...] for dict keys
            return invalid(param or None, f"{param}: {words}.", "invalid_type")
    return invalid(param or None, f"{param} = {show(value)}: {words}.", "invalid_type")


# -- prompts -------------------------------------------------------------------------------


def messages_of(given: list[Message]) -> tuple[ChatMessage, ...]:
    """The messages of a chat, at least one. Raises ApiError (400)."""
    if not given:
        raise invalid("messages", "messages = [] must hold at least one message.")
    return tuple(_message(i, message) for i, message in enumerate(given))


def _message(index: int, message: Message) -> ChatMessage:
    where = f"messages[{index}]"
    if message.function_call not in (None, []):
        param = f"{where}.function_call"
        words = f"{param} is not supported by this server: send tool_calls."
        raise ApiError(400, "unsupported_parameter", words, param=param)
    calls, answers = earlier_calls(where, message), answered_call(where, message)
    if message.content is None and not calls:
        raise invalid(f"{where}.content", f"{where}.content is required: a string or text parts.")
    # "developer" is OpenAI's newer word for the same thing; chat templates know only "system".
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return ChatMessage(role, message.content, message.name, calls, answers)
    texts = []
    for i, part in enumerate(message.content or ()):
        param = f"{where}.content[{i}]"
        if part.type != "text":
            words = f"{param}.type = {show(part.type)} is not supported: only text is."
            raise ApiError(400, "unsupported_parameter", words, param=f"{param}.type")
        if part.text is None:
            raise invalid(f"{param}.text", f"{param}.text is required and missing.")
        texts.append(part.text)
    return ChatMessage(role, "\n".join(texts), message.name, calls, answers)


# -- sampling ------------------------------------------------------------------------------


def _sampling(
    request: SamplingFields, max_key: str, max_tokens: int | None, tool_use: ToolUse | None
) -> SamplingParams:
    _in_range(max_key, max_tokens, 1, _MAX_COUNT)
    _in_range("min_tokens", request.min_tokens, 0, _MAX_COUNT)
    for key, (low, high) in SAMPLING_RANGES.items():
        _in_range(key, getattr(request, key, None), low, high)
    _in_range("top_k", request.top_k, -1, _MAX_COUNT)
    _in_range("seed", request.seed, _MIN_SEED, _MAX_SEED)
    if request.top_p == 0:
        raise invalid("top_p", "top_p = 0 leaves no token to choose; for greedy use temperature 0.")
    min_tokens = request.min_tokens or 0
    if max_tokens is not None and min_tokens > max_tokens:
        words = f"min_tokens = {min_tokens} must not be greater than {max_key} = {max_tokens}."
        raise invalid("min_tokens", words)
    seed = secrets.randbits(63) if request.seed is None else request.seed & SEED_BITS
    return SamplingParams(
        seed=seed,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=max(request.top_k or 0, 0),  # vLLM writes "off" as -1
        stop=_stops(request.stop),
        ignore_eos=bool(request.ignore_eos),
        min_p=request.min_p or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=1.0
        if request.repetition_penalty is None
        else request.repetition_penalty,
        stop_token_ids=_token_ids("stop_token_ids", request.stop_token_ids),
        logit_bias=_logit_bias(request.logit_bias),
        logprobs=_logprobs(request),
        allowed_token_ids=_token_ids("allowed_token_ids", request.allowed_token_ids),
        bad_words=_bad_words(request.bad_words),
        include_stop=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
        grammar=_grammar(request, tool_use),
    )


def _grammar(request: SamplingFields, tool_use: ToolUse | None) -> Grammar | None:
    asked = grammar_of(request)
    if asked is None:
        return tool_use.grammar if tool_use else None
    if tool_use:
        field = asked.field.partition(".")[0]
        words = f"{field} and tools do not go together: an answer is one or the other; "
        raise invalid(field, words + 'leave one out, or send tool_choice = "none".')
    return asked


def _logprobs(request: SamplingFields) -> int | None:
    """How many alternatives to tell for each token; None: no log probabilities at all."""
    if isinstance(request, ChatCompletionRequest):
        _in_range("top_logprobs", request.top_logprobs, 0, MAX_LOGPROBS)
        if request.top_logprobs and not request.logprobs:
            words = f"top_logprobs = {request.top_logprobs} is only allowed where logprobs is true."
            raise invalid("top_logprobs", words)
        return (request.top_logprobs or 0) if request.logprobs else None
    wanted = request.logprobs if isinstance(request, CompletionRequest) else None
    if wanted is True:
        raise invalid("logprobs", "logprobs = true must be a number here: how many alternatives.")
    return None if wanted is False else wanted


def _logit_bias(bias: dict[str, float] | None) -> dict[int, float]:
    found: dict[int, float] = {}
    for key, value in (bias or {}).items():
        if not _TOKEN_ID.fullmatch(key) or int(key) > _MAX_COUNT:
            words = f"logit_bias has the key {show(key)}; its keys must be token ids, as in "
            raise invalid("logit_bias", words + '{"50256": -100}.')
        low, high = LOGIT_BIAS_RANGE
        if not low <= value <= high:
            words = f"logit_bias of token {key} = {show(value)} must be between {low} and {high}."
            raise invalid("logit_bias", words)
        found[int(key)] = value
    return found


def _token_ids(key: str, ids: list[int] | None) -> tuple[int, ...]:
    wrong = next((i for i in ids or () if not 0 <= i <= _MAX_COUNT), None)
    if wrong is not None:
        raise invalid(key, f"{key}: {wrong} is not a token id.")
    return tuple(ids or ())


def _bad_words(words: list[str] | None) -> tuple[str, ...]:
    if any(not word.strip() for word in words or ()):
        raise invalid(
            "bad_words", "bad_words has an empty string in it; it would rule out nothing."
        )
    return tuple(words or ())


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MAX_STOPS:
        raise invalid("stop", f"stop has {len(stops)} strings; at most {MAX_STOPS} are allowed.")
    if "" in stops:
        raise invalid("stop", "stop = '' would match everywhere; stop strings must not be empty.")
    return stops


def _in_range(key: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise invalid(key, f"{key} = {show(value)} must be between {low} and {high}.")
