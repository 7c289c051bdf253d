"""One swap-in's bytes on their way: pieces, one watermark, and who waits for it.

    image      |embed..|layer.0........|layer.1........|layer.2........|head..|
    kept       |#######|######|                                                  on the device still
    pieces                     |0......|1......|2......|3......|4......|5.....|
    arrived                     done    done            done
    watermark  ------------------------->|

A forward may run meanwhile: before each group of weights is used, a *guard* (a forward pre-hook,
see `guarded`) waits until the watermark has passed the group's end. On CUDA the watermark counts
bytes whose copy was *given to the device*; the guard then makes the compute stream wait for the
stamp after them. Never the other way round: waiting for an event that was not recorded yet is
silently no wait at all, and the output would be wrong.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray
from torch import nn

from services.gpu_agent.host_image import Layout
from services.gpu_agent.pages import Stamp

_LOOK_EVERY_S: Final = 0.005  # how often a waiting forward looks whether it is to be given up


class NotArrived(Exception):
    """The weights that a forward needs are not there; nothing was computed, it can run again."""


class ForwardAbandoned(NotArrived):
    """A message came that may make the forward pointless."""


class ArrivalEnded(NotArrived):
    """The swap-in failed or was called off."""


@dataclass(frozen=True)
class Piece:
    """Bytes ``start`` to ``end`` of the image, all of one group (or after it), copied as one."""

    start: int
    end: int
    group: int


def cut(
    layout: Layout, is_kept: NDArray[np.bool_], page_bytes: int, piece_bytes: int
) -> list[Piece]:
    """The pieces that have to be copied, in order: what is not on a kept page.

    The gaps between groups are copied, too: checksums are of whole pages.
    """
    bounds = [*(group.offset for group in layout.groups), layout.num_bytes]
    pieces: list[Piece] = []
    for kept, pages in groupby(range(len(is_kept)), key=lambda page: bool(is_kept[page])):
        if kept:
            continue
        run = list(pages)
        first, last = run[0] * page_bytes, (run[-1] + 1) * page_bytes
        for number, (start, end) in enumerate(pairwise(bounds)):
            end = min(end, last)
            starts = range(max(start, first), end, piece_bytes)
            pieces += [Piece(at, min(at + piece_bytes, end), number) for at in starts]
    return pieces


class Arrival:
    """See the module. Copying threads call `begin`, `done` and `end`; the rest is the engine's.

    ``interrupted()``: whether a waiting forward should be given up; called while it waits.
    """

    def __init__(
        self, pieces: list[Piece], num_bytes: int, interrupted: Callable[[], bool]
    ) -> None:
        self.pieces: Final = pieces
        self.num_bytes: Final = num_bytes
        self._interrupted = interrupted
        self._news = threading.Condition()
        self._begun = [False] * len(pieces)
        self._stamps: list[Stamp | None] = [None] * len(pieces)
        self._num_whole = 0  # all pieces before this one are done
        self._watermark = pieces[0].start if pieces else num_bytes
        self._looked_at = time.monotonic()
        self._is_called_off = False
        self._is_over = False
        self.ended_at = 0.0  # time.perf_counter() when it was over; the engine may be busy then
        self._error: Exception | None = None

    @property
    def bytes_to_copy(self) -> int:
        return sum(piece.end - piece.start for piece in self.pieces)

    @property
    def watermark(self) -> int:
        return self._watermark

    @property
    def is_whole(self) -> bool:
        return self._watermark >= self.num_bytes

    @property
    def is_called_off(self) -> bool:
        return self._is_called_off

    @property
    def is_over(self) -> bool:
        """Nobody copies any more: all is there and checked, or it failed, or was called off."""
        return self._is_over

    @property
    def error(self) -> Exception | None:
        return self._error

    # -- the copying side ----------------------------------------------------------------

    def begin(self, number: int) -> bool:
        """About to copy this piece; False where the swap-in was called off or failed."""
        with self._news:
            if self._is_called_off or self._error:
                return False
            self._begun[number] = True
            return True

    def done(self, number: int, stamp: Stamp) -> None:
        """The piece is there once ``stamp`` is reached."""
        with self._news:
            self._stamps[number] = stamp
            while self._num_whole < len(self.pieces) and self._stamps[self._num_whole]:
                self._num_whole += 1
            at_end = self._num_whole == len(self.pieces)
            self._watermark = self.num_bytes if at_end else self.pieces[self._num_whole].start
            self._news.notify_all()

    def fail(self, error: Exception) -> None:
        """The first error counts."""
        with self._news:
            self._error = self._error or error
            self._news.notify_all()

    def end(self) -> None:
        with self._news:
            self._is_over = True
            self.ended_at = time.perf_counter()
            self._news.notify_all()

    # -- the engine's side ---------------------------------------------------------------

    def wait_for(self, end: int) -> None:
        """Return once bytes [0, ``end``) may be computed with. Raises NotArrived."""
        with self._news:
            while self._watermark < end:
                if self._error or self._is_called_off:
                    raise ArrivalEnded
                self._news.wait(_LOOK_EVERY_S)
                # By the clock: while pieces come fast, waiting never takes that long.
                if time.monotonic() >= self._looked_at + _LOOK_EVERY_S:
                    if self._interrupted():
                        raise ForwardAbandoned
                    self._looked_at = time.monotonic()
            stamp = self._last_stamp(end)
        if stamp is not None:
            stamp.order_compute()

    def _last_stamp(self, end: int) -> Stamp | None:
        """Of the last piece below ``end``: copies are done in order."""
        for number in range(self._num_whole - 1, -1, -1):
            if self.pieces[number].start < end:
                return self._stamps[number]
        return None

    def wait_until_over(self) -> None:
        """Block until nobody copies any more. Never raises; see `error`."""
        with self._news:
            self._news.wait_for(lambda: self._is_over)

    def call_off(self) -> None:
        """Stop at the next piece. `wait_until_over` tells when that is."""
        with self._news:
            self._is_called_off = True
            self._news.notify_all()

    def fate_of_pages(
        self, num_pages: int, page_bytes: int
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """(complete, written to), for every page of the image. Call when it is over.

        A page without a piece of its own is complete only if it was kept; that is the caller's
        to know.
        """
        written = np.zeros(num_pages, dtype=np.bool_)
        complete = np.zeros(num_pages, dtype=np.bool_)
        for piece in self.pieces:
            complete[piece.start // page_bytes : -(-piece.end // page_bytes)] = True
        for piece, begun, stamp in zip(self.pieces, self._begun, self._stamps, strict=True):
            span = slice(piece.start // page_bytes, -(-piece.end // page_bytes))
            if begun:
                written[span] = True
            if stamp is None:
                complete[span] = False
        return complete, written


@contextmanager
def guarded(
    module: nn.Module, ends: dict[str, int], wait_for: Callable[[int], None]
) -> Iterator[None]:
    """While open, no submodule in ``ends`` runs before ``wait_for(its end)`` has returned."""

    def guard(end: int) -> Callable[..., None]:
        return lambda *_: wait_for(end)

    hooks = [
        module.get_submodule(name).register_forward_pre_hook(guard(end))
        for name, end in ends.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
