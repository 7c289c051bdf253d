"""The outermost layer: an id and, for every POST, a server span around each request.

It sits outside the framework, so that errors made anywhere (unknown routes too) carry the same
headers, and a span lasts until the last byte of a stream.
"""

import re
import uuid
from typing import cast

from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send
from opentelemetry import propagate, trace
from opentelemetry.trace import SpanKind, Status, StatusCode

from services.telemetry import ATTR_REQUEST, tracer

REQUEST_ID_HEADER = "x-request-id"
TRACE_ID_HEADER = "x-trace-id"

_STATE_KEY = "hotswap_request_id"
# Span names must be few: a path that nobody serves is not part of one.
_KNOWN_PATH = re.compile(
    r"/v1/(chat/completions|completions|embeddings|files|batches)/?|(/v1)?/(de)?tokenize/?"
)


def request_id_of(scope: Scope) -> str:
    """The id that this layer gave the request."""
    return cast(str, scope["state"][_STATE_KEY])


class Traced:
    """ASGI application around ``app``."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await self._app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        # A new dict: the server shares one state between requests.
        scope["state"] = {**scope.get("state", {}), _STATE_KEY: request_id}
        ids = [(REQUEST_ID_HEADER.encode(), request_id.encode())]

        async def send_with_ids(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *ids]
                _note_status(message["status"])
            await send(message)

        if scope["method"] != "POST":
            await self._app(scope, receive, send_with_ids)
            return
        path = scope["path"]
        name = f"POST {path.rstrip('/')}" if _KNOWN_PATH.fullmatch(path) else "POST"
        carrier = {
            key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]
        }
        with tracer.start_as_current_span(
            name,
            context=propagate.extract(carrier),
            kind=SpanKind.SERVER,
            attributes={
                ATTR_REQUEST: request_id,
                "http.request.method": "POST",
                "url.path": path,
            },
        ) as span:
            context = span.get_span_context()
            if context.is_valid:
                ids.append((TRACE_ID_HEADER.encode(), f"{context.trace_id:032x}".encode()))
            await self._app(scope, receive, send_with_ids)


def _note_status(status: int) -> None:
    span = trace.get_current_span()
    span.set_attribute("http.response.status_code", status)
    if status >= 500:
        span.set_status(Status(StatusCode.ERROR))
