"""How long a client is willing to wait for its whole answer.

OpenAI's wire has no field for it; its SDKs only hang up, which cancels the request too. Here the
body may say ``timeout`` (seconds, as LiteLLM's) and gateways may add a header; the shorter one
counts, and the server's own ``api.request_timeout_s`` in any case.
"""

from typing import Final

from services.api.errors import invalid
from services.api.fields import show

TIMEOUT_HEADER: Final = "x-request-timeout-s"


def timeout_of(header: str | None, in_body: float | None) -> float | None:
    """Seconds; None where the client says nothing. Raises ApiError (400)."""
    asked = []
    if in_body is not None:
        asked.append(_positive("timeout", in_body, show(in_body)))
    if header is not None:
        try:
            asked.append(_positive(TIMEOUT_HEADER, float(header), show(header)))
        except ValueError as error:
            words = f"{TIMEOUT_HEADER} = {show(header)} must be a number of seconds."
            raise invalid(TIMEOUT_HEADER, words) from error
    return min(asked, default=None)


def _positive(name: str, value: float, shown: str) -> float:
    if not 0 < value < float("inf"):  # also NaN
        raise invalid(name, f"{name} = {shown} must be a number of seconds greater than 0.")
    return value
