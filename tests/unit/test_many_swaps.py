"""Hundreds of random swaps: not a bit of a logit differs, and nothing grows."""

import gc
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from schemas.state import ModelSpec
from services.gpu_agent.arrival import Arrival
from services.gpu_agent.device_cpu import PAGE_BYTES, CpuPool, CpuRegion
from services.gpu_agent.hosted import HostedModel
from services.gpu_agent.pages import runs
from tests.unit import tiny_models
from tests.unit.swap_kit import LARGER, leave_only, load, no_progress, num_hooks, scribble, write

IDS = tiny_models.prompt(12)


@pytest.fixture(autouse=True)
def _few_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Computing threads spin, and on a busy machine would take the cores from each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # that copy
    yield
    torch.set_num_threads(num_threads)


@dataclass
class Seen:
    """What happened over all swaps."""

    partial: int = 0  # some bytes kept and some copied
    whole: int = 0  # nothing kept
    scattered: int = 0  # mapped to many runs of pages
    overlapped: int = 0  # a forward had to wait for weights
    waits: int = 0


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    seen = Seen()
    wait_for, map_pages = Arrival.wait_for, CpuRegion.map

    def counted(arrival: Arrival, end: int) -> None:
        seen.waits += arrival.watermark < end
        wait_for(arrival, end)

    def looked_at(region: CpuRegion, pages: tuple[int, ...]) -> None:
        seen.scattered += len(list(runs(pages))) >= len(pages) // 3
        map_pages(region, pages)

    monkeypatch.setattr(Arrival, "wait_for", counted)
    monkeypatch.setattr(CpuRegion, "map", looked_at)
    return seen


def test_200_random_swaps_of_three_architectures(tmp_path: Path, seen: Seen) -> None:
    """Under a budget of 1.3 times the largest, on shuffled pages, with forwards in between."""
    described = CpuPool(1)
    footprints = []
    for family in LARGER:
        spec = ModelSpec(family, str(write(tmp_path / "described", family)))
        model = HostedModel.inspect(spec, described)
        footprints.append(model.facts.footprint_bytes // PAGE_BYTES)
        model.close()
    described.close()
    assert all(10 <= num_pages <= 20 for num_pages in footprints)

    pool = CpuPool(int(1.3 * max(footprints)))
    models = [load(tmp_path, pool, family) for family in LARGER]
    assert len({model.facts.architecture for model in models}) == 3
    expected = [tiny_models.logits(tiny_models.reference(m.folder), IDS) for m in models]
    chance = random.Random(11)
    resident: HostedModel | None = None
    last = 0
    held: list[int] = []  # pages of somebody else
    for number in range(200):
        if resident is not None:
            resident.swap_out()
        chance.shuffle(held)
        pool.free.give(held)
        which = chance.choice((last, last, 0, 1, 2))  # the one before comes back often
        last = models.index(resident) if resident else 0
        model = resident = models[which]
        spare = pool.num_pages - footprints[which]
        if chance.random() < 0.15:
            held = leave_only(pool, pool.num_pages - spare, chance)
        else:
            held = list(pool.free.take(chance.choice((0, 0, chance.randrange(spare + 1)))))
            scribble(pool, tuple(held))
        pool.free.validate()
        missing = model.facts.weight_bytes - model.cached_bytes
        runs_ahead = chance.random() < 0.5
        pool.link_bytes_per_s = max(missing, 1) / 0.03 if runs_ahead else 0.0
        before = seen.waits
        model.begin_swap_in()
        if runs_ahead:
            assert torch.equal(tiny_models.logits(model.module, IDS), expected[which]), number
        trace = model.end_swap_in()
        assert torch.equal(tiny_models.logits(model.module, IDS), expected[which]), number
        assert trace.num_bytes + trace.kept_bytes == model.layout.num_bytes
        assert missing - PAGE_BYTES < trace.num_bytes <= missing
        assert num_hooks(model.module) == 0
        pool.free.validate()
        used = footprints[which] + len(held)
        assert pool.free.num_free == pool.num_pages - used
        seen.overlapped += seen.waits > before
        seen.partial += trace.num_bytes > 0 and trace.kept_bytes > 0
        seen.whole += trace.kept_bytes == 0
    assert min(seen.partial, seen.whole, seen.scattered, seen.overlapped) >= 30, seen
    for model in models:
        model.close()
    pool.free.give(held)
    assert pool.free.num_free == pool.num_pages
    pool.close()


# -- nothing grows -----------------------------------------------------------------------


@dataclass
class Held:
    """What this process holds."""

    resident_bytes: int
    num_files: int
    num_mappings: int
    num_threads: int
    num_hooks: int

    @classmethod
    def now(cls, models: list[HostedModel]) -> "Held":
        for thread in threading.enumerate():
            if thread.name == "swap-in":
                thread.join()
        gc.collect()
        process = psutil.Process()
        return cls(
            process.memory_info().rss,
            process.num_fds(),
            len(Path("/proc/self/maps").read_text().splitlines()),
            process.num_threads(),
            sum(num_hooks(model.module) for model in models),
        )


def swap_at_random(pool: CpuPool, models: list[HostedModel], chance: random.Random) -> int:
    """One swap, now and then called off; returns 1 where it was of a part of the model."""
    model = chance.choice(models)
    others = pool.free.take(chance.randrange(3))
    model.begin_swap_in()
    partial = 0
    if chance.random() < 0.1:
        model.call_off_swap_in()
    else:
        trace = model.end_swap_in()
        partial = int(trace.num_bytes > 0 and trace.kept_bytes > 0)
        if chance.random() < 0.05:
            tiny_models.logits(model.module, IDS)
        model.swap_out()
    pool.free.give(chance.sample(others, len(others)))
    if chance.random() < 0.05:
        pool.free.give(leave_only(pool, pool.num_pages // 2, chance))
    return partial


@pytest.fixture
def models_of_all_sizes(tmp_path: Path) -> Iterator[tuple[CpuPool, list[HostedModel]]]:
    # Weights of 1, 16, 12 and 11 pages.
    pool = CpuPool(20)
    models = [load(tmp_path, pool, family) for family in ("qwen3", *LARGER)]
    yield pool, models
    for model in models:
        model.close()
    assert pool.free.num_free == pool.num_pages
    pool.close()


def test_1000_swaps_leave_nothing_behind(
    models_of_all_sizes: tuple[CpuPool, list[HostedModel]],
) -> None:
    pool, models = models_of_all_sizes
    chance = random.Random(17)
    for _ in range(100):
        swap_at_random(pool, models, chance)
    before = Held.now(models)
    partial = sum(swap_at_random(pool, models, chance) for _ in range(1000))
    after = Held.now(models)
    pool.free.validate()
    assert partial > 100
    assert (after.num_files, after.num_threads, after.num_hooks) == (
        before.num_files,
        before.num_threads,
        0,
    )
    # A page on its own is a mapping of its own, at home and in a region.
    assert after.num_mappings <= before.num_mappings + 3 * pool.num_pages
    # 8 KiB a swap would be twice as much.
    assert after.resident_bytes <= before.resident_bytes + 4 * 2**20, (before, after)
    for model in models:
        model.unload()
        model.load(no_progress)
