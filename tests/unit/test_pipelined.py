"""Forwards that run while their weights arrive, against transformers' own, bit for bit."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from services.gpu_agent.arrival import Arrival, ArrivalEnded, ForwardAbandoned
from services.gpu_agent.canary import Canary
from services.gpu_agent.device_cpu import CpuPool
from tests.unit import tiny_models
from tests.unit.swap_kit import PATIENCE_S, InStep, load, noting, num_hooks, scribble

NUM_PAGES = 3


@pytest.fixture
def pool() -> Iterator[CpuPool]:
    pool = CpuPool(NUM_PAGES)
    pages = pool.free.take(NUM_PAGES)
    scribble(pool, pages)  # whatever is computed with too early is wrong
    pool.free.give(pages)
    yield pool
    pool.close()


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_forward_waits_for_every_group(
    tmp_path: Path, pool: CpuPool, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tmp_path, pool, family)
    ids = tiny_models.prompt()
    expected = tiny_models.logits(tiny_models.reference(model.folder), ids)
    step = InStep(monkeypatch, pool)
    model.begin_swap_in(step.interrupted)
    assert num_hooks(model.module) > 0
    found = tiny_models.logits(model.module, ids)
    assert model.state == "arriving"
    assert step.num_waits >= len(model.layout.groups) - 1  # a piece may run ahead
    step.let_go()
    trace = model.end_swap_in()
    assert torch.equal(found, expected)
    assert trace.num_bytes == model.layout.num_bytes
    assert num_hooks(model.module) == 0
    assert torch.equal(tiny_models.logits(model.module, ids), expected)
    model.close()


def test_a_forward_overlaps_with_a_slow_link(tmp_path: Path, pool: CpuPool) -> None:
    model = load(tmp_path, pool, "llama", "off")
    ids = tiny_models.prompt()
    expected = tiny_models.logits(tiny_models.reference(model.folder), ids)
    pool.link_bytes_per_s = model.layout.num_bytes / 0.2
    seen: list[int] = []  # how much was there, whenever a layer had run
    model.begin_swap_in()
    arrival = model._arriving().arrival
    hooks = [
        layer.register_forward_hook(lambda *_: seen.append(arrival.watermark))
        for layer in model.module.model.layers  # type: ignore[union-attr]
    ]
    assert torch.equal(tiny_models.logits(model.module, ids), expected)
    for hook in hooks:
        hook.remove()
    trace = model.end_swap_in()
    groups = {group.name: group for group in model.layout.groups}
    assert seen[0] >= groups["layer.0"].offset + groups["layer.0"].num_bytes
    assert seen[1] >= groups["layer.1"].offset + groups["layer.1"].num_bytes
    assert trace.copy_s >= 0.19
    assert trace.first_layer_s <= trace.copy_s * 0.7
    model.close()


def test_without_its_guards_a_forward_is_wrong(
    tmp_path: Path, pool: CpuPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests above would see it."""
    model = load(tmp_path, pool, "llama", "off")
    ids = tiny_models.prompt()
    expected = tiny_models.logits(tiny_models.reference(model.folder), ids)
    with pool.link:
        model.begin_swap_in()
        with monkeypatch.context() as patch:
            patch.setattr(Arrival, "wait_for", lambda *_: None)
            model._arriving()._hooks.close()
            assert not torch.equal(tiny_models.logits(model.module, ids), expected)
    model.end_swap_in()
    assert torch.equal(tiny_models.logits(model.module, ids), expected)
    model.close()


def test_an_abandoned_forward_runs_again(tmp_path: Path, pool: CpuPool) -> None:
    model = load(tmp_path, pool, "qwen2", "off")
    ids = tiny_models.prompt()
    expected = tiny_models.logits(tiny_models.reference(model.folder), ids)
    asked: list[int] = []

    def interrupted() -> bool:
        asked.append(1)
        return True

    with pool.link:
        model.begin_swap_in(interrupted)
        for number in (1, 2):
            with pytest.raises(ForwardAbandoned):
                tiny_models.logits(model.module, ids)
            assert len(asked) == number
        assert model.state == "arriving"
    assert model.end_swap_in().num_bytes == model.layout.num_bytes
    assert torch.equal(tiny_models.logits(model.module, ids), expected)
    assert len(asked) == 2
    model.close()


def test_a_waiting_forward_ends_with_the_copy_that_fails(
    tmp_path: Path, pool: CpuPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tmp_path, pool, "llama")
    waits = threading.Event()
    fails = OSError("the bus fell off")

    def fail(*_: object) -> int:
        assert waits.wait(PATIENCE_S)
        raise fails

    with monkeypatch.context() as patch:
        patch.setattr("services.gpu_agent.transfer.Transfer._copy_piece", fail)
        model.begin_swap_in(noting(waits))
        with pytest.raises(ArrivalEnded):
            tiny_models.logits(model.module, tiny_models.prompt())
        with pytest.raises(OSError, match="the bus fell off"):
            model.end_swap_in()
    assert (model.state, model.kv_pages, pool.free.num_free) == ("host", (), NUM_PAGES)
    assert num_hooks(model.module) == 0
    pool.free.validate()
    model.swap_in()
    model.close()


def test_the_canary_runs_while_arriving_and_is_repeated_once(
    tmp_path: Path, pool: CpuPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tmp_path, pool, "mistral", "sampled")
    forwards: list[str] = []
    forward = Canary._forward

    def noted(canary: Canary) -> torch.Tensor:
        forwards.append(model.state)
        return forward(canary)

    monkeypatch.setattr(Canary, "_forward", noted)
    step = InStep(monkeypatch, pool)
    model.begin_swap_in(step.interrupted)
    assert model.wants_canary
    model.run_canary()
    step.let_go()
    model.end_swap_in()
    assert forwards == ["arriving", "arriving"]  # the second one once all was there
    model.swap_out()
    model.swap_in()
    assert len(forwards) == 2
    model.close()


def test_a_canary_that_was_abandoned_has_not_run(tmp_path: Path, pool: CpuPool) -> None:
    model = load(tmp_path, pool, "mistral", "all")
    with pool.link:
        model.begin_swap_in(lambda: True)
        with pytest.raises(ForwardAbandoned):
            model.run_canary()
        assert model.wants_canary
    model.end_swap_in()
    model.close()
