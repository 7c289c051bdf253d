"""What an answer is to look like: how many choices, and what is told besides their texts."""

from collections.abc import Sequence
from dataclasses import dataclass

from schemas.requests import ChatMessage, ChatPrompt, Prompt, TextPrompt
from services.api.errors import ApiError, invalid
from services.api.openai import CompletionRequest, SamplingFields

MAX_N = 128  # as OpenAI
MAX_CHOICES = 512  # n times prompts: each is a request in the queue
MAX_ID = 256


@dataclass(frozen=True)
class AnswerForm:
    """``echoes``: of each prompt, what goes before its choices' texts; None inside: the prompt's
    own text, which only its tokenizer knows. None as a whole: nothing.
    """

    n: int = 1  # choices for each prompt
    echoes: tuple[str | None, ...] | None = None
    token_ids: bool = False  # tell them, the prompt's too
    logprobs_by_id: bool = False  # tokens in log probabilities are called "token_id:ID"
    usage_in_chunks: bool = False  # tokens so far, in each chunk of a stream
    request_id: str = ""  # the client's, for the answer's id


def form_of(request: SamplingFields, prompts: Sequence[Prompt]) -> AnswerForm:
    """Raises ApiError (400)."""
    options, request_id = request.stream_options, request.request_id
    if request_id is not None and not 1 <= len(request_id) <= MAX_ID:
        words = f"request_id has {len(request_id)} characters; it must have 1 to {MAX_ID}."
        raise invalid("request_id", words)
    return AnswerForm(
        n=_num_choices(request, len(prompts)),
        echoes=_echoes(request, prompts) if request.echo else None,
        token_ids=bool(request.return_token_ids),
        logprobs_by_id=bool(request.return_tokens_as_token_ids),
        usage_in_chunks=bool(options and options.continuous_usage_stats),
        request_id=request_id or "",
    )


def _num_choices(request: SamplingFields, num_prompts: int) -> int:
    n = 1 if request.n is None else request.n
    if not 1 <= n <= MAX_N:
        raise invalid("n", f"n = {n} must be between 1 and {MAX_N}.")
    best_of = request.best_of if isinstance(request, CompletionRequest) else None
    if best_of is not None and best_of != n:
        words = f"best_of = {best_of} is not supported by this server unless it is n = {n}: "
        raise ApiError(
            400, "unsupported_parameter", words + "all choices are told.", param="best_of"
        )
    if n * num_prompts > MAX_CHOICES:
        words = f"n = {n} choices for each of {num_prompts} prompts are {n * num_prompts}; "
        raise invalid("n", words + f"at most {MAX_CHOICES} are allowed in one request.")
    return n


def _echoes(request: SamplingFields, prompts: Sequence[Prompt]) -> tuple[str | None, ...]:
    if isinstance(request, CompletionRequest) and request.logprobs is not None:
        words = "echo = true with logprobs is not supported by this server: it does not tell log "
        words += "probabilities of prompts; leave one of them out."
        raise ApiError(400, "unsupported_parameter", words, param="echo")
    return tuple(_echo(prompt) for prompt in prompts)


def _echo(prompt: Prompt) -> str | None:
    match prompt:
        case TextPrompt(text):
            return text
        case ChatPrompt([*_, ChatMessage("assistant", content)]):
            return content  # as in vLLM: what the model was to go on with
        case ChatPrompt():
            return ""
        case _:
            return None
