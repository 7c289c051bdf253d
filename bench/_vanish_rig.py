"""What `bench.vanish` runs against one api process: clients that can vanish, and a fake agent."""

import asyncio
import contextlib
import json
import socket
import struct
import time
import urllib.request
from dataclasses import dataclass, field

import psutil

from schemas import names
from schemas.requests import CancelRequest
from schemas.state import (
    DeploymentRecord,
    LeaseRecord,
    ModelFacts,
    ModelSpec,
    ReplicaState,
    ResidencyRecord,
)
from schemas.stream import Finished, RequestTiming, Started, Tokens
from services.bus import Bucket, Bus, Delivery, Message, Puller

MODEL = "m"
GPU = "gpu0"
TEXT = " word"
FACTS = ModelFacts("Fake", "float32", 1, 4096, 4096, max_model_len=4096, max_batch=2000)
_STILL_HERE_S = 2.0  # the queue delivers again what nobody has claimed for 5 s


@dataclass
class Row:
    """One request at the agent."""

    delivery: Delivery
    num_tokens: int = 0


@dataclass
class Agent:
    """Decodes every open request by one token per step, until its length or a cancellation."""

    bus: Bus
    step_s: float
    rows: dict[str, Row] = field(default_factory=dict)
    cancelled_at: dict[str, float] = field(default_factory=dict)
    tokens_after: dict[str, int] = field(default_factory=dict)  # sent since, for those who left
    length: int | None = None  # of all answers; None: they go on
    num_steps: int = 0
    text: str = TEXT  # of each token

    async def start(self) -> None:
        """Tell the api that there is a leader and an agent with the model, and serve."""
        leases = Bucket(self.bus, names.BUCKET_LEASES, LeaseRecord)
        await leases.put(names.LEADER_KEY, LeaseRecord("bench", 1))
        await leases.put(names.agent_lease_key(GPU), LeaseRecord("bench"))
        spec = ModelSpec(MODEL, "/nowhere")
        models = Bucket(self.bus, names.BUCKET_MODELS, DeploymentRecord)
        await models.put(MODEL, DeploymentRecord(spec, "ready", facts=FACTS))
        state: ReplicaState = "resident"
        residency = Bucket(self.bus, names.BUCKET_RESIDENCY, ResidencyRecord)
        record = ResidencyRecord(GPU, MODEL, state, 1, time.time())
        await residency.put(names.replica_key(GPU, MODEL), record)
        await self.bus.subscribe(names.cancel_subject(), CancelRequest, self._on_cancel)
        self._puller = Puller(self.bus, MODEL, self._on_delivery)
        await self._puller.start()
        await self._puller.want(FACTS.max_batch)
        self._stepping = asyncio.create_task(self._run())

    async def stop(self) -> None:
        self._puller.stop()
        self._stepping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._stepping

    async def _on_delivery(self, delivery: Delivery) -> None:
        request_id = delivery.request.request_id
        if request_id not in self.rows:
            self.rows[request_id] = Row(delivery)
            await self._say(delivery, Started(request_id, GPU, delivery.num_delivered, "warm"))
        await self._puller.want(FACTS.max_batch)

    async def _on_cancel(self, message: Message[CancelRequest]) -> None:
        row = self.rows.pop(message.body.request_id, None)
        if row:
            self.cancelled_at[message.body.request_id] = time.monotonic()
            await row.delivery.ack()

    async def _run(self) -> None:
        claimed_at = time.monotonic()
        while True:
            began_at = time.monotonic()
            claim = began_at - claimed_at > _STILL_HERE_S
            claimed_at = began_at if claim else claimed_at
            for number, (request_id, row) in enumerate(list(self.rows.items())):
                if request_id in self.rows:  # not cancelled in the meantime
                    await self._step(request_id, row)
                if claim:
                    await row.delivery.in_progress()
                if number % 20 == 0:
                    await asyncio.sleep(0)  # cancellations are heard in the middle of a step, too
            self.num_steps += 1
            await asyncio.sleep(max(0.0, self.step_s - (time.monotonic() - began_at)))

    async def _step(self, request_id: str, row: Row) -> None:
        to = row.delivery
        if self.length is not None and row.num_tokens >= self.length:
            del self.rows[request_id]
            end = (row.num_tokens, RequestTiming())
            await self._say(to, Finished(request_id, to.num_delivered, "length", 7, *end))
            await to.ack()
            return
        index = row.num_tokens
        await self._say(to, Tokens(request_id, to.num_delivered, index, (100 + index,), self.text))
        row.num_tokens += 1
        if request_id in self.tokens_after:
            self.tokens_after[request_id] += 1

    async def _say(self, to: Delivery, chunk: Started | Tokens | Finished) -> None:
        await self.bus.publish(to.request.reply_to, chunk)


class Client:
    """One streaming completion over a socket of its own."""

    def __init__(self, port: int, key: str, window: int = 0) -> None:
        """``window``: bytes that its machine takes for it while it does not read; 0: as usual."""
        self._port = port
        self._window = window
        self._key = key
        self.request_id = ""
        self.text = ""
        self.is_done = False

    async def begin(self) -> None:
        """Ask, and read up to the first token. AssertionError for any answer but a stream."""
        own = socket.socket()
        if self._window:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._window)
        own.setblocking(False)
        await asyncio.get_running_loop().sock_connect(own, ("127.0.0.1", self._port))
        limit = self._window or 65536
        self._reader, self._writer = await asyncio.open_connection(sock=own, limit=limit)
        body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 1000, "stream": True})
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {self._key}\r\n"
        )
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self._writer.write((head + body).encode())
        answer = (await self._reader.readuntil(b"\r\n\r\n")).decode()
        assert answer.startswith("HTTP/1.1 200"), answer
        headers = dict(line.split(": ", 1) for line in answer.splitlines()[1:] if line)
        self.request_id = headers["x-request-id"]
        while TEXT not in self.text:
            await self._read()

    async def finish(self) -> None:
        """Read to the end, and leave."""
        while not self.is_done:
            await self._read()
        self._writer.close()
        await self._writer.wait_closed()

    def vanish(self) -> None:
        """Gone without a word: a reset in mid-stream."""
        own: socket.socket = self._writer.get_extra_info("socket")
        own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    async def _read(self) -> None:
        size = int(await self._reader.readline(), 16)  # a chunk of the transfer coding
        data = await self._reader.readexactly(size + 2)
        for line in data.decode().split("\n\n"):
            event = line.strip().removeprefix("data: ")
            if event == "[DONE]":
                self.is_done = True
            elif event:
                choices = json.loads(event)["choices"]
                self.text += "".join(choice["text"] for choice in choices)
        if size == 0:
            assert self.is_done, "the stream ended without [DONE]"


@dataclass(frozen=True)
class Held:
    """What the api process holds."""

    rss: int  # bytes
    num_fds: int
    num_subscriptions: int  # of its NATS connection: inboxes, watches
    num_pending: int  # bytes that NATS has for it
    num_requests: int  # in the queue, all of them its own


async def held(bus: Bus, process: psutil.Process, http_port: int) -> Held:
    url = f"http://127.0.0.1:{http_port}/connz?subs=1"

    def ask() -> list[dict[str, object]]:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return list(json.load(answer)["connections"])

    connections = await asyncio.to_thread(ask)
    [api] = [one for one in connections if one.get("name") == "hotswap-api"]
    info = await bus.jetstream(f"STREAM.INFO.{names.STREAM_REQUESTS}")
    return Held(
        rss=process.memory_info().rss,
        num_fds=process.num_fds(),
        num_subscriptions=int(str(api["subscriptions"])),
        num_pending=int(str(api["pending_bytes"])),
        num_requests=int(info["state"]["messages"]),
    )
