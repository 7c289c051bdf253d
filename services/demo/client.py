"""The demo's two eyes: an HTTP client that times tokens, and a bus subscriber that sees swaps."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Literal

import httpx
import msgspec

from schemas import names
from schemas.events import (
    Event,
    ModelLoaded,
    RequestEnded,
    SwapInCompleted,
    WorkerDied,
)
from schemas.state import AgentStatus
from services.bus import Bus, Message
from services.ops.stack import Endpoints, StackError

_PATIENCE_S = 120.0


class Measurement(msgspec.Struct, frozen=True):
    """One request as its client saw it, with what the bus said about it. Times in seconds."""

    scenario: Literal["cold", "switch", "warm"]
    model: str
    prompt_tokens: int
    start: str  # how the server says it was served: cold, switch or warm
    ttft_s: float  # request sent -> first token's chunk
    ready_s: float  # request sent -> model resident; 0 when it was
    load_s: float  # disk -> host image, within ready_s
    prefill_s: float
    num_bytes: int
    copy_s: float
    gb_per_s: float
    text: str


class DemoClient:
    """``async with DemoClient(endpoints) as client``."""

    def __init__(self, endpoints: Endpoints) -> None:
        self._endpoints = endpoints
        self._http = httpx.AsyncClient(base_url=endpoints.api_url, timeout=_PATIENCE_S)
        self._events: list[Event] = []
        self._news = asyncio.Condition()
        self._worker_pid = 0

    async def __aenter__(self) -> "DemoClient":
        self._bus = await Bus.connect(self._endpoints.options("admin"), service="demo")
        await self._bus.subscribe(names.events_subject(), Event, self._on_event)
        await self._bus.subscribe(names.status_subject(), AgentStatus, self._on_status)
        await self._bus.flush()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()
        await self._bus.close()

    async def _on_event(self, message: Message[Event]) -> None:
        async with self._news:
            self._events.append(message.body)
            self._news.notify_all()

    async def _on_status(self, message: Message[AgentStatus]) -> None:
        async with self._news:
            self._worker_pid = message.body.worker_pid
            self._news.notify_all()

    async def _wait(self, what: str, done: Callable[[], bool]) -> None:
        async with self._news:
            try:
                await asyncio.wait_for(self._news.wait_for(done), _PATIENCE_S)
            except TimeoutError:
                raise StackError(f"waited {_PATIENCE_S:g} s for {what}; see the logs") from None

    async def wait_registered(self, models: list[str]) -> None:
        """Until an agent has looked at every model (it may have done so before we listened)."""
        while True:
            listed = (await self._http.get("/v1/models")).json()["data"]
            status = {entry["id"]: entry["hotswap"] for entry in listed}
            failed = [m for m in models if status.get(m, {}).get("status") == "failed"]
            if failed:
                raise StackError(f"model {failed[0]} failed: {status[failed[0]]['reason']}")
            if all(status.get(m, {}).get("status") == "ready" for m in models):
                return
            await asyncio.sleep(0.1)

    async def kill_worker(self, kill: Callable[[int], None]) -> None:
        """Kill the engine worker, and return when the agent has noticed."""
        await self._wait("an engine worker", lambda: self._worker_pid != 0)
        mark = len(self._events)
        kill(self._worker_pid)
        self._worker_pid = 0

        def died() -> bool:
            return any(isinstance(event, WorkerDied) for event in self._events[mark:])

        await self._wait("the worker's death", died)

    async def complete(self, model: str, prompt: str, max_tokens: int) -> None:
        """One request that nobody measures. Raises StackError where it fails."""
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        response = await self._http.post("/v1/completions", json=body)
        if response.status_code != 200:
            raise StackError(f"{model}: HTTP {response.status_code}: {response.text}")

    async def measure(
        self,
        scenario: Literal["cold", "switch", "warm"],
        model: str,
        prompt_tokens: int,
        prompt: str,
        max_tokens: int,
    ) -> Measurement:
        """Stream one greedy completion and time its first token."""
        mark = len(self._events)
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
        sent_at, began = time.time(), time.perf_counter()
        ttft_s, text, start = 0.0, "", ""
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                words = (await response.aread()).decode(errors="replace")
                raise StackError(f"{model}: HTTP {response.status_code}: {words}")
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line[len("data: ") :])
                if "error" in chunk:
                    raise StackError(f"{model}: {chunk['error']['message']}")
                if chunk["choices"]:
                    ttft_s = ttft_s or time.perf_counter() - began
                    text += chunk["choices"][0]["text"]
                elif "hotswap" in chunk:  # the headers left before a long wait was over
                    start = chunk["hotswap"]["start"]
            request_id = response.headers["x-request-id"]
        ended = await self._ended(request_id, mark)
        if ended.prompt_tokens != prompt_tokens:
            raise StackError(f"{model}: the prompt had {ended.prompt_tokens} tokens")
        mine = [e for e in self._events[mark:] if getattr(e, "model", "") == model]
        loaded = next((e for e in mine if isinstance(e, ModelLoaded)), None)
        swapped = next((e for e in mine if isinstance(e, SwapInCompleted)), None)
        return Measurement(
            scenario=scenario,
            model=model,
            prompt_tokens=prompt_tokens,
            start=start,
            ttft_s=ttft_s,
            ready_s=swapped.at - sent_at if swapped else 0.0,
            load_s=loaded.load_s if loaded else 0.0,
            prefill_s=ended.timing.prefill_s,
            num_bytes=swapped.trace.num_bytes if swapped else 0,
            copy_s=swapped.trace.copy_s if swapped else 0.0,
            gb_per_s=swapped.trace.gb_per_s if swapped else 0.0,
            text=text,
        )

    async def _ended(self, request_id: str, mark: int) -> RequestEnded:
        found: list[RequestEnded] = []

        def look() -> bool:
            found[:] = [
                e
                for e in self._events[mark:]
                if isinstance(e, RequestEnded) and e.request_id == request_id
            ]
            return bool(found)

        await self._wait(f"the end of request {request_id}", look)
        return found[0]
