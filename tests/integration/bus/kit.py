"""What the tests of the bus share: connections, boxes that are waited on, requests."""

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

import msgspec
import pytest

from schemas.requests import GenerateRequest, SamplingParams, TextPrompt
from services.bus import Bus, Delivery, Puller, WorkQueue
from services.bus.connection import RawMessage
from tests.integration.nats_process import NatsServer

T = TypeVar("T")

PATIENCE_S = 8.0
MODEL = "org/Model-1.5"

_ids = itertools.count()


class Parties:
    """Connections to one server, by user; all closed in the end."""

    def __init__(self, server: NatsServer) -> None:
        self._server = server
        self._open: list[Bus] = []

    async def __call__(self, user: str) -> Bus:
        bus = await Bus.connect(self._server.credentials[user], service=f"test-{user}")
        self._open.append(bus)
        return bus

    async def close(self) -> None:
        for bus in self._open:
            await bus.close()


class Box(Generic[T]):
    """Collects what comes, in order, and lets a test wait for it."""

    def __init__(self) -> None:
        self.all: list[T] = []
        self._grew = asyncio.Condition()

    async def put(self, item: T) -> None:
        async with self._grew:
            self.all.append(item)
            self._grew.notify_all()

    async def until(self, done: Callable[[list[T]], object], patience_s: float = PATIENCE_S) -> T:
        """Wait until ``done(all)``; gives the newest item."""
        async with self._grew:
            try:
                await asyncio.wait_for(self._grew.wait_for(lambda: done(self.all)), patience_s)
            except TimeoutError:
                raise AssertionError(f"waited {patience_s} s; so far: {self.all}") from None
            return self.all[-1]

    async def count(self, number: int, patience_s: float = PATIENCE_S) -> T:
        """Wait until ``number`` items are there; gives the newest."""
        return await self.until(lambda items: len(items) >= number, patience_s)


async def tap(bus: Bus, subject: str) -> Box[RawMessage]:
    """A box of all that comes on ``subject`` from now on."""
    box: Box[RawMessage] = Box()
    await bus.subscribe_raw(subject, box.put)
    await bus.flush()
    return box


async def eventually(holds: Callable[[], Awaitable[object]], what: str) -> None:
    """Ask until it ``holds``: for what a server does by itself and announces to nobody."""
    give_up_at = time.monotonic() + PATIENCE_S
    while not await holds():
        assert time.monotonic() < give_up_at, f"waited {PATIENCE_S} s for {what}"
        await asyncio.sleep(0.05)


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged as an error, in order."""
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]


def request(model: str = MODEL, *, deadline_s: float = 60.0, **fields: Any) -> GenerateRequest:
    now = time.time()
    made = GenerateRequest(
        request_id=f"r{next(_ids)}",
        model=model,
        klass="interactive",
        prompt=TextPrompt("a secret prompt"),
        sampling=SamplingParams(seed=1),
        reply_to="_INBOX_api.r",
        created_at=now,
        deadline_at=now + deadline_s,
    )
    return msgspec.structs.replace(made, **fields)


async def pulling(bus: Bus, box: Box[Delivery], want: int = 1, model: str = MODEL) -> Puller:
    """A puller whose deliveries go into ``box``."""
    puller = Puller(bus, model, box.put)
    await puller.start()
    await puller.want(want)
    return puller


async def holds_only(counting: WorkQueue, depths: dict[str, int]) -> None:
    """Wait until the queue holds ``depths``: an answer counts once the server has read it."""

    async def agrees() -> bool:
        return (await counting.depths())[0] == depths

    await eventually(agrees, f"the queue to hold {depths}")
