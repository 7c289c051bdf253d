"""Jobs that run together and end together."""

import asyncio

import pytest

from services import jobs
from services.jobs import unless_set, until_first_ends


async def for_ever(log: list[str]) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        log.append("cancelled")


async def soon() -> str:
    await asyncio.sleep(0)
    return "done"


async def fails() -> None:
    raise LookupError("its own error, in no group")


async def test_the_first_to_end_ends_all() -> None:
    log: list[str] = []
    await until_first_ends(for_ever(log), soon(), for_ever(log))
    assert log == ["cancelled"] * 2


async def test_the_first_to_fail_says_why() -> None:
    log: list[str] = []
    with pytest.raises(LookupError, match="its own error"):
        await until_first_ends(for_ever(log), fails())
    assert log == ["cancelled"]


async def test_cancelled_from_outside() -> None:
    log: list[str] = []
    running = asyncio.create_task(until_first_ends(for_ever(log)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert log == ["cancelled"]


async def test_a_job_that_misses_a_cancellation_is_told_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jobs, "_CANCEL_AGAIN_S", 0.01)
    missed: list[asyncio.CancelledError] = []

    async def hard_of_hearing() -> None:
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError as error:
                if missed:
                    raise
                missed.append(error)

    await until_first_ends(hard_of_hearing(), soon())
    assert len(missed) == 1


async def test_unless_set() -> None:
    stop = asyncio.Event()
    assert await unless_set(stop, soon()) == "done"
    with pytest.raises(LookupError):
        await unless_set(stop, fails())
    stop.set()
    log: list[str] = []
    await unless_set(stop, for_ever(log))
    assert log in ([], ["cancelled"])  # it may not even have begun
