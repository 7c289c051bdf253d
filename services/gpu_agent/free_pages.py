"""Which pages of the pool are free, and what the free ones still hold.

A swapped-out model's pages are free, but until somebody writes over them they hold its bytes:
the model comes back without copying those. So a swap-out costs nothing, a newcomer takes from
the others exactly as many pages as it needs, and a swap-in copies only what is missing.

    A leaves     [A0 A1 A2 A3 A4 A5]  all free, all still A's
    B needs 2    [A0 A1 A2 A3 B0 B1]  the least recently freed owner loses its tail
    A comes back  kept  kept  kept  kept  copied (4, 5): its first layers are there already

``take`` and ``claim`` hand out pages that hold nothing first, then those of the owner that left
first, its last pages first. An *owner* is a number that stands for one host image's content; it
is never used again for other content.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

_NOBODY: Final = 0


class OutOfPages(Exception):
    """Fewer pages are free than were asked for. Nothing was taken."""

    def __init__(self, wanted: int, free: int, total: int) -> None:
        super().__init__(
            f"{wanted} pages wanted, {free} free of {total}: swap another model out first, or "
            "raise the memory budget"
        )
        self.wanted: Final = wanted
        self.free: Final = free
        self.total: Final = total


@dataclass(frozen=True)
class Claim:
    """Pages taken for one swap-in.

    Image page i goes to device page ``weights[i]``, which holds its bytes already where
    ``is_kept[i]``. ``rest``: pages for anything else. The other two: what ``weights`` held
    before, so that it is not lost should nobody write over it.
    """

    weights: tuple[int, ...]
    is_kept: NDArray[np.bool_]
    rest: tuple[int, ...]
    old_owner: NDArray[np.int64]
    old_index: NDArray[np.int64]


class FreePages:
    """The free list over pages 0 .. num_pages-1. See the module's text."""

    def __init__(self, num_pages: int) -> None:
        self._is_free = np.ones(num_pages, dtype=np.bool_)
        self._owner = np.full(num_pages, _NOBODY, dtype=np.int64)  # of free pages; else NOBODY
        self._index = np.zeros(num_pages, dtype=np.int64)  # which page of its owner's image
        self._left: dict[int, None] = {}  # owners of free pages, in the order in which they left
        self.num_pages = num_pages
        self.num_free = num_pages

    def take(self, num_pages: int) -> tuple[int, ...]:
        """``num_pages`` free pages, ascending. OutOfPages takes nothing."""
        if num_pages < 0:
            raise ValueError(f"can not take {num_pages} pages")
        if num_pages > self.num_free:
            raise OutOfPages(num_pages, self.num_free, self.num_pages)
        return self._mark_taken(self._least_valuable(num_pages))

    def claim(self, owner: int, num_weights: int, num_rest: int) -> Claim:
        """Pages for ``owner``'s image and ``num_rest`` others. OutOfPages takes nothing."""
        if num_weights + num_rest > self.num_free:
            raise OutOfPages(num_weights + num_rest, self.num_free, self.num_pages)
        weights = np.full(num_weights, -1, dtype=np.int64)
        held = np.flatnonzero(self._owner == owner)
        weights[self._index[held]] = held
        is_kept = weights >= 0
        self._mark_taken(weights[is_kept])
        fresh = self._least_valuable(num_rest + int(np.count_nonzero(~is_kept)))
        # KV is written at once, weights only as they arrive: what was worth least goes first.
        rest, into = fresh[:num_rest], fresh[num_rest:]
        weights[~is_kept] = into
        old_owner, old_index = self._owner[weights].copy(), self._index[weights].copy()
        self._mark_taken(fresh)
        return Claim(tuple(weights.tolist()), is_kept, tuple(rest.tolist()), old_owner, old_index)

    def unclaim(
        self, claim: Claim, owner: int, arrived: NDArray[np.bool_], touched: NDArray[np.bool_]
    ) -> None:
        """Give back all of ``claim``, of whose image pages ``arrived`` are complete.

        Pages not ``touched`` still hold what they held before.
        """
        self.give((*claim.weights, *claim.rest))
        weights = np.asarray(claim.weights, dtype=np.int64)
        for number in dict.fromkeys(claim.old_owner[~touched & ~claim.is_kept].tolist()):
            mine = ~touched & ~claim.is_kept & (claim.old_owner == number)
            if number != _NOBODY:
                self._note(number, weights[mine], claim.old_index[mine])
        mine = arrived | claim.is_kept
        self._note(owner, weights[mine], np.flatnonzero(mine))

    def give(self, pages: Iterable[int]) -> None:
        """Back to the free list, holding nothing of worth.

        ValueError (nothing given) on a page that is not taken.
        """
        given = list(pages)
        bad = [p for p in given if not 0 <= p < self.num_pages or self._is_free[p]]
        if bad or len(set(given)) != len(given):
            raise ValueError(f"pages given twice or never taken: {bad or given}")
        self._is_free[given] = True
        self._owner[given] = _NOBODY
        self.num_free += len(given)

    def give_image(self, pages: tuple[int, ...], owner: int) -> None:
        """Back to the free list; page i of them holds page i of ``owner``'s image."""
        self.give(pages)
        self._note(owner, np.asarray(pages, dtype=np.int64), np.arange(len(pages)))

    def num_held(self, owner: int) -> int:
        """How many free pages hold content of ``owner``."""
        return int(np.count_nonzero(self._owner == owner))

    def forget(self, owner: int) -> None:
        """``owner``'s content is worth nothing any more."""
        self._owner[self._owner == owner] = _NOBODY
        self._left.pop(owner, None)

    def _note(self, owner: int, pages: NDArray[np.int64], index: NDArray[np.int64]) -> None:
        """Free ``pages`` hold pages ``index`` of ``owner``'s image, which leaves now."""
        if pages.size:
            self._owner[pages] = owner
            self._index[pages] = index
            self._left.pop(owner, None)
            self._left[owner] = None

    def _least_valuable(self, count: int) -> NDArray[np.int64]:
        """``count`` free pages: those that hold nothing, then by owner, then ascending."""
        plain = np.flatnonzero(self._is_free & (self._owner == _NOBODY))[:count]
        chosen = [plain]
        missing = count - plain.size
        for owner in list(self._left):
            if missing <= 0:
                break
            held = np.flatnonzero(self._owner == owner)
            tail = held[np.argsort(-self._index[held], kind="stable")][:missing]
            chosen.append(np.sort(tail))
            missing -= tail.size
        return np.concatenate(chosen)

    def _mark_taken(self, pages: NDArray[np.int64]) -> tuple[int, ...]:
        self._is_free[pages] = False
        owners = np.unique(self._owner[pages])
        self._owner[pages] = _NOBODY
        self.num_free -= int(pages.size)
        for owner in owners.tolist():
            if owner != _NOBODY and not self.num_held(owner):
                self._left.pop(owner, None)
        return tuple(pages.tolist())

    def validate(self) -> None:
        """Raise AssertionError where the books do not balance."""
        assert self.num_free == int(np.count_nonzero(self._is_free)), "free count"
        assert not np.any(self._owner[~self._is_free]), "a taken page has a content note"
        owners = set(np.unique(self._owner).tolist()) - {_NOBODY}
        assert owners == set(self._left), f"owners {owners}, noted {list(self._left)}"
