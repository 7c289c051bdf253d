"""The copy from host image to device: every byte, with any number of threads, and its trace."""

import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from services.gpu_agent.arrival import Arrival, cut
from services.gpu_agent.checksums import Checksums, Corruption
from services.gpu_agent.device_cpu import PAGE_BYTES, CpuPool
from services.gpu_agent.host_image import HostImage, Weight, plan_layout
from services.gpu_agent.pages import Region
from services.gpu_agent.transfer import Transfer, Verify

SIZES = {"embed": 3 * PAGE_BYTES, "layer.0": 70_001, "layer.1": 70_001, "norm": 1, "head": 5}


@pytest.fixture
def pool() -> Iterator[CpuPool]:
    pool = CpuPool(8)
    yield pool
    pool.close()


def filled_image() -> HostImage:
    image = HostImage(plan_layout(Weight(n, n, (s,), torch.uint8) for n, s in SIZES.items()))
    image.tensor.copy_(torch.randint(256, (image.layout.num_bytes,)).to(torch.uint8))
    image.checksums = Checksums.of(image.tensor, PAGE_BYTES)
    return image


def mapped(pool: CpuPool, image: HostImage) -> Region:
    region = pool.reserve(image.layout.num_bytes)
    region.map(pool.free.take(pool.pages_for(image.layout.num_bytes)))
    return region


def begin(
    pool: CpuPool,
    region: Region,
    image: HostImage,
    verify: Verify = "all",
    kept: tuple[int, ...] = (),
    piece_bytes: int = 40_000,
) -> tuple[Transfer, Arrival]:
    num_pages = pool.pages_for(image.layout.num_bytes)
    is_kept = np.isin(np.arange(num_pages), kept)
    pieces = cut(image.layout, is_kept, PAGE_BYTES, piece_bytes)
    arrival = Arrival(pieces, image.layout.num_bytes, lambda: False)
    job = Transfer(pool, region, image, arrival, verify, lambda: None)
    return job, arrival


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_every_byte_arrives_and_every_group_is_timed(
    pool: CpuPool, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    image = filled_image()
    region = mapped(pool, image)
    for _ in range(20):
        region.tensor.fill_(0xAB)
        job, arrival = begin(pool, region, image)
        job.start()
        arrival.wait_until_over()
        assert arrival.error is None
        assert arrival.is_whole
        for slot in image.layout:
            assert torch.equal(slot.view(region.tensor), slot.view(image.tensor))
    report = job.report()
    assert [layer.name for layer in report.layers] == list(SIZES)
    assert all(0 <= layer.num_bytes - SIZES[layer.name] < 256 for layer in report.layers)
    assert report.num_bytes == sum(layer.num_bytes for layer in report.layers)
    assert report.num_bytes == image.layout.num_bytes  # with the gaps between groups
    assert all(layer.copy_s >= 0 for layer in report.layers)
    assert 0 < sum(layer.copy_s for layer in report.layers) <= report.copy_s
    region.unmap()


def test_kept_pages_are_not_copied(pool: CpuPool) -> None:
    image = filled_image()
    region = mapped(pool, image)
    region.tensor.fill_(0xAB)
    job, arrival = begin(pool, region, image, "off", kept=(0, 2))
    assert arrival.watermark == PAGE_BYTES
    job.start()
    arrival.wait_until_over()
    assert arrival.is_whole
    assert bool((region.tensor[:PAGE_BYTES] == 0xAB).all())
    assert torch.equal(
        region.tensor[PAGE_BYTES : 2 * PAGE_BYTES], image.tensor[PAGE_BYTES : 2 * PAGE_BYTES]
    )
    assert bool((region.tensor[2 * PAGE_BYTES : 3 * PAGE_BYTES] == 0xAB).all())
    assert job.report().num_bytes == image.layout.num_bytes - 2 * PAGE_BYTES
    region.unmap()


def test_a_failing_copy_is_told_whichever_thread_meets_it(pool: CpuPool) -> None:
    job, arrival = begin(pool, pool.reserve(1), filled_image())
    job.start()
    arrival.wait_until_over()
    assert isinstance(arrival.error, ValueError)
    assert "holds no pages" in str(arrival.error)


@pytest.mark.parametrize("where", [0, 2 * PAGE_BYTES + 17, 3 * PAGE_BYTES + 140_002])
def test_a_flipped_bit_in_the_host_image_is_found(pool: CpuPool, where: int) -> None:
    image = filled_image()
    region = mapped(pool, image)
    image.tensor[where] ^= 4
    job, arrival = begin(pool, region, image)
    job.start()
    arrival.wait_until_over()
    assert isinstance(arrival.error, Corruption)
    assert f"page {where // PAGE_BYTES} " in str(arrival.error)
    assert arrival.error.check == "page"
    region.unmap()


def test_one_page_is_sampled(pool: CpuPool, monkeypatch: pytest.MonkeyPatch) -> None:
    image = filled_image()
    region = mapped(pool, image)
    checked: list[int] = []
    check = Checksums.check

    def spy(self: Checksums, page: int, content: torch.Tensor, where: str) -> None:
        checked.append(page)
        check(self, page, content, where)

    monkeypatch.setattr(Checksums, "check", spy)
    for _ in range(60):
        job, arrival = begin(pool, region, image, "sampled", piece_bytes=PAGE_BYTES)
        job.start()
        arrival.wait_until_over()
    assert len(checked) == 60
    assert set(checked) == {0, 1, 2, 3}
    region.unmap()


def test_a_transfer_that_is_called_off_stops_at_the_next_piece(pool: CpuPool) -> None:
    pool.link_bytes_per_s = 4e6  # a piece of 40 kB takes 10 ms
    image = filled_image()
    region = mapped(pool, image)
    job, arrival = begin(pool, region, image)
    job.start()
    arrival.wait_for(80_000)
    arrival.call_off()
    began = time.perf_counter()
    arrival.wait_until_over()
    assert not arrival.is_whole
    report = job.report()
    # A second's worth of pieces was still to come.
    assert 80_000 <= report.num_bytes < sum(SIZES.values()) / 2
    assert time.perf_counter() - began < report.copy_s + 1
    complete, written = arrival.fate_of_pages(4, PAGE_BYTES)
    assert complete.tolist() == [False] * 4
    assert written.tolist() == [True, False, False, False]
    region.unmap()


def test_one_swap_in_at_a_time_has_the_link(pool: CpuPool) -> None:
    image = filled_image()
    region = mapped(pool, image)
    job, arrival = begin(pool, region, image)
    with pool.link:
        job.start()
        before = arrival.watermark
    arrival.wait_until_over()
    assert (before, arrival.watermark) == (0, image.layout.num_bytes)
    region.unmap()
