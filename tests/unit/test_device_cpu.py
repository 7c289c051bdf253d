"""The CPU pool on the real kernel: what moves, what stays, and what faults."""

import errno
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from services.gpu_agent import device, device_cpu
from services.gpu_agent.device_cpu import PAGE_BYTES, CpuPool
from services.gpu_agent.pages import DeviceError

NUM_PAGES = 12


@pytest.fixture
def pool() -> Iterator[CpuPool]:
    pool = CpuPool(NUM_PAGES)
    yield pool
    pool.close()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def fill(pool: CpuPool, page: int, value: int) -> None:
    pool.identity(torch.uint8)[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = value


def test_identity_views_share_the_pool(pool: CpuPool) -> None:
    assert pool.identity(torch.bfloat16).shape == (NUM_PAGES * PAGE_BYTES // 2,)
    pool.identity(torch.float32)[PAGE_BYTES // 4] = 1.0
    assert pool.identity(torch.uint8)[PAGE_BYTES : PAGE_BYTES + 4].tolist() == [0, 0, 128, 63]
    assert pool.identity(torch.uint8).data_ptr() % PAGE_BYTES == 0


def test_mapping_moves_pages_without_copying(pool: CpuPool) -> None:
    for page in range(NUM_PAGES):
        fill(pool, page, page + 1)
    region = pool.reserve(3 * PAGE_BYTES - 5)
    assert region.num_bytes == 3 * PAGE_BYTES
    region.map((7, 2, 3))
    assert region.tensor[::PAGE_BYTES].tolist() == [8, 3, 4]
    region.tensor[0] = 99
    assert region.unmap() == (7, 2, 3)
    assert int(pool.identity(torch.uint8)[7 * PAGE_BYTES]) == 99
    region.release()


def test_copy_in_lands_at_its_offset(pool: CpuPool) -> None:
    region = pool.reserve(2 * PAGE_BYTES)
    region.map(pool.free.take(2))
    region.tensor.zero_()
    source = torch.arange(1000).to(torch.uint8)
    region.copy_in(PAGE_BYTES - 300, source)
    assert torch.equal(region.tensor[PAGE_BYTES - 300 : PAGE_BYTES + 700], source)
    assert int(region.tensor.count_nonzero()) == int(source.count_nonzero())
    with pytest.raises(ValueError, match="do not fit"):
        region.copy_in(2 * PAGE_BYTES - 999, source)
    region.unmap()
    with pytest.raises(ValueError, match="map it first"):
        region.copy_in(0, source)


def test_misuse_is_refused(pool: CpuPool) -> None:
    region = pool.reserve(2 * PAGE_BYTES)
    with pytest.raises(ValueError, match="do not fill"):
        region.map((0,))
    with pytest.raises(ValueError, match="holds no pages"):
        region.unmap()
    region.map((0, 1))
    with pytest.raises(ValueError, match="already holds 2"):
        region.map((2, 3))
    with pytest.raises(ValueError, match="unmap it first"):
        region.release()
    region.unmap()
    region.release()


def test_resident_memory_and_mappings_stay_flat_over_random_cycles() -> None:
    with_pages = 64
    pool = CpuPool(with_pages)
    regions = [pool.reserve(size * PAGE_BYTES) for size in (20, 24, 28, 9)]
    addresses = [region.tensor.data_ptr() for region in regions]
    source = torch.full((28 * PAGE_BYTES,), 7, dtype=torch.uint8)
    chance = random.Random(3)
    held: dict[int, int] = {}

    def step() -> None:
        number = chance.randrange(len(regions))
        region = regions[number]
        if region.is_mapped:
            assert int(region.tensor[-1]) == held.pop(number)
            pool.free.give(region.unmap())
        elif region.num_bytes // PAGE_BYTES <= pool.free.num_free:
            region.map(pool.free.take(region.num_bytes // PAGE_BYTES))
            region.copy_in(0, source[: region.num_bytes])
            held[number] = chance.randrange(256)
            region.tensor[-1] = held[number]

    for _ in range(20):
        step()
    before = resident_bytes()
    for _ in range(300):
        step()
    assert abs(resident_bytes() - before) < 4 * 2**20
    assert [region.tensor.data_ptr() for region in regions] == addresses
    for region in regions:
        if region.is_mapped:
            pool.free.give(region.unmap())
    # Everything is home: the kernel sees one mapping again, or nearly.
    pool.identity(torch.uint8).fill_(1)
    first, last = pool.home.address, pool.home.address + pool.budget_bytes
    maps = Path("/proc/self/maps").read_text()
    starts = [int(line.split("-")[0], 16) for line in maps.splitlines()]
    assert sum(first <= start < last for start in starts) <= 3
    pool.close()


@pytest.mark.parametrize(
    "access",
    [
        "region.tensor[0].item()",  # swapped out
        "region.map((1, 2)); region.tensor[0].item(); region.unmap(); region.tensor[-1].item()",
        "region.map((1, 2)); pool.identity(torch.uint8)[2 * P].item()",  # left home
    ],
)
def test_use_after_swap_out_faults(access: str) -> None:
    script = f"""
        import torch
        from services.gpu_agent.device_cpu import PAGE_BYTES as P, CpuPool
        pool = CpuPool(4)
        region = pool.reserve(2 * P)
        region.map((0, 1)); region.tensor.fill_(1); region.unmap()
        print("alive", flush=True)
        {access}
        print("survived", flush=True)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "alive\n", done.stderr
    assert done.returncode == -signal.SIGSEGV


def test_a_refused_move_leaves_every_page_home(
    pool: CpuPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = device_cpu._mremap
    region = pool.reserve(3 * PAGE_BYTES)
    third = region.tensor.data_ptr() + 2 * PAGE_BYTES

    def refuse(source: int, target: int, size: int) -> int:
        return errno.ENOMEM if target == third else real(source, target, size)

    monkeypatch.setattr(device_cpu, "_mremap", refuse)
    with pytest.raises(DeviceError, match=r"mremap\(1 pages, 2097152 bytes\).*max_map_count"):
        region.map((1, 4, 8))
    assert not region.is_mapped
    pool.identity(torch.uint8).fill_(5)
    monkeypatch.undo()
    region.map((1, 4, 8))
    assert int(region.tensor.min()) == 5
    region.unmap()


def test_runs_that_the_kernel_will_not_move_at_once_go_page_by_page(
    pool: CpuPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = device_cpu._mremap

    def single_pages_only(source: int, target: int, size: int) -> int:
        return errno.EFAULT if size > PAGE_BYTES else real(source, target, size)

    monkeypatch.setattr(device_cpu, "_mremap", single_pages_only)
    for page in range(NUM_PAGES):
        fill(pool, page, page + 1)
    region = pool.reserve(4 * PAGE_BYTES)
    region.map((3, 4, 5, 9))
    assert region.tensor[::PAGE_BYTES].tolist() == [4, 5, 6, 10]
    region.unmap()
    assert pool.identity(torch.uint8)[::PAGE_BYTES].tolist() == list(range(1, NUM_PAGES + 1))


def test_a_kernel_without_mremap_is_refused_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_cpu, "_mremap", lambda *_: errno.EINVAL)
    with pytest.raises(DeviceError, match=r"mremap.*Invalid argument.*Linux 5\.7"):
        CpuPool(1)


def test_budgets_that_can_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match=r"more than the .* available"):
        CpuPool(2**40 // PAGE_BYTES * 64)
    with pytest.raises(ValueError, match="less than one page"):
        device.open_pool("cpu", PAGE_BYTES - 1)
    with pytest.raises(ValueError, match="multiple of 2 MiB"):
        device.open_pool("cpu", PAGE_BYTES, page_bytes=4096)


def test_open_pool_rounds_down_and_says_why_it_is_the_cpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device, "why_no_cuda", lambda _index: "NVML finds no NVIDIA driver")
    caplog.set_level("INFO")
    pool = device.open_pool("auto", 3 * PAGE_BYTES + 17)
    assert (pool.kind, pool.num_pages, pool.page_bytes) == ("cpu", 3, PAGE_BYTES)
    assert "device: cpu, because NVML finds no NVIDIA driver" in caplog.text
    pool.close()
    with pytest.raises(DeviceError, match='"cuda" was asked for, but NVML finds no'):
        device.open_pool("cuda", PAGE_BYTES)
