"""What the model is given: prompts out of HTTP bodies, and what is to be done with them."""

from typing import Any

import msgspec

from schemas.requests import (
    ChatMessage,
    ChatPrompt,
    Prompt,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
    Tool,
)
from services.api.errors import invalid
from services.api.fields import show
from services.api.form import AnswerForm
from services.api.openai import ChatCompletionRequest, CompletionRequest, SamplingFields

MAX_PROMPTS = 512
MAX_SALT = 1024
_MAX_TOKENS = (1 << 31) - 1
# Of the function that renders a chat template: no variables of the template.
RESERVED = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "self",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)


# -- completions ---------------------------------------------------------------------------


def of_completion(request: CompletionRequest) -> tuple[Prompt, ...]:
    """All prompts of a completions request, at least one. Raises ApiError (400)."""
    given = request.prompt
    add_special_tokens = request.add_special_tokens is not False
    if isinstance(given, str):
        return (TextPrompt(given, add_special_tokens),)
    if not given:
        raise invalid("prompt", "prompt = [] must hold text or token ids.")
    if isinstance(given[0], int):
        return (_tokens("prompt", given),)
    if len(given) > MAX_PROMPTS:
        words = f"prompt has {len(given)} entries; at most {MAX_PROMPTS} are allowed."
        raise invalid("prompt", words)
    return tuple(
        TextPrompt(one, add_special_tokens)
        if isinstance(one, str)
        else _tokens(f"prompt[{i}]", one)
        for i, one in enumerate(given)
    )


def _tokens(where: str, given: Any) -> TokenPrompt:
    if isinstance(given, int):
        words = f"{where} = {given}: token ids and other prompts can not stand in one list."
        raise invalid("prompt", words, "invalid_type")
    if not given:
        raise invalid("prompt", f"{where} = [] must hold text or token ids.")
    strange = next((one for one in given if not isinstance(one, int)), None)
    if strange is not None:
        words = f"{where} holds {show(strange)} among token ids; they can not stand in one list."
        raise invalid("prompt", words, "invalid_type")
    if (wrong := bad_token_id(given)) is not None:
        raise invalid("prompt", f"{where}: {show(wrong)} is not a token id; they start at 0.")
    return TokenPrompt(tuple(given))


def bad_token_id(ids: list[int]) -> int | None:
    """The first of ``ids`` that no model can have."""
    if not ids or (min(ids) >= 0 and max(ids) <= _MAX_TOKENS):
        return None
    return next(i for i in ids if not 0 <= i <= _MAX_TOKENS)


# -- chats ---------------------------------------------------------------------------------


def of_chat(
    request: ChatCompletionRequest, messages: tuple[ChatMessage, ...], tools: tuple[Tool, ...]
) -> ChatPrompt:
    """``messages`` and ``tools``, and how the template is to render them. Raises ApiError (400)."""
    return ChatPrompt(
        messages,
        **template_options(
            request.add_generation_prompt,
            request.continue_final_message,
            request.chat_template_kwargs,
        ),
        add_special_tokens=bool(request.add_special_tokens),
        documents=tuple(request.documents or ()),
        reasoning_effort=request.reasoning_effort,
        tools=tools,
    )


def template_options(
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
    template_kwargs: dict[str, Any] | None,
) -> dict[str, Any]:
    """Those of ChatPrompt that chats and their tokenizing have in common. Raises ApiError (400)."""
    if continue_final_message and add_generation_prompt:
        words = "continue_final_message and add_generation_prompt can not both be true."
        raise invalid("continue_final_message", words)
    if reserved := sorted(RESERVED & (template_kwargs or {}).keys()):
        words = (
            f"chat_template_kwargs can not have {reserved[0]!r}: it is no variable of a template."
        )
        raise invalid("chat_template_kwargs", words)
    return {
        "add_generation_prompt": add_generation_prompt is not False and not continue_final_message,
        "continue_final_message": bool(continue_final_message),
        "template_kwargs": template_kwargs or {},
    }


# -- both ----------------------------------------------------------------------------------


def with_options(
    sampling: SamplingParams, request: SamplingFields, form: AnswerForm
) -> SamplingParams:
    """``sampling`` with what ``request`` says about its prompts. Raises ApiError (400)."""
    most = request.truncate_prompt_tokens
    if most is not None and (most == 0 or not -1 <= most <= _MAX_TOKENS):
        words = f"truncate_prompt_tokens = {show(most)} must be a number of tokens, or -1 for "
        raise invalid("truncate_prompt_tokens", words + "as many as the model can take.")
    salt = request.cache_salt
    if salt is not None and not 1 <= len(salt) <= MAX_SALT:
        words = f"cache_salt has {len(salt)} characters; it must have 1 to {MAX_SALT}."
        raise invalid("cache_salt", words)
    tells_text = form.echoes is not None and None in form.echoes
    if most is None and salt is None and not form.token_ids and not tells_text:
        return sampling  # as nearly always
    return msgspec.structs.replace(
        sampling,
        truncate_prompt_tokens=most,
        truncation_side=request.truncation_side or "left",
        cache_salt=salt or "",
        tell_prompt_ids=form.token_ids,
        tell_prompt_text=tells_text,
    )
