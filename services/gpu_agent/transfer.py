"""The copy of a swap-in, in threads of its own, in execution order.

A GPU's copy engine works by itself: pieces are queued on its stream, a bounded number of bytes
ahead, so that a swap-in that is called off stops soon. On CPU the copying is ours, and one thread
can not fill the memory bus. There, threads take the next piece whenever they are done with one,
so that one whose core is busy elsewhere takes fewer:

    image     |embed..|layer.0........|layer.1........|
    pieces    |0......|1.......|2.....|3.......|4.....|
    thread A   0           2                4
    thread B      1             3

One swap-in copies at a time: two that share the link would both be late.
"""

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import torch

from schemas.state import LayerCopy, PcieLink
from services.gpu_agent.arrival import Arrival
from services.gpu_agent.host_image import HostImage
from services.gpu_agent.pages import PagePool, Region, Stamp

Verify: TypeAlias = Literal["sampled", "all", "off"]

PIECE_BYTES: Final = {"cpu": 8 * 2**20, "cuda": 32 * 2**20}
MAX_THREADS: Final = 8
# Enough to keep the link busy while this thread waits for the interpreter lock, some 20 ms of
# a fast link; and what a swap-in that is called off still copies.
AHEAD_BYTES: Final = 2**30
_LOOK_EVERY_S: Final = 0.02


@dataclass(frozen=True)
class CopyReport:
    """What is known once it is over. ``copy_s``: from before the first to after the last byte."""

    num_bytes: int
    copy_s: float
    verify_s: float
    layers: tuple[LayerCopy, ...]
    link: PcieLink | None


class Transfer:
    """Copies an arrival's pieces. `start`, then the arrival tells; `report` once it is over.

    ``on_over()`` is called in a copying thread, last of all.
    """

    def __init__(
        self,
        pool: PagePool,
        region: Region,
        image: HostImage,
        arrival: Arrival,
        verify: Verify,
        on_over: Callable[[], None],
    ) -> None:
        self._pool = pool
        self._region = region
        self._image = image
        self._arrival = arrival
        self._verify = verify
        self._on_over = on_over
        self._next = iter(range(len(arrival.pieces)))  # taking one is one step under the GIL
        self._num_threads = 1
        if pool.kind == "cpu" and not pool.link_bytes_per_s:
            # Asked here: in a new thread torch would tell its default.
            self._num_threads = min(torch.get_num_threads(), MAX_THREADS)
        self._first: Stamp | None = None  # before the first piece
        self._ends: dict[int, Stamp] = {}  # by number, of the pieces that were copied
        self._copy_s = self._verify_s = 0.0
        self._link: PcieLink | None = None

    def start(self) -> None:
        self._pool.copiers.submit(self._run)

    def report(self) -> CopyReport:
        """Raises nothing; of an arrival that was called off it tells what was copied."""
        num_bytes = 0
        seconds = [0.0] * len(self._image.layout.groups)
        copied = [0] * len(seconds)
        last = self._first
        for number, end in sorted(self._ends.items()):
            piece = self._arrival.pieces[number]
            num_bytes += piece.end - piece.start
            copied[piece.group] += piece.end - piece.start
            # Several threads end pieces out of order: a group's time counts from the end of all
            # before it.
            took = end.seconds_since(last) if last else 0.0
            if took > 0:
                seconds[piece.group] += took
                last = end
        layers = tuple(
            LayerCopy(group.name, count, taken)
            for group, count, taken in zip(self._image.layout.groups, copied, seconds, strict=True)
        )
        return CopyReport(num_bytes, self._copy_s, self._verify_s, layers, self._link)

    # -- the copying threads ---------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._pool.enter_thread()
            # Another swap-in may hold the link for long: look for an end while waiting.
            while not self._pool.link.acquire(timeout=_LOOK_EVERY_S):
                if self._arrival.is_called_off:
                    return
            try:
                self._copy_and_check()
            finally:
                self._pool.link.release()
        except Exception as error:  # whatever it is, the engine must hear of it
            self._arrival.fail(error)
        finally:
            self._arrival.end()
            self._on_over()

    def _copy_and_check(self) -> None:
        began = time.perf_counter()
        self._copy()
        self._copy_s = time.perf_counter() - began
        if self._arrival.is_whole:
            self._check()
            self._verify_s = time.perf_counter() - began - self._copy_s

    def _copy(self) -> None:
        self._first = self._pool.stamp()
        if self._pool.kind == "cuda":
            self._queue_pieces()
        else:
            self._share_pieces()

    def _queue_pieces(self) -> None:
        """Give the device piece after piece, AHEAD_BYTES at most before they are done."""
        stamp = self._first
        ahead: deque[tuple[int, Stamp]] = deque()
        ahead_bytes = 0
        half = len(self._arrival.pieces) // 2
        try:
            for number in self._next:
                if not self._arrival.begin(number):
                    break
                size = self._copy_piece(number)
                stamp = self._pool.stamp()
                self._ends[number] = stamp
                self._arrival.done(number, stamp)
                ahead.append((size, stamp))
                ahead_bytes += size
                while ahead_bytes > AHEAD_BYTES:
                    freed, oldest = ahead.popleft()
                    oldest.wait()
                    ahead_bytes -= freed
                if number == half:
                    self._link = self._pool.read_link()  # under load: idle links slow down
        finally:
            if stamp:
                stamp.wait()

    def _share_pieces(self) -> None:
        """Copy with several threads, of which this is one. Copies give up the interpreter lock."""
        helpers = [self._pool.copiers.submit(self._copy_some) for _ in range(self._num_threads - 1)]
        self._copy_some()
        for helper in helpers:
            helper.result()

    def _copy_some(self) -> None:
        rate = self._pool.link_bytes_per_s
        began, copied = time.perf_counter(), 0
        try:
            for number in self._next:
                if not self._arrival.begin(number):
                    return
                copied += self._copy_piece(number)
                if rate:
                    time.sleep(max(0.0, began + copied / rate - time.perf_counter()))
                self._ends[number] = self._pool.stamp()
                self._arrival.done(number, self._ends[number])
        except Exception as error:
            self._arrival.fail(error)

    def _copy_piece(self, number: int) -> int:
        piece = self._arrival.pieces[number]
        self._region.copy_in(piece.start, self._image.tensor[piece.start : piece.end])
        return piece.end - piece.start

    def _check(self) -> None:
        """Compare pages on the device with what was loaded. Raises Corruption."""
        checksums = self._image.checksums
        if self._verify == "off" or checksums is None:
            return
        every = range(checksums.num_pages)
        chosen = [random.choice(every)] if self._verify == "sampled" and every else every
        check_pages(self._region, self._image, chosen)


def check_pages(region: Region, image: HostImage, pages: Sequence[int] | None = None) -> int:
    """Compare ``pages`` (None: all) of a resident model with what was loaded; returns how many.

    Raises Corruption.
    """
    if image.checksums is None:
        return 0

    def read(start: int, end: int) -> torch.Tensor:
        return region.read(start, end - start)

    return image.checksums.check_read(read, "on the device", pages)
