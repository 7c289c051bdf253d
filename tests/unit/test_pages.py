"""Cutting pages into runs."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from services.gpu_agent.pages import runs


@given(st.lists(st.integers(0, 30), unique=True))
def test_runs_cover_every_page_in_order(pages: list[int]) -> None:
    found = list(runs(pages))
    assert [first + i for _, first, length in found for i in range(length)] == pages
    assert [start for start, _, _ in found] == [
        sum(f[2] for f in found[:i]) for i in range(len(found))
    ]
    for (_, first, length), (_, following, _) in pairwise(found):
        assert following != first + length
