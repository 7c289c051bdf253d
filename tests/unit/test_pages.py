"""The free list, against a model of it; and cutting pages into runs."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.gpu_agent.pages import OutOfPages, PagePool, Region, Stamp, runs


class BookPool(PagePool):
    """Free list only."""

    def identity(self, dtype: torch.dtype) -> torch.Tensor:
        raise NotImplementedError

    def reserve(self, num_bytes: int) -> Region:
        raise NotImplementedError

    def stamp(self) -> Stamp:
        raise NotImplementedError

    def join_copies(self) -> None:
        raise NotImplementedError

    def synchronize(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


def test_take_gives_the_lowest_pages_ascending() -> None:
    pool = BookPool(4096, 6)
    assert pool.take(4) == (0, 1, 2, 3)
    pool.give([2, 0])
    assert pool.take(3) == (0, 2, 4)
    assert (pool.num_free, pool.used_bytes) == (1, 5 * 4096)


def test_out_of_pages_takes_nothing_and_says_what_was_wanted() -> None:
    pool = BookPool(4096, 4)
    pool.take(3)
    with pytest.raises(OutOfPages, match=r"2 pages wanted, 1 free of 4") as caught:
        pool.take(2)
    assert (caught.value.wanted, caught.value.free, caught.value.total) == (2, 1, 4)
    assert pool.take(1) == (3,)


@pytest.mark.parametrize("bad", [[0, 0], [3], [4], [-1], [0, 1, 2]])
def test_a_wrong_give_changes_nothing(bad: list[int]) -> None:
    pool = BookPool(4096, 4)
    pool.take(2)
    with pytest.raises(ValueError, match="given twice or never taken"):
        pool.give(bad)
    assert pool.num_free == 2
    pool.give([0, 1])
    assert pool.num_free == 4


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=40))
def test_free_list_against_a_set(steps: list[tuple[bool, int]]) -> None:
    pool, free, taken = BookPool(4096, 16), set(range(16)), list[tuple[int, ...]]()
    for is_take, number in steps:
        if is_take and number <= len(free):
            got = pool.take(number)
            assert got == tuple(sorted(free)[:number])
            free -= set(got)
            taken.append(got)
        elif is_take:
            with pytest.raises(OutOfPages):
                pool.take(number)
        elif taken:
            back = taken.pop(number % len(taken))
            pool.give(back)
            free |= set(back)
        assert pool.num_free == len(free)


@given(st.lists(st.integers(0, 30), unique=True))
def test_runs_cover_every_page_in_order(pages: list[int]) -> None:
    found = list(runs(pages))
    assert [first + i for _, first, length in found for i in range(length)] == pages
    assert [start for start, _, _ in found] == [
        sum(f[2] for f in found[:i]) for i in range(len(found))
    ]
    for (_, first, length), (_, following, _) in pairwise(found):
        assert following != first + length
