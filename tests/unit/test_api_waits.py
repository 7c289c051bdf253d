"""Retry-After: from what the scheduler predicts, where it does."""

from typing import cast

import pytest

from schemas.state import PredictedWait
from services.api import errors
from services.api.waits import MOST_S, Wait, Waits
from services.bus import Bus


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def predicted(wait_s: float | None, model: str = "m") -> PredictedWait:
    return PredictedWait(model, 0.0, wait_s, 1, 0, 0.0, 1)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def waits(clock: Clock) -> Waits:
    return Waits(cast(Bus, None), clock)  # never started: the tests are the scheduler


def test_the_place_in_line_is_known_where_the_wait_is_not(waits: Waits, clock: Clock) -> None:
    waits.note(predicted(None))
    assert (waits.of("m"), waits.retry_after_s("m")) == (Wait(1, None), None)
    waits.note(predicted(5.0))
    clock.now += 2
    assert waits.of("m") == Wait(1, 3.0)
    assert waits.of("another") is None
    clock.now += 60
    assert waits.of("m") is None


@pytest.mark.parametrize(
    ("wait_s", "seconds"),
    [(0.001, 1), (1.0, 1), (1.001, 2), (7.5, 8), (3600.0, MOST_S), (None, None)],
)
def test_seconds_are_rounded_up_and_bounded(
    waits: Waits, wait_s: float | None, seconds: int | None
) -> None:
    assert waits.retry_after_s("m") is None
    waits.note(predicted(wait_s))
    assert waits.retry_after_s("m") == seconds
    assert waits.retry_after_s("another") is None


def test_time_passes_and_old_predictions_are_forgotten(waits: Waits, clock: Clock) -> None:
    waits.note(predicted(7.5))
    clock.now += 3.0
    assert waits.retry_after_s("m") == 5
    clock.now += 5.0
    assert waits.retry_after_s("m") == 1
    clock.now += 5.0
    assert waits.retry_after_s("m") is None


def test_the_newest_prediction_counts(waits: Waits) -> None:
    waits.note(predicted(7.5))
    waits.note(predicted(2.5))
    assert waits.retry_after_s("m") == 3
    waits.note(predicted(None))
    assert waits.retry_after_s("m") is None


def test_where_nothing_is_predicted_the_constants_stay() -> None:
    full, failed = errors.queue_full("m", 3), errors.model_unavailable("m", "why")
    assert full.headers == {"retry-after": str(errors.RETRY_AFTER_S)}
    assert failed.headers == {"retry-after": str(errors.RETRY_AFTER_S * 5)}
    gone = errors.from_failure("model_unavailable", "why", "prompt")
    assert gone.headers == {"retry-after": str(errors.RETRY_AFTER_S)}


def test_a_prediction_is_told_for_a_full_queue_and_an_unavailable_model_only() -> None:
    told = {"retry-after": "7"}
    assert errors.queue_full("m", 3, 7).headers == told
    assert errors.model_unavailable("m", "why", 7).headers == told
    assert errors.from_failure("model_unavailable", "why", "prompt", 7).headers == told
    leaving = errors.from_failure("cancelled", "why", "prompt", 7)  # another agent may be free
    assert leaving.headers == {"retry-after": str(errors.RETRY_AFTER_S)}
    assert errors.from_failure("engine_failed", "why", "prompt", 7).headers == {}
