"""The KV blocks of one model: which are free, who uses them, what they hold.

A page is cut into blocks of a few tokens. A row (a running request) uses blocks; several rows use
the same one where their tokens begin alike. A block nobody uses is free, but until it is handed
out again it holds what was computed, and a row that begins with those tokens takes it back:

    used      counted by rows        [7:2] [8:1] [9:1]
    free      next to go first       [3] [4] [k:1] [k:2] [k:5]     k: known by its key

A *key* stands for all tokens up to a block's end (see prefix.py), so equal keys mean equal K and
V. Only full blocks have one, and nobody writes into those any more.

Pages come in two kinds. The *reserve* is the replica's own, from swap-in to swap-out. When it is
used up, pages that nobody needs now are *borrowed* from the pool; a borrowed page goes back as
soon as none of its blocks is used, and the engine may ask for all of them at any time.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final


class OutOfBlocks(Exception):
    """Fewer blocks are free than are needed. Nothing was taken."""


class Blocks:
    """See the module's text. Block b is number ``b % per_page`` of page ``b // per_page``.

    ``borrow()``: a page of the pool, or None. ``give_back(page)``: the reverse.
    ``num_borrowable()``: how many pages ``borrow`` would find.
    """

    def __init__(
        self,
        per_page: int,
        borrow: Callable[[], int | None],
        give_back: Callable[[int], None],
        num_borrowable: Callable[[], int],
    ) -> None:
        self.per_page: Final = per_page
        self._borrow = borrow
        self._give_back = give_back
        self._num_borrowable = num_borrowable
        self._reserve: tuple[int, ...] = ()
        self._borrowed: dict[int, int] = {}  # page -> how many of its blocks are used
        self._free: OrderedDict[int, None] = OrderedDict()  # those without a key first
        self._users: dict[int, int] = {}  # used block -> by how many rows
        self._key: dict[int, bytes] = {}
        self._by_key: dict[bytes, int] = {}

    # -- pages -----------------------------------------------------------------------------

    def attach(self, pages: Sequence[int]) -> None:
        """The reserve, from now on. ValueError where there is one already."""
        if self._reserve:
            raise ValueError(f"there are {len(self._reserve)} reserve pages already")
        self._reserve = tuple(pages)
        for page in self._reserve:
            self._add(page)

    def detach(self) -> None:
        """Forget all; borrowed pages go back. ValueError while blocks are used."""
        if self._users:
            raise ValueError(f"{len(self._users)} KV blocks are still used")
        self._reserve = ()
        self._free.clear()
        self._key.clear()
        self._by_key.clear()

    def _add(self, page: int) -> None:
        first = page * self.per_page
        for block in reversed(range(first, first + self.per_page)):
            self._free[block] = None
            self._free.move_to_end(block, last=False)

    @property
    def num_used(self) -> int:
        return len(self._users)

    @property
    def num_free(self) -> int:
        """Without borrowing."""
        return len(self._free)

    @property
    def num_borrowed_pages(self) -> int:
        return len(self._borrowed)

    # -- blocks ----------------------------------------------------------------------------

    def can_take(self, count: int) -> bool:
        short = count - len(self._free)
        return short <= 0 or short <= self._num_borrowable() * self.per_page

    def take(self) -> int:
        """A block of one's own, which holds nothing of worth. Raises OutOfBlocks."""
        if not self._free:
            page = self._borrow()
            if page is None:
                raise OutOfBlocks("all KV blocks are in use, and the pool has no page to spare")
            self._borrowed[page] = 0
            self._add(page)
        block, _ = self._free.popitem(last=False)
        self._forget(block)
        self._use(block)
        return block

    def share(self, key: bytes) -> int | None:
        """The block known by ``key``, used by one more; None where there is none."""
        block = self._by_key.get(key)
        if block is None:
            return None
        if block in self._free:
            del self._free[block]
            self._use(block)
        else:
            self._users[block] += 1
        return block

    def publish(self, block: int, key: bytes) -> None:
        """``block`` is full, and may be shared as ``key``. Where another one is known by it,
        that one stays.
        """
        if key not in self._by_key and block not in self._key:
            self._key[block] = key
            self._by_key[key] = block

    def holds(self, block: int, key: bytes) -> bool:
        return self._key.get(block) == key

    def release(self, block: int) -> None:
        """One user less. ValueError where it has none."""
        left = self._users.get(block, 0) - 1
        if left < 0:
            raise ValueError(f"KV block {block} is not used")
        if left:
            self._users[block] = left
            return
        del self._users[block]
        self._free[block] = None
        if block not in self._key:
            self._free.move_to_end(block, last=False)
        page = block // self.per_page
        if page in self._borrowed:
            self._borrowed[page] -= 1
            if not self._borrowed[page]:
                self._return(page)

    @property
    def users(self) -> dict[int, int]:
        """Used block -> by how many rows."""
        return dict(self._users)

    def _use(self, block: int) -> None:
        self._users[block] = 1
        page = block // self.per_page
        if page in self._borrowed:
            self._borrowed[page] += 1

    def _return(self, page: int) -> None:
        del self._borrowed[page]
        first = page * self.per_page
        for block in range(first, first + self.per_page):
            del self._free[block]
            self._forget(block)
        self._give_back(page)

    def _forget(self, block: int) -> None:
        key = self._key.pop(block, None)
        if key is not None:
            del self._by_key[key]

    def validate(self) -> None:
        """Raise AssertionError where the books do not balance."""
        pages = [*self._reserve, *self._borrowed]
        assert len(set(pages)) == len(pages), "a page is there twice"
        mine = {page * self.per_page + i for page in pages for i in range(self.per_page)}
        assert mine == {*self._free, *self._users}, "KV blocks leak"
        assert not self._free.keys() & self._users.keys(), "a free KV block is used"
        assert all(count > 0 for count in self._users.values()), "a KV block has no users"
        for page, used in self._borrowed.items():
            real = sum(1 for block in self._users if block // self.per_page == page)
            assert used == real > 0, f"borrowed page {page}: {used} blocks counted, {real} used"
        assert {self._key[block]: block for block in self._key} == self._by_key, "keys"
        assert self._key.keys() <= mine, "a key of a block that is not here"
