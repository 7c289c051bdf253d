"""One agent over a real nats-server and a fake engine worker, and a test's hands on both."""

import asyncio
import contextlib
import itertools
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import pytest

from schemas import names
from schemas.commands import Command, Load, Register, SwapIn, SwapOut, Unload
from schemas.events import Event, ModelLoaded, ModelRegistered, RequestEnded, SwapInCompleted
from schemas.requests import CancelRequest, GenerateRequest, SamplingParams, TextPrompt
from schemas.state import AgentStatus, ModelSpec, Preemption, ResidencyRecord
from schemas.stream import Chunk, Failed, Finished, ResumeFrom, Resuming, Tokens
from services.bus import Bucket, Bus, Message, WorkQueue, declare
from services.bus.connection import RawMessage
from services.gpu_agent import worker_link
from services.gpu_agent.control import AgentControl
from services.settings import GpuSettings
from tests.integration.nats_process import NatsServer

GPU = "gpu0"
FAKE_WORKER = Path(__file__).parent / "fake_worker.py"
PATIENCE_S = 15.0

T = TypeVar("T")


def use_fake_worker(patch: pytest.MonkeyPatch) -> None:
    def command(self: worker_link.WorkerLink, descriptor: int) -> list[str]:
        return [sys.executable, str(FAKE_WORKER), str(descriptor)]

    patch.setattr(worker_link.WorkerLink, "_command", command)
    patch.setattr(worker_link, "_RESTART_PAUSE_S", 0.0)


async def eventually(check: Callable[[], Awaitable[bool]], what: str) -> None:
    """For what announces itself by no event."""
    give_up_at = time.monotonic() + PATIENCE_S
    while not await check():
        assert time.monotonic() < give_up_at, f"waited for {what}"
        await asyncio.sleep(0.02)


class Log:
    """Things as they come, and waiting for one of them. Nothing is ever taken out."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self._grown = asyncio.Condition()

    async def add(self, item: Any) -> None:
        async with self._grown:
            self.items.append(item)
            self._grown.notify_all()

    def all(self, kind: type[T], after: int = 0, **wanted: Any) -> list[T]:
        return [
            item
            for item in self.items[after:]
            if isinstance(item, kind) and all(getattr(item, k) == v for k, v in wanted.items())
        ]

    async def until(self, kind: type[T], after: int = 0, **wanted: Any) -> T:
        """The first ``kind`` with these attributes, now or later."""
        await self.until_true(lambda: bool(self.all(kind, after, **wanted)), f"{kind} {wanted}")
        return self.all(kind, after, **wanted)[0]

    async def until_true(
        self, condition: Callable[[], bool], what: str = "", patience_s: float = PATIENCE_S
    ) -> None:
        try:
            async with asyncio.timeout(patience_s), self._grown:
                await self._grown.wait_for(condition)
        except TimeoutError:
            story = "\n".join(map(str, self.items))
            raise AssertionError(f"waited for {what}; there were:\n{story}") from None


class Watcher:
    """Every event and status on the bus, as an operator sees them."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.events = Log()
        self.statuses = Log()

    async def start(self) -> None:
        async def on_event(message: Message[Event]) -> None:
            await self.events.add(message.body)

        async def on_status(message: Message[AgentStatus]) -> None:
            await self.statuses.add(message.body)

        await self.bus.subscribe(f"{names.PREFIX}.events.>", Event, on_event)
        await self.bus.subscribe(names.status_subject(), AgentStatus, on_status)
        await self.bus.flush()

    async def residency_is(self, **expected: str) -> None:
        """Wait until HS_RESIDENCY has these states, by model."""
        bucket = Bucket(self.bus, names.BUCKET_RESIDENCY, ResidencyRecord)

        async def check() -> bool:
            records = (await bucket.items()).values()
            return {record.model: record.state for record in records} == expected

        await eventually(check, f"residency {expected}")


class Agent:
    """AgentControl, with a scheduler's and an api's voice for the test."""

    def __init__(self, control: AgentControl, buses: dict[str, Bus], watcher: Watcher) -> None:
        self.control = control
        self.events = watcher.events
        self.statuses = watcher.statuses
        self.watcher = watcher
        self.epoch = 1
        self.queue = WorkQueue(buses["api"])
        self._buses = buses
        self._generations = itertools.count(1)
        self._specs: dict[str, ModelSpec] = {}

    async def send(self, command: Command) -> None:
        bus = self._buses["scheduler"]
        await bus.publish(names.command_subject(GPU), command)
        await bus.flush()

    async def register(
        self,
        model: str,
        source: str = "fake",
        max_batch: int = 4,
        preemption: Preemption = "preserve",
    ) -> int:
        spec = self._specs[model] = ModelSpec(
            name=model, source=source, max_batch=max_batch, preemption=preemption
        )
        generation = next(self._generations)
        await self.send(Register(GPU, model, self.epoch, generation, spec))
        return generation

    async def load(self, model: str) -> int:
        return await self._command(Load, model)

    async def swap_in(self, model: str) -> int:
        return await self._command(SwapIn, model)

    async def swap_out(self, model: str) -> int:
        return await self._command(SwapOut, model)

    async def unload(self, model: str, end_requests: str = "") -> int:
        return await self._command(Unload, model, end_requests=end_requests)

    async def preempt(self, model: str) -> int:
        return await self._command(SwapOut, model, preempt=True)

    async def _command(
        self, kind: type[Load | SwapIn | SwapOut | Unload], model: str, **more: Any
    ) -> int:
        generation = next(self._generations)
        await self.send(kind(GPU, model, self.epoch, generation, **more))
        return generation

    async def bring_in(self, model: str, **how: Any) -> None:
        """Register, load and swap in; each step waits for its own command's end, never for
        that of an earlier one.
        """
        generation = await self.register(model, **how)
        await self.events.until(ModelRegistered, model=model, generation=generation)
        await self._load_and_swap_in(model)

    async def bring_back(self, model: str, after: int) -> None:
        """What a scheduler does when a new worker has registered its models."""
        await self.events.until(ModelRegistered, after, model=model)
        await self._load_and_swap_in(model)

    async def _load_and_swap_in(self, model: str) -> None:
        generation = await self.load(model)
        await self.events.until(ModelLoaded, model=model, generation=generation)
        generation = await self.swap_in(model)
        await self.events.until(SwapInCompleted, model=model, generation=generation)

    async def ask(
        self,
        name: str,
        text: str,
        model: str = "m",
        left_s: float = 60.0,
        listen: bool = True,
        tenant: str = "",
        answers: bool = True,
        verdict: Literal["run", "cancel", "drop"] = "run",
        attempts_before: int = 0,
        klass: names.RequestClass = "interactive",
    ) -> Log:
        """Queue a request; its chunks appear in the log. ``answers``: with ``verdict``, when an
        agent asks what is known of it.
        """
        api = self._buses["api"]
        reply_to = f"{api.inbox}.r.{name}"
        chunks = Log()

        async def on_chunk(raw: RawMessage) -> None:
            chunk: Any = msgspec.json.decode(raw.data, type=Chunk)
            if isinstance(chunk, Resuming) and answers:
                known = {i: token for one in chunks.all(Tokens) for i, token in _numbered(one)}
                known_ids = tuple(known[i] for i in sorted(known))
                await api.publish(raw.reply, ResumeFrom(name, verdict, known_ids))
            await chunks.add(chunk)

        if listen:
            await api.subscribe_raw(reply_to, on_chunk)
        now = time.time()
        what = (TextPrompt(text), SamplingParams(seed=1))
        request = GenerateRequest(
            name,
            model,
            klass,
            *what,
            reply_to,
            now,
            now + left_s,
            tenant,
            attempts_before=attempts_before,
        )
        await self.queue.enqueue(request)
        return chunks

    async def cancel(self, name: str, model: str = "m", gpu: str = "") -> None:
        cancel = CancelRequest(name, model, gpu)
        await self._buses["api"].publish(names.cancel_subject(model), cancel)

    def release(self) -> None:
        """Let the requests that hold go on."""
        os.kill(self.control.worker.pid, signal.SIGUSR1)

    async def ended(self, num_requests: int = 1) -> None:
        """Wait until that many RequestEnded were seen."""
        await self.events.until_true(
            lambda: len(self.events.all(RequestEnded)) >= num_requests, f"{num_requests} ends"
        )

    async def queue_is_empty(self) -> None:
        """Wait until every request has been acknowledged."""
        queue = WorkQueue(self._buses["scheduler"])

        async def is_empty() -> bool:
            return not (await queue.depths())[0] and not (await queue.depths("batch"))[0]

        await eventually(is_empty, "an empty queue")


def _numbered(chunk: Tokens) -> list[tuple[int, int]]:
    return list(enumerate(chunk.token_ids, chunk.index))


def ends(chunks: Log) -> list[Finished | Failed]:
    return [chunk for chunk in chunks.items if isinstance(chunk, Finished | Failed)]


@contextlib.asynccontextmanager
async def connected(nats: NatsServer, *users: str) -> AsyncIterator[dict[str, Bus]]:
    buses = {user: await Bus.connect(nats.credentials[user], service=user) for user in users}
    try:
        yield buses
    finally:
        for bus in buses.values():
            await bus.close()


@contextlib.asynccontextmanager
async def running_agent(nats: NatsServer) -> AsyncIterator[Agent]:
    async with connected(nats, "admin", "scheduler", "api", "agent") as buses:
        for bus in buses.values():
            await declare(bus)
        watcher = Watcher(buses["admin"])
        await watcher.start()
        control = AgentControl(buses["agent"], GpuSettings(name=GPU, device="cpu"), "i1")
        agent = Agent(control, buses, watcher)
        writing = asyncio.create_task(control.reporter.residency_writer.run())
        control.start_worker()
        await control.open()
        await buses["agent"].flush()
        try:
            yield agent
        finally:
            await control.stop()
            writing.cancel()
