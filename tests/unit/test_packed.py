"""Several prompts in one forward pass: the tokens they get one by one, nobody pays for others."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from services.gpu_agent.engine.kv import KVStore, Span
from services.gpu_agent.engine.packed import PackedView, can_pack
from services.gpu_agent.ipc import Broke, Done
from tests.unit import tiny_models
from tests.unit.engine_kit import (
    Answers,
    FakePool,
    expected_greedy,
    geometry_of,
    make_batch,
    request,
    run,
)

PROMPTS = {"a": [3, 1, 4, 1, 5], "b": [2] * 40, "c": [9, 8, 7], "d": [6]}


class Counted:
    """A module that counts its forward passes, and may be made to fail."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.forward = module.forward  # for its signature
        self.num_passes = 0
        self.raises_on = self.nan_on = -1

    def __call__(self, **arguments: Any) -> Any:
        self.num_passes += 1
        ids = arguments["input_ids"]
        if self.raises_on in ids:
            raise RuntimeError("the device caught fire")
        result = self._module(**arguments)
        if self.nan_on in ids:
            result.logits.fill_(torch.nan)
        return result


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen3", "falcon_7b", "mixtral"])
def module(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    return tiny_models.reference(tiny_models.write(folder, request.param)).float()


def test_short_prompts_share_a_forward_pass(module: Any) -> None:
    batch = make_batch(module, chunk_tokens=64)
    counted = Counted(module)
    batch.module = counted
    answers = Answers()
    for name, prompt in PROMPTS.items():
        answers.take(batch.submit(request(name, prompt, max_tokens=10)))
    answers.take(batch.step())
    assert counted.num_passes == 1
    assert all(len(answers[name].tokens) == 1 for name in PROMPTS)
    run(batch, answers=answers)
    for name, prompt in PROMPTS.items():
        assert answers[name].tokens == expected_greedy(module, prompt, 10)


def test_prompts_that_go_on_are_packed_with_others(module: Any) -> None:
    """Chunks, a known beginning, and turns with rows that decode."""
    batch = make_batch(module, chunk_tokens=48, kv_tokens=2048, max_batch=8)
    long = [(5 * i) % 250 for i in range(100)]
    run(batch, request("seen", long[:60], max_tokens=2))
    texts = {"x": long, "y": [*long[:50], 7], "z": long[:3], "w": [*long[:60], 1, 2]} | PROMPTS
    answers = run(batch, *(request(n, p, max_tokens=12) for n, p in texts.items()), stagger=1)
    for name, prompt in texts.items():
        assert answers[name].tokens == expected_greedy(module, prompt, 12), name


@pytest.mark.parametrize("kind", ["raises_on", "nan_on"])
def test_who_fails_in_company_fails_alone(module: Any, kind: str) -> None:
    batch = make_batch(module, chunk_tokens=64)
    counted = Counted(module)
    setattr(counted, kind, 77)
    batch.module = counted
    bad = request("bad", [77, 1], max_tokens=10)
    answers = run(
        batch,
        request("a", PROMPTS["a"], max_tokens=10),
        bad,
        request("c", PROMPTS["c"], max_tokens=10),
    )
    assert isinstance(answers["bad"].end, Broke)
    for name in ("a", "c"):
        assert isinstance(answers[name].end, Done)
        assert answers[name].tokens == expected_greedy(module, PROMPTS[name], 10)


@pytest.mark.parametrize(
    ("family", "can"),
    [("falcon_alibi", False), ("gemma_2", False), ("llama_dynamic", False), ("mistral", True)],
)
def test_models_whose_layers_want_to_know_more_are_not_packed(
    family: str, can: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    module = tiny_models.reference(tiny_models.write(tmp_path_factory.mktemp(family), family))
    geometry = geometry_of(module)
    store = KVStore(FakePool(geometry.bytes_per_token * 16, 2), geometry)  # type: ignore[arg-type]
    assert can_pack(module, store) is can


def test_the_mask_lets_each_token_see_its_own_row_up_to_itself() -> None:
    config = tiny_models.FAMILIES["mistral"][1]()
    geometry = geometry_of(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    store = KVStore(FakePool(geometry.bytes_per_token * 32, 2), geometry)  # type: ignore[arg-type]
    view = PackedView(store, [Span(store.places(0), 0, 2), Span(store.places(1), 1, 3)])
    assert view.position_ids.tolist() == [[0, 1, 1, 2]]
    assert view.last.tolist() == [1, 3]
    assert view.attention_mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
