"""What `bench.api` runs: a nats-server, the api as a process, a null agent and a bare server."""

import asyncio
import contextlib
import resource
import secrets
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator

import psutil

from bench._api_agent import DIRECT, MODEL
from bench._api_client import Connection
from bench._scheduler_rig import Rig, open_rig
from schemas.requests import ChatMessage, ChatPrompt, GenerateRequest, SamplingParams
from schemas.stream import Chunk, Tokens
from services.bus import Bus, Message
from services.ops.nats_server import free_port
from services.settings import ApiSettings, Settings

PATH = "/v1/chat/completions"
MAX_QUEUED = 4096
PATIENCE_S = 120.0


def chat(what: str, num_tokens: int) -> dict[str, object]:
    """The body of a request. ``what``: see `bench._api_agent`."""
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": what}],
        "max_tokens": num_tokens,
        "stream": True,
    }


class ApiRig:
    """Everything that runs, and one measurement of each kind."""

    def __init__(self, rig: Rig, bus: Bus, port: int) -> None:
        self._rig = rig
        self._bus = bus
        self._port = port
        self._bare_port = 0
        self._inbox = bus.new_inbox("bench")
        self._tokens: asyncio.Queue[float] = asyncio.Queue()
        self._idle: list[Connection] = []
        self._one: Connection
        self._api: psutil.Process
        self._streams: list[Connection] = []
        self._bare_streams: list[Connection] = []
        self.processes: list[Process] = []

    async def start(self, num_streams: int, num_tokens: int) -> None:
        """Start all processes, and open the connections."""
        agent = await self._python("_api_agent", str(self._rig.plan.credential_files["admin"]))
        await _line(agent)
        api = ApiSettings(port=self._port, max_queued_per_model=MAX_QUEUED)
        service = await self._rig.start("api", Settings(api=api))
        self._api = psutil.Process(service.pid)
        await service.says("listening on")
        await self._bus.subscribe(f"{self._inbox}.*", Chunk, self._on_chunk)
        await self._bus.flush()
        self._one = Connection(self._port)
        self._streams = [Connection(self._port) for _ in range(num_streams)]
        await self._one.connect()
        # The bare server says what the api said.
        self._one.send(PATH, chat("now", num_tokens))
        await self._one.end()
        events = self._rig.folder / "events"
        events.write_bytes(self._one.events())
        bare = await self._python("_api_bare", str(events))
        self._bare_port = int(await _line(bare))
        self._bare_streams = [Connection(self._bare_port) for _ in range(num_streams)]

    async def _python(self, module: str, *args: str) -> Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", f"bench.{module}", *args, stdout=PIPE
        )
        self.processes.append(process)
        return process

    async def end(self) -> None:
        for connection in (*self._idle, *self._streams, *self._bare_streams):
            connection.close()
        for process in self.processes:
            process.terminate()
            await process.wait()

    # -- time to first token ---------------------------------------------------------------

    async def through_api(self) -> float:
        """Seconds from the first byte of an HTTP request to the first token of its answer."""
        await self._one.connect()
        began = time.perf_counter()
        self._one.send(PATH, chat("now", 8))
        took_s = await self._one.first_token() - began
        await self._one.end()
        return took_s

    async def direct(self) -> float:
        """The same request, already parsed, published to the agent's own subject: no HTTP, no api,
        no queue. Seconds until its first token has come and is decoded.
        """
        now = time.time()
        name = secrets.token_hex(16)
        request = GenerateRequest(
            request_id=name,
            model=MODEL,
            klass="interactive",
            prompt=ChatPrompt((ChatMessage("user", "now"),)),
            sampling=SamplingParams(seed=1, max_tokens=8),
            reply_to=f"{self._inbox}.{name}",
            created_at=now,
            deadline_at=now + 60,
        )
        began = time.perf_counter()
        await self._bus.publish(DIRECT, request)
        took_s = await self._tokens.get() - began
        for _ in range(7):
            await self._tokens.get()
        return took_s

    async def _on_chunk(self, message: Message[Chunk]) -> None:
        if isinstance(message.body, Tokens):
            self._tokens.put_nowait(time.perf_counter())

    # -- idle streams ----------------------------------------------------------------------

    async def open_idle(self, num_streams: int) -> None:
        """That many streams that have said their first word and then say nothing."""
        for _ in range(num_streams // 50):
            some = [Connection(self._port) for _ in range(50)]
            for connection in some:
                await connection.connect()
                connection.send(PATH, chat("idle", 4096))
            for connection in some:
                await connection.first_token()
            self._idle += some

    async def close_idle(self) -> None:
        """Their clients leave; done when the api has no connection of theirs any more."""
        for connection in self._idle:
            connection.close()
        self._idle = []
        async with asyncio.timeout(PATIENCE_S):
            while self._num_connections() > len(self._streams) + 1:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        for _ in range(20):
            await self.through_api()

    def _num_connections(self) -> int:
        found = self._api.net_connections("tcp")
        return sum(one.laddr.port == self._port and one.status == "ESTABLISHED" for one in found)

    # -- tokens per second -----------------------------------------------------------------

    async def stream_api(self, num_tokens: int) -> float:
        """Tokens per second over all streams, through queue, agent, bus and api."""
        for connection in self._streams:
            await connection.connect()
        for connection in self._streams:
            connection.send(PATH, chat(f"gate {len(self._streams)}", num_tokens))
        return await self._rate(self._streams, num_tokens)

    async def stream_bare(self, num_tokens: int) -> float:
        """Events with a token per second over all streams, from the bare server."""
        for connection in self._bare_streams:
            await connection.connect()
        for connection in self._bare_streams:
            connection.send(f"/?{len(self._bare_streams)}", {})
        return await self._rate(self._bare_streams, num_tokens)

    async def _rate(self, streams: list[Connection], num_tokens: int) -> float:
        async with asyncio.timeout(PATIENCE_S):
            ends = [await connection.end() for connection in streams]
        began = min(connection.first_at for connection in streams)
        for connection in streams:
            found = connection.events().count(b'"content":" token"')
            assert found == num_tokens, f"{found} tokens of {num_tokens} came"
        return len(streams) * num_tokens / (max(ends) - began)

    def api_cpu_s(self) -> float:
        """Processor time that the api has used."""
        times = self._api.cpu_times()
        return float(times.user + times.system)


async def _line(process: Process) -> str:
    assert process.stdout
    async with asyncio.timeout(PATIENCE_S):
        line = await process.stdout.readline()
    assert line, "a process of the benchmark did not start"
    return line.decode()


@contextlib.asynccontextmanager
async def open_api_rig(num_streams: int, num_tokens: int) -> AsyncIterator[ApiRig]:
    """Start it all, and stop it in the end."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a file per open stream
    async with open_rig(MAX_QUEUED) as rig:
        api = ApiRig(rig, rig.bus, free_port(0))
        try:
            await api.start(num_streams, num_tokens)
            yield api
        finally:
            await api.end()
