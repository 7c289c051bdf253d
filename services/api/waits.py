"""When a client should try again, by how long the scheduler expects its model to be waited for."""

import math
import time
from collections.abc import Callable
from typing import TypeAlias

import msgspec

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


class Wait(msgspec.Struct, frozen=True):
    """``place``: of the model in line, from 1; 0: it is on its way in."""

    place: int
    left_s: float | None  # None: not known


class Waits:
    """The newest prediction for each model that is waited for."""

    def __init__(self, bus: Bus, clock: Callable[[], float] = time.monotonic) -> None:
        self._bus = bus
        self._clock = clock
        self._predicted: dict[str, tuple[float, PredictedWait]] = {}  # model -> heard at
        self._stop: Hook | None = None

    async def start(self) -> None:
        self._stop = await self._bus.subscribe(names.wait_subject(), PredictedWait, self._on_wait)

    async def stop(self) -> None:
        if self._stop:
            await self._stop()

    def retry_after_s(self, model: str) -> int | None:
        """What is left of the predicted wait, in whole seconds from 1 to `MOST_S`."""
        wait = self.of(model)
        if wait is None or wait.left_s is None:
            return None
        return min(max(math.ceil(wait.left_s), 1), MOST_S)

    def of(self, model: str) -> Wait | None:
        """What was predicted last, less what has passed since."""
        if model not in self._predicted:
            return None
        heard_at, wait = self._predicted[model]
        passed_s = self._clock() - heard_at
        if passed_s > _FORGET_S:
            del self._predicted[model]
            return None
        if wait.wait_s is None:
            return Wait(wait.place, None)
        return Wait(wait.place, round(max(0.0, wait.wait_s - passed_s), 3))

    def note(self, wait: PredictedWait) -> None:
        """The scheduler said so just now."""
        self._predicted[wait.model] = (self._clock(), wait)

    async def _on_wait(self, message: Message[PredictedWait]) -> None:
        self.note(message.body)
