"""What the driver does with memory calls, asked directly: how long they take, what they refuse.

    alignments of a reserved range · one unmap over many mappings · access page by page or at once
    mapping and unmapping while a copy runs elsewhere: does either wait for the other?

Without a page pool, so that it tells why where no pool can be opened.
"""

import importlib
import mmap
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch

from bench._gpu_report import Part
from services.gpu_agent.cuda_driver import Driver

MIB: Final = 2**20
PAGE_BYTES: Final = 32 * MIB
NUM_PAGES: Final = 32  # 1 GiB


def ask(part: Part) -> None:
    """Everything, into ``part``'s details; nothing in a dry run, which has no driver."""
    if part.is_dry:
        return
    torch.cuda.init()  # type: ignore[no-untyped-call]
    torch.cuda.set_device(0)
    part.details.update(experiments(importlib.import_module("cuda.bindings.driver")))


def experiments(driver: Any, page_bytes: int = PAGE_BYTES) -> dict[str, Any]:
    """Seconds of every call, or what the driver said. Leaves nothing behind where all goes well."""
    call = Driver(driver)
    call("cuInit", 0, about="start")
    context = call("cuDevicePrimaryCtxRetain", call("cuDeviceGet", 0, about="GPU"), about="GPU")
    call("cuCtxSetCurrent", context, about="GPU")
    size = NUM_PAGES * page_bytes
    found: dict[str, Any] = {
        f"reserve, aligned to {alignment // MIB} MiB": _told(
            partial(_reserve_and_free, call, size, alignment)
        )
        for alignment in (0, 2 * MIB, 16 * MIB, 32 * MIB, 64 * MIB)
    }
    found["pages"] = _told(partial(_pages, call, page_bytes))
    return found


def _told(ask_it: Callable[[], Any]) -> Any:
    try:
        return ask_it()
    except Exception as error:  # whatever it refuses is the answer
        return f"{type(error).__name__}: {error}"


def _timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _reserve_and_free(call: Driver, size: int, alignment: int) -> float:
    began = time.perf_counter()
    address = int(call("cuMemAddressReserve", size, alignment, 0, 0, about="trial"))
    took = time.perf_counter() - began
    call("cuMemAddressFree", address, size, about="trial")
    return took


class _Ranges:
    """Two sets of pages and a range for each."""

    def __init__(self, call: Driver, page_bytes: int) -> None:
        names = call.names
        self._call = call
        self._page_bytes = page_bytes
        self.size = NUM_PAGES * page_bytes
        properties = names.CUmemAllocationProp()
        properties.type = names.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = names.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = 0
        self._access = names.CUmemAccessDesc()
        self._access.location = properties.location
        self._access.flags = names.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._handles = [
            call("cuMemCreate", page_bytes, properties, 0, about="trial")
            for _ in range(2 * NUM_PAGES)
        ]
        self.first, self.second = (
            int(call("cuMemAddressReserve", self.size, 2 * MIB, 0, 0, about="trial"))
            for _ in range(2)
        )

    def map(self, address: int) -> None:
        start = 0 if address == self.first else NUM_PAGES
        for number in range(NUM_PAGES):
            where, handle = address + number * self._page_bytes, self._handles[start + number]
            self._call("cuMemMap", where, self._page_bytes, 0, handle, 0, about="trial")

    def allow(self, address: int, *, at_once: bool) -> None:
        step = self.size if at_once else self._page_bytes
        for at in range(address, address + self.size, step):
            self._call("cuMemSetAccess", at, step, [self._access], 1, about="trial")

    def unmap(self, address: int, *, at_once: bool) -> None:
        step = self.size if at_once else self._page_bytes
        for at in range(address, address + self.size, step):
            self._call("cuMemUnmap", at, step, about="trial")

    def close(self) -> None:
        for address in (self.first, self.second):
            self._call("cuMemAddressFree", address, self.size, about="trial")
        for handle in self._handles:
            self._call("cuMemRelease", handle, about="trial")


def _pages(call: Driver, page_bytes: int) -> dict[str, float]:
    """Seconds for ``NUM_PAGES`` pages; those "in a copy" run beside one of as many bytes."""
    began = time.perf_counter()
    ranges = _Ranges(call, page_bytes)
    took = {"create and reserve": time.perf_counter() - began}
    first, second, size = ranges.first, ranges.second, ranges.size
    for way, at_once in (("page by page", False), ("at once", True)):
        took[f"map, {way}"] = _timed(lambda: ranges.map(first))
        took[f"access, {way}"] = _timed(partial(ranges.allow, first, at_once=at_once))
        took[f"unmap, {way}"] = _timed(partial(ranges.unmap, first, at_once=at_once))
    ranges.map(first)
    ranges.allow(first, at_once=True)
    source = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8).fill_(1)
    address = source.data_ptr()
    took["pin"] = _timed(lambda: call("cuMemHostRegister", address, size, 0, about="trial"))
    flag = call.names.CUstream_flags.CU_STREAM_NON_BLOCKING
    stream = call("cuStreamCreate", flag, about="trial")

    def copy() -> None:
        call("cuMemcpyHtoDAsync", first, address, size, stream, about="trial")

    def wait() -> None:
        call("cuStreamSynchronize", stream, about="trial")

    for _ in range(3):  # the last one counts
        began = time.perf_counter()
        copy()
        wait()
        took["copy, alone"] = time.perf_counter() - began
    began = time.perf_counter()
    copy()
    took["map, in a copy"] = _timed(lambda: ranges.map(second))
    took["access, in a copy"] = _timed(lambda: ranges.allow(second, at_once=True))
    wait()
    took["copy, with map and access"] = time.perf_counter() - began
    began = time.perf_counter()
    copy()
    took["unmap, in a copy"] = _timed(lambda: ranges.unmap(second, at_once=True))
    wait()
    took["copy, with unmap"] = time.perf_counter() - began
    call("cuStreamDestroy", stream, about="trial")
    call("cuMemHostUnregister", address, about="trial")
    ranges.unmap(first, at_once=True)
    ranges.close()
    return took
