"""When a client should try again, by how long the scheduler expects its model to be waited for."""

import math
import time
from collections.abc import Callable
from typing import TypeAlias

from schemas import names
from schemas.state import PredictedWait
from services.bus import Bus, Message
from services.bus.connection import Hook

RetryAfter: TypeAlias = Callable[[str], int | None]  # model -> seconds; None: not known

MOST_S = 60  # a longer wait is no more than a guess
_FORGET_S = 10.0  # predictions come about once a second for as long as somebody waits


def unknown(model: str) -> int | None:
    """A `RetryAfter` that never knows."""
    return None


class Waits:
    """The newest prediction for each model that is waited for."""

    def __init__(self, bus: Bus, clock: Callable[[], float] = time.monotonic) -> None:
        self._bus = bus
        self._clock = clock
        self._predicted: dict[str, tuple[float, float]] = {}  # model -> heard at, seconds from then
        self._stop: Hook | None = None

    async def start(self) -> None:
        self._stop = await self._bus.subscribe(names.wait_subject(), PredictedWait, self._on_wait)

    async def stop(self) -> None:
        if self._stop:
            await self._stop()

    def retry_after_s(self, model: str) -> int | None:
        """What is left of the predicted wait, in whole seconds from 1 to `MOST_S`."""
        if model not in self._predicted:
            return None
        heard_at, wait_s = self._predicted[model]
        passed_s = self._clock() - heard_at
        if passed_s > _FORGET_S:
            del self._predicted[model]
            return None
        return min(max(math.ceil(wait_s - passed_s), 1), MOST_S)

    def note(self, wait: PredictedWait) -> None:
        """The scheduler said so just now."""
        if wait.wait_s is None:
            self._predicted.pop(wait.model, None)
        else:
            self._predicted[wait.model] = (self._clock(), wait.wait_s)

    async def _on_wait(self, message: Message[PredictedWait]) -> None:
        self.note(message.body)
