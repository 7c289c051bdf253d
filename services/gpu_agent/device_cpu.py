"""The CPU as a device: a page pool in host memory whose pages move by page table entry.

One anonymous private mapping is created and touched once. Putting a page into a region moves
its page table entries there (``mremap``), no byte is copied, and the range it left becomes
inaccessible at once:

    before   home [p0][p1][p2][p3]     region [----][----]        ---- PROT_NONE: faults
    map      home [p0][--][--][p3]     region [ p1 ][ p2 ]        one mremap per run of pages
    unmap    home [p0][p1][p2][p3]     region [----][----]

Why not a memory file mapped twice: fixed mappings of a file cost 4 to 6 times a plain copy
(every page faults again after each map), and a swapped-out range would have to be unmapped
from two places. Moving page tables costs microseconds per run and keeps huge pages huge.

``MREMAP_DONTUNMAP`` leaves the source range in place, empty, so that no other thread's
allocation can slip into it before it is made inaccessible. It needs Linux 5.7.
"""

import ctypes
import errno
import os
import time
from pathlib import Path
from typing import Final

import psutil
import torch

from services.gpu_agent.pages import DeviceError, PagePool, Region, Stamp, runs

PAGE_BYTES: Final = 2 * 2**20  # one huge page: moved by one entry, and TLB-friendly

_PROT_NONE, _PROT_RW = 0, 3
_MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS, _MAP_NORESERVE = 0x02, 0x10, 0x20, 0x4000
_MREMAP_MAYMOVE, _MREMAP_FIXED, _MREMAP_DONTUNMAP = 1, 2, 4
_MADV_DONTFORK, _MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 10, 14, 23
_MAP_FAILED: Final = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_void_p,
]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class CpuPool(PagePool):
    """``num_pages`` of host memory behind the pool interface.

    Raises DeviceError where the memory is not there or the kernel can not move pages.
    """

    kind = "cpu"
    torch_device = torch.device("cpu")

    def __init__(self, num_pages: int, page_bytes: int = PAGE_BYTES) -> None:
        if num_pages < 1 or page_bytes < 1 or page_bytes % PAGE_BYTES:
            raise ValueError(
                f"{num_pages} pages of {page_bytes} bytes: the pool needs at least one page, and "
                f"pages of a multiple of {PAGE_BYTES} bytes"
            )
        super().__init__(page_bytes, num_pages)
        self.device_name = _cpu_name()
        _check_memory(self.budget_bytes)
        _check_mremap()
        self.home = _Range(self.budget_bytes, _PROT_RW)
        try:
            self._make_resident()
        except DeviceError:
            self.home.free()
            raise
        self._bytes = _tensor_at(self.home.address, self.budget_bytes)

    def _make_resident(self) -> None:
        address, size = self.home.address, self.budget_bytes
        # Advice only: without huge pages everything works, with slower moves and copies.
        _libc.madvise(address, size, _MADV_HUGEPAGE)
        # A forked child would get every page copied on write: twice the budget.
        _libc.madvise(address, size, _MADV_DONTFORK)
        # Touch all now, because copying into untouched memory runs at a fraction of the speed.
        if _libc.madvise(address, size, _MADV_POPULATE_WRITE) != 0:
            code = ctypes.get_errno()
            if code != errno.EINVAL:  # EINVAL: Linux before 5.14 does not know it
                raise _refused(f"madvise(POPULATE_WRITE, {size} bytes)", code)
            ctypes.memset(address, 0, size)

    def identity(self, dtype: torch.dtype) -> torch.Tensor:
        return self._bytes.view(dtype)

    def reserve(self, num_bytes: int) -> "CpuRegion":
        if num_bytes < 1:
            raise ValueError(f"can not reserve {num_bytes} bytes")
        return CpuRegion(self, self.pages_for(num_bytes) * self.page_bytes)

    def stamp(self) -> Stamp:
        return _ClockStamp()

    def close(self) -> None:
        self.copiers.shutdown()
        self.home.free()


class CpuRegion(Region):
    """A range of addresses that pages of a ``CpuPool`` are moved into."""

    def __init__(self, pool: CpuPool, num_bytes: int) -> None:
        self._pool = pool
        self._pages: tuple[int, ...] = ()
        self._range = _Range(num_bytes, _PROT_NONE)
        self.num_bytes = num_bytes
        self.is_mapped = False
        self.tensor = _tensor_at(self._range.address, num_bytes)

    def map(self, pages: tuple[int, ...]) -> None:
        self._check_map(pages, self._pool.page_bytes)
        done: list[tuple[int, int, int]] = []
        try:
            for position, page, length in runs(pages):
                self._move(position, page, length, into_region=True)
                done.append((position, page, length))
        except DeviceError:
            for position, page, length in done:
                self._move(position, page, length, into_region=False)
            raise
        self._pages, self.is_mapped = pages, True

    def unmap(self) -> tuple[int, ...]:
        self._check_is_mapped()
        pages = self._pages
        self._pages, self.is_mapped = (), False
        for position, page, length in runs(pages):
            self._move(position, page, length, into_region=False)
        return pages

    def _move(self, position: int, page: int, length: int, *, into_region: bool) -> None:
        page_bytes = self._pool.page_bytes
        home = self._pool.home.address + page * page_bytes
        here = self._range.address + position * page_bytes
        source, target = (home, here) if into_region else (here, home)
        _move_pages(source, target, length, page_bytes)

    def copy_in(self, offset: int, source: torch.Tensor) -> None:
        self._check_copy(offset, source)
        # Not Tensor.copy_: it forks into as many threads as torch has, and loses to one plain
        # memmove as soon as those threads' cores are shared.
        ctypes.memmove(self._range.address + offset, source.data_ptr(), source.numel())

    def read(self, offset: int, num_bytes: int) -> torch.Tensor:
        self._check_read(offset, num_bytes, self._pool.page_bytes)
        return self.tensor[offset : offset + num_bytes]

    def release(self) -> None:
        self._check_release()
        self._range.free()


class _ClockStamp(Stamp):
    """Copies are synchronous, so the wall clock tells."""

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def wait(self) -> None:
        pass

    def order_compute(self) -> None:
        pass

    def seconds_since(self, earlier: Stamp) -> float:
        assert isinstance(earlier, _ClockStamp)
        return self._at - earlier._at


class _Range:
    """Addresses of our own, aligned to huge pages, mapped private and anonymous."""

    def __init__(self, num_bytes: int, protection: int) -> None:
        self._size = num_bytes + PAGE_BYTES  # room to align
        self._base = _map_anonymous(None, self._size, protection)
        self.address = -(-self._base // PAGE_BYTES) * PAGE_BYTES

    def free(self) -> None:
        """Idempotent."""
        if self._size:
            _libc.munmap(self._base, self._size)
            self._size = 0


def _map_anonymous(at: int | None, num_bytes: int, protection: int) -> int:
    # NORESERVE: moving a range doubles its charge for a moment, which strict accounting refuses.
    flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE | (_MAP_FIXED if at is not None else 0)
    address = _libc.mmap(at, num_bytes, protection, flags, -1, 0)
    if address in (None, _MAP_FAILED):
        raise _refused(f"mmap({num_bytes} bytes)", ctypes.get_errno())
    return int(address)


def _move_pages(source: int, target: int, count: int, page_bytes: int) -> None:
    """Move ``count`` pages' table entries and close the source range.

    All or nothing: on DeviceError every page is where it was.
    """
    size = count * page_bytes
    code = _mremap(source, target, size)
    if code in (errno.EFAULT, errno.EINVAL) and count > 1:
        # The run spans several mappings of the kernel's: it moves only one at a time.
        for index in range(count):
            step = index * page_bytes
            code = _mremap(source + step, target + step, page_bytes)
            if code:
                for back in range(index):
                    _mremap(target + back * page_bytes, source + back * page_bytes, page_bytes)
                break
    if code:
        raise _refused(f"mremap({count} pages, {size} bytes)", code)
    # A fresh mapping, rather than mprotect on what was left: it merges with its neighbours, so
    # the number of kernel mappings does not grow with the number of swaps.
    _map_anonymous(source, size, _PROT_NONE)


def _mremap(source: int, target: int, size: int) -> int:
    """0, or the errno."""
    flags = _MREMAP_MAYMOVE | _MREMAP_FIXED | _MREMAP_DONTUNMAP
    if _libc.mremap(source, size, size, flags, target) in (None, _MAP_FAILED):
        return ctypes.get_errno()
    return 0


def _refused(call: str, code: int) -> DeviceError:
    remedy = {
        errno.ENOMEM: "out of memory or of mappings: lower the budget, or raise vm.max_map_count",
        errno.EPERM: "not permitted: a sandbox or seccomp profile forbids it",
    }.get(code, "the CPU device needs Linux 5.7 or newer")
    return DeviceError(f"{call} failed: {os.strerror(code)} (errno {code}); {remedy}")


def _check_mremap() -> None:
    """Try one move, so that a kernel without it is refused at start and not at the first swap."""
    source, target = _Range(PAGE_BYTES, _PROT_RW), _Range(PAGE_BYTES, _PROT_NONE)
    try:
        ctypes.memset(source.address, 1, 1)
        _move_pages(source.address, target.address, 1, PAGE_BYTES)
        if ctypes.string_at(target.address, 1) != b"\x01":
            raise DeviceError(
                "mremap(MREMAP_DONTUNMAP) lost the page's content on this kernel: the CPU device "
                "needs a Linux kernel 5.7 or newer that can move anonymous memory"
            )
    finally:
        source.free()
        target.free()


def _check_memory(budget_bytes: int) -> None:
    """Refuse a budget that would bring the out-of-memory killer."""
    available = available_bytes()
    if budget_bytes > available:
        raise DeviceError(
            f"a memory budget of {budget_bytes} bytes is more than the {available} bytes that are "
            "available: lower the budget or free memory"
        )


def available_bytes() -> int:
    """Host memory that may still be taken."""
    available = psutil.virtual_memory().available
    try:  # in a container its own limit counts, not the machine's memory
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        available = min(available, max(limit - used, 0))
    except (OSError, ValueError):
        pass
    return available


def _tensor_at(address: int, num_bytes: int) -> torch.Tensor:
    """uint8 (num_bytes,) over raw memory; reads nothing. The caller keeps the memory mapped."""
    buffer = (ctypes.c_uint8 * num_bytes).from_address(address)
    return torch.frombuffer(buffer, dtype=torch.uint8)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return "CPU"
