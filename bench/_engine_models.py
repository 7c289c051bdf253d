"""Models for the engine benchmark, written with random weights.

families      a few hundred KB each, float32: what must answer as transformers does, token for token
turning       about 10 MB, 8 KiB of KV per token: several of them take turns on one pool
serving       about 0.3e9 parameters, Llama shape: throughput

Weights are drawn so that logits lie well apart. With the usual small init every logit is close to
every other, and the rounding of another batch shape would decide which one is the largest.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from bench import _models
from schemas.state import DType, ModelSpec
from services.demo.models import VOCAB_SIZE, DemoModel, make_weights

VOCABULARY: Final = 256
MAX_LEN: Final = 256
WINDOW: Final = 16  # tokens that the sliding Mistral sees: most prompts are longer
TURNING_MAX_LEN: Final = 8192
SERVING_MAX_LEN: Final = 1024
SERVING_LAYERS: Final = 20

_SPREAD: Final = 3.0  # how much wider than a fresh init, for logits that lie apart

LLAMA_LIKE: Final = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": MAX_LEN,
}
FALCON_LIKE: Final = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_LEN,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILIES: Final[dict[str, Callable[[], Any]]] = {
    "llama": lambda: LlamaConfig(**LLAMA_LIKE),
    "llama, tied": lambda: LlamaConfig(**LLAMA_LIKE, tie_word_embeddings=True),
    "mistral, sliding": lambda: MistralConfig(**LLAMA_LIKE, sliding_window=WINDOW),
    # as Falcon 7B: one KV head, attention and MLP in parallel
    "falcon, multi-query": lambda: FalconConfig(
        **FALCON_LIKE, multi_query=True, alibi=False, bias=False
    ),
    # as Falcon 40B: grouped KV heads
    "falcon, grouped": lambda: FalconConfig(
        **FALCON_LIKE, new_decoder_architecture=True, num_kv_heads=2, alibi=False, bias=False
    ),
    "falcon, alibi": lambda: FalconConfig(
        **FALCON_LIKE, multi_query=False, alibi=True, parallel_attn=False, bias=True
    ),
    "qwen": lambda: Qwen2Config(**LLAMA_LIKE),
    "gemma": lambda: GemmaConfig(**LLAMA_LIKE, head_dim=16),
}

# KV of 64 KiB per token: a page of 2 MiB holds no more than 32 tokens, so pages matter.
WIDE_KV: Final = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=64,
    num_key_value_heads=64,
    head_dim=64,
    intermediate_size=64,
    max_position_embeddings=MAX_LEN,
)


def turning() -> LlamaConfig:
    """Small enough for hundreds of swaps, with KV that costs something to move."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=512,
        max_position_embeddings=TURNING_MAX_LEN,
        tie_word_embeddings=False,
    )


def serving(num_layers: int = SERVING_LAYERS) -> LlamaConfig:
    """0.303e9 parameters with all its layers, 67e6 of them vocabulary."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=1024,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        intermediate_size=2816,
        max_position_embeddings=SERVING_MAX_LEN,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=3,
        pad_token_id=0,
    )


def write_tiny(place: Path, config: Any, *, seed: int = 0) -> Path:
    """Write a model of ``config`` and a byte tokenizer to ``place``; gives ``place``."""
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            # Fresh norms and biases are ones and zeros, which would hide a mix-up.
            if parameter.ndim == 1:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
            elif "embed" not in name:
                parameter.data.mul_(_SPREAD)
    finally:
        torch.random.set_rng_state(state)
    model.save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    return place


def write_serving(place: Path, dtype: torch.dtype, num_layers: int = SERVING_LAYERS) -> Path:
    """Write the serving model with the demo's tokenizer to ``place``; gives ``place``."""
    config = serving(num_layers)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = dtype
    config.save_pretrained(place)
    weights = make_weights(DemoModel("serving", 31, config), quiet_ids=[])
    tensors = {name: tensor.to(dtype) for name, tensor in weights.items()}
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    _models.write_tokenizer(place)
    return place


def byte_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per byte, 256 in all, no special ones: every id is part of some text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=chat_template)


def spec(name: str, place: Path, dtype: DType = "float32", **settings: Any) -> ModelSpec:
    """How to deploy the model in ``place``."""
    return ModelSpec(name=name, source=str(place), dtype=dtype, **settings)


def reference(place: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model as transformers loads it, untouched by this project."""
    model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def greedy(model: Any, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What ``generate`` of transformers gives for one prompt alone; no end of sequence."""
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return [int(i) for i in out[0, len(prompt) :]]
