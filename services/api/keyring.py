"""The API keys of this server, as the bucket HS_KEYS has them, and whether one is right.

Changes apply at once. While NATS is away the keys known last stay valid, until they expire.
"""

import logging
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from schemas import names
from schemas.keys import KeyRecord
from services import keys
from services.api import refusals
from services.api.mirror import Mirror
from services.api.tenants import bearer_of
from services.bus import Bucket, Bus

log = logging.getLogger(__name__)


class Keyring:
    """``required``: whether requests need a key at all. ``gone(id)``: a key was withdrawn."""

    def __init__(
        self, bus: Bus, *, required: bool, gone: Callable[[str], None] = lambda key_id: None
    ) -> None:
        self.required = required
        self.bucket = Bucket(bus, names.BUCKET_KEYS, KeyRecord)
        self._gone = gone
        self._mirror = Mirror(bus, names.BUCKET_KEYS, KeyRecord, self._changed)
        self._undo: list[Callable[[], object]] = []

    async def start(self) -> None:
        """Watch; returns once the present keys are known. Raises BusError."""
        self._undo += await self._mirror.start()

    async def stop(self) -> None:
        for undo in self._undo:
            if isinstance(waiting := undo(), Awaitable):
                await waiting

    def records(self) -> list[KeyRecord]:
        """All keys, the oldest first."""
        return sorted(self._mirror.values.values(), key=lambda one: (one.created_at, one.id))

    def find(self, key_id: str) -> KeyRecord | None:
        return self._mirror.values.get(key_id)

    def check(self, authorization: str | None) -> KeyRecord:
        """The record of the key in an Authorization header. Raises ApiError (401)."""
        key = bearer_of(authorization)
        if not key:
            raise refusals.missing_api_key()
        record = self._mirror.values.get(keys.key_id(key))
        if not keys.is_right(key, record) or record is None:
            raise refusals.invalid_api_key()
        return _usable(record)

    def of_tenant(self, tenant: str) -> KeyRecord | None:
        """The key that requests of ``tenant`` came with; None where none is asked for.

        Raises ApiError (401) where it may not be used any more.
        """
        if not self.required:
            return None
        record = self._mirror.values.get(tenant)
        if record is None:
            raise refusals.invalid_api_key()
        return _usable(record)

    async def make_first_key(self, folder: Path) -> None:
        """Where keys are asked for and there is none: an admin's, written into ``folder``.

        A key that lies there already is used again. Raises OSError, BusError, BadKey.
        """
        if not self.required or self._mirror.values:
            return
        path = folder / keys.FIRST_KEY_FILE
        key, record = keys.make("first admin", key=_read_key(path), role="admin")
        _write_key(path, key)
        await self.bucket.put(record.id, record)  # last: nobody could know it otherwise
        log.warning("there was no API key: the first one, for an admin, is in %s", path)

    def _changed(self, key_id: str, record: KeyRecord | None) -> None:
        if record is None:
            self._gone(key_id)


def _usable(record: KeyRecord) -> KeyRecord:
    if record.disabled:
        raise refusals.disabled_api_key(record)
    if keys.has_expired(record, time.time()):
        raise refusals.expired_api_key(record)
    return record


def _read_key(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


def _write_key(path: Path, key: str) -> None:
    """Readable by the owner only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        out.write(f"{key}\n")
