"""Disk to host image.

Tensors that lie in the files under the module's own names are read straight to their place in
the image, by several readers at once, converted only where the dtype differs. A read takes a
stretch of the file, of whatever tensors lie there; each goes where the image wants it:

    file   |header|...[q_proj......][v_proj...][norm]......|     one read
    image  |embed....|layer.0: [q_proj......][norm][v_proj...] ...

Older or differently packed checkpoints (other names, experts stored one by one) are converted
by transformers in a process of its own (see convert.py).

``load`` may run in a thread beside a running engine: it touches no global torch state, and it
reads, copies and checksums without holding the interpreter lock. Files are never touched through
a mapping: one that is cut short meanwhile is an error, not a SIGBUS.
"""

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from schemas.state import ModelSpec
from services.gpu_agent import convert
from services.gpu_agent.checkpoint import BadCheckpoint, Checkpoint, StoredTensor
from services.gpu_agent.checksums import Checksums, checksum
from services.gpu_agent.host_image import HostImage, Layout, Slot

_CHUNK_BYTES: Final = 4 * 2**20  # of the file in one read: the disk's rate, and early progress
_MAX_PARTS: Final = 1024  # in one read: IOV_MAX
_NUM_READERS: Final = 4
_PROGRESS_S: Final = 0.1


@dataclass(frozen=True)
class Read:
    """``slot`` is filled from ``stored``; ``also`` are other copies that must be equal (tied)."""

    slot: Slot
    stored: StoredTensor
    also: tuple[StoredTensor, ...] = ()


@dataclass(frozen=True)
class LoadPlan:
    """How one model gets from its files into an image of ``layout``.

    ``reads`` covers all slots, or is empty where the checkpoint has to be converted.
    """

    spec: ModelSpec
    checkpoint: Checkpoint
    layout: Layout
    dtype: torch.dtype
    reads: tuple[Read, ...]


def plan_load(
    spec: ModelSpec, checkpoint: Checkpoint, layout: Layout, module: nn.Module, dtype: torch.dtype
) -> LoadPlan:
    """Match the model's weights with the files' tensors. Reads nothing.

    Raises BadCheckpoint for weights that are missing or of another shape.
    """
    reads: list[Read] = []
    missing: list[str] = []
    for slot in layout:
        names = (slot.weight.name, *slot.weight.aliases)
        stored = [checkpoint.tensors[name] for name in names if name in checkpoint.tensors]
        wrong = [tensor for tensor in stored if tensor.shape != slot.weight.shape]
        if wrong:
            raise BadCheckpoint(
                f"{wrong[0].file}: tensor {wrong[0].name!r} has shape {wrong[0].shape}, but "
                f"config.json makes it {slot.weight.shape}: the two do not belong together"
            )
        if stored:
            reads.append(Read(slot, stored[0], tuple(stored[1:])))
        else:
            missing.append(slot.weight.name)
    if not missing:
        return LoadPlan(spec, checkpoint, layout, dtype, tuple(reads))
    if not _can_be_renamed(module, checkpoint):
        raise BadCheckpoint(
            f"{checkpoint.folder} lacks {len(missing)} of {len(layout.slots)} tensors, the first "
            f"is {missing[0]!r}: the download is incomplete, or config.json is another model's"
        )
    return LoadPlan(spec, checkpoint, layout, dtype, ())


def _can_be_renamed(module: nn.Module, checkpoint: Checkpoint) -> bool:
    """Whether transformers knows a stored tensor under another name of this module's."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    known = module.state_dict()
    transforms: list[Any] = get_model_conversion_mapping(module)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if not isinstance(entry, WeightRenaming)]
    prefix = getattr(module, "base_model_prefix", None)
    for name in checkpoint.tensors:
        if name not in known:
            renamed, _ = rename_source_key(name, renamings, converters, prefix, known)
            if renamed in known:
                return True
    return False


def load(
    plan: LoadPlan, image: HostImage, page_bytes: int, on_progress: Callable[[int, int], None]
) -> None:
    """Fill ``image``, and set its checksums: one for every ``page_bytes``.

    ``on_progress(done, total)`` in bytes of the image, in this thread, several times a second.
    Raises BadCheckpoint, and the image's content is undefined then.
    """
    plan.checkpoint.check_unchanged()
    total = sum(slot.weight.num_bytes for slot in plan.layout)
    on_progress(0, total)
    if plan.reads:
        checksums = _read_all(plan, image, page_bytes, lambda done: on_progress(done, total))
    else:
        convert.load(plan.spec, plan.checkpoint.folder, plan.dtype, image, on_progress)
        checksums = Checksums.of(image.tensor, page_bytes)
    plan.checkpoint.check_unchanged()
    image.checksums = checksums


def _read_all(
    plan: LoadPlan, image: HostImage, page_bytes: int, on_progress: Callable[[int], None]
) -> Checksums:
    filling = _Filling(image, page_bytes)
    firsts = [part for read in plan.reads for part in _cut(read.slot, read.stored, False)]
    copies = [p for read in plan.reads for other in read.also for p in _cut(read.slot, other, True)]
    with ExitStack() as stack:
        files = {path: _File(path, stack) for path in plan.checkpoint.files}
        readers = stack.enter_context(ThreadPoolExecutor(_NUM_READERS, "load"))
        for parts in (firsts, copies):  # a copy is compared with what is there already
            todo = deque(_stretches(parts))
            jobs = [readers.submit(_read_some, files, todo, filling) for _ in range(_NUM_READERS)]
            try:
                unfinished = set(jobs)
                while unfinished:
                    finished, unfinished = wait(unfinished, _PROGRESS_S, FIRST_EXCEPTION)
                    for job in finished:
                        job.result()
                    on_progress(filling.done)
            finally:
                todo.clear()  # after an error the others stop
    return filling.checksums()


@dataclass(frozen=True)
class _Part:
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


def _cut(slot: Slot, stored: StoredTensor, is_copy: bool) -> Iterator[_Part]:
    size = math.prod(stored.shape)
    step = _CHUNK_BYTES // stored.dtype.itemsize
    for first in range(0, size, step):
        yield _Part(slot, stored, is_copy, first, min(step, size - first))


def _stretches(parts: list[_Part]) -> Iterator[list[_Part]]:
    """Parts that follow one another in a file, as many as one read takes; in file order."""
    stretch: list[_Part] = []
    for part in sorted(parts, key=lambda part: (part.stored.file, part.start)):
        if stretch and not (
            (part.stored.file, part.start) == (stretch[-1].stored.file, stretch[-1].end)
            and part.end - stretch[0].start <= _CHUNK_BYTES
            and len(stretch) < _MAX_PARTS
        ):
            yield stretch
            stretch = []
        stretch.append(part)
    if stretch:
        yield stretch


def _read_some(files: dict[Path, "_File"], todo: deque[list[_Part]], filling: "_Filling") -> None:
    """Read stretches until there are no more. Several threads do this."""
    with suppress(IndexError):
        while True:
            stretch = todo.popleft()
            targets = [filling.target(part) for part in stretch]
            files[stretch[0].stored.file].read(stretch[0].start, targets)
            for part, target in zip(stretch, targets, strict=True):
                filling.arrived(part, target)


class _Filling:
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

    def target(self, part: _Part) -> torch.Tensor:
        """Where to read ``part``, uint8: its place, or a scratch tensor if that is not enough."""
        if part.is_copy or part.stored.dtype != part.slot.weight.dtype:
            return torch.empty(part.end - part.start, dtype=torch.uint8)
        return self._place(part)

    def arrived(self, part: _Part, target: torch.Tensor) -> None:
        """``part`` was read to its `target`. BadCheckpoint for a copy that differs."""
        weight, place = part.slot.weight, self._place(part)
        if part.is_copy:
            copy = target.view(part.stored.dtype).to(weight.dtype).view(torch.uint8)
            if not torch.equal(copy, place):
                raise BadCheckpoint(
                    f"{part.stored.file}: config.json ties {part.stored.name!r} to "
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

    def _place(self, part: _Part) -> torch.Tensor:
        start = self._offset(part)
        return self._image.tensor[start : start + part.count * part.slot.weight.dtype.itemsize]

    def _offset(self, part: _Part) -> int:
        return part.slot.offset + part.first * part.slot.weight.dtype.itemsize

    def _shares(self, start: int, num_bytes: int) -> Iterator[tuple[int, int]]:
        """(page, how many of the bytes lie on it)."""
        end = start + num_bytes
        while start < end:
            page = start // self._page_bytes
            stop = min((page + 1) * self._page_bytes, end)
            yield page, stop - start
            start = stop


class _File:
    """One open file; closed with ``stack``. `read` may be called by several threads."""

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
