"""What the meta module tells, and that nothing of it stays behind."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PreTrainedModel,
)

from schemas.state import ModelSpec
from services.gpu_agent import probe, skeleton
from services.gpu_agent.checkpoint import BadCheckpoint
from services.gpu_agent.host_image import plan_layout
from services.gpu_agent.probe import KVGeometry
from tests.unit import tiny_models

SPEC = ModelSpec("m", "x")
BF16 = torch.bfloat16


def examined(config: Any) -> probe.Examined:
    return probe.examine(skeleton.build(config, SPEC, BF16), config, SPEC)


@pytest.mark.parametrize(
    ("family", "num_kv_heads", "windows"),
    [
        ("llama", 2, (None, None)),
        ("mistral", 2, (16, 16)),
        ("falcon_7b", 1, (None, None)),
        # config.json says 2: transformers caches them broadcast to all 4
        ("falcon_40b", 4, (None, None)),
        ("falcon_alibi", 4, (None, None)),
    ],
)
def test_kv_geometry_is_what_the_module_caches(
    family: str, num_kv_heads: int, windows: tuple[int | None, ...]
) -> None:
    config = tiny_models.FAMILIES[family][1]()
    geometry = examined(config).geometry
    assert geometry == KVGeometry(2, num_kv_heads, 16, BF16, windows)
    assert geometry.bytes_per_token == 2 * 2 * num_kv_heads * 16 * 2


def test_windows_differ_by_layer_where_the_model_says_so() -> None:
    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=64,
        sliding_window=32,
    )
    assert examined(config).geometry.sliding_windows == (32, 32, 32, 32, 32, None, 32)


def test_models_with_other_state_are_refused() -> None:
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)
    with pytest.raises(BadCheckpoint, match=r"MambaForCausalLM is not supported|cache"):
        examined(config)


def test_weights_come_in_execution_order() -> None:
    config = LlamaConfig(**tiny_models.LLAMA_LIKE)
    weights = examined(config).weights
    assert [w.name for w in weights][:2] == [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
    ]
    assert [w.name for w in weights][-2:] == ["model.norm.weight", "lm_head.weight"]
    groups = list(dict.fromkeys(w.group for w in weights))
    assert groups == ["embed", "layer.0", "layer.1", "norm", "head"]


def test_more_than_ten_layers_stay_in_order_and_experts_in_their_layer() -> None:
    config = MixtralConfig(**{**tiny_models.LLAMA_LIKE, "num_hidden_layers": 12})
    groups = list(dict.fromkeys(w.group for w in examined(config).weights))
    assert groups == ["embed", *(f"layer.{n}" for n in range(12)), "norm", "head"]


def test_tied_weights_are_one_weight_with_an_alias() -> None:
    config = LlamaConfig(**tiny_models.LLAMA_LIKE, tie_word_embeddings=True)
    result = examined(config)
    assert result.weights[0].aliases == ("lm_head.weight",)
    assert "lm_head.weight" not in [w.name for w in result.weights]
    assert result.num_parameters == sum(w.num_bytes // 2 for w in result.weights)


def buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_buffers_equal_those_of_an_ordinary_model(family: str) -> None:
    config = tiny_models.FAMILIES[family][1]()
    module = skeleton.build(config, SPEC, BF16)
    skeleton.make_buffers_real(module, torch.device("cpu"), SPEC)
    expected = buffers(AutoModelForCausalLM.from_config(config, dtype=BF16))
    named = buffers(module)
    assert named.keys() == expected.keys()
    for name, buffer in expected.items():
        assert named[name].dtype == buffer.dtype
        assert torch.equal(named[name], buffer), name


@pytest.mark.parametrize("family", ["llama_dynamic", "llama_yarn", "gemma_3"])
def test_a_full_context_leaves_the_buffers_as_they_were(family: str) -> None:
    config = tiny_models.FAMILIES[family][1]()
    module = skeleton.build(config, SPEC, torch.float32)
    layout = plan_layout(probe.examine(module, config, SPEC).weights)
    skeleton.make_buffers_real(module, torch.device("cpu"), SPEC)
    skeleton.bind(module, layout, torch.zeros(layout.num_bytes, dtype=torch.uint8))
    before = buffers(module)
    for length in (tiny_models.MAX_LEN, 3):
        tiny_models.logits(module, tiny_models.prompt(length))
        after = buffers(module)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(buffer.is_meta for buffer in before.values())


def test_an_attribute_that_is_also_a_buffer_stays_so() -> None:
    # as older modelling code writes it: self.original_inv_freq = self.inv_freq
    config = LlamaConfig(**tiny_models.LLAMA_LIKE)
    module = skeleton.build(config, SPEC, BF16)
    rotary: Any = module.get_submodule("model.rotary_emb")
    expected = buffers(AutoModelForCausalLM.from_config(config, dtype=BF16))
    del rotary.original_inv_freq
    rotary.original_inv_freq = rotary.inv_freq.detach()
    layout = plan_layout(probe.examine(module, config, SPEC).weights)
    skeleton.make_buffers_real(module, torch.device("cpu"), SPEC)
    skeleton.bind(module, layout, torch.zeros(layout.num_bytes, dtype=torch.uint8))
    assert rotary.original_inv_freq is rotary.inv_freq
    assert torch.equal(rotary.inv_freq, expected["model.rotary_emb.inv_freq"])


def test_a_buffer_that_only_a_distant_module_sets_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(**tiny_models.LLAMA_LIKE)
    module = skeleton.build(config, SPEC, BF16)
    buffer = torch.empty(3, device="meta")
    module.get_submodule("model.norm").register_buffer("scales", buffer, persistent=False)
    ordinary: Any = PreTrainedModel._init_weights

    def init_weights(self: Any, part: nn.Module) -> None:
        ordinary(self, part)
        if part is module.get_submodule("model.layers.1.mlp.up_proj"):
            module.get_buffer("model.norm.scales").fill_(7.0)

    with pytest.raises(BadCheckpoint, match=r"does not set its buffer 'model.norm.scales'"):
        skeleton.make_buffers_real(module, torch.device("cpu"), SPEC)
    module = skeleton.build(config, SPEC, BF16)
    module.get_submodule("model.norm").register_buffer("scales", buffer, persistent=False)
    for sort in {type(part) for part in module.modules() if isinstance(part, PreTrainedModel)}:
        monkeypatch.setattr(sort, "_init_weights", init_weights)
    skeleton.make_buffers_real(module, torch.device("cpu"), SPEC)
    assert module.get_buffer("model.norm.scales").tolist() == [7.0] * 3


def test_quantized_checkpoints_are_refused(tmp_path: Path) -> None:
    path = tiny_models.write(tmp_path / "m", "llama")
    tiny_models.edit_config(path, quantization_config={"quant_method": "fp8"})
    with pytest.raises(BadCheckpoint, match=r"is quantized \(fp8\), which is not supported"):
        skeleton.read_config(path, SPEC)


def test_binding_leaves_nothing_on_the_meta_device_and_no_global_state() -> None:
    config = LlamaConfig(**tiny_models.LLAMA_LIKE)
    module = skeleton.build(config, SPEC, BF16)
    layout = plan_layout(probe.examine(module, config, SPEC).weights)
    memory = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    with pytest.raises(BadCheckpoint, match="where it can not be loaded"):
        skeleton.bind(module, layout, memory)  # its buffers are still meta
    skeleton.make_buffers_real(module, torch.device("cpu"), SPEC)
    skeleton.bind(module, layout, memory)
    assert not any(p.requires_grad or p.is_meta for p in module.parameters())
    assert not module.training
    assert torch.get_default_dtype() == torch.float32
    assert torch.empty(1).device.type == "cpu"


def test_auto_dtype_is_the_configs_then_the_files() -> None:
    config = LlamaConfig(**tiny_models.LLAMA_LIKE, dtype="bfloat16")
    assert skeleton.choose_dtype(config, SPEC, iter([torch.float16])) == torch.bfloat16
    config.dtype = None
    stored = iter([torch.int64, torch.float16])
    assert skeleton.choose_dtype(config, SPEC, stored) == torch.float16
    wanted = ModelSpec("m", "x", dtype="float32")
    assert skeleton.choose_dtype(config, wanted, iter([])) == torch.float32
