"""A scheduler's records and a GPU agent that speak the bus, with answers that tests write."""

import asyncio
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from schemas import names
from schemas.events import LoadProgressed, RequestWithdrawn
from schemas.requests import CancelRequest, EmbedRequest, GenerateRequest
from schemas.state import (
    DeploymentRecord,
    LeaseRecord,
    ModelFacts,
    ModelSpec,
    PredictedWait,
    ReplicaState,
    ResidencyRecord,
    SwapTrace,
)
from schemas.stream import (
    ErrorCode,
    Failed,
    Finished,
    FinishReason,
    PromptTold,
    RequestTiming,
    Started,
    StartKind,
    TokenLogprobs,
    Tokens,
    Vectors,
)
from services.bus import Bucket, Bus, Delivery, Message, Puller

GPU = "gpu0"
FACTS = ModelFacts(
    architecture="LlamaForCausalLM",
    dtype="float32",
    num_parameters=1000,
    weight_bytes=4096,
    kv_bytes=2048,
    max_model_len=512,
    max_batch=8,
)


class ScriptedScheduler:
    """Writes deployments and the leader's lease, and predicts waits."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._models = Bucket(bus, names.BUCKET_MODELS, DeploymentRecord)
        self._leases = Bucket(bus, names.BUCKET_LEASES, LeaseRecord)

    async def lead(self) -> None:
        await self._leases.put(names.LEADER_KEY, LeaseRecord(holder="test", epoch=1))

    async def deploy(self, model: str, facts: ModelFacts = FACTS) -> None:
        spec = ModelSpec(name=model, source="/models/x")
        record = DeploymentRecord(spec=spec, status="ready", facts=facts, created_at=1_767_225_600)
        await self._models.put(names.escape(model), record)

    async def fail(self, model: str, reason: str) -> None:
        spec = ModelSpec(name=model, source="/models/x")
        record = DeploymentRecord(spec=spec, status="failed", reason=reason)
        await self._models.put(names.escape(model), record)

    async def predict(self, model: str, wait_s: float, place: int = 1) -> None:
        wait = PredictedWait(model, time.time(), wait_s, 1, 0, time.time(), place)
        await self._bus.publish(names.wait_subject(model), wait)
        await self._bus.flush()

    async def remove(self, model: str) -> None:
        await self._models.delete(names.escape(model))


@dataclass
class GenerateDelivery(Delivery):
    """One that holds a request to generate."""

    request: GenerateRequest


@dataclass
class ScriptedAgent:
    """Holds models, collects what the api sends, and answers as it is told."""

    bus: Bus
    deliveries: "asyncio.Queue[Delivery]" = field(default_factory=asyncio.Queue)
    cancels: "asyncio.Queue[CancelRequest]" = field(default_factory=asyncio.Queue)
    pullers: dict[str, Puller] = field(default_factory=dict)

    async def start(self) -> None:
        leases = Bucket(self.bus, names.BUCKET_LEASES, LeaseRecord)
        await leases.put(names.agent_lease_key(GPU), LeaseRecord(holder="test"))

        async def on_cancel(message: Message[CancelRequest]) -> None:
            self.cancels.put_nowait(message.body)

        await self.bus.subscribe(names.cancel_subject(), CancelRequest, on_cancel)
        await self.bus.flush()

    async def hold(self, model: str, state: ReplicaState = "resident") -> None:
        residency = Bucket(self.bus, names.BUCKET_RESIDENCY, ResidencyRecord)
        record = ResidencyRecord(GPU, model, state, generation=1, changed_at=time.time())
        await residency.put(names.replica_key(GPU, model), record)

    async def loads(self, model: str, done_bytes: int, total_bytes: int) -> None:
        event = LoadProgressed(GPU, model, time.time(), done_bytes, total_bytes)
        await self.bus.publish(names.event_subject("load_progressed", GPU, model), event)

    async def pull(
        self, model: str, num_free: int = 8, klass: names.RequestClass = "interactive"
    ) -> None:
        puller = Puller(self.bus, model, self.deliveries.put, klass)
        self.pullers[f"{klass}.{model}"] = puller
        await puller.start()
        await puller.want(num_free)

    async def next(self) -> GenerateDelivery:
        delivery = await asyncio.wait_for(self.deliveries.get(), 10)
        assert isinstance(delivery.request, GenerateRequest)
        return cast(GenerateDelivery, delivery)

    async def next_embed(self) -> tuple[Delivery, EmbedRequest]:
        delivery = await asyncio.wait_for(self.deliveries.get(), 10)
        assert isinstance(delivery.request, EmbedRequest)
        return delivery, delivery.request

    async def next_cancel(self) -> CancelRequest:
        return await asyncio.wait_for(self.cancels.get(), 10)

    def stop(self) -> None:
        for puller in self.pullers.values():
            puller.stop()
            if lingering := getattr(puller, "_lingering", None):
                lingering.cancel()

    # -- answers ---------------------------------------------------------------------------

    async def started(
        self, to: Delivery, start: StartKind = "warm", swap: SwapTrace | None = None
    ) -> None:
        chunk = Started(to.request.request_id, GPU, to.num_delivered, start, swap)
        await self.bus.publish(to.request.reply_to, chunk)

    async def answer_begins(self, to: Delivery, *texts: str) -> None:
        """Started and tokens, flushed: the server has passed them on when this returns."""
        await self.started(to)
        await self.tokens(to, *texts)
        await self.bus.flush()

    async def tokens(
        self,
        to: Delivery,
        *texts: str,
        index: int = 0,
        first_id: int = 100,
        logprobs: Sequence[TokenLogprobs] = (),
        prompt: PromptTold | None = None,
    ) -> None:
        """One chunk per text; token ids follow from the position. The first tells ``prompt``."""
        for i, text in enumerate(texts, start=index):
            chunk = Tokens(
                to.request.request_id,
                to.num_delivered,
                i,
                (first_id + i,),
                text,
                tuple(logprobs[i - index : i - index + 1]),
                prompt if i == 0 else None,
            )
            await self.bus.publish(to.request.reply_to, chunk)

    async def finished(
        self,
        to: Delivery,
        num_tokens: int,
        reason: FinishReason = "stop",
        text: str = "",
        cached_tokens: int = 0,
    ) -> None:
        chunk = Finished(
            request_id=to.request.request_id,
            attempt=to.num_delivered,
            finish_reason=reason,
            prompt_tokens=7,
            completion_tokens=num_tokens,
            timing=RequestTiming(),
            text=text,
            cached_tokens=cached_tokens,
        )
        await self.bus.publish(to.request.reply_to, chunk)
        await to.ack()

    async def failed(self, to: Delivery, code: ErrorCode, message: str) -> None:
        chunk = Failed(to.request.request_id, to.num_delivered, code, message)
        await self.bus.publish(to.request.reply_to, chunk)
        await to.ack()

    async def vectors(self, to: Delivery, *vectors: tuple[float, ...], index: int = 0) -> None:
        """One chunk with all of ``vectors``."""
        data = b"".join(struct.pack(f"<{len(one)}f", *one) for one in vectors)
        name, attempt = to.request.request_id, to.num_delivered
        await self.bus.publish(
            to.request.reply_to, Vectors(name, attempt, index, len(vectors[0]), data)
        )

    async def answer(self, to: Delivery, *texts: str, rest: str = "") -> None:
        """A whole answer."""
        await self.started(to)
        await self.tokens(to, *texts)
        await self.finished(to, len(texts), text=rest)


class Withdrawals:
    """RequestWithdrawn events, as an operator would see them."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[RequestWithdrawn] = asyncio.Queue()

    async def start(self, bus: Bus) -> None:
        async def on_event(message: Message[RequestWithdrawn]) -> None:
            self._queue.put_nowait(message.body)

        subject = f"{names.PREFIX}.events.request_withdrawn.>"
        await bus.subscribe(subject, RequestWithdrawn, on_event)
        await bus.flush()

    async def next(self) -> RequestWithdrawn:
        return await asyncio.wait_for(self._queue.get(), 10)

    def is_empty(self) -> bool:
        return self._queue.empty()
