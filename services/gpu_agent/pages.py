"""The page pool: all device memory of one agent, in pages of one size, created once.

    PagePool   free list over pages 0 .. num_pages-1, lowest first
      |-- identity(dtype)   the whole pool as one tensor; page i at element i*page_bytes/itemsize
      `-- reserve(bytes) -> Region   an address range that never moves; pages come and go

    home      [p0][p1][p2][p3][p4][p5]...        pages taken for KV are used at home
                        |   |
    region A           [p2][p3]                  mapped: its tensor is usable
    region B           [--][--][--]              not mapped: any access faults

A page is free, taken at home, or taken and mapped in one region. ``take`` and ``give`` move
it between free and taken; ``Region.map`` and ``Region.unmap`` move it between home and region.
The budget is the pool's size, so it can not be exceeded by construction.

Only the engine loop calls a pool; nothing here is thread-safe except ``pin_host`` and
``unpin_host``, which a loading thread uses.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np
import torch


class OutOfPages(Exception):
    """Fewer pages are free than were asked for. Nothing was taken."""

    def __init__(self, wanted: int, free: int, total: int) -> None:
        super().__init__(
            f"{wanted} pages wanted, {free} free of {total}: swap another model out first, or "
            "raise the memory budget"
        )
        self.wanted: Final = wanted
        self.free: Final = free
        self.total: Final = total


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
        """Put taken ``pages`` (exactly ``num_bytes`` worth) here, in that order; content undefined.

        Raises ValueError for a wrong number of pages or a region in use, and DeviceError where
        the system refuses; nothing is mapped then and the pages are at home.
        """

    @abstractmethod
    def unmap(self) -> tuple[int, ...]:
        """Send the pages home (content undefined) and make the range inaccessible.

        Returns the pages; they stay taken until ``PagePool.give``. Waits for work on them.
        """

    @abstractmethod
    def copy_in(self, offset: int, source: torch.Tensor) -> None:
        """Copy ``source`` (host, uint8, contiguous) to byte ``offset``.

        Done on return on CPU; queued on the copy stream on CUDA, where later work on the
        compute stream waits for it once ``PagePool.join_copies`` was called.
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

    def _check_release(self) -> None:
        if self.is_mapped:
            raise ValueError(f"region still holds {len(self._pages)} pages: unmap it first")


class Stamp(ABC):
    """A point in the order of copies, to measure between. Made by ``PagePool.stamp``."""

    @abstractmethod
    def seconds_since(self, earlier: "Stamp") -> float:
        """Seconds from ``earlier`` to this one; call ``PagePool.join_copies`` before."""


class PagePool(ABC):
    """All device memory of one agent. See the module's picture."""

    kind: str  # "cpu" or "cuda"
    device_name: str
    torch_device: torch.device
    page_bytes: int
    num_pages: int

    def __init__(self, page_bytes: int, num_pages: int) -> None:
        self.page_bytes = page_bytes
        self.num_pages = num_pages
        self._is_free = np.ones(num_pages, dtype=np.bool_)
        self._num_free = num_pages

    # -- the free list ---------------------------------------------------------------------

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def used_bytes(self) -> int:
        return (self.num_pages - self._num_free) * self.page_bytes

    @property
    def budget_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    def pages_for(self, num_bytes: int) -> int:
        """How many pages hold ``num_bytes``."""
        return -(-num_bytes // self.page_bytes)

    def take(self, num_pages: int) -> tuple[int, ...]:
        """The lowest ``num_pages`` free pages, ascending. OutOfPages takes nothing."""
        if num_pages < 0:
            raise ValueError(f"can not take {num_pages} pages")
        if num_pages > self._num_free:
            raise OutOfPages(num_pages, self._num_free, self.num_pages)
        pages = np.flatnonzero(self._is_free)[:num_pages]
        self._is_free[pages] = False
        self._num_free -= num_pages
        return tuple(int(page) for page in pages)

    def give(self, pages: Iterable[int]) -> None:
        """Back to the free list. ValueError (nothing given) on a page that is not taken."""
        given = list(pages)
        bad = [p for p in given if not 0 <= p < self.num_pages or self._is_free[p]]
        if bad or len(set(given)) != len(given):
            raise ValueError(f"pages given twice or never taken: {bad or given}")
        self._is_free[given] = True
        self._num_free += len(given)

    # -- memory ----------------------------------------------------------------------------

    @abstractmethod
    def identity(self, dtype: torch.dtype) -> torch.Tensor:
        """The whole pool as a 1-D tensor; page i starts at element i*page_bytes//itemsize.

        Pages at home are accessible there; a page that is mapped in a region is not.
        """

    @abstractmethod
    def reserve(self, num_bytes: int) -> Region:
        """An address range of ``num_bytes``, rounded up to pages; inaccessible until mapped."""

    def pin_host(self, address: int, num_bytes: int) -> bool:
        """Make host memory fit for asynchronous copies. False where it makes no difference."""
        return False

    def unpin_host(self, address: int) -> None:  # noqa: B027 - nothing to do where nothing is pinned
        """Undo ``pin_host``, before the memory is freed."""

    @abstractmethod
    def stamp(self) -> Stamp:
        """Mark this point between copies."""

    @abstractmethod
    def join_copies(self) -> None:
        """Wait for all copies; later work on the compute stream sees them."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for all work on the device."""

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
