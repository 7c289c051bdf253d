"""A GPU agent without a GPU: `python -m bench._api_agent CREDENTIALS`, one process of `bench.api`.

It pulls requests from the real queue and answers with ready-made tokens, one message per token and
stream, as a real agent's control process sends them. What a request asks for is the first word of
its last message:

    now     Started, `max_tokens` tokens, Finished, at once
    gate N  likewise, but held back until N such requests are here; then a token for each in turns
    idle    Started and one token; the rest never comes

The same answers are given to requests that are published to DIRECT, past the api and the queue.
"""

import asyncio
import sys
import time
from pathlib import Path

import msgspec

from schemas import names
from schemas.requests import CancelRequest, ChatPrompt, GenerateRequest
from schemas.state import DeploymentRecord, LeaseRecord, ModelFacts, ModelSpec, ResidencyRecord
from schemas.stream import Finished, RequestTiming, Started, Tokens
from services.bus import Bucket, Bus, BusOptions, Delivery, Message, Puller, declare

MODEL = "bench/null"
GPU = "null0"
DIRECT = "bench.api.direct"
TEXT = " token"
MAX_OPEN = 2048
MAX_TOKENS = 4096  # where a request names none
KEEP_ALIVE_S = 2.0  # as a real agent: the queue delivers again what is silent for longer
_SLICES = 20

FACTS = ModelFacts(
    architecture="Null",
    dtype="float32",
    num_parameters=1,
    weight_bytes=4096,
    kv_bytes=4096,
    max_model_len=1 << 20,
    max_batch=MAX_OPEN,
)


class NullAgent:
    """Holds MODEL, pulls its requests, and answers each at once."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._idle: dict[str, Delivery] = {}
        self._gated: list[tuple[GenerateRequest, Delivery]] = []
        self._puller = Puller(bus, MODEL, self._on_delivery)
        self._beating: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Write the records that the api looks for, and pull."""
        await declare(self._bus)
        leases = Bucket(self._bus, names.BUCKET_LEASES, LeaseRecord)
        for key in (names.LEADER_KEY, names.agent_lease_key(GPU)):
            await leases.put(key, LeaseRecord(holder="bench", epoch=1))
        spec = ModelSpec(name=MODEL, source="/none")
        deployment = DeploymentRecord(spec, "ready", facts=FACTS, created_at=int(time.time()))
        deployments = Bucket(self._bus, names.BUCKET_MODELS, DeploymentRecord)
        await deployments.put(names.escape(MODEL), deployment)
        residency = Bucket(self._bus, names.BUCKET_RESIDENCY, ResidencyRecord)
        here = ResidencyRecord(GPU, MODEL, "resident", generation=1, changed_at=time.time())
        await residency.put(names.replica_key(GPU, MODEL), here)
        await self._bus.subscribe(names.cancel_subject(), CancelRequest, self._on_cancel)
        await self._bus.subscribe(DIRECT, GenerateRequest, self._on_direct)
        await self._puller.start()
        await self._puller.want(MAX_OPEN)
        await self._bus.flush()
        self._beating = asyncio.create_task(self._keep_alive())

    async def _on_direct(self, message: Message[GenerateRequest]) -> None:
        await self._answer(message.body, 1)

    async def _on_cancel(self, message: Message[CancelRequest]) -> None:
        if delivery := self._idle.pop(message.body.request_id, None):
            await delivery.ack()

    async def _on_delivery(self, delivery: Delivery) -> None:
        await self._puller.want(MAX_OPEN)
        request = delivery.request
        assert isinstance(request, GenerateRequest)
        match _words(request):
            case ["idle", *_]:
                self._idle[request.request_id] = delivery
                await self._begin(request, delivery.num_delivered)
            case ["gate", count]:
                self._gated.append((request, delivery))
                if len(self._gated) == int(count):
                    gated, self._gated = self._gated, []
                    await self._answer_all(gated)
            case _:
                await self._answer(request, delivery.num_delivered)
                await delivery.ack()

    async def _begin(self, request: GenerateRequest, attempt: int) -> None:
        reply_to = request.reply_to
        await self._bus.publish(reply_to, Started(request.request_id, GPU, attempt, "warm"))
        await self._bus.publish(reply_to, _token(request, attempt, 0))

    async def _answer(self, request: GenerateRequest, attempt: int) -> None:
        await self._begin(request, attempt)
        for index in range(1, _num_tokens(request)):
            await self._bus.publish(request.reply_to, _token(request, attempt, index))
        await self._bus.publish(request.reply_to, _finished(request, attempt))

    async def _answer_all(self, gated: list[tuple[GenerateRequest, Delivery]]) -> None:
        """A token for each of them, then the next one for each, as fast as the server takes them.

        The messages are made before the first leaves, so that making them costs no time then.
        """
        options = self._bus.options
        host, port = options.url.removeprefix("nats://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        login = f'"user":"{options.user}","pass":"{options.password}","verbose":false'
        writer.write(f"CONNECT {{{login}}}\r\nPING\r\n".encode())
        await reader.readuntil(b"PONG\r\n")
        steps = max(_num_tokens(request) for request, _ in gated)
        attempts = [(request, delivery.num_delivered) for request, delivery in gated]
        blocks = [b"".join(_pub(r, Started(r.request_id, GPU, a, "warm")) for r, a in attempts)]
        blocks += [
            b"".join(_pub(r, _token(r, a, i)) for r, a in attempts if i < _num_tokens(r))
            for i in range(steps)
        ]
        blocks.append(b"".join(_pub(r, _finished(r, a)) for r, a in attempts))
        for block in blocks:
            writer.write(block)
            await writer.drain()
        writer.write(b"PING\r\n")
        await reader.readuntil(b"PONG\r\n")
        writer.close()
        for _, delivery in gated:
            await delivery.ack()

    async def _keep_alive(self) -> None:
        turn = 0
        while True:
            await asyncio.sleep(KEEP_ALIVE_S / _SLICES)
            turn = (turn + 1) % _SLICES
            for delivery in list(self._idle.values())[turn::_SLICES]:
                await delivery.in_progress()


def _words(request: GenerateRequest) -> list[str]:
    assert isinstance(request.prompt, ChatPrompt)
    return request.prompt.messages[-1].content.split()


def _num_tokens(request: GenerateRequest) -> int:
    return request.sampling.max_tokens or MAX_TOKENS


def _token(request: GenerateRequest, attempt: int, index: int) -> Tokens:
    return Tokens(request.request_id, attempt, index, (1000 + index,), TEXT)


def _finished(request: GenerateRequest, attempt: int) -> Finished:
    return Finished(request.request_id, attempt, "length", 8, _num_tokens(request), RequestTiming())


def _pub(request: GenerateRequest, chunk: msgspec.Struct) -> bytes:
    """One message as the protocol has it, with a subject for "no responders" as a real agent's."""
    body = msgspec.json.encode(chunk)
    gone = f"_INBOX_bench.gone.{request.request_id}"
    return f"PUB {request.reply_to} {gone} {len(body)}\r\n".encode() + body + b"\r\n"


async def _serve(credentials: Path) -> None:
    bus = await Bus.connect(BusOptions.read(credentials), service="agent")
    agent = NullAgent(bus)
    await agent.start()
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(Path(sys.argv[1])))
