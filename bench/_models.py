"""Models for benchmarks: written with random weights, of the shapes that a swap can meet.

layered   Llama, about 250 MB: nearly all bytes in 24 layers of 10 MB, as in real models
wide      Falcon, about 200 MB: nearly all bytes in two tables, copied as two large groups
"""

from pathlib import Path

from safetensors.torch import save_file
from transformers import LlamaConfig

from schemas.state import ModelSpec
from services.demo.models import DemoModel, demo_configs, make_weights, train_tokenizer

KV_TOKENS = 512


def layered() -> DemoModel:
    """A Llama whose bytes lie in its layers."""
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=24,
        num_attention_heads=8,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    return DemoModel("layered", 21, config)


def wide() -> DemoModel:
    """The smallest of the demo's models, which are mostly vocabulary."""
    return DemoModel("wide", 22, demo_configs()[0].config)


def write(model: DemoModel, folder: Path, kv_tokens: int = KV_TOKENS) -> ModelSpec:
    """Write ``model`` (no tokenizer) below ``folder``, and give how to deploy it."""
    place = folder / model.name
    model.config.save_pretrained(place)
    weights = make_weights(model, quiet_ids=[])
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    return ModelSpec(name=model.name, source=str(place), kv_tokens=kv_tokens)


def write_tokenizer(place: Path) -> None:
    """Write the demo's tokenizer into a model's folder, for engines that want one."""
    train_tokenizer().save_pretrained(place)
