"""How stored bytes become an image: cut into parts, each read to its place, page by page complete.

    file   |header|...[q_proj......][v_proj...][norm]......|     parts that follow one another are
    image  |embed....|layer.0: [q_proj......][norm][v_proj...] ...             one read: a stretch

Files are never touched through a mapping: one that is cut short meanwhile is an error, not a
SIGBUS.
"""

import math
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from services.gpu_agent.checkpoint import BadCheckpoint, StoredTensor
from services.gpu_agent.checksums import Checksums, checksum
from services.gpu_agent.host_image import HostImage, Slot

CHUNK_BYTES: Final = 4 * 2**20  # of the file in one read: the disk's rate, and early progress
_MAX_PARTS: Final = 1024  # in one read: IOV_MAX


@dataclass(frozen=True)
class Part:
    """``count`` elements of ``slot``'s weight, from ``first`` on, as they are ``stored``.

    ``is_copy``: they must equal what the image holds already (tied).
    """

    slot: Slot
    stored: StoredTensor
    is_copy: bool
    first: int
    count: int

    @property
    def start(self) -> int:
        """In its file, in bytes."""
        return self.stored.start + self.first * self.stored.dtype.itemsize

    @property
    def end(self) -> int:
        return self.start + self.count * self.stored.dtype.itemsize


def cut(slot: Slot, stored: StoredTensor, is_copy: bool) -> Iterator[Part]:
    """``stored`` in parts that one read can take."""
    size = math.prod(stored.shape)
    step = CHUNK_BYTES // stored.dtype.itemsize
    for first in range(0, size, step):
        yield Part(slot, stored, is_copy, first, min(step, size - first))


def stretches(parts: list[Part]) -> Iterator[list[Part]]:
    """Parts that follow one another in a file, as many as one read takes; in file order."""
    stretch: list[Part] = []
    for part in sorted(parts, key=lambda part: (part.stored.file, part.start)):
        if stretch and not (
            (part.stored.file, part.start) == (stretch[-1].stored.file, stretch[-1].end)
            and part.end - stretch[0].start <= CHUNK_BYTES
            and len(stretch) < _MAX_PARTS
        ):
            yield stretch
            stretch = []
        stretch.append(part)
    if stretch:
        yield stretch


class Filling:
    """What of an image has arrived. A page's checksum is taken when its last byte is there."""

    def __init__(self, image: HostImage, page_bytes: int) -> None:
        self.done = 0  # bytes of weights
        self._image = image
        self._page_bytes = page_bytes
        self._lock = threading.Lock()
        num_pages = -(-image.layout.num_bytes // page_bytes)
        self._missing = [0] * num_pages  # bytes; gaps between weights are zeros, as fresh memory is
        self._values: list[int | None] = [None] * num_pages
        for slot in image.layout:
            for page, count in self._shares(slot.offset, slot.weight.num_bytes):
                self._missing[page] += count

    def target(self, part: Part) -> torch.Tensor:
        """Where to read ``part``, uint8: its place, or a scratch tensor if that is not enough."""
        if part.is_copy or part.stored.dtype != part.slot.weight.dtype:
            return torch.empty(part.end - part.start, dtype=torch.uint8)
        return self._place(part)

    def arrived(self, part: Part, target: torch.Tensor) -> None:
        """``part`` was read to its `target`. BadCheckpoint for a copy that differs."""
        weight, place = part.slot.weight, self._place(part)
        if part.is_copy:
            copy = target.view(part.stored.dtype).to(weight.dtype).view(torch.uint8)
            if not torch.equal(copy, place):
                raise BadCheckpoint(
                    f"{part.stored.origin}: config.json ties {part.stored.name!r} to "
                    f"{weight.name!r}, but the files hold two different tensors: set "
                    '"tie_word_embeddings": false in config.json'
                )
            return
        if target.data_ptr() != place.data_ptr():
            place.view(weight.dtype).copy_(target.view(part.stored.dtype))
        complete = []
        with self._lock:
            self.done += place.numel()
            for page, count in self._shares(self._offset(part), place.numel()):
                self._missing[page] -= count
                if self._missing[page] == 0:
                    complete.append(page)
        for page in complete:
            self._values[page] = self._checksum(page)

    def checksums(self) -> Checksums:
        """Of all pages, once everything has arrived."""
        values = (
            self._checksum(page) if value is None else value  # None: a page that is all gap
            for page, value in enumerate(self._values)
        )
        return Checksums(self._page_bytes, self._image.layout.num_bytes, tuple(values))

    def _checksum(self, page: int) -> int:
        start = page * self._page_bytes
        return checksum(self._image.tensor[start : start + self._page_bytes])

    def _place(self, part: Part) -> torch.Tensor:
        start = self._offset(part)
        return self._image.tensor[start : start + part.count * part.slot.weight.dtype.itemsize]

    def _offset(self, part: Part) -> int:
        return part.slot.offset + part.first * part.slot.weight.dtype.itemsize

    def _shares(self, start: int, num_bytes: int) -> Iterator[tuple[int, int]]:
        """(page, how many of the bytes lie on it)."""
        end = start + num_bytes
        while start < end:
            page = start // self._page_bytes
            stop = min((page + 1) * self._page_bytes, end)
            yield page, stop - start
            start = stop


class OpenFile:
    """One open file of one reader; closed with ``stack``."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise BadCheckpoint(f"{path} can not be read: {error.strerror}") from error
        stack.callback(os.close, self._descriptor)

    def read(self, position: int, targets: list[torch.Tensor]) -> None:
        """Fill ``targets`` (uint8, 1-D), one after another, from byte ``position`` on.

        BadCheckpoint where the file ends too early or can not be read.
        """
        left = [target.numpy().data for target in targets]
        while left:
            try:
                got = os.preadv(self._descriptor, left, position)
            except OSError as error:
                raise BadCheckpoint(
                    f"{self._path} can not be read at byte {position}: {error.strerror}"
                ) from error
            if got == 0:
                raise BadCheckpoint(f"{self._path} was cut short while it was read")
            position += got
            while left and got >= len(left[0]):
                got -= len(left.pop(0))
            if left:
                left[0] = left[0][got:]
