"""The host image: all weights of a model, packed once, in the order in which they are used.

    byte 0                                                                        num_bytes
    |embed.....|layer.0: q k v o gate up down norms|layer.1 ...........| ... |norm|head.....|
               ^ every tensor starts at a multiple of 256 bytes; tied weights are stored once

The device copy has the very same layout, so a swap-in is one straight copy per group, first
groups first, and a parameter is a view at the same offset on either side.
"""

import contextlib
import logging
import math
import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Final

import torch

from services.gpu_agent.pages import DeviceError, PagePool

logger = logging.getLogger(__name__)

ALIGN_BYTES: Final = 256  # what CUDA's own allocator gives; vectorised loads rely on it


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

    ``tensor`` is uint8 (layout.num_bytes,). Its memory is anonymous, in huge pages where the
    system has them; it is pinned once by ``pin``, and freed when the last view is gone.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._memory = mmap.mmap(
            -1, max(layout.num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        with contextlib.suppress(OSError):  # advice only; EINVAL: a kernel without huge pages
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.tensor = torch.frombuffer(self._memory, dtype=torch.uint8, count=layout.num_bytes)
        self._pinned_by: PagePool | None = None

    @property
    def writable(self) -> memoryview:
        """The same memory as bytes, for reading files straight into it."""
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
            if pool.pin_host(self.tensor.data_ptr(), self.tensor.numel()):
                self._pinned_by = pool
        except DeviceError as error:
            logger.warning("host image stays unpinned, its swap-ins will be slow: %s", error)

    def free(self) -> None:
        """Unpin, and drop this object's hold on the memory."""
        if self._pinned_by is not None:
            self._pinned_by.unpin_host(self.tensor.data_ptr())
            self._pinned_by = None
        self.tensor = torch.empty(0, dtype=torch.uint8)
