"""What a model is for, and how it embeds, as its files tell."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, GPT2Config, LlamaConfig, RobertaConfig

from schemas.state import ModelSpec
from services.gpu_agent.checkpoint import BadCheckpoint
from services.gpu_agent.device_cpu import CpuPool
from services.gpu_agent.hosted import HostedModel
from services.gpu_agent.runner import Pooling, find_pooling
from tests.unit import tiny_embedders, tiny_models
from tests.unit.tiny_embedders import MAX_LEN, WIDTH, add_modules


@pytest.fixture
def pool() -> Iterator[CpuPool]:
    pool = CpuPool(4)
    yield pool
    pool.close()


def found(folder: Path, config: Any, runner: Any = "auto") -> Pooling | None:
    return find_pooling(folder, config, ModelSpec("m", str(folder), runner=runner))


@pytest.mark.parametrize(
    ("architecture", "embeds"),
    [
        ("LlamaForCausalLM", False),
        ("GPT2LMHeadModel", False),
        ("Gemma3ForConditionalGeneration", False),
        ("LlamaModel", True),
        ("BertModel", True),
        ("BertForMaskedLM", True),
        ("XLMRobertaForSequenceClassification", True),
        (None, False),
    ],
)
def test_the_architecture_decides(tmp_path: Path, architecture: str | None, embeds: bool) -> None:
    config = LlamaConfig(architectures=architecture and [architecture])
    assert (found(tmp_path, config) is not None) == embeds


def test_code_of_the_models_own_says_it_by_its_auto_map(tmp_path: Path) -> None:
    config = LlamaConfig(architectures=["ChatThing"], auto_map={"AutoModelForCausalLM": "a.B"})
    assert found(tmp_path, config) is None


def test_the_spec_overrides_the_files(tmp_path: Path) -> None:
    writes = LlamaConfig(architectures=["LlamaForCausalLM"])
    assert found(tmp_path, writes, "embed") == Pooling("lasttoken")
    embeds = BertConfig(architectures=["BertModel"])
    assert found(tmp_path, embeds, "generate") is None


@pytest.mark.parametrize(
    ("config", "mode"),
    [
        (BertConfig(), "mean"),
        (BertConfig(is_decoder=True), "lasttoken"),
        (RobertaConfig(), "mean"),
        (LlamaConfig(), "lasttoken"),
        (GPT2Config(), "lasttoken"),
    ],
)
def test_defaults(tmp_path: Path, config: Any, mode: Any) -> None:
    assert found(tmp_path, config, "embed") == Pooling(mode, normalize=True)


def test_the_files_of_sentence_transformers(tmp_path: Path) -> None:
    config = LlamaConfig(architectures=["LlamaForCausalLM"])
    add_modules(tmp_path, "cls_token", "Normalize")
    assert found(tmp_path, config) == Pooling("cls")
    add_modules(tmp_path, "mean_tokens")
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 77}')
    assert found(tmp_path, config) == Pooling("mean", normalize=False, max_tokens=77)
    add_modules(tmp_path, "", keys={"pooling_mode": "max"})
    assert found(tmp_path, config) == Pooling("max", normalize=False, max_tokens=77)
    (tmp_path / "modules.json").unlink()
    assert found(tmp_path, config) == Pooling("max", normalize=True, max_tokens=77)


def test_what_can_not_be_done_is_refused_with_the_reason(tmp_path: Path) -> None:
    config = BertConfig(architectures=["BertModel"])

    def refusal() -> str:
        with pytest.raises(BadCheckpoint) as caught:
            found(tmp_path, config)
        return str(caught.value)

    add_modules(tmp_path, "mean_tokens", "Dense")
    assert "a Dense module, which is not supported" in refusal()
    two = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}
    add_modules(tmp_path, "", keys=two)
    assert "asks for cls and mean" in refusal()
    add_modules(tmp_path, "", keys={"pooling_mode_strange": True})
    assert "no known pooling" in refusal()
    add_modules(tmp_path, "mean_tokens")
    (tmp_path / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    assert "do_lower_case" in refusal()
    (tmp_path / "1_Pooling" / "config.json").write_text("{")
    assert "1_Pooling/config.json is corrupt" in refusal()
    (tmp_path / "1_Pooling" / "config.json").unlink()
    assert "there is no such file" in refusal()
    modules = [{"type": "a.Transformer", "path": "0_T"}, {"type": "a.Pooling", "path": "1_Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert "move its files up" in refusal()
    (tmp_path / "modules.json").write_text(json.dumps(modules[:1]))
    assert "no Pooling module" in refusal()
    (tmp_path / "modules.json").write_text('[{"typ": 1}]')
    assert "modules.json is corrupt" in refusal()


# -- what follows from it ------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_facts(tmp_path: Path, pool: CpuPool, family: str) -> None:
    folder = tiny_embedders.write(tmp_path, family)
    facts = HostedModel.inspect(ModelSpec("m", str(folder)), pool).facts
    assert (facts.runner, facts.dimensions, facts.kv_bytes) == ("embed", WIDTH, 0)
    assert facts.max_model_len == MAX_LEN  # of Roberta two less than its config says
    assert facts.footprint_bytes == facts.weight_bytes
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 77}')
    assert HostedModel.inspect(ModelSpec("m", str(folder)), pool).facts.max_model_len == 77
    more = ModelSpec("m", str(folder), max_model_len=100)
    assert HostedModel.inspect(more, pool).facts.max_model_len == 100
    with pytest.raises(BadCheckpoint, match=f"more than the {MAX_LEN} tokens"):
        HostedModel.inspect(ModelSpec("m", str(folder), max_model_len=MAX_LEN + 1), pool)


def test_a_generating_model_has_facts_as_ever(tmp_path: Path, pool: CpuPool) -> None:
    folder = tiny_models.write(tmp_path, "llama")
    facts = HostedModel.inspect(ModelSpec("m", str(folder)), pool).facts
    assert (facts.runner, facts.dimensions) == ("generate", 0)
    assert facts.kv_bytes > 0


def test_execution_order_and_groups_of_an_encoder(tmp_path: Path, pool: CpuPool) -> None:
    folder = tiny_embedders.write(tmp_path, "bert_masked")
    model = HostedModel.inspect(ModelSpec("m", str(folder)), pool)
    groups = [group.name for group in model.layout.groups]
    assert groups == ["embed", "layer.0", "layer.1", "layer.2"]
    names = [slot.weight.name for slot in model.layout]
    assert not [name for name in names if name.startswith(("bert.", "cls.", "pooler."))]


def test_an_old_bert_is_converted(tmp_path: Path, pool: CpuPool) -> None:
    """Its norms have other names, and its encoder a prefix."""
    folder = tiny_embedders.write(tmp_path, "bert_masked")
    file = folder / "model.safetensors"
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in load_file(file).items()
    }
    assert any("gamma" in name for name in tensors)
    save_file(tensors, file, {"format": "pt"})
    model = HostedModel.inspect(ModelSpec("m", str(folder)), pool)
    model.load(lambda done, total: None)
    model.swap_in()
    ids = [5, 6, 7, 8]
    got = tiny_embedders.run(
        tiny_embedders.embedder_of(model, pool), tiny_embedders.request("a", ids)
    )
    expected = tiny_embedders.reference(folder, ids, "mean", normalized=True)
    assert torch.allclose(got.vectors("a")[0], expected, atol=1e-5)
    model.close()


def test_an_encoder_that_lacks_weights_is_refused(tmp_path: Path, pool: CpuPool) -> None:
    folder = tiny_embedders.write(tmp_path, "bert_masked")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(BadCheckpoint, match="download is incomplete"):
        HostedModel.inspect(ModelSpec("m", str(folder)), pool)
