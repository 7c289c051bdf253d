"""Loaded by schemathesis (SCHEMATHESIS_HOOKS): two checks of ours in the place of two of its own.

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
from schemathesis.checks import CheckContext
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

Body: TypeAlias = dict[str, Any]


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


# param of the error -> whether ``body`` breaks the rule about it
BETWEEN_FIELDS: Final[dict[str, Callable[[Body], bool]]] = {
    "stream_options": lambda body: (
        body.get("stream_options") is not None and not body.get("stream")
    ),
    "min_tokens": _more_than_max,
    "top_logprobs": lambda body: bool(body.get("top_logprobs")) and not body.get("logprobs"),
    # How long its vectors are is the model's, and of no concern to the document.
    "dimensions": lambda body: (body.get("dimensions") or 0) > 1,
}


@schemathesis.check
def acceptance(
    ctx: CheckContext, response: schemathesis.Response, case: schemathesis.Case[Any]
) -> bool | None:
    """What the document allows is accepted, but for rules between fields."""
    if case.operation.label not in STRICT:
        return None
    positive = case.meta is not None and case.meta.generation.mode.is_positive
    if positive and response.status_code == 400 and isinstance(case.body, dict):
        param = json.loads(response.content)["error"]["param"]
        breaks = BETWEEN_FIELDS.get(param)
        if breaks and breaks(case.body):
            return None
    return positive_data_acceptance(ctx, response, case)


@schemathesis.check
def refusal(
    ctx: CheckContext, response: schemathesis.Response, case: schemathesis.Case[Any]
) -> bool | None:
    """What the document does not allow is refused."""
    return negative_data_rejection(ctx, response, case) if case.operation.label in STRICT else None
