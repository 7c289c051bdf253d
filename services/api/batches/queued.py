"""Which requests of batches are in the queue, and how they are called."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass

from schemas import names
from services.bus import Bus, history

_FRESH_S = 2.0  # a look serves all who ask within this time
_AT_A_TIME = 64


@dataclass(frozen=True)
class Run:
    """One run of one line: ``<batch>-<line>-<attempt>`` is the id of its request.

    ``stream_seq``: of its message in the queue; 0 where that is not known.
    """

    batch: str
    number: int
    attempt: int
    stream_seq: int = 0

    @property
    def request_id(self) -> str:
        return f"{self.batch}-{self.number}-{self.attempt}"

    @classmethod
    def parse(cls, request_id: str, stream_seq: int = 0) -> "Run | None":
        """None: it is no run of a batch."""
        batch, *numbers = request_id.split("-")
        if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
            return None
        return cls(batch, int(numbers[0]), int(numbers[1]), stream_seq)


@dataclass(frozen=True)
class Look:
    """What was in the queue at some time."""

    runs: dict[str, list[Run]]  # by batch

    def of(self, batch: str) -> Iterator[Run]:
        return iter(self.runs.get(batch, ()))


class Queued:
    """Looks at the queue, for all batches at once."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._last = Look({})
        self._last_at = 0.0  # monotonic: when it was begun
        self._looking = asyncio.Lock()

    async def look(self) -> Look:
        """What the queue holds, as of now or later than this was asked. Raises BusError."""
        asked_at = time.monotonic()
        async with self._looking:
            if self._last_at >= asked_at:
                return self._last
            begun_at = time.monotonic()
            runs: dict[str, list[Run]] = {}
            subject = f"{names.PREFIX}.requests.batch.>"
            async for raw in history.read(self._bus, names.STREAM_BATCH, subject, size=_AT_A_TIME):
                seq = int(raw.headers["Nats-Sequence"])
                if run := Run.parse(raw.headers.get("Nats-Msg-Id", ""), seq):
                    runs.setdefault(run.batch, []).append(run)
            self._last, self._last_at = Look(runs), begun_at
            return self._last
