"""Swap-ins that are called off, fail, or wait for the link: what is kept, and who lost nothing."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from services.gpu_agent import transfer
from services.gpu_agent.checksums import Corruption
from services.gpu_agent.device_cpu import PAGE_BYTES, CpuPool, CpuRegion
from services.gpu_agent.hosted import HostedModel
from services.gpu_agent.pages import DeviceError
from services.gpu_agent.transfer import Transfer
from tests.unit import tiny_models
from tests.unit.swap_kit import PATIENCE_S, load, num_hooks

IDS = tiny_models.prompt(12)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[CpuPool]:
    monkeypatch.setitem(transfer.PIECE_BYTES, "cpu", 300_000)  # pages in several pieces
    pool = CpuPool(20)
    yield pool
    pool.close()


class StopAt:
    """Holds the copy back before piece ``number`` until `go`; `reached` tells when it is there."""

    def __init__(self, patch: pytest.MonkeyPatch, pool: CpuPool) -> None:
        pool.link_bytes_per_s = 1e15  # one thread, in order
        self.number = -1
        self.reached = threading.Event()
        self.go = threading.Event()
        copy = Transfer._copy_piece

        def stop(job: Transfer, number: int) -> int:
            if number == self.number:
                self.reached.set()
                assert self.go.wait(PATIENCE_S)
            return copy(job, number)

        patch.setattr(Transfer, "_copy_piece", stop)

    def call_off(self, model: HostedModel, number: int) -> int:
        """Begin to swap ``model`` in and call it off in piece ``number``; returns bytes copied."""
        self.number = number
        self.reached.clear()
        self.go.clear()
        model.begin_swap_in()
        pieces = model._arriving().arrival.pieces
        assert self.reached.wait(PATIENCE_S)
        arrival = model._arriving().arrival
        call_off = arrival.call_off

        def call_off_and_go() -> None:
            call_off()
            self.go.set()

        arrival.call_off = call_off_and_go  # type: ignore[method-assign]
        trace = model.call_off_swap_in()
        self.number = -1
        assert trace.num_bytes == sum(p.end - p.start for p in pieces[: number + 1])
        return trace.num_bytes


def expected_of(model: HostedModel) -> torch.Tensor:
    return tiny_models.logits(tiny_models.reference(model.folder), IDS)


def test_called_off_anywhere_nothing_is_lost_nor_copied_twice(
    tmp_path: Path, pool: CpuPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = StopAt(monkeypatch, pool)
    models = [load(tmp_path, pool, name, "all") for name in ("large_llama", "large_qwen2")]
    expected = [expected_of(model) for model in models]
    weights = [model.facts.weight_bytes // PAGE_BYTES for model in models]
    chance = random.Random(3)
    for round_ in range(24):
        first = chance.randrange(2)
        one, other = models[first], models[1 - first]
        # ``other`` has left, whole or in part.
        other.swap_in()
        assert torch.equal(tiny_models.logits(other.module, IDS), expected[1 - first])
        other.swap_out()
        kept_of_other = other.cached_bytes
        assert kept_of_other == other.facts.weight_bytes
        kept_of_one = one.cached_bytes
        num_pieces = _count_pieces(one, pool)
        number = chance.randrange(num_pieces)
        copied = stop.call_off(one, number)
        assert (one.state, one.kv_pages, num_hooks(one.module)) == ("host", (), 0)
        assert pool.free.num_free == pool.num_pages
        pool.free.validate()
        # 1. What arrived is kept but for the page that was cut short.
        gained = one.cached_bytes - kept_of_one
        assert copied - 2 * PAGE_BYTES < gained <= copied + PAGE_BYTES
        # 2. What was not written to is still the other's: page by page.
        lost = kept_of_other - other.cached_bytes
        assert lost <= copied + 2 * PAGE_BYTES
        if number == 0:
            assert lost <= PAGE_BYTES
        # 3. Either may come next, and copies what is missing, no more.
        which = chance.randrange(2)
        model = models[which]
        missing = weights[which] - model.cached_bytes // PAGE_BYTES
        trace = model.swap_in()
        assert trace.num_bytes <= missing * PAGE_BYTES
        assert trace.num_bytes + trace.kept_bytes == model.layout.num_bytes
        assert trace.num_bytes > (missing - 1) * PAGE_BYTES
        assert torch.equal(tiny_models.logits(model.module, IDS), expected[which]), round_
        model.swap_out()
    for model in models:
        model.close()
    pool.free.validate()
    assert pool.free.num_free == pool.num_pages


def _count_pieces(model: HostedModel, pool: CpuPool) -> int:
    """How many pieces its swap-in would copy now."""
    with pool.link:
        model.begin_swap_in()
        count = len(model._arriving().arrival.pieces)
        model.call_off_swap_in()
    return count


def test_a_victim_is_restored_for_free_where_the_newcomer_did_not_get_to_it(
    tmp_path: Path, pool: CpuPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = StopAt(monkeypatch, pool)
    victim, newcomer = (load(tmp_path, pool, name) for name in ("large_llama", "large_qwen2"))
    expected = expected_of(victim)
    victim.swap_in()
    victim.swap_out()
    # The newcomer needs the free pages and some of the victim's, which it takes last.
    stop.call_off(newcomer, 1)
    assert victim.cached_bytes == victim.facts.weight_bytes
    trace = victim.swap_in()
    assert (trace.num_bytes, trace.kept_bytes) == (0, victim.layout.num_bytes)
    assert trace.layers
    assert torch.equal(tiny_models.logits(victim.module, IDS), expected)
    victim.close()
    newcomer.close()


def test_a_swap_in_that_is_over_is_called_off_without_loss(tmp_path: Path, pool: CpuPool) -> None:
    model = load(tmp_path, pool, "large_llama")
    over = threading.Event()
    model.begin_swap_in(on_over=over.set)
    assert over.wait(PATIENCE_S)
    assert model.is_swap_in_over
    model.call_off_swap_in()
    assert model.cached_bytes == model.facts.weight_bytes
    assert model.swap_in().num_bytes == 0
    model.close()


def test_one_that_waits_for_the_link_is_called_off_at_once(tmp_path: Path, pool: CpuPool) -> None:
    model = load(tmp_path, pool, "llama")
    with pool.link:  # another swap-in copies
        model.begin_swap_in()
        trace = model.call_off_swap_in()
        assert (trace.num_bytes, model.state) == (0, "host")
    pool.free.validate()
    assert model.swap_in().num_bytes == model.layout.num_bytes
    model.close()


def test_corruption_is_told_even_when_called_off(tmp_path: Path, pool: CpuPool) -> None:
    model = load(tmp_path, pool, "llama", "all")
    assert model._image is not None
    model._image.tensor[5] ^= 1
    over = threading.Event()
    model.begin_swap_in(on_over=over.set)
    assert over.wait(PATIENCE_S)
    with pytest.raises(Corruption, match=r"page 0 .* on the device"):
        model.call_off_swap_in()
    assert (model.state, pool.free.num_free, model.cached_bytes) == ("cold", 20, 0)
    model.load(lambda *_: None)
    model.swap_in()
    assert torch.equal(tiny_models.logits(model.module, IDS), expected_of(model))
    model.close()


@pytest.mark.parametrize("fails", ["map", "copy"])
def test_after_a_failure_all_pages_are_free_and_nothing_bad_is_kept(
    tmp_path: Path, pool: CpuPool, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    victim, model = load(tmp_path, pool, "large_llama"), load(tmp_path, pool, "large_qwen2")
    victim.swap_in()
    victim.swap_out()

    def refuse(*_: object) -> None:
        raise DeviceError("no")

    with monkeypatch.context() as patch:
        patch.setattr(CpuRegion, "map" if fails == "map" else "copy_in", refuse)
        with pytest.raises(DeviceError, match="no"):
            model.swap_in()
    assert (model.state, model.kv_pages, model.cached_bytes) == ("host", (), 0)
    assert pool.free.num_free == pool.num_pages
    pool.free.validate()
    if fails == "map":  # nothing was written to
        assert victim.cached_bytes == victim.facts.weight_bytes
    expected = [expected_of(each) for each in (victim, model)]
    for each, logits in zip((victim, model), expected, strict=True):
        each.swap_in()
        assert torch.equal(tiny_models.logits(each.module, IDS), logits)
        each.swap_out()
    victim.close()
    model.close()


def test_calls_out_of_place_are_refused(tmp_path: Path, pool: CpuPool) -> None:
    model = load(tmp_path, pool, "llama")
    calls: list[Callable[[], object]] = [model.end_swap_in, model.call_off_swap_in]
    for call in calls:
        with pytest.raises(ValueError, match="is host, not arriving"):
            call()
    with pool.link:
        model.begin_swap_in()
        with pytest.raises(ValueError, match="is arriving: only a host image swaps in"):
            model.begin_swap_in()
        with pytest.raises(ValueError, match="is arriving, not resident"):
            model.swap_out()
        with pytest.raises(ValueError, match="is arriving: swap it out first"):
            model.unload()
        with pytest.raises(ValueError, match="is arriving: there is nothing to check"):
            model.verify()
        model.close()
    assert pool.free.num_free == pool.num_pages


def test_a_paced_link_is_as_slow_as_it_says(tmp_path: Path, pool: CpuPool) -> None:
    model = load(tmp_path, pool, "llama", "off")
    pool.link_bytes_per_s = model.layout.num_bytes / 0.1
    began = time.perf_counter()
    trace = model.swap_in()
    assert time.perf_counter() - began >= trace.copy_s >= 0.1
    model.close()
