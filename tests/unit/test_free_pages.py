"""The free list and what its pages hold: stories, and a model that keeps the bytes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.gpu_agent.free_pages import Claim, FreePages, OutOfPages

A, B, C = 1, 2, 3


def test_take_gives_the_lowest_pages_ascending() -> None:
    free = FreePages(6)
    assert free.take(4) == (0, 1, 2, 3)
    free.give([2, 0])
    assert free.take(3) == (0, 2, 4)
    assert free.num_free == 1


def test_out_of_pages_takes_nothing_and_says_what_was_wanted() -> None:
    free = FreePages(4)
    free.take(3)
    with pytest.raises(OutOfPages, match=r"2 pages wanted, 1 free of 4") as caught:
        free.take(2)
    assert (caught.value.wanted, caught.value.free, caught.value.total) == (2, 1, 4)
    with pytest.raises(OutOfPages, match=r"2 pages wanted, 1 free of 4"):
        free.claim(A, 1, 1)
    assert free.take(1) == (3,)


@pytest.mark.parametrize("bad", [[0, 0], [3], [4], [-1], [0, 1, 2]])
def test_a_wrong_give_changes_nothing(bad: list[int]) -> None:
    free = FreePages(4)
    free.take(2)
    with pytest.raises(ValueError, match="given twice or never taken"):
        free.give(bad)
    assert free.num_free == 2
    free.give([0, 1])
    assert free.num_free == 4


def test_a_model_that_left_comes_back_without_a_copy() -> None:
    free = FreePages(6)
    claim = free.claim(A, 4, 1)
    assert not claim.is_kept.any()
    free.give_image(claim.weights, A)
    free.give(claim.rest)
    assert free.num_held(A) == 4
    again = free.claim(A, 4, 1)
    assert again.weights == claim.weights
    assert again.is_kept.all()


def test_a_newcomer_takes_only_what_it_needs_from_the_tail_of_who_left_first() -> None:
    free = FreePages(8)
    for owner in (A, B):
        free.give_image(free.claim(owner, 4, 0).weights, owner)
    # A left first. B's claim went to pages that held nothing, so both are whole.
    assert (free.num_held(A), free.num_held(B)) == (4, 4)
    newcomer = free.claim(C, 2, 1)
    assert (free.num_held(A), free.num_held(B)) == (1, 4)
    free.give((*newcomer.weights, *newcomer.rest))
    back = free.claim(A, 4, 0)
    assert back.is_kept.tolist() == [True, False, False, False]


def test_a_swap_in_that_is_called_off_costs_nobody_what_was_not_written() -> None:
    free = FreePages(4)
    free.give_image(free.claim(A, 4, 0).weights, A)
    newcomer = free.claim(B, 3, 0)
    arrived = np.array([True, False, False])
    written = np.array([True, True, False])
    free.unclaim(newcomer, B, arrived, written)
    free.validate()
    assert (free.num_held(A), free.num_held(B)) == (2, 1)
    assert free.claim(B, 3, 0).is_kept.tolist() == [True, False, False]


def test_forgotten_content_is_found_no_more() -> None:
    free = FreePages(4)
    free.give_image(free.claim(A, 3, 0).weights, A)
    free.forget(A)
    free.validate()
    assert free.num_held(A) == 0
    assert not free.claim(A, 3, 0).is_kept.any()


NUM_PAGES = 12
SIZES = {A: 5, B: 4, C: 7}


class Device(RuleBasedStateMachine):
    """Every page really holds something; a page said to be kept must hold just that."""

    def __init__(self) -> None:
        super().__init__()
        self.free = FreePages(NUM_PAGES)
        self.content: list[tuple[int, int] | None] = [None] * NUM_PAGES
        self.arriving: dict[int, Claim] = {}
        self.resident: dict[int, Claim] = {}

    def _idle(self) -> list[int]:
        return [o for o in SIZES if o not in self.arriving and o not in self.resident]

    @precondition(lambda self: self._idle())
    @rule(data=st.data(), num_kv=st.integers(0, 3))
    def begin(self, data: st.DataObject, num_kv: int) -> None:
        owner = data.draw(st.sampled_from(self._idle()))
        before = self.free.num_free
        try:
            claim = self.free.claim(owner, SIZES[owner], num_kv)
        except OutOfPages:
            assert SIZES[owner] + num_kv > before == self.free.num_free
            return
        assert len(set(claim.weights) | set(claim.rest)) == SIZES[owner] + num_kv
        for index, page in enumerate(claim.weights):
            if claim.is_kept[index]:
                assert self.content[page] == (owner, index)
        for page in claim.rest:
            self.content[page] = None
        self.arriving[owner] = claim

    @precondition(lambda self: self.arriving)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(list(self.arriving)))
        claim = self.resident[owner] = self.arriving.pop(owner)
        for index, page in enumerate(claim.weights):
            self.content[page] = (owner, index)

    @precondition(lambda self: self.arriving)
    @rule(data=st.data())
    def call_off(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(list(self.arriving)))
        claim = self.arriving.pop(owner)
        arrived = np.zeros(SIZES[owner], dtype=np.bool_)
        written = np.zeros(SIZES[owner], dtype=np.bool_)
        missing = np.flatnonzero(~claim.is_kept)
        num_arrived = data.draw(st.integers(0, len(missing)))
        num_written = data.draw(st.integers(num_arrived, min(num_arrived + 1, len(missing))))
        for index in missing[:num_written]:
            written[index] = True
            self.content[claim.weights[index]] = None
        for index in missing[:num_arrived]:
            arrived[index] = True
            self.content[claim.weights[index]] = (owner, int(index))
        self.free.unclaim(claim, owner, arrived, written)

    @precondition(lambda self: self.resident)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(list(self.resident)))
        claim = self.resident.pop(owner)
        self.free.give_image(claim.weights, owner)
        self.free.give(claim.rest)

    @rule(number=st.integers(0, 4))
    def use(self, number: int) -> None:
        if number <= self.free.num_free:
            pages = self.free.take(number)
            for page in pages:
                self.content[page] = None
            self.free.give(pages)

    @invariant()
    def books_balance(self) -> None:
        self.free.validate()
        claims = [*self.arriving.values(), *self.resident.values()]
        taken = [page for claim in claims for page in (*claim.weights, *claim.rest)]
        assert len(set(taken)) == len(taken) == NUM_PAGES - self.free.num_free


TestDevice = Device.TestCase
TestDevice.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=40))
def test_free_list_against_a_set(steps: list[tuple[bool, int]]) -> None:
    free, unused, taken = FreePages(16), set(range(16)), list[tuple[int, ...]]()
    for is_take, number in steps:
        if is_take and number <= len(unused):
            got = free.take(number)
            assert got == tuple(sorted(unused)[:number])
            unused -= set(got)
            taken.append(got)
        elif is_take:
            with pytest.raises(OutOfPages):
                free.take(number)
        elif taken:
            back = taken.pop(number % len(taken))
            free.give(back)
            unused |= set(back)
        assert free.num_free == len(unused)
