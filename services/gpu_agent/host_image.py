"""The host image: all weights of a model, packed once, in the order in which they are used.

    byte 0                                                                        num_bytes
    |embed.....|layer.0: q k v o gate up down norms|layer.1 ...........| ... |norm|head.....|
               ^ every tensor starts at a multiple of 256 bytes; tied weights are stored once

The device copy has the very same layout, so a swap-in is one straight copy per group, first
groups first, and a parameter is a view at the same offset on either side.

Its memory is anonymous, or a file in memory that several processes share (``fill_file``):

    |image|page_bytes, checksum of each page|     unsigned 64-bit; the checksums may be missing

Once filled, such a file is sealed: its size never changes, and there is no new way to write to
it. The checksums lie in it, so what vouches for the bytes is as safe as they are. It is mapped
read-only and shared, not private: to pin a private mapping is to copy it. A driver has to be
told that memory is read-only to register it (CU_MEMHOSTREGISTER_READ_ONLY).
"""

import contextlib
import ctypes
import errno
import fcntl
import itertools
import logging
import math
import mmap
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Final

import numpy as np
import torch

from services.gpu_agent.checksums import Checksums
from services.gpu_agent.pages import DeviceError, PagePool

logger = logging.getLogger(__name__)

_keys: Final = itertools.count(1)
ALIGN_BYTES: Final = 256  # what CUDA's own allocator gives; vectorised loads rely on it

_POPULATE_READ: Final = 22  # madvise(2), Linux 5.14
# Not F_SEAL_WRITE: kernels before 6.7 would refuse even to map it read-only.
_F_SEAL_FUTURE_WRITE: Final = 0x10
_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE


@dataclass(frozen=True)
class Weight:
    """One tensor that a model needs. ``aliases``: names of other places that share it (tied)."""

    name: str
    group: str  # "embed", "layer.0", ..., "norm", "head"
    shape: tuple[int, ...]
    dtype: torch.dtype
    aliases: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Slot:
    """Where one weight lies: ``offset`` in bytes from the image's start."""

    weight: Weight
    offset: int

    def view(self, image: torch.Tensor) -> torch.Tensor:
        """The weight as a tensor of its own shape and dtype over ``image`` (uint8, 1-D)."""
        piece = image[self.offset : self.offset + self.weight.num_bytes]
        return piece.view(self.weight.dtype).view(self.weight.shape)


@dataclass(frozen=True)
class Group:
    """A contiguous stretch of the image that is copied and timed as one."""

    name: str
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Layout:
    """The packing of one model. ``num_bytes`` includes alignment gaps."""

    slots: tuple[Slot, ...]
    groups: tuple[Group, ...]
    num_bytes: int

    def __iter__(self) -> Iterator[Slot]:
        return iter(self.slots)


def plan_layout(weights: Iterable[Weight]) -> Layout:
    """Pack ``weights`` in their order; consecutive ones of the same group form a group."""
    slots: list[Slot] = []
    end = 0
    for weight in weights:
        offset = -(-end // ALIGN_BYTES) * ALIGN_BYTES
        slots.append(Slot(weight, offset))
        end = offset + weight.num_bytes
    groups: list[Group] = []
    for name, members in groupby(slots, key=lambda slot: slot.weight.group):
        inside = list(members)
        start, stop = inside[0].offset, inside[-1].offset + inside[-1].weight.num_bytes
        groups.append(Group(name, start, stop - start))
    return Layout(tuple(slots), tuple(groups), end)


class HostImage:
    """One model's weights in host memory, laid out by ``layout``.

    ``tensor`` is uint8 (layout.num_bytes,). Its memory is anonymous, or given as a mapping of at
    least that size; in huge pages where the system has them. It is pinned once by ``pin``, and
    unmapped after ``free`` when the last view is gone. The first ``free`` calls ``on_free``.
    """

    def __init__(
        self,
        layout: Layout,
        memory: mmap.mmap | None = None,
        on_free: Callable[[], None] | None = None,
    ) -> None:
        self.layout = layout
        self.key: Final = next(_keys)  # stands for this content and no other, see free_pages.py
        self.checksums: Checksums | None = None  # set by the loader once the image is filled
        self._memory = _anonymous(layout.num_bytes) if memory is None else memory
        with contextlib.suppress(OSError):  # advice only; EINVAL: a kernel without huge pages
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.tensor = _tensor_over(self._memory, layout.num_bytes)
        self._on_free = on_free
        self._pinned_by: PagePool | None = None

    @classmethod
    def over(cls, file: int, layout: Layout, on_free: Callable[[], None]) -> "HostImage":
        """Over a file of ``fill_file``'s, with its checksums; the descriptor stays the caller's.

        Whoever writes to its tensor is killed by the kernel. Raises OSError.
        """
        memory = mmap.mmap(file, layout.num_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        with contextlib.suppress(OSError):  # advice only: map all now, not in the first swap-in
            memory.madvise(_POPULATE_READ)
        image = cls(layout, memory, on_free)
        image.checksums = _read_checksums(file, layout)
        return image

    @property
    def num_bytes(self) -> int:
        """What the image costs in host memory: whole pages of the kernel's smallest size."""
        return -(-self.layout.num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE

    @property
    def is_read_only(self) -> bool:
        return memoryview(self._memory).readonly

    @property
    def writable(self) -> memoryview:
        """The same memory as bytes, to read files straight into. ValueError where read-only."""
        if self.is_read_only:
            raise ValueError("this host image is shared and sealed: nothing can be written to it")
        return memoryview(self._memory)

    def views(self) -> Iterator[tuple[Weight, torch.Tensor]]:
        """Every weight with its tensor over the image."""
        for slot in self.layout:
            yield slot.weight, slot.view(self.tensor)

    def pin(self, pool: PagePool) -> None:
        """Make asynchronous copies to ``pool``'s device possible. Idempotent.

        Where the system will not lock that much memory, swap-ins work, but slower.
        """
        if self._pinned_by is not None:
            return
        try:
            if pool.pin_host(
                self.tensor.data_ptr(), self.tensor.numel(), read_only=self.is_read_only
            ):
                self._pinned_by = pool
        except DeviceError as error:
            logger.warning("host image stays unpinned, its swap-ins will be slow: %s", error)

    def free(self) -> None:
        """Unpin, and drop this object's hold on the memory. Idempotent."""
        if self._pinned_by is not None:
            self._pinned_by.unpin_host(self.tensor.data_ptr())
            self._pinned_by = None
        # Not mmap.close(): a view that somebody still holds would point into nothing.
        self.tensor = torch.empty(0, dtype=torch.uint8)
        self._memory = _anonymous(0)
        if self._on_free is not None:
            self._on_free()
            self._on_free = None


def fill_file(name: str, layout: Layout, fill: Callable[[HostImage], None]) -> int:
    """A new memory file with an image in it, sealed; returns its descriptor.

    ``fill`` writes to the image that it is given, sets its checksums, and keeps no view of it.
    What it raises comes out of here. ``name`` is for /proc only. Raises OSError where the
    system has no such files, or not enough memory.
    """
    file = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(file, layout.num_bytes)
        image = HostImage(layout, mmap.mmap(file, layout.num_bytes))
        try:
            fill(image)
            checksums = image.checksums
        finally:
            image.free()
        if checksums is not None:
            numbers = array("Q", (checksums.page_bytes, *checksums.values)).tobytes()
            if os.pwrite(file, numbers, layout.num_bytes) < len(numbers):
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), name)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(file)
        raise
    return file


def is_sealed(file: int, layout: Layout) -> bool:
    """Whether ``file`` holds all bytes of ``layout`` and nobody can take or change them."""
    try:
        seals = fcntl.fcntl(file, fcntl.F_GET_SEALS)
    except OSError:  # not a memory file
        return False
    return seals & _SEALS == _SEALS and os.fstat(file).st_size >= layout.num_bytes


def _read_checksums(file: int, layout: Layout) -> Checksums | None:
    count = os.fstat(file).st_size - layout.num_bytes
    numbers = array("Q", os.pread(file, count, layout.num_bytes))
    return Checksums(numbers[0], layout.num_bytes, tuple(numbers[1:])) if numbers else None


def _anonymous(num_bytes: int) -> mmap.mmap:
    return mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _tensor_over(memory: mmap.mmap, num_bytes: int) -> torch.Tensor:
    """uint8 (num_bytes,) over the start of ``memory``, which lives as long as the tensor.

    By address, as torch has no read-only tensors: over a read-only buffer it would only warn.
    """
    address = np.frombuffer(memory, dtype=np.uint8).ctypes.data
    buffer = (ctypes.c_uint8 * num_bytes).from_address(address)
    buffer.memory = memory  # type: ignore[attr-defined]  # the tensor holds the buffer
    return torch.frombuffer(buffer, dtype=torch.uint8)
