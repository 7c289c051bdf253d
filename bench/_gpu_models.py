"""Models without files for GPU runs: published shapes, random weights, host images made in place.

    config -> build -> examine -> layout -> (pool) region, buffers, bind -> MemoryModel
                                    `-> HostImage: touched by all cores, pinned, filled, checksummed

``tiny`` shapes are the same architectures, small enough for a few CPU cores.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import FalconConfig, LlamaConfig, MistralConfig

from bench._gpu_report import Part
from schemas.state import ModelSpec
from services.gpu_agent import probe, skeleton
from services.gpu_agent.checkpoint import Checkpoint
from services.gpu_agent.checksums import Checksums, checksum
from services.gpu_agent.host_image import HostImage, Layout, plan_layout
from services.gpu_agent.hosted import HostedModel
from services.gpu_agent.loader import LoadPlan
from services.gpu_agent.pages import PagePool, Region
from services.gpu_agent.probe import Examined
from services.gpu_agent.registration import assemble
from services.gpu_agent.transfer import Verify

SPREAD: Final = 0.02  # standard deviation of every matrix, as these models are initialised
NUM_ROWS: Final = 8  # requests decoded together
MAX_ROWS: Final = 32  # that a batch takes

_LLAMA: Final[dict[str, Any]] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
}
_MISTRAL: Final[dict[str, Any]] = {
    "vocab_size": 32768,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "sliding_window": None,
    "tie_word_embeddings": False,
}
_FALCON: Final[dict[str, Any]] = {
    "vocab_size": 65024,
    "hidden_size": 4096,
    "num_hidden_layers": 60,
    "num_attention_heads": 32,
    "num_kv_heads": 8,
    "ffn_hidden_size": 16384,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500042.0},
    "new_decoder_architecture": True,
    "num_ln_in_parallel_attn": 1,
    "multi_query": True,
    "parallel_attn": True,
    "bias": False,
    "alibi": False,
    "tie_word_embeddings": False,
}
_TINY: Final = {"vocab_size": 2048, "hidden_size": 384, "num_hidden_layers": 4}
_TINY_HEADS: Final = {"num_attention_heads": 6, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Shape:
    """A model to make. ``kv_tokens``: its KV reserve."""

    name: str
    config: Any
    kv_tokens: int
    seed: int
    dtype: torch.dtype

    @property
    def vocab_size(self) -> int:
        return int(self.config.vocab_size)


def shapes(*, tiny: bool) -> dict[str, Shape]:
    """By name. ``llama-slim`` has few of Llama's layers, for what needs no full model."""
    smaller: dict[str, Any] = {}
    falcon: dict[str, Any] = {}
    if tiny:
        smaller = {**_TINY, **_TINY_HEADS, "intermediate_size": 1024}
        falcon = {**_TINY, "num_attention_heads": 6, "num_kv_heads": 2, "ffn_hidden_size": 1536}
    llama = {**_LLAMA, **smaller}
    configs = {
        "llama": LlamaConfig(**llama),
        "mistral": MistralConfig(**{**_MISTRAL, **smaller}),
        "falcon": FalconConfig(**{**_FALCON, **falcon}),
        "llama-slim": LlamaConfig(**{**llama, "num_hidden_layers": 2 if tiny else 4}),
    }
    kv_tokens = 512 if tiny else 2304
    dtype = torch.float32 if tiny else torch.bfloat16  # many CPUs are slow at bfloat16
    return {
        name: Shape(name, config, kv_tokens, seed, dtype)
        for seed, (name, config) in enumerate(configs.items())
    }


@dataclass(frozen=True)
class Planned:
    """A shape's module on the meta device, and its layout."""

    shape: Shape
    spec: ModelSpec
    module: nn.Module
    examined: Examined
    layout: Layout

    def num_pages(self, page_bytes: int) -> int:
        """Of weights and KV reserve."""
        tokens_per_page = page_bytes // self.examined.geometry.bytes_per_token
        return -(-self.layout.num_bytes // page_bytes) - (-self.shape.kv_tokens // tokens_per_page)


def plan(shape: Shape) -> Planned:
    """All that can be known without a device."""
    spec = ModelSpec(shape.name, "nowhere", max_batch=MAX_ROWS, kv_tokens=shape.kv_tokens)
    module = skeleton.build(shape.config, spec, shape.dtype)
    examined = probe.examine(module, shape.config, spec)
    return Planned(shape, spec, module, examined, plan_layout(examined.weights))


class MemoryModel(HostedModel):
    """A hosted model that has no files: its host image is lent to it.

    This class is the one place that knows the inside of `HostedModel`.
    """

    region: Region
    image: HostImage

    @classmethod
    def make(
        cls, planned: Planned, pool: PagePool, image: HostImage, verify: Verify
    ) -> "MemoryModel":
        """Bind ``planned``'s module, which can be done once, to a region of ``pool``."""
        shape, spec = planned.shape, planned.spec
        files = Checkpoint(Path("nowhere"), {}, {})
        known = assemble(
            spec,
            shape.config,
            planned.module,
            planned.examined,
            LoadPlan(spec, files, planned.layout, shape.dtype, ()),
            pool,
        )
        model = cls(known, pool, verify)
        model.region, model.image = known.region, image
        model._image, model.state = image, "host"
        return model

    def close(self) -> None:
        """Leave the image alone: it is lent."""
        if self.state == "arriving":
            self.call_off_swap_in()
        if self.state == "resident":
            self.swap_out()
        self._pool.free.forget(self.image.key)
        self._image, self.state = None, "cold"
        self.region.release()


# -- host images ---------------------------------------------------------------------------


def make_image(
    shape: Shape, layout: Layout, pool: PagePool, page_bytes: int, part: Part
) -> HostImage:
    """A pinned image with random weights; how long each step took goes to ``part``."""
    image = HostImage(layout)
    began = time.perf_counter()

    def step(name: str) -> None:
        nonlocal began
        now = time.perf_counter()
        part.value(f"{shape.name} image: {name}", now - began, "s")
        began = now

    image.tensor.zero_()  # torch's threads touch it, all cores at once
    step("first touch")
    image.pin(pool)
    step("pin")
    fill(image, shape.seed, pool.torch_device)
    step("fill")
    image.checksums = checksums_of(image, page_bytes)
    step("checksums")
    part.value(f"{shape.name} image: size", layout.num_bytes / 1e9, "GB")
    return image


def fill(image: HostImage, seed: int, device: torch.device) -> None:
    """Matrices from a normal distribution drawn on ``device``, norms 1, biases 0."""
    generator = torch.Generator(device).manual_seed(seed)
    for weight, view in image.views():
        if len(weight.shape) == 1:
            view.fill_(0.0 if weight.name.endswith("bias") else 1.0)
        else:
            drawn = torch.randn(
                weight.shape, generator=generator, device=device, dtype=weight.dtype
            )
            view.copy_(drawn.mul_(SPREAD))


def checksums_of(image: HostImage, page_bytes: int) -> Checksums:
    """As `Checksums.of`, with several threads."""
    starts = range(0, image.layout.num_bytes, page_bytes)
    with ThreadPoolExecutor() as threads:
        values = threads.map(lambda at: checksum(image.tensor[at : at + page_bytes]), starts)
        return Checksums(page_bytes, image.layout.num_bytes, tuple(values))
