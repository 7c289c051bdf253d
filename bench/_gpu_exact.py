"""Parts of a GPU run that compare bits: a CUDA graph over swaps, forwards during arrivals."""

import random
import time
from collections.abc import Callable
from typing import Any, Final

import torch
from transformers import Cache

from bench._gpu_models import MemoryModel
from bench._gpu_report import Part
from bench._gpu_stage import Stage, prompt
from services.gpu_agent.probe import KVGeometry

CONTEXT_TOKENS: Final = 64  # that the captured decode step looks back at
MOST_S: Final = 150.0  # for all swaps of one part


class StillCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """K and V of one row, ``CONTEXT_TOKENS`` long, in torch's own memory.

    A step writes its token's K and V to the last place, so that it can be repeated for ever: no
    address and no length changes, as a CUDA graph needs it.
    """

    def __init__(self, geometry: KVGeometry, device: torch.device) -> None:
        super().__init__(layers=[])
        size = (2, 1, geometry.num_kv_heads, CONTEXT_TOKENS, geometry.head_dim)
        generator = torch.Generator(device).manual_seed(0)
        self._kept = [
            torch.randn(size, generator=generator, device=device, dtype=geometry.dtype)
            for _ in range(geometry.num_layers)
        ]

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._kept[layer_idx]
        keys[:, :, -1:].copy_(key)
        values[:, :, -1:].copy_(value)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return CONTEXT_TOKENS - 1

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return CONTEXT_TOKENS - 1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return CONTEXT_TOKENS, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1


def decode_step(model: MemoryModel, device: torch.device) -> Callable[[], torch.Tensor]:
    """One decode step with inputs that stay where they are; gives the logits."""
    cache = StillCache(model.geometry, device)
    ids = torch.tensor([prompt(model, 1)], device=device)
    positions = torch.tensor([[CONTEXT_TOKENS - 1]], device=device)

    def step() -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = model.module(
                input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True
            ).logits
        return logits

    return step


def capture(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """``step`` as a CUDA graph: what it gives lies in the same memory every time."""
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return logits

    return replay


def graphs(stage: Stage, part: Part, *names: str) -> None:
    """A captured decode step replays bit for bit after swaps with another model in between."""
    model, other = stage.pair(part, *names)
    model.swap_in()
    step = decode_step(model, stage.pool.torch_device)
    eager = _bytes_of(step())
    replay = capture(step) if stage.is_on_gpu else step
    expected = _bytes_of(replay())
    part.value("replay equals the eager step", float(torch.equal(expected, eager)))
    began, same, num = time.perf_counter(), 0, 0
    while num < stage.sizes.num_graph_swaps and time.perf_counter() - began < MOST_S:
        model.swap_out()
        other.swap_in()
        other.swap_out()
        model.swap_in()
        same += torch.equal(_bytes_of(replay()), expected)
        num += 1
    part.value("swaps", num)
    part.value("one round", (time.perf_counter() - began) / num, "s")
    part.value("replays that were bit-identical", same)
    name = f"graph replays bit-identical after each of {stage.sizes.num_graph_swaps} swaps"
    part.holds(name, same == stage.sizes.num_graph_swaps)
    began = time.perf_counter()
    for _ in range(20):
        replay()
    stage.synchronize()
    part.value("one replay", (time.perf_counter() - began) / 20, "s")


def arrivals(stage: Stage, part: Part, *names: str) -> None:
    """Forwards that run while the weights arrive give the logits of a resident model."""
    models = stage.pair(part, *names)
    chosen = random.Random(1)
    expected: dict[tuple[str, int], torch.Tensor] = {}
    lengths = (*stage.sizes.prompts, stage.sizes.prompts[0] // 3)
    for model in models:
        stage.only_host()
        model.swap_in()
        for length in lengths:
            expected[model.spec.name, length] = stage.logits(model, length)
    began, same, num = time.perf_counter(), 0, 0
    while num < stage.sizes.num_random_swaps and time.perf_counter() - began < MOST_S:
        model, length = chosen.choice(models), chosen.choice(lengths)
        stage.keep(model, chosen.choice((0.0, chosen.random())))
        model.begin_swap_in()
        found = stage.logits(model, length)
        model.end_swap_in()
        same += torch.equal(found, expected[model.spec.name, length])
        same += torch.equal(stage.logits(model, length), expected[model.spec.name, length])
        num += 1
    part.value("swaps", num)
    part.value("bit-identical, during and after", same)
    part.holds("logits bit-identical, during and after each swap", same == 2 * num > 0)


def _bytes_of(logits: torch.Tensor) -> torch.Tensor:
    return logits.contiguous().view(torch.uint8).cpu()
