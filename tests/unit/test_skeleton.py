"""What the meta module tells, and that nothing of it stays behind."""

from typing import Any

import pytest
import torch
from transformers import (
    FalconConfig,
    Gemma3TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
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
    config = LlamaConfig(**tiny_models._LLAMA_LIKE)
    weights = examined(config).weights
    assert [w.name for w in weights][:2] == [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
    ]
    assert [w.name for w in weights][-2:] == ["model.norm.weight", "lm_head.weight"]
    groups = list(dict.fromkeys(w.group for w in weights))
    assert groups == ["embed", "layer.0", "layer.1", "norm", "head"]


def test_more_than_ten_layers_stay_in_order_and_experts_in_their_layer() -> None:
    config = MixtralConfig(**{**tiny_models._LLAMA_LIKE, "num_hidden_layers": 12})
    groups = list(dict.fromkeys(w.group for w in examined(config).weights))
    assert groups == ["embed", *(f"layer.{n}" for n in range(12)), "norm", "head"]


def test_tied_weights_are_one_weight_with_an_alias() -> None:
    config = LlamaConfig(**tiny_models._LLAMA_LIKE, tie_word_embeddings=True)
    result = examined(config)
    assert result.weights[0].aliases == ("lm_head.weight",)
    assert "lm_head.weight" not in [w.name for w in result.weights]
    assert result.num_parameters == sum(w.num_bytes // 2 for w in result.weights)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**tiny_models._LLAMA_LIKE),
        LlamaConfig(
            **tiny_models._LLAMA_LIKE,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
        MistralConfig(**tiny_models._LLAMA_LIKE),
        FalconConfig(**tiny_models._FALCON_LIKE, alibi=False),
    ],
)
def test_buffers_equal_those_of_an_ordinary_model(config: Any) -> None:
    from transformers import AutoModelForCausalLM

    module = skeleton.build(config, SPEC, BF16)
    skeleton.make_buffers_real(module, torch.device("cpu"), SPEC)
    expected = AutoModelForCausalLM.from_config(config, dtype=BF16)
    named = dict(module.named_buffers())
    assert named.keys() == dict(expected.named_buffers()).keys()
    for name, buffer in expected.named_buffers():
        assert named[name].dtype == buffer.dtype
        assert torch.equal(named[name], buffer), name


def test_binding_leaves_nothing_on_the_meta_device_and_no_global_state() -> None:
    config = LlamaConfig(**tiny_models._LLAMA_LIKE)
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
    config = LlamaConfig(**tiny_models._LLAMA_LIKE, dtype="bfloat16")
    assert skeleton.choose_dtype(config, SPEC, iter([torch.float16])) == torch.bfloat16
    config.dtype = None
    stored = iter([torch.int64, torch.float16])
    assert skeleton.choose_dtype(config, SPEC, stored) == torch.float16
    wanted = ModelSpec("m", "x", dtype="float32")
    assert skeleton.choose_dtype(config, wanted, iter([])) == torch.float32
