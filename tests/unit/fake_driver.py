"""A stand-in for ``cuda.bindings.driver``: the same calls and results, over host memory.

It keeps the rules that the driver documents: handles are mapped whole into reserved ranges at
multiples of the granularity, never over a mapped range; memory is usable only after
cuMemSetAccess; a range is freed only when nothing is mapped in it; asynchronous copies read
host memory when the stream is synchronised, not before. Every call is recorded.

A page is a stretch of one memory file, so that the same page seen through two mappings is
really the same memory. It does not run on, or prove anything about, a GPU.
"""

import ctypes
import enum
import mmap
import os
import threading
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final

from services.gpu_agent import device_cpu

GRANULARITY: Final = 2 * 2**20
_PROT_RW, _MAP_SHARED_FIXED = 3, 0x11


class Result(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_CONTEXT = 201


@dataclass
class Mapping:
    num_bytes: int
    page: int
    accessible: bool = False


class FakeDriver:
    """See the module. ``calls``: (name, arguments) in order; ``fail``: name -> nth call, result."""

    CUresult = Result
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM=0)
    CU_MEMHOSTREGISTER_READ_ONLY = 8
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)

    def __init__(self, capacity_bytes: int) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.fail: dict[str, tuple[int, Result]] = {}
        self.capacity_bytes = capacity_bytes
        self.pages: dict[int, int] = {}  # handle -> bytes
        self.ranges: dict[int, int] = {}  # address -> bytes
        self.mappings: dict[int, Mapping] = {}  # address -> what is mapped there
        self.pinned: dict[int, int] = {}
        self.events = 0
        self.contexts = 0
        self._next = 0
        self._queued: list[tuple[int, int, int]] = []
        self._copying = threading.Lock()
        self._recorded: set[int] = set()
        self._memory = os.memfd_create("fake-gpu")

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, arguments))
            at, result = self.fail.get(name, (0, Result.CUDA_SUCCESS))
            if at == sum(called == name for called, _ in self.calls) and at:
                return (result,) if name in _NO_VALUE else (result, None)
            try:
                returned = getattr(self, f"_{name}")(*arguments)
            except ValueError:
                return (Result.CUDA_ERROR_INVALID_VALUE, None)
            return (Result.CUDA_SUCCESS, *returned)

        return call

    def count(self, name: str) -> int:
        return sum(called == name for called, _ in self.calls)

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def close(self) -> None:
        os.close(self._memory)

    def CUmemAllocationProp(self) -> Any:  # noqa: N802 - the driver's name
        return SimpleNamespace(type=None, location=SimpleNamespace(type=None, id=None))

    def CUmemAccessDesc(self) -> Any:  # noqa: N802 - the driver's name
        return SimpleNamespace(location=None, flags=None)

    # -- the calls -------------------------------------------------------------------------

    def _cuInit(self, _flags: int) -> tuple[()]:  # noqa: N802
        return ()

    def _cuDeviceGet(self, ordinal: int) -> tuple[int]:  # noqa: N802
        return (ordinal,)

    def _cuDevicePrimaryCtxRetain(self, _device: int) -> tuple[int]:  # noqa: N802
        self.contexts += 1
        return (77,)

    def _cuDevicePrimaryCtxRelease(self, _device: int) -> tuple[()]:  # noqa: N802
        self.contexts -= 1
        return ()

    def _cuCtxSetCurrent(self, _context: int) -> tuple[()]:  # noqa: N802
        return ()

    def _cuMemGetAllocationGranularity(self, prop: Any, _option: int) -> tuple[int]:  # noqa: N802
        _check(prop.type == 1 and prop.location.type == 1)
        return (GRANULARITY,)

    def _cuMemCreate(self, size: int, prop: Any, flags: int) -> tuple[int]:  # noqa: N802
        _check(size % GRANULARITY == 0 and flags == 0 and prop.location.id is not None)
        handle = self._next
        self._next += size
        os.ftruncate(self._memory, self._next)
        self.pages[handle] = size
        return (handle,)

    def _cuMemRelease(self, handle: int) -> tuple[()]:  # noqa: N802
        _check(handle in self.pages)
        del self.pages[handle]
        return ()

    def _cuMemAddressReserve(  # noqa: N802
        self, size: int, alignment: int, address: int, flags: int
    ) -> tuple[int]:
        alignment = alignment or GRANULARITY
        _check(size % GRANULARITY == 0 and alignment % GRANULARITY == 0)
        _check(address == 0 and flags == 0)
        base = device_cpu._map_anonymous(None, size + alignment, 0)
        aligned = -(-base // alignment) * alignment
        self.ranges[aligned] = size
        return (aligned,)

    def _cuMemAddressFree(self, address: int, size: int) -> tuple[()]:  # noqa: N802
        _check(self.ranges.get(address) == size)
        _check(not any(address <= at < address + size for at in self.mappings))
        del self.ranges[address]
        return ()

    def _cuMemMap(  # noqa: N802
        self, address: int, size: int, offset: int, handle: int, flags: int
    ) -> tuple[()]:
        _check(self.pages.get(handle) == size and offset == 0 and flags == 0)
        _check(any(at <= address and address + size <= at + n for at, n in self.ranges.items()))
        _check(address not in self.mappings)
        got = device_cpu._libc.mmap(address, size, 0, _MAP_SHARED_FIXED, self._memory, handle)
        _check(got == address)
        self.mappings[address] = Mapping(size, handle)
        return ()

    def _cuMemSetAccess(  # noqa: N802
        self, address: int, size: int, access: list[Any], count: int
    ) -> tuple[()]:
        _check(count == len(access) == 1 and access[0].flags == 3)
        for at, mapping in self._inside(address, size):
            device_cpu._libc.mprotect(ctypes.c_void_p(at), ctypes.c_size_t(mapping.num_bytes), 3)
            mapping.accessible = True
        return ()

    def _cuMemUnmap(self, address: int, size: int) -> tuple[()]:  # noqa: N802
        _check(not self._queued)  # the driver would not wait for them
        for at, mapping in self._inside(address, size):
            device_cpu._map_anonymous(at, mapping.num_bytes, 0)
            del self.mappings[at]
        return ()

    def _inside(self, address: int, size: int) -> list[tuple[int, Mapping]]:
        found = [(at, m) for at, m in self.mappings.items() if address <= at < address + size]
        _check(sum(m.num_bytes for _, m in found) == size)  # whole mappings, no holes
        return found

    def _cuStreamCreate(self, flags: int) -> tuple[int]:  # noqa: N802
        _check(flags == 1)
        return (5,)

    def _cuStreamDestroy(self, _stream: int) -> tuple[()]:  # noqa: N802
        return ()

    def _cuStreamSynchronize(self, _stream: int) -> tuple[()]:  # noqa: N802
        with self._copying:
            while self._queued:
                ctypes.memmove(*self._queued.pop(0))
        return ()

    def _cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[()]:  # noqa: N802
        _check(flags == 0)
        # Waiting for an event that nobody recorded is silently no wait at all: never do it.
        _check(event in self._recorded)
        # What computes here is the host, at once: so the copies it waits for are done now.
        return self._cuStreamSynchronize(0) if stream != 5 else ()

    def _cuEventCreate(self, _flags: int) -> tuple[int]:  # noqa: N802
        self.events += 1
        return (1000 + self.events,)

    def _cuEventRecord(self, event: int, _stream: int) -> tuple[()]:  # noqa: N802
        self._recorded.add(event)
        return ()

    def _cuEventDestroy(self, _event: int) -> tuple[()]:  # noqa: N802
        self.events -= 1
        return ()

    def _cuEventSynchronize(self, _event: int) -> tuple[()]:  # noqa: N802
        return self._cuStreamSynchronize(0)

    def _cuEventElapsedTime(self, _start: int, _end: int) -> tuple[float]:  # noqa: N802
        return (2.5,)

    def _cuMemcpyHtoDAsync(  # noqa: N802
        self, target: int, source: int, size: int, stream: int
    ) -> tuple[()]:
        covered = sum(
            max(0, min(target + size, at + m.num_bytes) - max(target, at))
            for at, m in self.mappings.items()
            if m.accessible
        )
        _check(covered == size and stream == 5)
        self._queued.append((target, source, size))
        return ()

    def _cuMemcpyDtoHAsync(  # noqa: N802
        self, target: int, source: int, size: int, stream: int
    ) -> tuple[()]:
        _check(stream == 5)
        self._queued.append((target, source, size))
        return ()

    def _cuMemHostRegister(self, address: int, size: int, _flags: int) -> tuple[()]:  # noqa: N802
        _check(address % mmap.PAGESIZE == 0 and address not in self.pinned)
        self.pinned[address] = size
        return ()

    def _cuMemHostUnregister(self, address: int) -> tuple[()]:  # noqa: N802
        _check(address in self.pinned)
        del self.pinned[address]
        return ()

    def _cuGetErrorString(self, result: Result) -> tuple[bytes]:  # noqa: N802
        return (result.name.removeprefix("CUDA_ERROR_").lower().replace("_", " ").encode(),)


_NO_VALUE: Final = {"cuMemMap", "cuMemUnmap", "cuMemSetAccess", "cuMemcpyHtoDAsync"}


def _check(holds: bool) -> None:
    """What the driver would answer with CUDA_ERROR_INVALID_VALUE."""
    if not holds:
        raise ValueError
