"""What the engine's tests share: a byte tokenizer, a pool of NaN, requests, and a driver."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from bench import _engine_models
from schemas.requests import GenerateRequest, Prompt, SamplingParams, TokenPrompt
from services.gpu_agent.engine.batch import Batch
from services.gpu_agent.engine.blocks import Blocks
from services.gpu_agent.engine.decode_graph import DecodeGraphs, Recorder
from services.gpu_agent.engine.kv import KVStore
from services.gpu_agent.engine.kv_host import HostBlocks, HostKV
from services.gpu_agent.engine.kv_manager import KVManager
from services.gpu_agent.engine.prompts import ModelText
from services.gpu_agent.ipc import Begun, Broke, Done, FromWorker, Produced
from services.gpu_agent.skeleton import KVGeometry

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'wizard' %}"
    "{{ raise_exception('no wizards here') }}{% endif %}"
    "{{ m['role'] + ':' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per byte, 256 in all, no special ones: every id is part of some text."""
    return _engine_models.byte_tokenizer(chat_template)


def save_tokenizer(folder: Path) -> None:
    byte_tokenizer().save_pretrained(folder)


def model_text(eos_ids: tuple[int, ...] = (), vocab_size: int = 256) -> ModelText:
    return ModelText("tiny", byte_tokenizer(), frozenset(eos_ids), vocab_size)


class FakePool:
    """Pages of any size over plain memory, full of NaN: whatever is read unwritten shows."""

    kind = "cpu"
    device_name = "fake"
    torch_device = torch.device("cpu")

    def __init__(self, page_bytes: int, num_pages: int) -> None:
        self.page_bytes = page_bytes
        self.num_pages = num_pages
        self.memory = torch.full((page_bytes * num_pages // 4,), math.nan)

    def identity(self, dtype: torch.dtype) -> torch.Tensor:
        return self.memory.view(dtype)


def geometry_of(module: Any) -> KVGeometry:
    """What ``module`` caches, from one token through it."""
    cache = module(input_ids=torch.zeros((1, 1), dtype=torch.long), use_cache=True).past_key_values
    keys = cache.layers[0].keys
    layers = len(cache.layers)
    windows = tuple(
        int(layer.sliding_window) if getattr(layer, "is_sliding", False) else None
        for layer in cache.layers
    )
    return KVGeometry(layers, keys.shape[1], keys.shape[3], keys.dtype, windows)


def make_kv(
    pool: Any,
    geometry: KVGeometry,
    pages: Sequence[int],
    *,
    spare: Sequence[int] = (),
    host: HostBlocks | None = None,
    shares: bool = True,
) -> KVManager:
    """A cache whose reserve is ``pages``, and which may borrow ``spare``; not attached."""
    store = KVStore(pool, geometry)
    left = list(spare)
    blocks = Blocks(
        store.blocks_per_page,
        borrow=lambda: left.pop() if left else None,
        give_back=left.append,
        num_borrowable=lambda: len(left),
    )
    return KVManager(store, blocks, len(pages), host, shares)


def make_batch(
    module: Any,
    *,
    text: ModelText | None = None,
    max_model_len: int = 256,
    max_batch: int = 4,
    kv_tokens: int = 1024,
    page_tokens: int = 24,
    chunk_tokens: int = 32,
    wall_clock: Callable[[], float] = lambda: 0.0,
    num_spare: int = 0,
    host_bytes: int = 0,
    shares: bool = True,
    recorder: Recorder | None = None,
    on_ready: Callable[[], None] = lambda: None,
) -> Batch:
    """A resident batch over ``module`` whose pages are small, few and scattered.

    ``num_spare``: pages that it may borrow. ``host_bytes``: for KV in host memory.
    """
    geometry = geometry_of(module)
    num_pages = -(-kv_tokens // page_tokens)
    num_all = num_pages + num_spare
    pool = FakePool(geometry.bytes_per_token * page_tokens + 64, 2 * num_all + 1)
    pages = [2 * n + 1 for n in reversed(range(num_all))]
    reserve, spare = pages[:num_pages], pages[num_pages:]
    host = HostKV(host_bytes).open(KVStore(pool, geometry).block_bytes) if host_bytes else None  # type: ignore[arg-type]
    kv = make_kv(pool, geometry, reserve, spare=spare, host=host, shares=shares)
    batch = Batch(
        module,
        kv,
        text or model_text(),
        max_model_len=max_model_len,
        max_batch=max_batch,
        chunk_tokens=chunk_tokens,
        wall_clock=wall_clock,
        graphs=DecodeGraphs(module, kv.store, recorder) if recorder else None,
        on_ready=on_ready,
    )
    bring_in(batch, reserve)
    return batch


def bring_in(batch: Batch, pages: Sequence[int]) -> None:
    """The model comes to the device, weights and all."""
    batch.attach(pages)
    batch.arrived()


def request(
    request_id: str,
    prompt: Prompt | list[int],
    model: str = "tiny",
    deadline_at: float = math.inf,
    **sampling: Any,
) -> GenerateRequest:
    """Greedy and without an end unless told otherwise."""
    params = {"seed": 0, "temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **sampling}
    return GenerateRequest(
        request_id=request_id,
        model=model,
        klass="interactive",
        prompt=TokenPrompt(tuple(prompt)) if isinstance(prompt, list) else prompt,
        sampling=SamplingParams(**params),
        reply_to="nowhere",
        created_at=0.0,
        deadline_at=deadline_at,
    )


@dataclass
class Answer:
    """Everything that came out for one request."""

    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    begun: int = 0
    end: Done | Broke | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Answers(dict[str, Answer]):
    """Collects messages by request, and checks their order and that each ends once."""

    def take(self, out: list[FromWorker]) -> None:
        for message in out:
            if not isinstance(message, Begun | Produced | Done | Broke):
                continue
            answer = self.setdefault(message.request_id, Answer())
            assert answer.end is None, f"{message} after {answer.end}"
            match message:
                case Begun():
                    answer.begun += 1
                case Produced():
                    assert message.index == len(answer.tokens)
                    answer.tokens += message.token_ids
                    answer.pieces.append(message.text)
                case Done():
                    answer.pieces.append(message.text)
                    answer.end = message
                case Broke():
                    answer.end = message


def run(
    batch: Batch, *requests: GenerateRequest, stagger: int = 0, answers: Answers | None = None
) -> Answers:
    """Submit ``requests``, ``stagger`` steps apart, and step until all have ended."""
    answers = Answers() if answers is None else answers
    for each in requests:
        answers.take(batch.submit(each))
        for _ in range(stagger):
            answers.take(batch.step())
            batch.validate()
    while batch.num_requests:
        answers.take(batch.step())
        batch.validate()
    assert all(answer.end is not None for answer in answers.values())
    return answers


def expected_greedy(module: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """What ``generate`` of transformers gives for one prompt alone."""
    return _engine_models.greedy(module, prompt, num_tokens)
