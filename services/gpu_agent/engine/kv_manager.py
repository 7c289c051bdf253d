"""What each row has in the KV cache: taken, shared, written behind, parked, brought back.

    waiting ── place ──> placed ── computed ──> placed ── release ──> gone
                ^                                 │
                `──────────── park ───────────────┘        at a token boundary, at any time

`place` begins with what is there already: blocks on the device that other rows computed, then
blocks in host memory. Full blocks are found by their tokens (prefix.py), so it makes no
difference who computed them. Only what is missing is computed, by the next forwards.

    row's tokens   | full | full | full | part |
    device           used   used   used   used     one's own from the first that was not found
    host             by key by key        tail     tail: as it was when the row was parked

With ``preserve``, full blocks are *written behind*: copied to host memory while later tokens are
computed, so that a `park` has little left to copy. It holds what it needs there until the row
has gone on. What is missing then, for whatever reason, is computed anew from the tokens: nothing
here can lose a row.

While a model's weights arrive they are not verified yet, and nothing that was computed from them
is published or written behind (``is_trusted``).
"""

import itertools
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.gpu_agent.engine.blocks import Blocks, OutOfBlocks
from services.gpu_agent.engine.kv import KVStore, Span
from services.gpu_agent.engine.kv_host import HostBlocks
from services.gpu_agent.engine.prefix import extend_keys

_NOWHERE: Final = np.empty(0, dtype=np.int64)
_serial = itertools.count(1)


def _digest(salt: bytes) -> bytes:
    """Longer than any key, so that no salt can stand for the blocks before."""
    return sha256(salt).digest() if salt else b""


@dataclass(eq=False)
class RowKV:
    """One row's part of the cache. ``places``: of each token that ``blocks`` have room for."""

    blocks: list[int] = field(default_factory=list)
    places: NDArray[np.int64] = field(default_factory=lambda: _NOWHERE)
    num_cached: int = 0  # tokens whose K and V are in the blocks
    num_published: int = 0  # of its blocks, those that others may find
    keys: list[bytes] = field(default_factory=list)  # of its full blocks, as far as asked for
    held: list[bytes] = field(default_factory=list)  # in host memory, of a row that was parked
    tail: bytes = b""  # host key of its last, unfinished block
    tail_end: int = 0  # tokens cached when that was written
    salt: bytes = b""  # one's own where blocks must not be shared

    @property
    def is_placed(self) -> bool:
        return bool(self.blocks)

    @property
    def num_places(self) -> int:
        return len(self.places)

    def span(self, end: int) -> Span:
        return Span(self.places, self.num_cached, end)


class KVManager:
    """The cache of one model. ``host`` is None where nothing is to be kept in host memory.

    ``num_reserve_tokens``: what fits into the reserve, so how long a row may get for sure.
    ``shares``: whether rows may use each other's blocks (`prefix.are_prefixes_shareable`).
    """

    def __init__(
        self,
        store: KVStore,
        blocks: Blocks,
        num_reserve_pages: int,
        host: HostBlocks | None = None,
        shares: bool = True,
    ) -> None:
        self.store: Final = store
        self.blocks: Final = blocks
        self.host: Final = host
        self.num_reserve_tokens: Final = (
            num_reserve_pages * store.blocks_per_page * store.block_tokens
        )
        self.is_trusted = True
        self.num_computed = 0  # tokens, over its life
        self.copied_bytes = 0  # device to host, over its life
        self._shares = shares
        self._behind: deque[tuple[int, bytes]] = deque()  # to be copied: block, key

    # -- a row comes and goes --------------------------------------------------------------

    def new_row(self, salt: bytes = b"") -> RowKV:
        """``salt``: it shares blocks with rows of the same salt only."""
        return RowKV(salt=_digest(salt) if self._shares else b"row %d" % next(_serial))

    def place(self, kv: RowKV, ids: Sequence[int]) -> bool:
        """Blocks for all of ``ids`` and one token more, with what is known of them already.

        False (nothing taken) where there are not enough. At least the last token is left to be
        computed: its logits are what comes next.
        """
        size = self.store.block_tokens
        count = -(-(len(ids) + 1) // size)
        usable = (len(ids) - 1) // size
        # 1. On the device.
        extend_keys(kv.keys, ids, size, kv.salt)
        for key in kv.keys[:usable]:
            block = self.blocks.share(key)
            if block is None:
                break
            kv.blocks.append(block)
        if not self.blocks.can_take(count - len(kv.blocks)):
            for block in reversed(kv.blocks):
                self.blocks.release(block)
            kv.blocks.clear()
            return False
        # 2. In host memory.
        while len(kv.blocks) < usable and self._fetch(kv, kv.keys[len(kv.blocks)]):
            self.blocks.publish(kv.blocks[-1], kv.keys[len(kv.blocks) - 1])
        kv.num_published = len(kv.blocks)
        kv.num_cached = len(kv.blocks) * size
        # 3. Its own unfinished block.
        if kv.tail and kv.num_cached == kv.tail_end // size * size and self._fetch(kv, kv.tail):
            kv.num_cached = kv.tail_end
        # 4. Room for the rest.
        while len(kv.blocks) < count:
            kv.blocks.append(self.blocks.take())
        kv.places = np.concatenate([self.store.places(block) for block in kv.blocks])
        return True

    def _fetch(self, kv: RowKV, key: bytes) -> bool:
        """Append a block with the bytes that host memory keeps as ``key``, if it does."""
        source = self.host.find(key) if self.host else None
        if source is None:
            return False
        block = self.blocks.take()
        self.store.block_view(block).copy_(source, non_blocking=True)
        kv.blocks.append(block)
        return True

    def grow(self, kv: RowKV, num_tokens: int) -> None:
        """Room for ``num_tokens`` tokens in all. Raises OutOfBlocks, and leaves what it got."""
        while kv.num_places < num_tokens:
            block = self.blocks.take()
            kv.blocks.append(block)
            kv.places = np.concatenate((kv.places, self.store.places(block)))

    def computed(self, kv: RowKV, ids: Sequence[int], end: int) -> None:
        """A forward wrote K and V of ``ids`` up to ``end``."""
        self.num_computed += end - kv.num_cached
        kv.num_cached = end
        if not self.is_trusted:
            return
        if kv.held or kv.tail:
            self._let_go(kv)
        full = end // self.store.block_tokens
        if kv.num_published < full:
            extend_keys(kv.keys, ids[:end], self.store.block_tokens, kv.salt)
            for number in range(kv.num_published, full):
                block, key = kv.blocks[number], kv.keys[number]
                self.blocks.publish(block, key)
                if self.host and not self.host.has(key):
                    self._behind.append((block, key))
            kv.num_published = full

    def release(self, kv: RowKV) -> None:
        """The row has ended: nothing is kept for its sake."""
        self._leave(kv)
        self._let_go(kv)

    def park(self, kv: RowKV, ids: Sequence[int]) -> None:
        """Give up the row's blocks; what it needs to go on is held in host memory."""
        if self.host and self.is_trusted:
            self._save(kv, ids, self.host)
        self._leave(kv)

    def _save(self, kv: RowKV, ids: Sequence[int], host: HostBlocks) -> None:
        size = self.store.block_tokens
        self._let_go(kv)
        extend_keys(kv.keys, ids[: kv.num_cached], size, kv.salt)
        full = kv.num_cached // size
        for block, key in zip(kv.blocks[:full], kv.keys, strict=False):
            if not self._copy_out(block, key, host):
                return
            host.hold(key)
            kv.held.append(key)
        if kv.num_cached % size:
            tail = b"tail %d" % next(_serial)
            if self._copy_out(kv.blocks[full], tail, host):
                host.hold(tail)
                kv.tail, kv.tail_end = tail, kv.num_cached

    def _leave(self, kv: RowKV) -> None:
        for block in reversed(kv.blocks):  # the first ones stay known for longest
            self.blocks.release(block)
        kv.blocks.clear()
        kv.places = _NOWHERE
        kv.num_cached = kv.num_published = 0

    def _let_go(self, kv: RowKV) -> None:
        """What was held for the row is an ordinary part of the cache again."""
        if self.host:
            for key in kv.held:
                self.host.unhold(key)
            if kv.tail:
                self.host.unhold(kv.tail, drop=True)
        kv.held, kv.tail, kv.tail_end = [], b"", 0

    # -- write-behind ----------------------------------------------------------------------

    def write_behind(self, max_bytes: int) -> None:
        """Copy some of what is full to host memory."""
        if self.host is None:
            return
        while self._behind and max_bytes > 0:
            block, key = self._behind.popleft()
            if self.blocks.holds(block, key) and not self.host.has(key):
                max_bytes -= self.store.block_bytes
                if not self._copy_out(block, key, self.host):
                    self._behind.clear()  # all is held: what is copied now, is so at a park

    def _copy_out(self, block: int, key: bytes, host: HostBlocks) -> bool:
        """False where host memory has no room."""
        if host.has(key):
            return host.find(key) is not None
        target = host.add(key)
        if target is None:
            return False
        target.copy_(self.store.block_view(block), non_blocking=True)
        self.copied_bytes += target.numel()
        return True

    # -- the device comes and goes ---------------------------------------------------------

    def attach(self, pages: Sequence[int]) -> None:
        """The model is on the device: its reserve."""
        self.blocks.attach(pages)

    def detach(self) -> None:
        """All rows are parked or gone, and the pages leave. Host memory keeps what it has."""
        self._behind.clear()
        self.blocks.detach()

    def forget(self) -> None:
        """Nothing that was computed is to be trusted, or wanted, any more. No row is left."""
        self._behind.clear()
        if self.host:
            self.host.clear()

    def validate(self, rows: Sequence[RowKV]) -> None:
        """Raise AssertionError where the books do not balance. ``rows``: all there are."""
        self.blocks.validate()
        users = Counter(block for kv in rows for block in kv.blocks)
        assert users == self.blocks.users, "blocks are used by rows that are gone"
        size = self.store.block_tokens
        for kv in rows:
            assert kv.num_places == len(kv.blocks) * size >= kv.num_cached, "places"
            assert kv.num_published <= kv.num_cached // size, "published too much"
        held = Counter(key for kv in rows for key in (*kv.held, kv.tail) if key)
        assert held == (self.host.holds if self.host else {}), "host blocks are held for nobody"


__all__ = ["KVManager", "OutOfBlocks", "RowKV"]
