"""Disk to host image.

Tensors that lie in the files under the module's own names are read straight to their place in
the image, by several readers at once, converted only where the dtype differs:

    file   |header|.....[layers.0.q_proj .......].....|
                          preadv, 16 MiB at a time
    image  |embed....|layer.0: [q_proj ......] ...

Older or differently packed checkpoints (other names, experts stored one by one) are converted
by transformers in a process of its own (see convert.py), whose output is read the same way.

``load`` may run in a thread beside a running engine: it touches no global torch state, and it
reads and copies without holding the interpreter lock.
"""

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from schemas.state import ModelSpec
from services.gpu_agent import convert
from services.gpu_agent.checkpoint import BadCheckpoint, Checkpoint, StoredTensor
from services.gpu_agent.host_image import HostImage, Layout, Slot

_CHUNK_BYTES: Final = 16 * 2**20  # large enough for a disk's rate, small enough for progress
_NUM_READERS: Final = 4


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


def load(plan: LoadPlan, image: HostImage, on_progress: Callable[[int, int], None]) -> None:
    """Fill ``image``. ``on_progress(done, total)`` in bytes of the image, in this thread.

    Raises BadCheckpoint; the image's content is undefined then.
    """
    plan.checkpoint.check_unchanged()
    total = sum(slot.weight.num_bytes for slot in plan.layout)
    on_progress(0, total)
    if not plan.reads:
        convert.load(plan.spec, plan.checkpoint.folder, plan.dtype, image, on_progress)
        return
    done = 0
    with ExitStack() as stack:
        files = {file: stack.enter_context(_opened(file)) for file in plan.checkpoint.files}
        readers = stack.enter_context(ThreadPoolExecutor(_NUM_READERS, "load"))
        try:
            pieces = (piece for read in plan.reads for piece in _cut(read))
            futures = [readers.submit(_fill, files, piece, image) for piece in pieces]
            for future in as_completed(futures):
                done += future.result()
                on_progress(done, total)
        finally:
            readers.shutdown(wait=True, cancel_futures=True)
    plan.checkpoint.check_unchanged()


@dataclass(frozen=True)
class _Piece:
    """``count`` elements of one weight, from element ``first`` on."""

    read: Read
    first: int
    count: int


def _cut(read: Read) -> Iterator[_Piece]:
    size = math.prod(read.stored.shape)
    step = _CHUNK_BYTES // read.stored.dtype.itemsize
    for first in range(0, size, step):
        yield _Piece(read, first, min(step, size - first))


def _fill(files: dict[Path, int], piece: _Piece, image: HostImage) -> int:
    """Read one piece to its place; returns its bytes in the image."""
    slot, stored = piece.read.slot, piece.read.stored
    itemsize = slot.weight.dtype.itemsize
    start = slot.offset + piece.first * itemsize
    num_bytes = piece.count * itemsize
    if stored.dtype == slot.weight.dtype:
        _read_exactly(files, stored, piece, image.writable[start : start + num_bytes])
    else:
        target = image.tensor[start : start + num_bytes].view(slot.weight.dtype)
        target.copy_(_read_stored(files, stored, piece))
    for other in piece.read.also:
        copy = _read_stored(files, other, piece).to(slot.weight.dtype).view(torch.uint8)
        if not torch.equal(copy, image.tensor[start : start + num_bytes]):
            raise BadCheckpoint(
                f"{other.file}: config.json ties {other.name!r} to {stored.name!r}, but the "
                'files hold two different tensors: set "tie_word_embeddings": false in config.json'
            )
    return num_bytes


def _read_stored(files: dict[Path, int], stored: StoredTensor, piece: _Piece) -> torch.Tensor:
    """``piece`` in the dtype in which ``stored`` lies in its file, 1-D."""
    buffer = bytearray(piece.count * stored.dtype.itemsize)
    _read_exactly(files, stored, piece, memoryview(buffer))
    return torch.frombuffer(buffer, dtype=stored.dtype)


def _read_exactly(
    files: dict[Path, int], stored: StoredTensor, piece: _Piece, target: memoryview
) -> None:
    position = stored.start + piece.first * stored.dtype.itemsize
    while target:
        try:
            got = os.preadv(files[stored.file], [target], position)
        except OSError as error:
            raise BadCheckpoint(
                f"{stored.file} can not be read at byte {position}: {error.strerror}"
            ) from error
        if got == 0:
            raise BadCheckpoint(f"{stored.file} was cut short while it was read")
        target = target[got:]
        position += got


@contextmanager
def _opened(file: Path) -> Iterator[int]:
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise BadCheckpoint(f"{file} can not be read: {error.strerror}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)
