"""Tiny seeded checkpoints of every family, a few hundred KB each, for tests."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
)

from bench._engine_models import FALCON_LIKE, LLAMA_LIKE, MAX_LEN, VOCABULARY

__all__ = ["FALCON_LIKE", "LLAMA_LIKE", "MAX_LEN", "VOCABULARY"]

_GEMMA_LIKE: Final = {**LLAMA_LIKE, "head_dim": 16}


def _roped(rope_type: str, **settings: float) -> LlamaConfig:
    """A Llama whose context was stretched from 64 tokens, a quarter of MAX_LEN."""
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0, **settings}
    return LlamaConfig(**LLAMA_LIKE, rope_parameters=rope)


# name -> (dtype, config). The dtypes are mixed on purpose.
FAMILIES: Final[dict[str, tuple[torch.dtype, Callable[[], Any]]]] = {
    "llama": (torch.float32, lambda: LlamaConfig(**LLAMA_LIKE)),
    "llama_tied": (torch.bfloat16, lambda: LlamaConfig(**LLAMA_LIKE, tie_word_embeddings=True)),
    "llama_3": (
        torch.bfloat16,
        lambda: _roped(
            "llama3",
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "llama_yarn": (
        torch.float32,
        lambda: _roped("yarn", original_max_position_embeddings=64),
    ),
    "llama_linear": (torch.float16, lambda: _roped("linear")),
    "llama_dynamic": (torch.bfloat16, lambda: _roped("dynamic")),
    "mistral": (torch.bfloat16, lambda: MistralConfig(**LLAMA_LIKE, sliding_window=16)),
    "qwen2": (torch.float32, lambda: Qwen2Config(**LLAMA_LIKE)),
    "qwen3": (torch.float16, lambda: Qwen3Config(**LLAMA_LIKE, head_dim=16)),
    "mixtral": (torch.float32, lambda: MixtralConfig(**LLAMA_LIKE, num_local_experts=4)),
    "gemma": (torch.float16, lambda: GemmaConfig(**_GEMMA_LIKE)),
    "gemma_2": (torch.bfloat16, lambda: Gemma2Config(**_GEMMA_LIKE, sliding_window=16)),
    # one layer in six sees all: the sixth of these
    "gemma_3": (
        torch.bfloat16,
        lambda: Gemma3TextConfig(**{**_GEMMA_LIKE, "num_hidden_layers": 7}, sliding_window=16),
    ),
    # as Falcon 7B: one KV head, attention and MLP in parallel
    "falcon_7b": (
        torch.bfloat16,
        lambda: FalconConfig(**FALCON_LIKE, multi_query=True, alibi=False, bias=False),
    ),
    # as Falcon 40B: grouped KV heads, which transformers caches broadcast to all heads
    "falcon_40b": (
        torch.float32,
        lambda: FalconConfig(
            **FALCON_LIKE, new_decoder_architecture=True, num_kv_heads=2, alibi=False, bias=False
        ),
    ),
    "falcon_alibi": (
        torch.float32,
        lambda: FalconConfig(
            **FALCON_LIKE, multi_query=False, alibi=True, parallel_attn=False, bias=True
        ),
    ),
}


def write(folder: Path, family: str, *, seed: int = 0, max_shard_size: str = "1GB") -> Path:
    """Write ``family`` with seeded random weights to ``folder``; returns the folder."""
    dtype, make_config = FAMILIES[family]
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(make_config(), dtype=dtype)
        for name, parameter in model.named_parameters():
            # Fresh norms and biases are ones and zeros, which would hide a mix-up.
            if parameter.ndim == 1:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.data.mul_(3.0 if "embed" not in name else 1.0)
    finally:
        torch.random.set_rng_state(state)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of ``folder``'s config.json; None removes a key."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def reference(folder: Path) -> Any:
    """The model as transformers loads it, never touched by this project."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="sdpa")
    return model.eval()


def prompt(length: int = 24, seed: int = 0) -> torch.Tensor:
    """Token ids of shape (1, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (1, length), generator=generator)


def logits(module: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of shape (1, length, vocabulary), in float32."""
    with torch.no_grad():
        result: torch.Tensor = module(input_ids=ids, use_cache=False).logits
    return result.float()
