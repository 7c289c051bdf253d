"""The raw copy rate from host memory into the pool's memory: what no swap-in can beat.

Best of five single copies, of as many bytes as a middling model has, from memory like a host
image's. Measured once, when the worker starts; every swap's trace is compared with it.
"""

import ctypes
import mmap
import time
from contextlib import suppress
from typing import Final

import torch

from services.gpu_agent.pages import DeviceError, PagePool, Region

NUM_COPIES: Final = 5
MOST_BYTES: Final = {"cpu": 128 * 2**20, "cuda": 2 * 2**30}


def measure(pool: PagePool) -> float:
    """GB/s (10^9 bytes). The pool is as it was before."""
    num_pages = min(pool.free.num_free, MOST_BYTES[pool.kind] // pool.page_bytes)
    num_bytes = num_pages * pool.page_bytes
    region = pool.reserve(num_bytes)
    pages = pool.free.take(num_pages)
    source = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        source.madvise(mmap.MADV_HUGEPAGE)
    data = torch.frombuffer(source, dtype=torch.uint8)
    ctypes.memset(data.data_ptr(), 1, num_bytes)
    is_pinned = False
    try:
        region.map(pages)
        with suppress(DeviceError):
            is_pinned = pool.pin_host(data.data_ptr(), num_bytes)
        best_s = min(_copy_s(pool, region, data) for _ in range(NUM_COPIES))
    finally:
        if is_pinned:
            pool.unpin_host(data.data_ptr())
        if region.is_mapped:
            region.unmap()
        pool.free.give(pages)
        region.release()
    return num_bytes / best_s / 1e9


def _copy_s(pool: PagePool, region: Region, data: torch.Tensor) -> float:
    began = time.perf_counter()
    region.copy_in(0, data)
    pool.stamp().wait()
    return time.perf_counter() - began
