"""Who computes next: rows that wait, rows that run, and the KV blocks that they run on.

    add ──> waiting ──(blocks, a place)──> prefill ──> decoding ──> remove
               ^                              │            │
               `──────── park: out of blocks, or the model leaves

`next` chooses the rows of one forward pass:

1. unfinished prompts, where they have not had their turn;
2. else one token for every row that decodes; then it is the prompts' turn again.

A turn of prompts is a chunk of the oldest, or several short ones of no more tokens together: in
one forward pass where the model can (packed.py), else in several. So a long prompt and running
streams take turns, and neither waits for the other's whole.

Blocks are taken as a row grows. When they run out, the row admitted last is parked; the reserve
holds the longest possible row, so the first one can always go on, and all of them end.
"""

from collections import deque
from collections.abc import Iterator
from typing import Final

from services.gpu_agent.engine.kv_manager import KVManager, OutOfBlocks
from services.gpu_agent.engine.row import Row

DEFAULT_CHUNK_TOKENS: Final = 512


class Schedule:
    """See the module's text. ``chunk_tokens``: of prompts, between two steps of decoding.
    ``packs``: whether one forward pass may be for several prompts.
    """

    def __init__(
        self,
        kv: KVManager,
        max_batch: int,
        chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
        packs: bool = False,
    ) -> None:
        self.kv: Final = kv
        self.chunk_tokens = chunk_tokens
        self.num_parked = 0  # how often a row had to give way, over its life
        self._max_batch = max_batch
        self._packs = packs
        self._waiting: deque[Row] = deque()
        self._running: dict[str, Row] = {}  # in order of admission
        self._prefilled = 0  # tokens, since the last step of decoding

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    def __iter__(self) -> Iterator[Row]:
        """All rows, in the order in which they will end up running."""
        return iter([*self._running.values(), *self._waiting])

    def find(self, request_id: str) -> Row | None:
        if row := self._running.get(request_id):
            return row
        return next((row for row in self._waiting if row.request_id == request_id), None)

    def add(self, row: Row) -> None:
        row.kv = self.kv.new_row(row.request.sampling.cache_salt.encode())
        self._waiting.append(row)

    def remove(self, row: Row) -> None:
        """It has ended, wherever it is."""
        if row.is_running:
            del self._running[row.request_id]
        else:
            self._waiting.remove(row)
        self.kv.release(row.kv)

    # -- one step --------------------------------------------------------------------------

    def admit(self) -> list[Row]:
        """First come, first served, where there are blocks for all its tokens and one more. Who
        still waits for a grammar is passed by.
        """
        admitted = []
        for row in [row for row in self._waiting if not row.awaits_grammar]:
            if len(self._running) >= self._max_batch or not self.kv.place(row.kv, row.ids):
                break
            self._waiting.remove(row)
            self._running[row.request_id] = row
            # With all but its last token cached there is nothing to fill: it decodes.
            is_whole = 0 < row.num_cached == len(row.ids) - 1
            row.prefill_end = 0 if is_whole else len(row.ids)
            admitted.append(row)
        return admitted

    def next(self) -> list[Row]:
        """The rows of the next forward pass: in prefill, or all that decode."""
        filling = [row for row in self._running.values() if row.in_prefill]
        decoding = [row for row in self._running.values() if not row.in_prefill]
        if not decoding:
            self._prefilled = 0
        if filling and (not self._prefilled or self._has_room(filling[0])):
            return self._fill(filling)
        self._prefilled = 0
        return self._grow(decoding)

    def _fill(self, filling: list[Row]) -> list[Row]:
        """The oldest, and those after it that fit into the same turn with all they have."""
        chosen = filling[:1]
        self._prefilled += min(filling[0].num_to_fill, self.chunk_tokens)
        for row in filling[1:] if self._packs and not filling[0].is_alone else ():
            if self._has_room(row) and not row.is_alone:
                chosen.append(row)
                self._prefilled += row.num_to_fill
        return chosen

    def _has_room(self, row: Row) -> bool:
        return self._prefilled + row.num_to_fill <= self.chunk_tokens

    def _grow(self, rows: list[Row]) -> list[Row]:
        """Those of ``rows`` that have room for their next token, after parking others for it."""
        for row in rows:
            while row.is_running and row.kv.num_places < len(row.ids):
                try:
                    self.kv.grow(row.kv, len(row.ids))
                except OutOfBlocks:
                    self._park(next(reversed(self._running.values())))  # perhaps row itself
        return [row for row in rows if row.is_running]

    # -- making room -----------------------------------------------------------------------

    def _park(self, row: Row) -> None:
        """Give its blocks to others; it is first in line to come back."""
        del self._running[row.request_id]
        self.kv.park(row.kv, row.ids)
        self._waiting.appendleft(row)
        self.num_parked += 1

    def park_all(self) -> None:
        """At a token boundary; they come back in the same order."""
        while self._running:
            self._park(next(reversed(self._running.values())))

    def give_back(self, num_pages: int) -> None:
        """Park rows until that many borrowed pages are the pool's again, or there are none."""
        blocks = self.kv.blocks
        target = max(0, blocks.num_borrowed_pages - num_pages)
        while blocks.num_borrowed_pages > target and self._running:
            self._park(next(reversed(self._running.values())))

    def validate(self) -> None:
        """Raise AssertionError where the books do not balance."""
        self.kv.validate([row.kv for row in self])
        assert len(self._running) <= self._max_batch, "more rows than max_batch"
        assert all(row.is_running for row in self._running.values()), "a running row has no blocks"
        assert not any(row.is_running for row in self._waiting), "a waiting row owns blocks"
        assert not any(row.ended for row in self), "an ended row is still here"
