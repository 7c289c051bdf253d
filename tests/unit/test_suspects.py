"""Who is blamed for a dead engine worker."""

from services.gpu_agent import suspects
from services.gpu_agent.suspects import ALONE_AFTER, MAX_CRASHES, Suspects


def test_one_death_changes_nothing() -> None:
    found = Suspects()
    assert not found.blame("a")
    assert not found.blame("b")
    assert found.may_join("a", ["b"])


def test_then_each_runs_alone() -> None:
    found = Suspects()
    for _ in range(ALONE_AFTER):
        assert not found.blame("a")
    assert found.may_join("a", [])
    assert not found.may_join("a", ["innocent"])
    assert not found.may_join("innocent", ["a"])
    assert found.may_join("innocent", ["another"])


def test_at_last_it_is_given_up() -> None:
    found = Suspects()
    assert [found.blame("a") for _ in range(MAX_CRASHES)] == [False] * (MAX_CRASHES - 1) + [True]


def test_who_ends_well_is_cleared() -> None:
    found = Suspects()
    for _ in range(ALONE_AFTER):
        found.blame("a")
    found.clear("a")
    found.clear("never blamed")
    assert found.may_join("a", ["b"])
    assert not found.blame("a")


def test_memory_is_bounded() -> None:
    found = Suspects()
    for n in range(2 * suspects._REMEMBERED):
        found.blame(f"r{n}")
    assert len(found._deaths) == suspects._REMEMBERED
