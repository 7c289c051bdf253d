"""The copy from host image to device: every byte, with any number of threads, and its trace."""

from collections.abc import Iterator

import pytest
import torch

from services.gpu_agent import transfer
from services.gpu_agent.device_cpu import PAGE_BYTES, CpuPool
from services.gpu_agent.host_image import HostImage, Weight, plan_layout

SIZES = {"embed": 3 * PAGE_BYTES, "layer.0": 70_001, "layer.1": 70_001, "norm": 1, "head": 5}


@pytest.fixture
def pool() -> Iterator[CpuPool]:
    pool = CpuPool(8)
    yield pool
    pool.close()


def filled_image() -> HostImage:
    image = HostImage(plan_layout(Weight(n, n, (s,), torch.uint8) for n, s in SIZES.items()))
    image.tensor.copy_(torch.randint(256, (image.layout.num_bytes,)).to(torch.uint8))
    return image


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_every_byte_arrives_and_every_group_is_timed(
    pool: CpuPool, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "PIECE_BYTES", 40_000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    image = filled_image()
    region = pool.reserve(image.layout.num_bytes)
    region.map(pool.take(pool.pages_for(image.layout.num_bytes)))
    for _ in range(20):
        region.tensor.fill_(0xAB)
        report = transfer.copy_in(pool, region, image)
        for slot in image.layout:
            assert torch.equal(slot.view(region.tensor), slot.view(image.tensor))
    assert [(layer.name, layer.num_bytes) for layer in report.layers] == list(SIZES.items())
    assert report.num_bytes == sum(SIZES.values())
    assert all(layer.copy_s >= 0 for layer in report.layers)
    assert 0 < sum(layer.copy_s for layer in report.layers) <= report.copy_s
    region.unmap()


def test_a_failing_copy_is_told_whichever_thread_meets_it(
    pool: CpuPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "PIECE_BYTES", 40_000)
    region = pool.reserve(1)
    with pytest.raises(ValueError, match="holds no pages"):
        transfer.copy_in(pool, region, filled_image())
