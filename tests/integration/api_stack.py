"""One api over real HTTP and a real nats-server, with a scripted scheduler and agent around it."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import msgspec
import openai

from services.api import service
from services.bus import Bus, WorkQueue, declare
from services.ops.nats_server import free_port
from services.settings import ApiSettings, Settings
from tests.integration.nats_process import NatsServer
from tests.integration.scripted_agent import ScriptedAgent, ScriptedScheduler, Withdrawals
from tests.integration.tcp_proxy import TcpProxy

MODEL = "Qwen/Qwen2.5-7B"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
MAX_QUEUED = 3


class Stack:
    """One api, its clients, and everything that it talks to."""

    def __init__(self, nats: NatsServer, url: str) -> None:
        self.nats = nats
        self.http = httpx.AsyncClient(base_url=url, timeout=20)
        self.openai = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        self.withdrawals = Withdrawals()
        self.stop = asyncio.Event()
        self.running: asyncio.Task[None]
        self.agent: ScriptedAgent
        self.scheduler: ScriptedScheduler
        self.queue: WorkQueue
        self.proxy = TcpProxy(nats.credentials["api"].url)

    async def ask(self, **more: Any) -> httpx.Response:
        return await self.http.post("/v1/chat/completions", json=CHAT | more)

    async def until(self, condition: Callable[[Any], bool], path: str = "/readyz") -> None:
        """Poll ``path`` until ``condition`` holds for its status and JSON body."""
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    answer = await self.http.get(path)
                    if condition((answer.status_code, answer.json())):
                        return
                await asyncio.sleep(0.02)

    @contextlib.asynccontextmanager
    async def api_cut_off(self) -> AsyncIterator[None]:
        """The api has no connection to the server for a while; all others have."""
        await self.proxy.cut()
        await self.until(lambda got: got[0] == 503)
        yield
        await self.proxy.start()
        await self.until(lambda got: got[0] == 200)

    async def queue_holds(self, num_requests: int) -> None:
        """Wait until that many requests are queued or in flight."""
        async with asyncio.timeout(10):
            while True:
                depths, _ = await self.queue.depths()
                if sum(depths.values()) == num_requests:
                    return
                await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def running_stack(
    nats: NatsServer,
    timeout_s: float,
    progress_after_s: float = 0.0,
    *,
    through_proxy: bool = False,
) -> AsyncIterator[Stack]:
    """``through_proxy``: so that `Stack.api_cut_off` can be called."""
    port = free_port(0)
    api = ApiSettings(
        port=port,
        request_timeout_s=timeout_s,
        max_queued_per_model=MAX_QUEUED,
        max_body_bytes=100_000,
        progress_after_s=progress_after_s,
    )
    stack = Stack(nats, f"http://127.0.0.1:{port}")
    buses = {
        user: await Bus.connect(nats.credentials[user], service=user)
        for user in ("admin", "scheduler", "agent")
    }
    await declare(buses["admin"], MAX_QUEUED)
    stack.queue = WorkQueue(buses["admin"])
    await stack.withdrawals.start(buses["admin"])
    stack.scheduler = ScriptedScheduler(buses["scheduler"])
    stack.agent = ScriptedAgent(buses["agent"])
    options = nats.credentials["api"]
    if through_proxy:
        await stack.proxy.start()
        options = msgspec.structs.replace(options, url=stack.proxy.url)
    stack.running = asyncio.create_task(service.run(Settings(api=api), options, stop=stack.stop))
    await stack.until(lambda got: got[0] == 503)
    await stack.scheduler.lead()
    await stack.agent.start()
    await stack.scheduler.deploy(MODEL)
    await stack.agent.hold(MODEL)
    await stack.until(lambda got: got[0] == 200)
    await stack.until(lambda got: got[1]["data"][0]["hotswap"]["gpus"] != {}, "/v1/models")
    try:
        yield stack
    finally:
        stack.stop.set()
        await stack.http.aclose()
        await stack.openai.close()
        await asyncio.wait_for(stack.running, 20)
        await stack.proxy.cut()
        stack.agent.stop()
        for bus in buses.values():
            await bus.close()


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"]
    return dict(error)


def events_of(body: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]
