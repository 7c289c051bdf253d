"""The copy from host image to device, group by group in execution order, with its trace.

A GPU's copy engine works by itself: all groups are queued at once, on its own stream. On CPU
the copying is ours, and one thread can not fill the memory bus. There, threads take the next
piece whenever they are done with one, so that one whose core is busy elsewhere takes fewer:

    image     |embed..|layer.0........|layer.1........|
    pieces    |0......|1.......|2.....|3.......|4.....|
    thread A   0           2                4
    thread B      1             3
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Final

import torch

from schemas.state import LayerCopy
from services.gpu_agent.host_image import Group, HostImage
from services.gpu_agent.pages import PagePool, Region

PIECE_BYTES: Final = 8 * 2**20  # small enough to share out, large enough for memmove's stride
MAX_THREADS: Final = 8


@dataclass(frozen=True)
class CopyReport:
    """``copy_s``: from before the first to after the last byte, as the host sees it."""

    num_bytes: int
    copy_s: float
    layers: tuple[LayerCopy, ...]


def copy_in(pool: PagePool, region: Region, image: HostImage) -> CopyReport:
    """Copy the whole ``image`` into the mapped ``region``; returns when all of it is there.

    A group's time is from the end of the one before it to its own end.
    """
    groups = image.layout.groups
    began = time.perf_counter()
    if pool.kind == "cpu":
        ends = _share_out(region, image, min(torch.get_num_threads(), MAX_THREADS))
        took = [end - before for before, end in pairwise((began, *ends))]
    else:
        took = _queue(pool, region, image)
    copy_s = time.perf_counter() - began
    layers = tuple(
        LayerCopy(group.name, group.num_bytes, seconds)
        for group, seconds in zip(groups, took, strict=True)
    )
    return CopyReport(sum(group.num_bytes for group in groups), copy_s, layers)


def _queue(pool: PagePool, region: Region, image: HostImage) -> list[float]:
    """Queue group by group without waiting in between, so that the device never idles.

    Gives the seconds of each; the stamps between them are read after the last one is done.
    """
    stamps = [pool.stamp()]
    for group in image.layout.groups:
        region.copy_in(group.offset, image.tensor[group.offset : group.offset + group.num_bytes])
        stamps.append(pool.stamp())
    pool.join_copies()
    return [after.seconds_since(before) for before, after in pairwise(stamps)]


def _share_out(region: Region, image: HostImage, num_threads: int) -> list[float]:
    """Copy with ``num_threads``, of which this is one. Gives when each group was complete.

    Copies block here, and give up the interpreter lock meanwhile.
    """
    ends = [time.perf_counter()] * len(image.layout.groups)
    # One iterator for all: handing out a piece is one step under the interpreter lock.
    pieces = iter(list(_cut(image.layout.groups)))

    def copy() -> None:
        for number, start, stop in pieces:
            region.copy_in(start, image.tensor[start:stop])
            ends[number] = max(ends[number], time.perf_counter())

    with ExitStack() as stack:
        helpers = []
        if num_threads > 1:
            threads = stack.enter_context(ThreadPoolExecutor(num_threads - 1, "copy"))
            helpers = [threads.submit(copy) for _ in range(num_threads - 1)]
        copy()
        for helper in helpers:
            helper.result()
    return list(accumulate(ends, max))  # complete: the groups before it are, too


def _cut(groups: tuple[Group, ...]) -> Iterator[tuple[int, int, int]]:
    """(group number, first byte, end) of every piece, in order."""
    for number, group in enumerate(groups):
        end = group.offset + group.num_bytes
        for start in range(group.offset, end, PIECE_BYTES):
            yield number, start, min(start + PIECE_BYTES, end)
