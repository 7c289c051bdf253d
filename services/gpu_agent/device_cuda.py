"""One NVIDIA GPU: a page pool over the driver's virtual memory calls.

Every page is one physical allocation, created at start and mapped twice when in use:

    handles   [h0][h1][h2][h3]               cuMemCreate, once
    identity  [h0][h1][h2][h3]               cuMemMap, once; KV pages are used here
    region A       [h1][h2]                  cuMemMap per page at swap-in, one cuMemSetAccess;
                                             one cuMemUnmap at swap-out

The region's addresses are reserved once, so parameters are views made once. Unlike on the CPU
a mapped page stays reachable in the identity view too; nothing uses it there.

Order between streams: copies run on a stream of their own. Before the first copy after a map it
waits for the compute stream; a stamp after a copy makes the compute stream, or the host, wait for
it; and ``unmap`` waits for the compute stream, because the driver does not.

The driver module (``cuda.bindings.driver``) is an argument, so that everything but the driver
is tested on machines without one.
"""

import importlib
import mmap
from collections.abc import Callable
from typing import Any, Final

import torch

from schemas.state import PcieLink
from services.gpu_agent.cuda_driver import Driver, tensor_at
from services.gpu_agent.detect import PcieProbe
from services.gpu_agent.pages import DeviceError, PagePool, Region, Stamp

_MORE_EVENTS: Final = 256
PAGE_BYTES: Final = 32 * 2**20  # at 2 MiB the map calls cost as much as the copy


def open_cuda_pool(num_pages: int, page_bytes: int, index: int) -> "CudaPool":
    """The pool on GPU ``index``, in the context that torch uses. Raises DeviceError."""
    torch.cuda.init()  # type: ignore[no-untyped-call]
    torch.cuda.set_device(index)
    driver = importlib.import_module("cuda.bindings.driver")
    call = Driver(driver)
    call("cuInit", 0, about="start")
    bus_id = call("cuDeviceGetPCIBusId", 32, index, about=f"GPU {index}")
    return CudaPool(
        driver,
        num_pages,
        page_bytes,
        index,
        device_name=torch.cuda.get_device_name(index),
        torch_device=torch.device("cuda", index),
        compute_stream=lambda: int(torch.cuda.current_stream(index).cuda_stream),
        tensor_at=tensor_at,
        read_link=PcieProbe(bus_id.split(b"\0")[0].decode()).read,
    )


class CudaPool(PagePool):
    """``num_pages`` of one GPU's memory. Use ``open_cuda_pool``.

    ``compute_stream()``: handle of the stream that the models run on. ``tensor_at(address,
    num_bytes)``: uint8 tensor over device memory. ``read_link()``: the state of its PCIe link.
    """

    kind = "cuda"

    def __init__(
        self,
        driver: Any,
        num_pages: int,
        page_bytes: int,
        index: int,
        *,
        device_name: str,
        torch_device: torch.device,
        compute_stream: Callable[[], int],
        tensor_at: Callable[[int, int], torch.Tensor],
        read_link: Callable[[], PcieLink | None] = lambda: None,
    ) -> None:
        super().__init__(page_bytes, num_pages)
        self.device_name = device_name
        self.torch_device = torch_device
        self.call: Final = Driver(driver)
        self.handles: list[Any] = []
        self.spare_events: list[Any] = []
        self._index = index
        self._compute_stream = compute_stream
        self.tensor_at = tensor_at
        self._read_link = read_link
        self._undo: list[Callable[[], None]] = []
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        call, names, size = self.call, self.call.names, self.budget_bytes
        call("cuInit", 0, about="start")
        self._device = call("cuDeviceGet", self._index, about=f"GPU {self._index}")
        self._context = call("cuDevicePrimaryCtxRetain", self._device, about=f"GPU {self._index}")
        self._later("cuDevicePrimaryCtxRelease", self._device, about=f"GPU {self._index}")
        call("cuCtxSetCurrent", self._context, about=f"GPU {self._index}")
        self._location_properties()
        granularity = call(
            "cuMemGetAllocationGranularity",
            self._properties,
            names.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM,
            about=f"GPU {self._index}",
        )
        if self.page_bytes % granularity:
            raise DeviceError(
                f"pages of {self.page_bytes} bytes do not fit this GPU's granularity of "
                f"{granularity} bytes: set page_bytes to a multiple of it"
            )
        for page in range(self.num_pages):
            about = f"page {page} of {self.num_pages}, {self.page_bytes} bytes"
            self.handles.append(
                call("cuMemCreate", self.page_bytes, self._properties, 0, about=about)
            )
            self._later("cuMemRelease", self.handles[-1], about=about)
        self._home = self.reserve_range(size)
        self._undo.append(lambda: self.free_range(self._home, size))
        self.map_range(self._home, tuple(range(self.num_pages)))
        self._undo.append(lambda: self.unmap_range(self._home, size))
        self._bytes = self.tensor_at(self._home, size)
        flag = names.CUstream_flags.CU_STREAM_NON_BLOCKING
        self.copy_stream = call("cuStreamCreate", flag, about="copy stream")
        self._later("cuStreamDestroy", self.copy_stream, about="copy stream")
        # Swaps create nothing: events enough for the pieces of the largest swap-in.
        num_events = size // PAGE_BYTES + self.num_pages + _MORE_EVENTS
        self.spare_events = [self.take_event() for _ in range(num_events)]
        self._staging = torch.frombuffer(mmap.mmap(-1, self.page_bytes), dtype=torch.uint8)
        address = self._staging.data_ptr()
        self.pin_host(address, self.page_bytes)
        self._undo.append(lambda: self.unpin_host(address))

    def _location_properties(self) -> None:
        names = self.call.names
        self._properties = names.CUmemAllocationProp()
        self._properties.type = names.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location.type = names.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._properties.location.id = self._index
        self._access = names.CUmemAccessDesc()
        self._access.location = self._properties.location
        self._access.flags = names.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE

    def _later(self, call: str, *arguments: Any, about: str) -> None:
        self._undo.append(lambda: self.call(call, *arguments, about=about))

    # -- address ranges, for the pool and its regions ----------------------------------------

    def reserve_range(self, num_bytes: int) -> int:
        """Address of a new range, aligned as the driver likes it."""
        return int(self.call("cuMemAddressReserve", num_bytes, 0, 0, 0, about=f"{num_bytes} bytes"))

    def free_range(self, address: int, num_bytes: int) -> None:
        self.call("cuMemAddressFree", address, num_bytes, about=f"{num_bytes} bytes")

    def map_range(self, address: int, pages: tuple[int, ...]) -> None:
        """Map ``pages`` one after another from ``address`` on; all or nothing."""
        size = len(pages) * self.page_bytes
        mapped = 0
        try:
            for page in pages:
                about = f"page {page} at byte {mapped} of {size}, {self.page_bytes} bytes"
                where, handle = address + mapped, self.handles[page]
                self.call("cuMemMap", where, self.page_bytes, 0, handle, 0, about=about)
                mapped += self.page_bytes
            self.call("cuMemSetAccess", address, size, [self._access], 1, about=f"{size} bytes")
        except DeviceError:
            if mapped:
                self.unmap_range(address, mapped)
            raise

    def unmap_range(self, address: int, num_bytes: int) -> None:
        self.call("cuMemUnmap", address, num_bytes, about=f"{num_bytes} bytes")

    # -- PagePool ------------------------------------------------------------------------------

    def identity(self, dtype: torch.dtype) -> torch.Tensor:
        return self._bytes.view(dtype)

    def reserve(self, num_bytes: int) -> "CudaRegion":
        if num_bytes < 1:
            raise ValueError(f"can not reserve {num_bytes} bytes")
        return CudaRegion(self, self.pages_for(num_bytes) * self.page_bytes)

    def pin_host(self, address: int, num_bytes: int, *, read_only: bool = False) -> bool:
        self.enter_thread()  # a loading thread calls this: the driver's context is per thread
        flags = self.call.names.CU_MEMHOSTREGISTER_READ_ONLY if read_only else 0
        self.call("cuMemHostRegister", address, num_bytes, flags, about=f"{num_bytes} bytes")
        return True

    def unpin_host(self, address: int) -> None:
        self.enter_thread()
        self.call("cuMemHostUnregister", address, about="host image")

    def order_copies_after_compute(self) -> None:
        """Copies queued from now on wait for what the compute stream was given so far."""
        self._order(self._compute_stream(), self.copy_stream)

    def _order(self, first: Any, then: Any) -> None:
        event = self.take_event()
        self.call("cuEventRecord", event, first, about="ordering streams")
        self.call("cuStreamWaitEvent", then, event, 0, about="ordering streams")
        self.spare_events.append(event)  # the driver has noted what to wait for

    def take_event(self) -> Any:
        """An event of the pool's; give it back through ``spare_events``."""
        try:
            return self.spare_events.pop()
        except IndexError:
            event = self.call("cuEventCreate", 0, about="event")
            self._later("cuEventDestroy", event, about="event")
            return event

    def enter_thread(self) -> None:
        self.call("cuCtxSetCurrent", self._context, about=f"GPU {self._index}")

    def stamp(self) -> Stamp:
        return _EventStamp(self)

    def compute_waits_for(self, event: Any) -> None:
        self.call("cuStreamWaitEvent", self._compute_stream(), event, 0, about="ordering streams")

    def wait_for_compute(self) -> None:
        self.call("cuStreamSynchronize", self._compute_stream(), about="compute stream")

    def read_to_host(self, address: int, num_bytes: int) -> torch.Tensor:
        """Device bytes in the staging page; valid until the next call."""
        about = f"{num_bytes} bytes to check"
        staging = self._staging[:num_bytes]
        self.call(
            "cuMemcpyDtoHAsync",
            staging.data_ptr(),
            address,
            num_bytes,
            self.copy_stream,
            about=about,
        )
        self.call("cuStreamSynchronize", self.copy_stream, about=about)
        return staging

    def read_link(self) -> PcieLink | None:
        return self._read_link()

    def close(self) -> None:
        """Idempotent; undoes what was done, last first, and raises the first error at the end."""
        errors: list[DeviceError] = []
        self.copiers.shutdown()
        while self._undo:
            try:
                self._undo.pop()()
            except DeviceError as error:
                errors.append(error)
        if errors:
            raise errors[0]


class CudaRegion(Region):
    """A reserved range of device addresses that handles are mapped into."""

    def __init__(self, pool: CudaPool, num_bytes: int) -> None:
        self._pool = pool
        self._pages: tuple[int, ...] = ()
        self.num_bytes = num_bytes
        self.is_mapped = False
        self._address = pool.reserve_range(num_bytes)
        try:
            # torch asks the driver which device the address is on, and of a range with nothing
            # mapped the driver knows none. Any page will do: nothing is read or written.
            pool.map_range(self._address, (0,))
            try:
                self.tensor = pool.tensor_at(self._address, num_bytes)
            finally:
                pool.unmap_range(self._address, pool.page_bytes)
        except BaseException:
            pool.free_range(self._address, num_bytes)
            raise

    def map(self, pages: tuple[int, ...]) -> None:
        self._check_map(pages, self._pool.page_bytes)
        self._pool.map_range(self._address, pages)
        self._pages, self.is_mapped = pages, True
        self._pool.order_copies_after_compute()

    def unmap(self) -> tuple[int, ...]:
        self._check_is_mapped()
        self._pool.wait_for_compute()
        self._pool.unmap_range(self._address, self.num_bytes)
        pages, self._pages, self.is_mapped = self._pages, (), False
        return pages

    def copy_in(self, offset: int, source: torch.Tensor) -> None:
        self._check_copy(offset, source)
        size = source.numel()
        self._pool.call(
            "cuMemcpyHtoDAsync",
            self._address + offset,
            source.data_ptr(),
            size,
            self._pool.copy_stream,
            about=f"{size} bytes to byte {offset} of {self.num_bytes}",
        )

    def read(self, offset: int, num_bytes: int) -> torch.Tensor:
        self._check_read(offset, num_bytes, self._pool.page_bytes)
        return self._pool.read_to_host(self._address + offset, num_bytes)

    def release(self) -> None:
        self._check_release()
        self._pool.free_range(self._address, self.num_bytes)


class _EventStamp(Stamp):
    """An event on the copy stream."""

    def __init__(self, pool: CudaPool) -> None:
        self._call = pool.call
        self._pool = pool
        self._event = pool.take_event()
        pool.call("cuEventRecord", self._event, pool.copy_stream, about="copy timing")

    def wait(self) -> None:
        self._call("cuEventSynchronize", self._event, about="copies")

    def order_compute(self) -> None:
        self._pool.compute_waits_for(self._event)

    def seconds_since(self, earlier: Stamp) -> float:
        assert isinstance(earlier, _EventStamp)
        elapsed = self._call("cuEventElapsedTime", earlier._event, self._event, about="copy timing")
        return float(elapsed) / 1000

    def __del__(self) -> None:
        if hasattr(self, "_event"):
            self._pool.spare_events.append(self._event)
