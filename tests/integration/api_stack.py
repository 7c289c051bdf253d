"""One api over real HTTP and a real nats-server, with a scripted scheduler and agent around it."""

import asyncio
import contextlib
import json
import ssl
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

    def __init__(
        self, nats: NatsServer, url: str, key: str = "", verify: ssl.SSLContext | bool = True
    ) -> None:
        self.nats = nats
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.AsyncClient(base_url=url, timeout=20, headers=headers, verify=verify)
        base_url = f"{url}/v1"
        self.openai = openai.AsyncOpenAI(base_url=base_url, api_key=key or "none", max_retries=0)
        self.withdrawals = Withdrawals()
        self.stop = asyncio.Event()
        self.running: asyncio.Task[None]
        self.agent: ScriptedAgent
        self.scheduler: ScriptedScheduler
        self.queue: WorkQueue
        self.proxy = TcpProxy(nats.credentials["api"].url)
        self.bus_url = nats.credentials["api"].url
        self.settings: Settings

    def start_api(self) -> None:
        options = msgspec.structs.replace(self.nats.credentials["api"], url=self.bus_url)
        self.running = asyncio.create_task(service.run(self.settings, options, stop=self.stop))

    async def restart_api(self) -> None:
        """Let it end, and start another one in its place."""
        self.stop.set()
        await asyncio.wait_for(self.running, 20)
        self.stop.clear()
        self.start_api()

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
    key: str = "",
    verify: ssl.SSLContext | bool = True,
    *,
    through_proxy: bool = False,
    **settings: Any,
) -> AsyncIterator[Stack]:
    """``key``: an API key that clients send; ``verify``: how they check the server's certificate;
    ``through_proxy``: so that `Stack.api_cut_off` can be called; ``settings``: more of
    `ApiSettings`.
    """
    port = free_port(0)
    limits: dict[str, Any] = {
        "max_queued_per_model": MAX_QUEUED,
        "max_body_bytes": 100_000,
        "progress_after_s": 0.0,
        "max_file_bytes": 20_000_000,
    }
    api = ApiSettings(port=port, request_timeout_s=timeout_s, **limits | settings)
    scheme = "https" if api.tls_cert else "http"
    stack = Stack(nats, f"{scheme}://127.0.0.1:{port}", key, verify)
    buses = {
        user: await Bus.connect(nats.credentials[user], service=user)
        for user in ("admin", "scheduler", "agent")
    }
    await declare(buses["admin"], MAX_QUEUED)
    stack.queue = WorkQueue(buses["admin"])
    await stack.withdrawals.start(buses["admin"])
    stack.scheduler = ScriptedScheduler(buses["scheduler"])
    stack.agent = ScriptedAgent(buses["agent"])
    if through_proxy:
        await stack.proxy.start()
        stack.bus_url = stack.proxy.url
    stack.settings = Settings(state_dir=str(nats.folder / "state"), api=api)
    stack.start_api()
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
