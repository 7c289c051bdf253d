"""API keys: how they look, what is kept of them, and what may be asked of one. No I/O.

    hs-2c70e12b7a0646f9-Zk9...      what a client sends: `Authorization: Bearer ...`
       `---- id ------' `-- 256 random bits, base64url

The id is no secret: it says which key this is, in lists, logs and on the bus (there it is the
tenant). Only a SHA-256 of the whole key is kept (decision 28 says why no slow hash is needed).
Keys of other makes can be brought along; the id of such a one is the start of its hash.
"""

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import msgspec

from schemas.keys import KeyRecord

FIRST_KEY_FILE = "admin.key"  # in the state folder: the key that the api makes where there is none
ID_DIGITS = 16
SECRET_BYTES = 32
MIN_KEY = 24  # characters of a key that somebody else made: it must not be guessable
MAX_KEY = 512
MAX_NAME = 100
MAX_MODELS = 100
MAX_LIMIT = 1_000_000_000
LIMITS = ("requests_per_minute", "tokens_per_minute", "max_concurrent")

_OURS = re.compile(rf"hs-([0-9a-f]{{{ID_DIGITS}}})-[A-Za-z0-9_-]+")
_NO_HASH = "0" * 64


class BadKey(ValueError):
    """A record that can not be used. ``field``: which part of it; the message names its value."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def new_key() -> str:
    """A key that nobody else has."""
    return f"hs-{secrets.token_hex(ID_DIGITS // 2)}-{secrets.token_urlsafe(SECRET_BYTES)}"


def digest(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


def key_id(key: str) -> str:
    """Which key ``key`` says it is."""
    ours = _OURS.fullmatch(key)
    return ours[1] if ours else digest(key)[:ID_DIGITS]


def is_right(key: str, record: KeyRecord | None) -> bool:
    """Whether ``key`` is the one of ``record``; in the same time, however much of it is right."""
    expected = record.hash if record else _NO_HASH
    return hmac.compare_digest(digest(key), expected) and record is not None


def has_expired(record: KeyRecord, now: float) -> bool:
    return record.expires_at is not None and now >= record.expires_at


def allows(record: KeyRecord | None, model: str) -> bool:
    """Whether the deployment ``model`` may be used with it. ``record`` None: nobody is asked."""
    if record is None or not record.models or model in record.models:
        return True
    return any(fnmatchcase(model, pattern) for pattern in record.models)


def describe(record: KeyRecord) -> str:
    """For messages and logs."""
    return f"{record.name!r} ({record.id})"


def make(name: str, *, key: str = "", **rest: Any) -> tuple[str, KeyRecord]:
    """A key and its record. ``key``: one that exists already. Raises BadKey."""
    if key and not (MIN_KEY <= len(key) <= MAX_KEY and key.isascii() and key.isprintable()):
        words = f"a key of your own must have {MIN_KEY} to {MAX_KEY} characters of ASCII"
        raise BadKey("key", words)
    if any(char.isspace() for char in key):
        raise BadKey("key", "a key must not hold spaces")
    key = key or new_key()
    record = KeyRecord(
        id=key_id(key), name=name, hash=digest(key), created_at=int(time.time()), **rest
    )
    return key, checked(record)


def checked(record: KeyRecord) -> KeyRecord:
    """``record``, if it makes sense. Raises BadKey."""
    if not record.name.strip() or len(record.name) > MAX_NAME or not record.name.isprintable():
        words = f"name = {record.name!r} must have 1 to {MAX_NAME} printable characters"
        raise BadKey("name", words)
    if len(record.models) > MAX_MODELS or not all(record.models):
        words = (
            f"models = {list(record.models)!r}: up to {MAX_MODELS} names or patterns, none empty"
        )
        raise BadKey("models", words)
    for field in LIMITS:
        limit = getattr(record, field)
        if limit is not None and not 1 <= limit <= MAX_LIMIT:
            raise BadKey(field, f"{field} = {limit} must be from 1 to {MAX_LIMIT}, or none")
    if record.expires_at is not None and record.expires_at <= record.created_at:
        words = f"expires_at = {record.expires_at} is before the key was made, in unix seconds"
        raise BadKey("expires_at", words)
    return record


def changed(record: KeyRecord, **fields: Any) -> KeyRecord:
    """``record`` with other ``fields``. Raises BadKey."""
    return checked(msgspec.structs.replace(record, **fields))


def by_name(records: Iterable[KeyRecord], name_or_id: str) -> list[KeyRecord]:
    """The one with that id, else those with that name."""
    found = list(records)
    with_id = [record for record in found if record.id == name_or_id]
    return with_id or [record for record in found if record.name == name_or_id]
