"""Files in a stream: one subject each, its bytes in chunks, in order."""

from collections.abc import AsyncIterator

from services.bus import history
from services.bus.connection import Bus, JetStreamError

CHUNK_BYTES = 512 * 1024  # below the 1 MB that a NATS server allows unless configured otherwise
_CHUNKS_AT_A_TIME = 8
_FULL = (10077, 10047, 10023)  # "maximum bytes exceeded" and its kin


class NoRoom(JetStreamError):
    """The stream, or the server's disk, is full."""


async def write(bus: Bus, subject: str, parts: AsyncIterator[bytes]) -> int:
    """Store what ``parts`` give (bytes of any length); returns how many bytes that were.

    What was stored of one that fails stays: `remove` it. Raises NoRoom, BusError.
    """
    num_bytes = 0
    rest = bytearray()
    async for part in parts:
        rest += part
        while len(rest) >= CHUNK_BYTES:
            num_bytes += await _store(bus, subject, bytes(rest[:CHUNK_BYTES]))
            del rest[:CHUNK_BYTES]
    if rest:
        num_bytes += await _store(bus, subject, bytes(rest))
    return num_bytes


async def read(bus: Bus, stream: str, subject: str) -> AsyncIterator[bytes]:
    """The chunks as they were stored. Raises BusError."""
    async for raw in history.read(bus, stream, subject, size=_CHUNKS_AT_A_TIME):
        yield raw.data


async def remove(bus: Bus, stream: str, subject: str) -> None:
    """Nothing where nothing is there. Raises BusError."""
    await bus.jetstream(f"STREAM.PURGE.{stream}", {"filter": subject})


async def _store(bus: Bus, subject: str, chunk: bytes) -> int:
    try:
        await bus.store(subject, chunk, {})
    except JetStreamError as error:
        if error.code in _FULL:
            raise NoRoom(subject, error.code, "there is no room for the file") from error
        raise
    return len(chunk)
