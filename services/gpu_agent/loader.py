"""Disk or object store to host image.

Tensors that are stored under the module's own names are read straight to their place in the image
(see reading.py), converted only where the dtype differs: files by several readers at once, objects
by ranged requests (see object_stream.py).

Older or differently packed checkpoints (other names, experts stored one by one) are converted
by transformers in a process of its own (see convert.py), from files only.

``load`` may run in a thread beside a running engine: it touches no global torch state, and it
reads, copies and checksums without holding the interpreter lock.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import nn

from schemas.state import ModelSpec, Runner
from services.gpu_agent import convert
from services.gpu_agent.checkpoint import BadCheckpoint, Checkpoint, StoredTensor
from services.gpu_agent.checksums import Checksums
from services.gpu_agent.host_image import HostImage, Layout, Slot
from services.gpu_agent.object_stream import Range, stream
from services.gpu_agent.reading import Filling, OpenFile, Part, cut, stretches

_BATCH_BYTES: Final = 256 * 2**20  # of objects that are asked for at once
# One per core: more of them take the cores from each other, and break up what the disk reads ahead.
_NUM_READERS: Final = max(2, min(8, len(os.sched_getaffinity(0))))
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
    runner: Runner = "generate"


def plan_load(
    spec: ModelSpec,
    checkpoint: Checkpoint,
    layout: Layout,
    module: nn.Module,
    dtype: torch.dtype,
    runner: Runner = "generate",
) -> LoadPlan:
    """Match the model's weights with the files' tensors. Reads nothing.

    Raises BadCheckpoint for weights that are missing or of another shape, and for those in an
    object store that would have to be converted.
    """
    reads: list[Read] = []
    missing: list[str] = []
    prefix = _stored_prefix(module, checkpoint)
    for slot in layout:
        names = [prefix + name for name in (slot.weight.name, *slot.weight.aliases)]
        stored = [checkpoint.tensors[name] for name in names if name in checkpoint.tensors]
        wrong = [tensor for tensor in stored if tensor.shape != slot.weight.shape]
        if wrong:
            raise BadCheckpoint(
                f"{wrong[0].origin}: tensor {wrong[0].name!r} has shape {wrong[0].shape}, but "
                f"config.json makes it {slot.weight.shape}: the two do not belong together"
            )
        if stored:
            reads.append(Read(slot, stored[0], tuple(stored[1:])))
        else:
            missing.append(slot.weight.name)
    if not missing:
        return LoadPlan(spec, checkpoint, layout, dtype, tuple(reads), runner)
    place = checkpoint.remote.uri if checkpoint.remote else checkpoint.folder
    if not _can_be_renamed(module, checkpoint, prefix):
        raise BadCheckpoint(
            f"{place} lacks {len(missing)} of {len(layout.slots)} tensors, the first "
            f"is {missing[0]!r}: the download is incomplete, or config.json is another model's"
        )
    if checkpoint.remote:
        raise BadCheckpoint(
            f"{place} names or packs its tensors in another way than the installed transformers: "
            "load it there, store it with `save_pretrained`, and deploy that"
        )
    return LoadPlan(spec, checkpoint, layout, dtype, (), runner)


def _stored_prefix(module: nn.Module, checkpoint: Checkpoint) -> str:
    """What stands before the names of ``module`` in the files: "bert." where it is the base of a
    BertForMaskedLM that was stored whole, else nothing.
    """
    name = getattr(module, "base_model_prefix", "")
    if not name or hasattr(module, name):  # it has a head itself
        return ""
    known = module.state_dict()
    if any(stored in known for stored in checkpoint.tensors):
        return ""
    prefix = f"{name}."
    return prefix if any(stored.startswith(prefix) for stored in checkpoint.tensors) else ""


def _can_be_renamed(module: nn.Module, checkpoint: Checkpoint, stored_prefix: str) -> bool:
    """Whether transformers knows a stored tensor under another name of this module's."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    known = module.state_dict()
    transforms: list[Any] = get_model_conversion_mapping(module)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if not isinstance(entry, WeightRenaming)]
    prefix = getattr(module, "base_model_prefix", None)
    for name in checkpoint.tensors:
        if name.removeprefix(stored_prefix) not in known:
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
        convert.load(plan.spec, plan.checkpoint.folder, plan.dtype, image, on_progress, plan.runner)
        checksums = Checksums.of(image.tensor, page_bytes)
    plan.checkpoint.check_unchanged()
    image.checksums = checksums


def _read_all(
    plan: LoadPlan, image: HostImage, page_bytes: int, on_progress: Callable[[int], None]
) -> Checksums:
    filling = Filling(image, page_bytes)
    firsts = [part for read in plan.reads for part in cut(read.slot, read.stored, False)]
    copies = [p for read in plan.reads for other in read.also for p in cut(read.slot, other, True)]
    for parts in (firsts, copies):  # a copy is compared with what is there already
        if plan.checkpoint.remote is not None:
            stream(_batches(parts, filling), lambda: on_progress(filling.done))
            on_progress(filling.done)
        else:
            _read_files(plan.checkpoint, parts, filling, on_progress)
    return filling.checksums()


def _read_files(
    checkpoint: Checkpoint, parts: list[Part], filling: Filling, on_progress: Callable[[int], None]
) -> None:
    todo = deque(stretches(parts))
    with ThreadPoolExecutor(_NUM_READERS, "load") as readers:
        unfinished = {
            readers.submit(_read_some, checkpoint, todo, filling) for _ in range(_NUM_READERS)
        }
        try:
            while unfinished:
                finished, unfinished = wait(unfinished, _PROGRESS_S, FIRST_EXCEPTION)
                for job in finished:
                    job.result()
                on_progress(filling.done)
        finally:
            todo.clear()  # after an error the others stop


def _read_some(checkpoint: Checkpoint, todo: deque[list[Part]], filling: Filling) -> None:
    """Read stretches until there are no more. Several threads do this.

    Each opens the files for itself: the kernel reads ahead by what one descriptor was read.
    """
    with ExitStack() as stack, suppress(IndexError):
        files = {path: OpenFile(path, stack) for path in checkpoint.files}
        while True:
            stretch = todo.popleft()
            targets = [filling.target(part) for part in stretch]
            files[stretch[0].stored.file].read(stretch[0].start, targets)
            for part, target in zip(stretch, targets, strict=True):
                filling.arrived(part, target)


def _batches(parts: list[Part], filling: Filling) -> Iterator[list[Range]]:
    """``parts`` as ranges of objects, so many at once that every connection is busy."""
    batch: list[Range] = []
    num_bytes = 0
    for part in sorted(parts, key=lambda part: (part.stored.origin, part.start)):
        target = filling.target(part)
        arrived = partial(filling.arrived, part, target)
        batch.append(Range(part.stored.origin, part.start, target, arrived))
        num_bytes += target.numel()
        if num_bytes >= _BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch
