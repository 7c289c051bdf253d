"""The canary: one short forward that has to come out the same, bit for bit."""

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from services.gpu_agent.canary import Canary
from services.gpu_agent.checksums import Corruption
from services.gpu_agent.device_cpu import CpuPool
from tests.unit import tiny_models
from tests.unit.swap_kit import load, no_progress


class Scaled(nn.Module):
    """Its output is its weight times the token ids, which it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 0.0, -1.0]))
        self.asked: list[list[int]] = []

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        assert not use_cache
        assert not torch.is_grad_enabled()
        self.asked.append(input_ids[0].tolist())
        return (input_ids[..., None] * self.weight,)


def canary_of(module: nn.Module, vocab_size: int = 5) -> Canary:
    text = SimpleNamespace(vocab_size=vocab_size)
    config = SimpleNamespace(get_text_config=lambda: text)
    return Canary(module, config, torch.device("cpu"))


def test_the_first_check_has_nothing_to_compare_with() -> None:
    module = Scaled()
    canary = canary_of(module)
    assert (canary.has_run, canary.is_new) == (False, True)
    canary.check("m")
    assert (canary.has_run, canary.is_new) == (True, False)
    canary.check("m")
    assert module.asked == [[0, 1, 2, 3, 4, 0, 1, 2]] * 2  # only tokens that it knows


def test_a_run_is_new_until_it_was_repeated() -> None:
    canary = canary_of(Scaled())
    canary.run()
    assert (canary.has_run, canary.is_new) == (True, True)
    canary.check("m")
    assert not canary.is_new


@pytest.mark.parametrize("off_by", [2**-23, -2.0, math.inf, math.nan])
def test_a_single_bit_is_found(off_by: float) -> None:
    module = Scaled()
    canary = canary_of(module)
    canary.run()
    with torch.no_grad():
        module.weight[0] += off_by
    with pytest.raises(Corruption, match="model 'm': the same forward gave another") as found:
        canary.check("m")
    assert found.value.check == "canary"
    assert canary.is_new
    canary.forget()
    assert not canary.has_run
    canary.check("m")


def test_zero_and_minus_zero_differ_and_nan_equals_nan() -> None:
    module = Scaled()
    canary = canary_of(module)
    with torch.no_grad():
        module.weight[0] = math.nan
    canary.run()
    canary.check("m")
    with torch.no_grad():
        module.weight[1] = -0.0
    with pytest.raises(Corruption):
        canary.check("m")


# -- of a hosted model -------------------------------------------------------------------


@pytest.fixture
def pool() -> Iterator[CpuPool]:
    pool = CpuPool(3)
    yield pool
    pool.close()


def test_a_weight_that_changed_is_found_at_the_next_swap_in(tmp_path: Path, pool: CpuPool) -> None:
    model = load(tmp_path, pool, "llama", "all")
    ids = tiny_models.prompt()
    model.swap_in()
    expected = tiny_models.logits(model.module, ids)
    model.swap_out()
    image = model._image
    assert image is not None
    image.checksums = None  # nothing but the canary looks
    (slot,) = (s for s in model.layout if s.weight.name == "model.embed_tokens.weight")
    slot.view(image.tensor)[3] += 1  # of a token that the canary reads
    pool.free.forget(image.key)
    with pytest.raises(Corruption) as found:
        model.swap_in()
    assert found.value.check == "canary"
    assert (model.state, model.kv_pages, pool.free.num_free) == ("cold", (), 3)
    assert not model.module.model.layers[0]._forward_pre_hooks  # type: ignore[index, union-attr]
    model.load(no_progress)
    model.swap_in()
    assert torch.equal(tiny_models.logits(model.module, ids), expected)
    model.close()


def test_what_a_canary_saw_of_bad_weights_is_forgotten(tmp_path: Path, pool: CpuPool) -> None:
    model = load(tmp_path, pool, "llama", "all")
    assert model._image is not None
    model._image.tensor[0] ^= 0x40
    model.begin_swap_in()
    model.run_canary()
    with pytest.raises(Corruption) as found:
        model.end_swap_in()
    assert found.value.check == "page"
    for _ in range(2):
        model.load(no_progress)
        model.swap_in()
        model.swap_out()
    model.close()


def test_a_canary_that_can_not_run_leaves_nothing_behind(
    tmp_path: Path, pool: CpuPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tmp_path, pool, "llama")

    def broken(_canary: Canary) -> torch.Tensor:
        raise RuntimeError("no kernel")

    with monkeypatch.context() as patch:
        patch.setattr(Canary, "_forward", broken)
        with pytest.raises(RuntimeError, match="no kernel"):
            model.swap_in()
    assert (model.state, model.kv_pages, pool.free.num_free) == ("host", (), 3)
    model.swap_in()
    model.close()
