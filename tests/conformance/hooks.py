"""Loaded by schemathesis (SCHEMATHESIS_HOOKS): checks of ours in the place of some of its own.

Every answer of every operation is held against the document. For the operations in STRICT the
requests are, too: what the document allows is accepted, and what it does not allow is refused.

JSON Schema says what one field may hold. Rules about several fields at once are in the document in
words; a request that breaks one of these, and only such a request, may be refused although the
document's schema allows it.
"""

import json
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import schemathesis
from schemathesis.checks import CheckContext, CheckFunction
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    negative_data_rejection,
    positive_data_acceptance,
    unsupported_method,
)

from tests.conformance.processes import MAX_QUEUED

Body: TypeAlias = dict[str, Any]


# Tools, grammars and messages have many rules between their parts: what is refused there is tested
# by name (tests/integration), and not held against the schema.
COMPOSED: Final = {"POST /v1/chat/completions", "POST /v1/completions"}
ENOUGH_S: Final = 30
BRIEFLY_S: Final = "0.1"
STRICT: Final = {
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/embeddings",
    "GET /v1/models",
    "GET /v1/models/{model_id}",
    "GET /healthz",
    "GET /readyz",
    "GET /version",
}


def _more_than_max(body: Body) -> bool:
    most = body.get("max_completion_tokens") or body.get("max_tokens")
    if most is None and "prompt" in body:
        most = 16  # the default of completions
    return most is not None and (body.get("min_tokens") or 0) > most


def _num_choices(body: Body) -> int:
    prompt = body.get("prompt")
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int | float)
    return (body.get("n") or 1) * (len(prompt) if several and prompt else 1)


# param of the error -> whether ``body`` breaks the rule about it
BETWEEN_FIELDS: Final[dict[str, Callable[[Body], bool]]] = {
    "stream_options": lambda body: (
        body.get("stream_options") is not None and not body.get("stream")
    ),
    "min_tokens": _more_than_max,
    "top_logprobs": lambda body: bool(body.get("top_logprobs")) and not body.get("logprobs"),
    "n": lambda body: _num_choices(body) > MAX_QUEUED,
    "best_of": lambda body: body.get("best_of") not in (None, body.get("n") or 1),
    "echo": lambda body: bool(body.get("echo")) and body.get("logprobs") is not None,
    "continue_final_message": lambda body: bool(body.get("add_generation_prompt")),
    # How long its vectors are is the model's, and of no concern to the document.
    "dimensions": lambda body: (body.get("dimensions") or 0) > 1,
}


@schemathesis.hook
def before_call(ctx: schemathesis.HookContext, case: schemathesis.Case[Any], kwargs: Any) -> None:
    """A request that leaves no time gets none, as it should: 504. Leave some time.

    And wait no longer than that for what the willing agent does not do: swaps.
    """
    if case.path.startswith("/v1/deployments/"):
        case.query = (case.query or {}) | {"timeout_s": BRIEFLY_S}
    case.headers.pop("x-request-timeout-s", None)
    if isinstance(case.body, dict):
        seconds = case.body.get("timeout")
        if isinstance(seconds, int | float) and 0 < seconds < ENOUGH_S:
            case.body["timeout"] = ENOUGH_S


@schemathesis.check
def acceptance(
    ctx: CheckContext, response: schemathesis.Response, case: schemathesis.Case[Any]
) -> bool | None:
    """What the document allows is accepted, but for rules between fields."""
    if case.operation.label not in STRICT - COMPOSED:
        return None
    positive = case.meta is not None and case.meta.generation.mode.is_positive
    if positive and response.status_code == 400 and isinstance(case.body, dict):
        param = json.loads(response.content)["error"]["param"]
        breaks = BETWEEN_FIELDS.get(param)
        if breaks and breaks(case.body):
            return None
    return positive_data_acceptance(ctx, response, case)


def _where_strict(check: CheckFunction) -> CheckFunction:
    """``check`` for the operations in STRICT. Others may have names with slashes in their paths:
    what looks like a wrong method of one is another name.
    """

    def checked(
        ctx: CheckContext, response: schemathesis.Response, case: schemathesis.Case[Any]
    ) -> bool | None:
        return check(ctx, response, case) if case.operation.label in STRICT else None

    checked.__name__ = f"{check.__name__}_where_strict"
    return checked


for _check in (negative_data_rejection, unsupported_method, allow_header_conformance):
    schemathesis.check(_where_strict(_check))
