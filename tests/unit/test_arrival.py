"""One swap-in's bookkeeping: which bytes have to come, which are there, and who waits."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from services.gpu_agent import arrival as arrival_module
from services.gpu_agent.arrival import (
    Arrival,
    ArrivalEnded,
    ForwardAbandoned,
    NotArrived,
    Piece,
    cut,
    guarded,
)
from services.gpu_agent.host_image import Layout, Weight, plan_layout
from services.gpu_agent.pages import Stamp
from tests.unit.swap_kit import PATIENCE_S, noting, num_hooks

PAGE = 1024


class Point(Stamp):
    """A stamp that notes who ordered computing after it."""

    def __init__(self, name: str, orders: list[str]) -> None:
        self.name = name
        self.orders = orders

    def wait(self) -> None:
        raise AssertionError("nobody waits on the host")

    def order_compute(self) -> None:
        self.orders.append(self.name)

    def seconds_since(self, earlier: Stamp) -> float:
        return 0.0


def never() -> bool:
    return False


def layout_of(sizes: list[int]) -> Layout:
    return plan_layout(Weight(f"w{i}", f"g{i}", (n,), torch.uint8) for i, n in enumerate(sizes))


def flags(text: str) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    """A kept page is "#", any other one "."."""
    return np.array([c == "#" for c in text], dtype=np.bool_)


def make(
    sizes: list[int], kept: str, piece: int = PAGE, interrupted: Callable[[], bool] = never
) -> Arrival:
    layout = layout_of(sizes)
    return Arrival(cut(layout, flags(kept), PAGE, piece), layout.num_bytes, interrupted)


def finish(arrival: Arrival, *numbers: int) -> list[str]:
    """Copy these pieces; returns where it is noted what is computed after them."""
    orders: list[str] = []
    for number in numbers:
        assert arrival.begin(number)
        arrival.done(number, Point(str(number), orders))
    return orders


# -- what has to be copied ---------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 5000), min_size=1, max_size=8).filter(any),
    piece_bytes=st.integers(1, 4000),
    data=st.data(),
)
def test_pieces_cover_the_missing_bytes_exactly(
    sizes: list[int], piece_bytes: int, data: st.DataObject
) -> None:
    piece_bytes = max(piece_bytes, sum(sizes) // 200)
    layout = layout_of(sizes)
    num_pages = -(-layout.num_bytes // PAGE)
    kept = data.draw(st.lists(st.booleans(), min_size=num_pages, max_size=num_pages))
    pieces = cut(layout, np.array(kept, dtype=np.bool_), PAGE, piece_bytes)
    covered = np.zeros(layout.num_bytes, dtype=np.int64)
    for piece in pieces:
        assert 0 < piece.end - piece.start <= piece_bytes
        covered[piece.start : piece.end] += 1
        group = layout.groups[piece.group]
        after = [g.offset for g in layout.groups[piece.group + 1 :]]
        assert group.offset <= piece.start
        assert piece.end <= min([*after, layout.num_bytes])
    missing = np.repeat(~np.array(kept, dtype=np.bool_), PAGE)[: layout.num_bytes]
    assert np.array_equal(covered, missing.astype(np.int64))
    assert all(a.end <= b.start for a, b in pairwise(pieces))
    arrival = Arrival(pieces, layout.num_bytes, never)
    assert arrival.bytes_to_copy == int(missing.sum())


def test_a_piece_belongs_to_one_group_and_takes_the_gap_after_it() -> None:
    layout = layout_of([1000, 3000])  # the second one starts at 1024
    assert cut(layout, flags("...."), PAGE, 2048) == [
        Piece(0, 1024, 0),
        Piece(1024, 3072, 1),
        Piece(3072, 4024, 1),
    ]


# -- the watermark -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "steps"),
    [
        ("....", [(2, 0), (0, 1024), (1, 3072), (3, 4096)]),
        ("#...", [(1, 1024), (0, 3072), (2, 4096)]),
        ("##..", [(1, 2048), (0, 4096)]),
        (".##.", [(0, 3072), (1, 4096)]),
        (".#.#", [(1, 0), (0, 4096)]),
        ("...#", [(0, 1024), (2, 1024), (1, 4096)]),
        ("####", []),
    ],
)
def test_the_watermark_follows_whole_pieces_and_skips_kept_pages(
    kept: str, steps: list[tuple[int, int]]
) -> None:
    arrival = make([4096], kept)
    assert arrival.watermark == PAGE * (len(kept) - len(kept.lstrip("#")))
    for number, watermark in steps:
        assert not arrival.is_whole
        finish(arrival, number)
        assert arrival.watermark == watermark
    assert arrival.is_whole


@settings(max_examples=200, deadline=None)
@given(data=st.data(), piece_bytes=st.integers(200, 2000))
def test_below_the_watermark_nothing_is_missing(data: st.DataObject, piece_bytes: int) -> None:
    kept = data.draw(st.text("#.", min_size=6, max_size=6))
    arrival = make([2500, 0, 1, 3000], kept, piece_bytes)
    missing = set(range(len(arrival.pieces)))
    for number in data.draw(st.permutations(sorted(missing))):
        first = min(arrival.pieces[n].start for n in missing)
        assert arrival.watermark == first
        finish(arrival, number)
        missing.remove(number)
    assert arrival.watermark == arrival.num_bytes


# -- who waits ---------------------------------------------------------------------------


def test_a_waiter_goes_on_when_its_end_is_there_and_not_before() -> None:
    arrival = make([4096], "....")
    asked = threading.Event()
    arrival._interrupted = noting(asked)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(arrival.wait_for, 2049)
        for number in (3, 0, 1):
            asked.clear()
            finish(arrival, number)
            asked.clear()
            assert asked.wait(PATIENCE_S)
            assert not waiting.done()
        orders = finish(arrival, 2)
        waiting.result(PATIENCE_S)
    assert orders == ["2"]


def test_computing_waits_for_the_stamp_of_the_last_byte_it_needs() -> None:
    arrival = make([4096], ".#..")
    orders = finish(arrival, 0, 1, 2)
    for end, stamp in ((1, "0"), (1024, "0"), (2048, "0"), (2049, "1"), (3072, "1"), (4096, "2")):
        orders.clear()
        arrival.wait_for(end)
        assert orders == [stamp], end
    arrival = make([4096], "##..")
    arrival.wait_for(2048)  # kept: nothing to order after


def test_a_waiter_gives_up_when_interrupted() -> None:
    answers = iter((False, False, True))
    arrival = make([4096], "....", interrupted=lambda: next(answers))
    with pytest.raises(ForwardAbandoned):
        arrival.wait_for(1)
    assert list(answers) == []
    finish(arrival, 0)
    arrival.wait_for(1024)  # nothing is lost: it goes on where the bytes are there


def test_a_waiter_is_interrupted_while_pieces_come_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """News all the time must not keep it from looking."""
    num_pieces = 10_000
    arrival = make([PAGE * num_pieces], "." * num_pieces)
    monkeypatch.setattr(arrival_module, "_LOOK_EVERY_S", 0.005)
    # The waiter's condition always has news when it is looked at: so it never times out.
    number = iter(range(num_pieces - 1))

    def next_piece_comes(timeout: float | None = None) -> bool:
        finish(arrival, next(number))
        return True

    monkeypatch.setattr(arrival, "_news", _Reentrant())
    monkeypatch.setattr(arrival._news, "wait", next_piece_comes)
    arrival._interrupted = lambda: True
    with pytest.raises(ForwardAbandoned):
        arrival.wait_for(arrival.num_bytes)
    assert arrival.watermark < arrival.num_bytes


class _Reentrant(threading.Condition):
    def __init__(self) -> None:
        super().__init__(threading.RLock())


@pytest.mark.parametrize("how", ["fail", "call_off"])
def test_a_waiter_hears_that_the_arrival_has_ended(how: str) -> None:
    waits = threading.Event()
    arrival = make([4096], "....", interrupted=noting(waits))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(arrival.wait_for, 4096)
        assert waits.wait(PATIENCE_S)
        finish(arrival, 0)
        if how == "fail":
            arrival.fail(OSError("first"))
            arrival.fail(OSError("second"))
        else:
            arrival.call_off()
        with pytest.raises(ArrivalEnded):
            waiting.result(PATIENCE_S)
    assert not arrival.begin(1)
    assert not arrival.is_over
    assert str(arrival.error) == ("first" if how == "fail" else "None")
    arrival.wait_for(1024)  # what is there is there
    with pytest.raises(NotArrived):
        arrival.wait_for(1025)
    arrival.end()
    arrival.wait_until_over()
    assert arrival.is_over


# -- what becomes of the pages -----------------------------------------------------------


def test_a_page_is_complete_with_all_its_pieces_and_written_with_the_first() -> None:
    arrival = make([1500, 2000, 1500], "#....", piece=800)
    starts = [piece.start for piece in arrival.pieces]
    assert starts == [1024, 1536, 2336, 3136, 3584, 4384]
    finish(arrival, 0, 1)
    arrival.begin(2)
    complete, written = arrival.fate_of_pages(5, PAGE)
    assert complete.tolist() == [False, True, False, False, False]
    assert written.tolist() == [False, True, True, True, False]
    finish(arrival, 2, 3, 4, 5)
    complete, _ = arrival.fate_of_pages(5, PAGE)
    assert complete.tolist() == [False, *[True] * 4]


@settings(max_examples=200, deadline=None)
@given(data=st.data(), piece_bytes=st.integers(100, 3000))
def test_the_fate_of_pages_against_their_bytes(data: st.DataObject, piece_bytes: int) -> None:
    kept = data.draw(st.text("#.", min_size=6, max_size=6))
    arrival = make([2500, 300, 3000], kept, piece_bytes)
    there = np.repeat(flags(kept), PAGE)[: arrival.num_bytes]
    touched = np.zeros_like(there)
    for number, piece in enumerate(arrival.pieces):
        fate = data.draw(st.sampled_from(["nothing", "begun", "done"]))
        if fate == "begun":
            arrival.begin(number)
        if fate == "done":
            finish(arrival, number)
            there[piece.start : piece.end] = True
        touched[piece.start : piece.end] = fate != "nothing"
    complete, written = arrival.fate_of_pages(6, PAGE)
    for page in range(6):
        span = slice(page * PAGE, (page + 1) * PAGE)
        assert (complete[page] or kept[page] == "#") == there[span].all()
        assert written[page] == touched[span].any()


# -- guards ------------------------------------------------------------------------------


def test_guards_wait_before_their_module_runs_and_leave_with_the_block() -> None:
    story: list[object] = []
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].register_forward_hook(lambda *_: story.append("1 ran"))

    def wait_for(end: int) -> None:
        story.append(end)
        if end == 13:
            raise ForwardAbandoned

    with guarded(module, {"0": 7, "1": 9, "": 3}, wait_for):
        module(torch.ones(2))
    assert story == [3, 7, 9, "1 ran"]
    with pytest.raises(ForwardAbandoned), guarded(module, {"1": 13}, wait_for):
        module(torch.ones(2))
    assert story[4:] == [13]
    assert num_hooks(module) == 0
