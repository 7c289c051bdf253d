"""Files: what is in them and what is known about them.

The bytes are stored first and the record after, so what has a record is whole; what was begun and
never got one is forgotten by the stream in the end.
"""

import contextlib
import time
import uuid
from collections.abc import AsyncIterator

from schemas import names
from schemas.batches import FilePurpose, FileRecord
from services.bus import Bucket, Bus, BusError, blobs
from services.bus.topology import KEPT_S


class FileDamaged(Exception):
    """Not all of its bytes are there any more."""


class Files:
    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._bucket = Bucket(bus, names.BUCKET_FILES, FileRecord)

    async def add(
        self,
        filename: str,
        purpose: FilePurpose,
        parts: AsyncIterator[bytes],
        *,
        tenant: str = "",
        kept_s: int = KEPT_S,
    ) -> FileRecord:
        """Store what ``parts`` give under a new id. Raises blobs.NoRoom, BusError."""
        file = f"file-{uuid.uuid4().hex}"
        subject = names.file_subject(file)
        now = int(time.time())
        try:
            num_bytes = await blobs.write(self._bus, subject, parts)
            expires_at = now + kept_s
            record = FileRecord(file, filename, purpose, num_bytes, now, expires_at, tenant)
            await self._bucket.put(file, record, expect=0, ttl_s=kept_s)
        except BaseException:
            await self._forget(file)
            raise
        return record

    async def get(self, file: str) -> FileRecord | None:
        return (await self._bucket.get(file)).value if names.is_key(file) else None

    async def all(self) -> list[FileRecord]:
        return list((await self._bucket.items()).values())

    async def read(self, record: FileRecord) -> AsyncIterator[bytes]:
        """Its bytes, in chunks. Raises FileDamaged, BusError."""
        num_bytes = 0
        subject = names.file_subject(record.file)
        async for chunk in blobs.read(self._bus, names.STREAM_FILES, subject):
            num_bytes += len(chunk)
            yield chunk
        if num_bytes != record.num_bytes:
            raise FileDamaged(
                f"{record.file} should have {record.num_bytes} bytes, and has {num_bytes}"
            )

    async def remove(self, file: str) -> None:
        """Raises BusError."""
        await self._bucket.delete(file)
        await blobs.remove(self._bus, names.STREAM_FILES, names.file_subject(file))

    async def _forget(self, file: str) -> None:
        with contextlib.suppress(BusError):  # the stream forgets it in the end
            await blobs.remove(self._bus, names.STREAM_FILES, names.file_subject(file))
