"""A GPU agent for the scheduler's tests: obeys every command at once, and notes it.

Like a real one it pulls requests from the moment it begins to swap in.
"""

import asyncio
import contextlib
import time
from dataclasses import dataclass, field

from schemas import names
from schemas.commands import Command, Load, Register, SwapIn, SwapOut, Unload
from schemas.events import (
    AgentEvent,
    ModelLoaded,
    ModelRegistered,
    ModelUnloaded,
    RequestEnded,
    RequestStarted,
    SwapInCancelled,
    SwapInCompleted,
    SwapOutCompleted,
    kind_of,
)
from schemas.state import AgentStatus, ModelFacts, ReplicaState, ReplicaStatus, SwapTrace
from schemas.stream import RequestTiming
from services.bus import Bus, Delivery, Message, Puller
from tests.integration.agent_kit import Log

GPU = "gpu0"
PAGE = 4096
FACTS = ModelFacts("Fake", "float32", 1, PAGE, PAGE, max_model_len=512, max_batch=4)
_HEARTBEAT_S = 0.1


@dataclass
class _Replica:
    generation: int
    state: ReplicaState = "cold"
    puller: Puller | None = None
    settings: str = ""


@dataclass
class ScriptedGpu:
    """Room for one model and a half. Answers what is queued for a resident model at once.

    ``is_stuck``: swap-ins begin and pull nothing, until they are called off.
    """

    bus: Bus
    is_stuck: bool = False
    commands: Log = field(default_factory=Log)
    messages: list[Message[Command]] = field(default_factory=list)
    replicas: dict[str, _Replica] = field(default_factory=dict)

    async def start(self) -> None:
        await self.bus.subscribe(names.command_subject(GPU), Command, self._on_command)
        await self.bus.flush()
        self._beating = asyncio.create_task(self._beat())

    async def stop(self) -> None:
        self._beating.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._beating
        for replica in self.replicas.values():
            if replica.puller:
                replica.puller.stop()

    def count(self, kind: type[Command], model: str) -> int:
        return len(self.commands.all(kind, model=model))

    async def _beat(self) -> None:
        while True:
            await self._status()
            await asyncio.sleep(_HEARTBEAT_S)

    async def _status(self) -> None:
        replicas = tuple(
            ReplicaStatus(
                model, replica.state, replica.generation, 0, FACTS, settings=replica.settings
            )
            for model, replica in self.replicas.items()
        )
        status = AgentStatus(GPU, "i1", 1, "cpu", "scripted", 3 * PAGE, 0, PAGE, replicas)
        await self.bus.publish(names.status_subject(GPU), status)

    async def _event(self, event: AgentEvent) -> None:
        model = getattr(event, "model", "")
        await self.bus.publish(names.event_subject(kind_of(event), GPU, model), event)

    async def _on_command(self, message: Message[Command]) -> None:
        command, now = message.body, time.time()
        self.messages.append(message)
        replica = self.replicas.setdefault(command.model, _Replica(command.generation))
        replica.generation = command.generation
        where = (GPU, command.model, command.generation, now)
        trace = SwapTrace(started_at=now, total_s=0.001, copy_s=0.001, num_bytes=PAGE)
        match command:
            case Register():
                replica.settings = command.settings
                await self._event(ModelRegistered(*where, FACTS))
            case Load():
                replica.state = "host"
                await self._event(ModelLoaded(*where, PAGE, 0.01))
            case SwapIn():
                replica.state = "swapping_in"
                if not self.is_stuck:
                    replica.puller = Puller(self.bus, command.model, self._on_delivery)
                    await replica.puller.start()
                    await replica.puller.want(4)
                    await self._status()
                    replica.state = "resident"
                    await self._event(SwapInCompleted(*where, trace))
            case SwapOut():
                if replica.state == "swapping_in":
                    await self._event(SwapInCancelled(*where, trace))
                replica.state = "host"
                if replica.puller:
                    replica.puller.stop()
                await self._event(SwapOutCompleted(*where, trace))
            case Unload():
                del self.replicas[command.model]
                await self._event(ModelUnloaded(*where, PAGE))
        await self._status()
        await self.commands.add(command)

    async def _on_delivery(self, delivery: Delivery) -> None:
        request, now = delivery.request, time.time()
        who = (GPU, request.model, request.request_id, now)
        tenant = request.tenant
        await self._event(RequestStarted(*who, attempt=1, queue_wait_s=0.0, tenant=tenant))
        await delivery.ack()
        timing = RequestTiming(decode_s=1.0)
        await self._event(RequestEnded(*who, "stop", 1, 1, timing, tenant=tenant))
