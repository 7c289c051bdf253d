"""The whole system on the CPU device, its traffic over HTTP, and all that the bus says meanwhile.

The device copies at `LINK_GB_PER_S` (a setting of the CPU device) and computes with one thread: as
on a GPU, a swap takes longer than a prompt, and the services have a core of their own.
"""

import asyncio
import contextlib
import functools
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import httpx
import msgspec
from transformers import LlamaConfig

from bench._models import write
from bench._scheduler_rig import PATIENCE_S, open_rig
from schemas import names
from schemas.commands import Command
from schemas.events import Event, RequestEnded, SwapInCompleted, SwapOutCompleted
from schemas.state import AgentStatus
from services.bus import Message
from services.demo.models import DemoModel, train_tokenizer
from services.ops.nats_server import free_port
from services.settings import ApiSettings, GpuSettings, ModelSettings, SchedulerSettings, Settings

T = TypeVar("T")

MAX_BATCH = 4
MAX_PROMPT, MAX_OUTPUT = 384, 64  # tokens of a request
KV_TOKENS = MAX_BATCH * (MAX_PROMPT + MAX_OUTPUT)
VOCABULARY = 2048
LINK_GB_PER_S = 0.25
FOOTPRINT_BYTES = 72 * 2**20  # of a model: weights and KV reserve, in whole pages
SCHEDULER = SchedulerSettings()


@functools.cache
def _tokenizer() -> Any:
    return train_tokenizer()


def write_models(folder: Path, num: int) -> dict[str, ModelSettings]:
    """Llamas of about 62 MB, all alike but for their weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    models = {}
    for seed in range(num):
        name = f"m{seed}"
        spec = write(DemoModel(name, seed, config), folder)
        _tokenizer().save_pretrained(Path(spec.source))
        models[name] = ModelSettings(
            source=spec.source, kv_tokens=KV_TOKENS, max_batch=MAX_BATCH, prefix_caching=False
        )
    return models


class Answer(NamedTuple):
    """One request as its client saw it. ``chunks_at``: monotonic seconds; empty: it failed."""

    request_id: str
    sent_at: float
    chunks_at: tuple[float, ...]

    @property
    def ttft_s(self) -> float:
        return self.chunks_at[0] - self.sent_at if self.chunks_at else float("nan")

    @property
    def gaps_s(self) -> list[float]:
        """Between one token and the next."""
        return [b - a for a, b in zip(self.chunks_at, self.chunks_at[1:], strict=False)]


class Heard(NamedTuple):
    """A message of the bus. ``at``: unix seconds, when it came to us."""

    at: float
    body: Any


class Live:
    """A running system."""

    def __init__(self, url: str, models: list[str]) -> None:
        self.models = models
        self.heard: list[Heard] = []
        self.status: AgentStatus | None = None
        self._news = asyncio.Condition()
        self._url = url
        self._rng = random.Random(1)
        # Every answer is this token again and again: text that no client has to wait for.
        (self._says,) = _tokenizer().encode("a", add_special_tokens=False)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = httpx.AsyncClient(timeout=PATIENCE_S, limits=limits)

    async def hear(self, rig: Any) -> None:
        async def on_event(message: Message[Event]) -> None:
            await self._hear(message.body)

        async def on_command(message: Message[Command]) -> None:
            await self._hear(message.body)

        async def on_status(message: Message[AgentStatus]) -> None:
            self.status = message.body

        await rig.bus.subscribe(names.events_subject(), Event, on_event)
        await rig.bus.subscribe(f"{names.PREFIX}.agent.*.command", Command, on_command)
        await rig.bus.subscribe(names.status_subject(), AgentStatus, on_status)
        await rig.bus.flush()

    async def _hear(self, body: Event | Command) -> None:
        async with self._news:
            self.heard.append(Heard(time.time(), body))
            self._news.notify_all()

    async def close(self) -> None:
        await self._client.aclose()

    def resident(self) -> list[str]:
        """Who came and did not leave, the first to come first."""
        there: dict[str, None] = {}
        for _, body in self.heard:
            if isinstance(body, SwapInCompleted):
                there[body.model] = None
            elif isinstance(body, SwapOutCompleted):
                there.pop(body.model, None)
        return list(there)

    async def ask(self, model: str, num_input: int, num_output: int) -> Answer:
        """One streamed completion of a prompt that nobody has sent before."""
        body = {
            "model": model,
            "prompt": [self._rng.randrange(10, VOCABULARY) for _ in range(num_input)],
            "max_tokens": num_output,
            "temperature": 0,
            "ignore_eos": True,
            "logit_bias": {str(self._says): 100},
            "stream": True,
        }
        data = msgspec.json.encode(body)
        headers = {"content-type": "application/json"}
        chunks: list[float] = []
        name = ""
        sent_at = time.monotonic()
        try:
            async with self._client.stream(
                "POST", f"{self._url}/v1/completions", content=data, headers=headers
            ) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: {") and '"text":"a' in line:
                        chunks.append(time.monotonic())
                        name = name or str(msgspec.json.decode(line[6:])["id"])
        except httpx.HTTPError:
            chunks = []
        if len(chunks) != num_output:
            return Answer(name, sent_at, ())
        return Answer(name.removeprefix("cmpl-"), sent_at, tuple(chunks))

    async def ended(self, *answers: Answer) -> None:
        """Until the bus has told the end of these, and so all that they caused."""
        wanted = {answer.request_id for answer in answers if answer.request_id}
        async with asyncio.timeout(PATIENCE_S), self._news:
            await self._news.wait_for(lambda: wanted <= self.ends().keys())

    def of(self, kind: type[T], since: float) -> list[tuple[float, T]]:
        """What of ``kind`` came after ``since`` (unix seconds), with the time."""
        return [(at, body) for at, body in self.heard if at > since and isinstance(body, kind)]

    def ends(self) -> dict[str, RequestEnded]:
        return {b.request_id: b for _, b in self.heard if isinstance(b, RequestEnded)}

    def num_preempted(self, since: float) -> int:
        return sum(out.num_suspended > 0 for _, out in self.of(SwapOutCompleted, since))


@contextlib.asynccontextmanager
async def open_live(models: dict[str, ModelSettings], num_fit: int) -> AsyncIterator[Live]:
    """Start it, with room for ``num_fit`` of ``models`` and a third of one more."""
    async with open_rig() as rig:
        settings = Settings(
            state_dir=str(rig.folder / "state"),
            api=ApiSettings(port=free_port(0)),
            gpus=(
                GpuSettings(
                    name="cpu0",
                    device="cpu",
                    memory=str(num_fit * FOOTPRINT_BYTES + FOOTPRINT_BYTES // 3),
                    threads=1,
                    link_gb_per_s=LINK_GB_PER_S,
                ),
            ),
            scheduler=SCHEDULER,
            models=models,
        )
        live = Live(f"http://127.0.0.1:{settings.api.port}", list(models))
        await live.hear(rig)
        for service in ("scheduler", "agent", "api"):
            await rig.start(service, settings)
        try:
            await _ready(live, f"http://127.0.0.1:{settings.api.port}/readyz")
            yield live
        finally:
            await live.close()


async def _ready(live: Live, url: str) -> None:
    """Until every model is loaded, and has been on the device once: its canary has run."""
    async with asyncio.timeout(PATIENCE_S), httpx.AsyncClient() as client:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get(url)).status_code == 200 and _is_loaded(live):
                    break
            await asyncio.sleep(0.05)
    for model in live.models:
        answer = await live.ask(model, 8, 4)
        if not answer.chunks_at:
            raise AssertionError(f"{model} gives no answer")
        await live.ended(answer)


def _is_loaded(live: Live) -> bool:
    replicas = live.status.replicas if live.status else ()
    loaded = [r for r in replicas if r.state in ("host", "resident")]
    return len(loaded) == len(live.models)
