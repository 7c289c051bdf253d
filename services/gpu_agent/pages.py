"""The page pool: all device memory of one agent, in pages of one size, created once.

    PagePool   free list over pages 0 .. num_pages-1, lowest first
      |-- identity(dtype)   the whole pool as one tensor; page i at element i*page_bytes/itemsize
      `-- reserve(bytes) -> Region   an address range that never moves; pages come and go

    home      [p0][p1][p2][p3][p4][p5]...        pages taken for KV are used at home
                        |   |
    region A           [p2][p3]                  mapped: its tensor is usable
    region B           [--][--][--]              not mapped: any access faults

A page is free, taken at home, or taken and mapped in one region. ``PagePool.free`` (see
free_pages.py) moves it between free and taken; ``Region.map`` and ``Region.unmap`` move it
between home and region. The budget is the pool's size, so it can not be exceeded by construction.

Only the engine loop calls a pool, with these exceptions: a loading thread calls ``pin_host`` and
``unpin_host``; a copying thread calls ``enter_thread``, then ``copy_in``, ``read``, ``stamp`` and
``read_link``.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import torch

from schemas.state import PcieLink
from services.gpu_agent.free_pages import FreePages, OutOfPages

__all__ = ["DeviceError", "OutOfPages", "PagePool", "Region", "Stamp", "runs"]


_MAX_COPIERS: Final = 256  # only as many as copy at once are ever started


class DeviceError(Exception):
    """The operating system or the driver refused a memory operation.

    The message names the call, its result and its sizes, and what to do where that is known.
    """


class Region(ABC):
    """A reserved address range that pages are mapped into.

    ``tensor`` is uint8 of shape (num_bytes,); its address never changes for the life of the
    region. Touching it while ``is_mapped`` is False faults.
    """

    num_bytes: int  # whole pages
    tensor: torch.Tensor
    is_mapped: bool
    _pages: tuple[int, ...]  # what is mapped here, in order

    @abstractmethod
    def map(self, pages: tuple[int, ...]) -> None:
        """Put taken ``pages`` (exactly ``num_bytes`` worth) here, in that order, content and all.

        Raises ValueError for a wrong number of pages or a region in use, and DeviceError where
        the system refuses; nothing is mapped then and the pages are at home.
        """

    @abstractmethod
    def unmap(self) -> tuple[int, ...]:
        """Send the pages home, content and all, and make the range inaccessible.

        Returns the pages; they stay taken until they are given back. Waits for computing on
        them; copies into them must be over.
        """

    @abstractmethod
    def copy_in(self, offset: int, source: torch.Tensor) -> None:
        """Copy ``source`` (host, uint8, contiguous) to byte ``offset``.

        Done on return on CPU; queued on the copy stream on CUDA: a ``PagePool.stamp`` made after
        it tells when it is done.
        """

    @abstractmethod
    def read(self, offset: int, num_bytes: int) -> torch.Tensor:
        """The device's bytes from ``offset`` on, on the host (uint8), for checking them.

        Valid until the next ``read``. ``num_bytes`` is at most a page.
        """

    @abstractmethod
    def release(self) -> None:
        """Free the address range. Raises ValueError while pages are mapped."""

    # -- what both devices check -----------------------------------------------------------

    def _check_map(self, pages: tuple[int, ...], page_bytes: int) -> None:
        if self.is_mapped:
            raise ValueError(f"region already holds {len(self._pages)} pages: unmap it first")
        if len(pages) * page_bytes != self.num_bytes:
            raise ValueError(
                f"{len(pages)} pages of {page_bytes} bytes do not fill a region of "
                f"{self.num_bytes} bytes"
            )

    def _check_is_mapped(self) -> None:
        if not self.is_mapped:
            raise ValueError("region holds no pages: map it first")

    def _check_copy(self, offset: int, source: torch.Tensor) -> None:
        self._check_is_mapped()
        if source.dtype != torch.uint8 or not source.is_contiguous() or source.device.type != "cpu":
            raise ValueError(
                f"can not copy from {source.dtype} on {source.device}: host bytes only"
            )
        if offset < 0 or offset + source.numel() > self.num_bytes:
            raise ValueError(
                f"{source.numel()} bytes at {offset} do not fit {self.num_bytes} bytes"
            )

    def _check_read(self, offset: int, num_bytes: int, page_bytes: int) -> None:
        self._check_is_mapped()
        if num_bytes > page_bytes or offset < 0 or offset + num_bytes > self.num_bytes:
            raise ValueError(f"can not read {num_bytes} bytes at {offset} of {self.num_bytes}")

    def _check_release(self) -> None:
        if self.is_mapped:
            raise ValueError(f"region still holds {len(self._pages)} pages: unmap it first")


class Stamp(ABC):
    """A point in the order of copies. Made by ``PagePool.stamp``."""

    @abstractmethod
    def wait(self) -> None:
        """Block until all copies before it are done."""

    @abstractmethod
    def order_compute(self) -> None:
        """Have work given to the compute stream from now on wait for the copies before it."""

    @abstractmethod
    def seconds_since(self, earlier: "Stamp") -> float:
        """Seconds from ``earlier`` to this one; both must have been waited for."""


class PagePool(ABC):
    """All device memory of one agent. See the module's picture."""

    kind: str  # "cpu" or "cuda"
    device_name: str
    torch_device: torch.device
    page_bytes: int
    num_pages: int

    link_bytes_per_s: float = 0.0  # copy no faster than this; 0: as fast as it goes
    ceiling_gb_per_s: float = 0.0  # raw copy rate host to device, see ceiling.py; 0: unknown

    def __init__(self, page_bytes: int, num_pages: int) -> None:
        self.page_bytes = page_bytes
        self.num_pages = num_pages
        self.free = FreePages(num_pages)
        self.link = threading.Lock()  # held by the one swap-in that copies: sharing slows both
        # Its threads stay: starting one costs time on the swap path, and memory of its own.
        self.copiers = ThreadPoolExecutor(_MAX_COPIERS, "swap-in")

    @property
    def used_bytes(self) -> int:
        return (self.num_pages - self.free.num_free) * self.page_bytes

    @property
    def budget_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    def pages_for(self, num_bytes: int) -> int:
        """How many pages hold ``num_bytes``."""
        return -(-num_bytes // self.page_bytes)

    # -- memory ----------------------------------------------------------------------------

    @abstractmethod
    def identity(self, dtype: torch.dtype) -> torch.Tensor:
        """The whole pool as a 1-D tensor; page i starts at element i*page_bytes//itemsize.

        Pages at home are accessible there; a page that is mapped in a region is not.
        """

    @abstractmethod
    def reserve(self, num_bytes: int) -> Region:
        """An address range of ``num_bytes``, rounded up to pages; inaccessible until mapped."""

    def pin_host(self, address: int, num_bytes: int, *, read_only: bool = False) -> bool:
        """Make host memory fit for asynchronous copies. False where it makes no difference.

        ``read_only``: the host itself may only read it.
        """
        return False

    def unpin_host(self, address: int) -> None:  # noqa: B027 - nothing to do where nothing is pinned
        """Undo ``pin_host``, before the memory is freed."""

    def enter_thread(self) -> None:  # noqa: B027 - nothing to do where threads have no context
        """To be called first in a thread that copies."""

    @abstractmethod
    def stamp(self) -> Stamp:
        """Mark this point between copies."""

    def read_link(self) -> PcieLink | None:
        """The state of the link that copies go over; None where there is none."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Free everything. Tensors over the pool and its regions must not be used any more."""


def runs(pages: Iterable[int]) -> Iterator[tuple[int, int, int]]:
    """Cut ``pages`` into (position, first page, length) of consecutive ones.

    >>> list(runs((4, 5, 6, 9)))
    [(0, 4, 3), (3, 9, 1)]
    """
    start = position = 0
    first = previous = -1
    for position, page in enumerate(pages):
        if first >= 0 and page == previous + 1:
            previous = page
            continue
        if first >= 0:
            yield start, first, position - start
        start, first, previous = position, page, page
    if first >= 0:
        yield start, first, position + 1 - start
