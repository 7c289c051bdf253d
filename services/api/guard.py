"""Who may come in: between the trace of a request and its handler.

    1. which role does the path need?      none: health and documentation are open
    2. is the key right, and of that role? else 401 or 403
    3. is there room?                      else 503 (this server) or 429 (this key)

All of it before the body is read. Which models a key may use is asked where the model is known:
by the catalog, and again by `admission` for whatever goes to the queue.
"""

import contextlib
import logging
import re
import time
from typing import cast

from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

from schemas.keys import KeyRecord, Role
from services.api import refusals
from services.api.errors import ApiError
from services.api.keyring import Keyring
from services.api.limits import OpenRequests
from services.api.quotas import Quotas
from services.keys import describe

log = logging.getLogger(__name__)

_STATE_KEY = "hotswap_key"
_ROLES: tuple[tuple[re.Pattern[str], Role | None], ...] = (
    (re.compile(r"/(healthz|readyz|schema(/.*)?)"), None),
    (re.compile(r"/v1/(keys|deployments|aliases|settings|admin)(/.*)?"), "admin"),
    (re.compile(r"/metrics"), "admin"),
)


def role_for(path: str) -> Role | None:
    """The role that ``path`` needs; None: it is open to all. What nobody serves needs a user's."""
    path = "/" + "/".join(part for part in path.split("/") if part)  # as the router reads it
    for pattern, role in _ROLES:
        if pattern.fullmatch(path):
            return role
    return "user"


def key_of(scope: Scope) -> KeyRecord | None:
    """The key that the request came with; None where keys are not asked for."""
    return cast(KeyRecord | None, scope["state"].get(_STATE_KEY))


class Guard:
    """ASGI application around ``app``."""

    def __init__(
        self, app: ASGIApp, keyring: Keyring, quotas: Quotas, open_requests: OpenRequests
    ) -> None:
        self._app = app
        self._keyring = keyring
        self._quotas = quotas
        self._open = open_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP or (role := role_for(scope["path"])) is None:
            await self._app(scope, receive, send)
            return
        record: KeyRecord | None = None
        with contextlib.ExitStack() as room:
            try:
                record = self._admit(scope, role)
                if scope["method"] == "POST" and role != "admin":
                    body = room.enter_context(self._open.enter())
                    receive = body.watched(receive)
                    if record:
                        self._quotas.enter(record, time.monotonic())
                        room.callback(self._quotas.leave, record.id)
            except ApiError as error:
                await _refuse(error, self._watched(scope, role, record, send))
                return
            scope["state"][_STATE_KEY] = record
            await self._app(scope, receive, self._watched(scope, role, record, send))

    def _admit(self, scope: HTTPScope, role: Role) -> KeyRecord | None:
        """The key that the request came with. Raises ApiError (401, 403)."""
        if not self._keyring.required:
            return None
        # Several headers are one list, as everywhere in HTTP, and so no key at all.
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        record = self._keyring.check(b", ".join(given).decode("latin-1"))
        if role == "admin" and record.role != "admin":
            raise refusals.insufficient_role(record, role, str(scope["method"]), scope["path"])
        return record

    def _watched(self, scope: HTTPScope, role: Role, record: KeyRecord | None, send: Send) -> Send:
        """``send``, which notes what was done for admins and tells others what is left for them."""
        if role == "admin":
            return _noted(scope, record, send)
        if record is None or scope["method"] != "POST":
            return send

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                left = self._quotas.headers(record, time.monotonic())
                told = [(name.encode(), value.encode()) for name, value in left]
                message["headers"] = [*message["headers"], *told]
            await send(message)

        return send_with_limits


def _noted(scope: HTTPScope, record: KeyRecord | None, send: Send) -> Send:
    async def send_and_note(message: Message) -> None:
        if message["type"] == "http.response.start":
            who = f"with the key {describe(record)}" if record else "without an admin's key"
            what = (scope["method"], scope["path"], message["status"])
            log.info("admin: %s %s: %d, %s", *what, who)
        await send(message)

    return send_and_note


async def _refuse(error: ApiError, send: Send) -> None:
    headers = {"content-type": "application/json", **error.headers}
    headers["content-length"] = str(len(error.body))
    await send(
        {
            "type": "http.response.start",
            "status": error.status,
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": error.body, "more_body": False})
