"""The demo models: sizes, determinism, atomic writing, prompts of exact length."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.demo import models as demo_models
from services.demo.models import VOCAB_SIZE, demo_configs, make_demo_models, prompt_of

MB = 1e6


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return demo_models.train_tokenizer()


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> list[str]:
    """The three architectures with narrow layers: the same code, a fraction of the time."""
    models = demo_configs()
    for model in models:
        heads = model.config.num_attention_heads
        model.config.hidden_size = 8 * heads
    monkeypatch.setattr(demo_models, "demo_configs", lambda: models)
    monkeypatch.setattr(demo_models, "train_tokenizer", lambda: tokenizer)
    return [model.name for model in models]


def test_sizes_and_shapes_of_the_real_ones() -> None:
    sizes = []
    for model in demo_configs():
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(model.config)
        sizes.append(sum(p.numel() for p in module.parameters()) * 4)
        assert model.config.max_position_embeddings == 4096
        assert model.config.vocab_size == VOCAB_SIZE
    assert all(150 * MB < size < 300 * MB for size in sizes)
    assert sizes == sorted(sizes)
    assert all(later > earlier * 1.1 for earlier, later in pairwise(sizes))
    # One and a half of the smallest, as the demo's device has: the largest fits, no two do.
    assert sizes[-1] + 16 * MB < 1.5 * sizes[0] < sizes[0] + sizes[1]
    assert {type(m.config).__name__ for m in demo_configs()} == {
        "LlamaConfig",
        "MistralConfig",
        "FalconConfig",
    }


def test_making_is_idempotent_deterministic_and_repairs(
    tmp_path: Path, small_models: list[str]
) -> None:
    reports: list[tuple[str, int, int]] = []
    first = make_demo_models(tmp_path / "a", lambda *report: reports.append(report))
    assert [path.name for path in first] == small_models
    assert [done for _, done, _ in reports] == [0, 1, 2, 3, 4]
    second = make_demo_models(tmp_path / "b")
    for one, other in zip(first, second, strict=True):
        for file in sorted(one.iterdir()):
            assert file.read_bytes() == (other / file.name).read_bytes(), file

    stamps = {path: (path / "model.safetensors").stat().st_mtime_ns for path in first}
    cut = first[1] / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    old = json.loads((first[2] / demo_models.MARKER).read_text())
    (first[2] / demo_models.MARKER).write_text(json.dumps({**old, "format_version": -1}))
    assert make_demo_models(tmp_path / "a") == first
    for n, path in enumerate(first):
        assert demo_models.is_complete(path)
        assert ((path / "model.safetensors").stat().st_mtime_ns == stamps[path]) == (n == 0)
    assert [path for path in (tmp_path / "a").iterdir() if path.name.startswith(".")] == []


def test_nothing_half_written_is_left_when_writing_fails(
    tmp_path: Path, small_models: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(demo_models, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        make_demo_models(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_checkpoints_load_and_talk(tmp_path: Path, small_models: list[str]) -> None:
    for path in make_demo_models(tmp_path):
        tokenizer = AutoTokenizer.from_pretrained(path)
        module = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
        assert module.dtype == torch.float32
        chat = [{"role": "user", "content": "Hello"}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert text == "<|bos|><|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        out = module.generate(**ids, max_new_tokens=8, do_sample=False)
        assert out.shape[1] == ids["input_ids"].shape[1] + 8, "greedy decoding must not end early"


def test_the_tokenizer(tokenizer: Any) -> None:
    assert len(tokenizer) == VOCAB_SIZE
    assert all(isinstance(tokenizer.decode([i]), str) for i in range(0, VOCAB_SIZE, 97))
    sentence = "Hello, how are you today? The capital of France is Paris."
    assert tokenizer.decode(tokenizer.encode(sentence)) == sentence
    assert len(tokenizer.encode(sentence)) < 16
    odd = "naïve 世界 🎉"
    assert tokenizer.decode(tokenizer.encode(odd)) == odd
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos_token_id]


@pytest.mark.parametrize("num_tokens", [1, 2, 17, 128, 2048])
def test_prompts_have_the_exact_length(tokenizer: Any, num_tokens: int) -> None:
    texts = {prompt_of(tokenizer, num_tokens, seed) for seed in range(3)}
    assert all(len(tokenizer.encode(text)) == num_tokens for text in texts)
    assert num_tokens < 3 or len(texts) == 3


def test_an_impossible_prompt_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="exactly 0 tokens"):
        prompt_of(tokenizer, 0)
