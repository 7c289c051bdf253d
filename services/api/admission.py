"""The last question before a request is queued, and the first thing done when it has ended.

Everything that asks a model for something comes through here, whichever path it came by.
"""

import time

from schemas.requests import ChatPrompt, EmbedRequest, Request, TextPrompt, TokenPrompt
from services.api import refusals
from services.api.call import Call
from services.api.catalog import Catalog
from services.api.keyring import Keyring
from services.api.quotas import Quotas

CHARS_PER_TOKEN = 4  # of prompts whose tokens nobody has counted


class Admission:
    """``max_prompt_chars``: of one prompt, whatever its model takes."""

    def __init__(
        self, keyring: Keyring, quotas: Quotas, catalog: Catalog, max_prompt_chars: int
    ) -> None:
        self._keyring = keyring
        self._quotas = quotas
        self._catalog = catalog
        self._max_prompt_chars = max_prompt_chars

    def admit(self, request: Request) -> None:
        """Raises ApiError where it may not be queued: its key, or its length."""
        record = self._keyring.of_tenant(request.tenant)
        deployment = self._catalog.find(request.model)
        if deployment and not self._catalog.allows(record, deployment):
            raise refusals.model_not_allowed(record, request.model)
        max_model_len = self._catalog.max_model_len(request.model)
        embeds = isinstance(request, EmbedRequest)
        for param, num, is_tokens in _lengths(request):
            if not is_tokens and num > self._max_prompt_chars:
                raise refusals.prompt_too_long(param, num, self._max_prompt_chars)
            # How many tokens a text has, only the engine can tell. One more must fit, to generate.
            if is_tokens and max_model_len and num + (not embeds) > max_model_len:
                raise refusals.context_length_exceeded(param, num, max_model_len)

    def ended(self, call: Call) -> None:
        """Charge its key for what it used."""
        if finished := call.finished:
            num_tokens = finished.prompt_tokens + finished.completion_tokens
        elif call.started:  # it was given up: as far as it came
            lengths = _lengths(call.request)
            prompt = sum(
                num if is_tokens else num // CHARS_PER_TOKEN for _, num, is_tokens in lengths
            )
            num_tokens = prompt + len(call.answer.token_ids)
        else:
            return
        self._quotas.charge(call.request.tenant, num_tokens, time.monotonic())


def _lengths(request: Request) -> list[tuple[str, int, bool]]:
    """Of each prompt in it: the field it came in, its length, and whether that is in tokens."""
    if isinstance(request, EmbedRequest):
        return [("input", len(one), not isinstance(one, str)) for one in request.inputs]
    match request.prompt:
        case ChatPrompt(messages=messages):
            return [("messages", sum(len(one.content or "") for one in messages), False)]
        case TextPrompt(text=text):
            return [("prompt", len(text), False)]
        case TokenPrompt(token_ids=token_ids):
            return [("prompt", len(token_ids), True)]
