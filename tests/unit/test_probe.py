"""Guards, and that a trial run over one layer of each kind tells what a full one does."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from schemas.state import ModelSpec
from services.gpu_agent import probe, skeleton, trial
from services.gpu_agent.checkpoint import BadCheckpoint
from tests.unit import tiny_models

SPEC = ModelSpec("m", "x")
DEEP = {**tiny_models.LLAMA_LIKE, "num_hidden_layers": 12}


def build(config: Any) -> nn.Module:
    return skeleton.build(config, SPEC, torch.bfloat16)


def count_mlps(module: nn.Module) -> list[str]:
    """Names of the MLPs that run from now on."""
    ran: list[str] = []
    for name, part in module.named_modules():
        if name.endswith("mlp"):
            part.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    return ran


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_one_layer_of_each_kind_tells_what_all_do(family: str) -> None:
    config = tiny_models.FAMILIES[family][1]()
    module = build(config)
    assert probe.examine(module, config, SPEC) == probe.examine(module, config, SPEC, shorten=False)
    assert not any("forward" in vars(part) for part in module.modules())


@pytest.mark.parametrize(
    ("config", "num_kinds"),
    [
        (LlamaConfig(**DEEP), 1),
        (MixtralConfig(**DEEP), 1),
        (Gemma3TextConfig(**DEEP, head_dim=16, sliding_window=16), 2),
        (Qwen2Config(**DEEP, use_sliding_window=True, sliding_window=16, max_window_layers=5), 2),
    ],
)
def test_deep_models_run_one_layer_of_each_kind(config: Any, num_kinds: int) -> None:
    module = build(config)
    full = probe.examine(module, config, SPEC, shorten=False)
    ran = count_mlps(module)
    short = probe.examine(module, config, SPEC)
    assert short == full
    assert len(ran) == num_kinds
    groups = list(dict.fromkeys(weight.group for weight in short.weights))
    assert [group for group in groups if "." in group] == [f"layer.{n}" for n in range(12)]
    assert len(short.geometry.sliding_windows) == 12


def test_layers_that_differ_all_run() -> None:
    config = LlamaConfig(**DEEP)
    module = build(config)
    layers: Any = module.get_submodule("model.layers")
    layers[3].self_attn.scaling *= 2
    layers[5].mlp.act_fn = nn.ReLU()
    ran = count_mlps(module)
    probe.examine(module, config, SPEC)
    assert ran == [f"model.layers.{n}.mlp" for n in (0, 3, 5)]


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_guards_are_the_layer_or_the_owner(family: str) -> None:
    config = tiny_models.FAMILIES[family][1]()
    examined = probe.examine(build(config), config, SPEC)
    assert list(examined.guards) != []
    assert examined.guards.keys() == {weight.name for weight in examined.weights}
    stem = "transformer.h" if "falcon" in family else "model.layers"
    for weight in examined.weights:
        guard = examined.guards[weight.name]
        if weight.group.startswith("layer."):
            assert guard == f"{stem}.{weight.group.removeprefix('layer.')}"
        else:
            assert guard == weight.name.rpartition(".")[0] != ""


class _Released(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails where an operation takes a weight that was not released."""

    def __init__(self, weights: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waiting = weights  # their addresses
        self.num_seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in (*args, *(kwargs or {}).values()):
            for tensor in value if isinstance(value, list | tuple) else [value]:
                if isinstance(tensor, torch.Tensor):
                    self.num_seen += 1
                    assert tensor.untyped_storage().data_ptr() not in self.waiting, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_no_weight_is_used_before_its_guard_released_it_in_layout_order(family: str) -> None:
    dtype, make_config = tiny_models.FAMILIES[family]
    config = make_config()
    examined = probe.examine(build(config), config, SPEC)
    order = [weight.name for weight in examined.weights]
    last = {examined.guards[name]: place for place, name in enumerate(order)}
    module = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    stored = dict(trial.stored_tensors(module))
    addresses = [stored[name].untyped_storage().data_ptr() for name in order]
    released = _Released(set(addresses))

    def release(guard: str) -> None:
        released.waiting -= set(addresses[: last[guard] + 1])
        if guard.endswith(".0"):  # the next layer still waits: this is a pipeline
            assert released.waiting

    for guard in last:
        module.get_submodule(guard).register_forward_pre_hook(
            lambda *_, guard=guard: release(guard)
        )
    with torch.no_grad(), released:
        module(input_ids=tiny_models.prompt(), use_cache=False)
    assert released.num_seen > 50
    assert not released.waiting


class _Peeking(LlamaMLP):  # type: ignore[misc]
    """Also reads a weight of some other module."""

    other: nn.Module
    through_data = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (up,) = self.__dict__["other"]
        weight = up.weight.data.t() if self.through_data else up.weight.t()
        result: torch.Tensor = super().forward(x) + (x @ weight).sum()
        return result


@pytest.mark.parametrize("through_data", [False, True])
def test_a_weight_that_another_layer_reads_earlier_is_guarded_by_the_root(
    through_data: bool,
) -> None:
    config = LlamaConfig(**DEEP)
    module = build(config)
    layers: Any = module.get_submodule("model.layers")
    for layer, following in pairwise(layers):
        layer.mlp.__class__ = _Peeking
        layer.mlp.through_data = through_data
        vars(layer.mlp)["other"] = (following.mlp.up_proj,)
    short = probe.examine(module, config, SPEC)
    assert short == probe.examine(module, config, SPEC, shorten=False)
    at_root = [name for name, guard in short.guards.items() if guard == ""]
    assert at_root == [f"model.layers.{n}.mlp.up_proj.weight" for n in range(1, 12)]


def test_a_weight_of_a_module_that_is_never_called_is_guarded_by_the_root() -> None:
    config = LlamaConfig(**tiny_models.LLAMA_LIKE)
    module = build(config)
    norm: Any = module.get_submodule("model.norm")
    norm.spare = nn.Linear(2, 2, bias=False, device="meta")
    guards = probe.examine(module, config, SPEC).guards
    assert guards["model.norm.spare.weight"] == ""
    assert guards["model.norm.weight"] == "model.norm"


def test_rope_that_depends_on_the_longest_row_of_a_batch_is_refused() -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 64,
    }
    config = Phi3Config(**tiny_models.LLAMA_LIKE, rope_parameters=rope, pad_token_id=0)
    with pytest.raises(BadCheckpoint, match="trial run"):
        probe.examine(build(config), config, SPEC)
