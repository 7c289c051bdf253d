"""Jobs that make up a service: run together, end together, fail with their own error.

`asyncio.TaskGroup` wraps what a job raised into an ExceptionGroup; a service that ends because
its lease is lost has one reason, and the command line wants to print that one.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_CANCEL_AGAIN_S = 1.0


async def until_first_ends(*jobs: Coroutine[Any, Any, Any]) -> None:
    """Run ``jobs`` until one of them ends, cancel the others, raise what the first raised."""
    tasks = [asyncio.create_task(job) for job in jobs]
    try:
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await _cancel(*tasks)
    for task in tasks:
        if task in ended:
            task.result()


async def unless_set(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of ``work``; None where ``stop`` was set first (``work`` is cancelled then)."""
    working = asyncio.create_task(work)
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        await _cancel(working, stopping)


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel ``tasks`` and wait for their end, whatever it is.

    More than once if need be: until Python 3.12 `asyncio.wait_for` forgets a cancellation that
    comes just when what it waits for is done, and a job that loops for ever then loops on.
    """
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=_CANCEL_AGAIN_S)
    await asyncio.gather(*tasks, return_exceptions=True)
