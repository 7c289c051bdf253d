"""The life of a replica: the table itself, and the error that tells its story."""

from typing import get_args

import pytest

from schemas.state import ReplicaState
from services.scheduler.lifecycle import (
    COMPLETED,
    DEVICE_STATES,
    FAILED,
    HISTORY_LENGTH,
    PATHS,
    PENDING_STATES,
    TRANSITIONS,
    Cause,
    CommandKind,
    InvalidTransition,
    Lifecycle,
    begins_at,
    is_behind,
)


def follow(*causes: Cause) -> Lifecycle:
    life = Lifecycle("gpu0/llama")
    for at, cause in enumerate(causes):
        life.move(cause, float(at))
    return life


def test_a_full_life() -> None:
    life = follow(
        "register", "registered", "load", "loaded", "swap_in", "swapped_in", "swap_out", "drained"
    )
    assert life.state == "swapping_out"


def test_a_swap_out_ends_at_the_host_image_drained_or_not() -> None:
    resident: list[Cause] = ["load", "loaded", "swap_in", "swapped_in", "swap_out"]
    assert follow(*resident, "swapped_out").state == "host"
    assert follow(*resident, "drained", "swapped_out").state == "host"


def test_the_table_knows_every_state_and_only_those() -> None:
    states = set(get_args(ReplicaState))
    assert set(TRANSITIONS) == states
    assert {target for row in TRANSITIONS.values() for target in row.values()} <= states
    assert {cause for row in TRANSITIONS.values() for cause in row} == set(get_args(Cause))


def test_every_state_can_be_lost_and_every_state_can_be_left() -> None:
    for state, row in TRANSITIONS.items():
        assert row["lost"] == "cold"
        assert set(row.values()) != {state} or state == "cold"


@pytest.mark.parametrize("kind", get_args(CommandKind))
def test_a_command_leads_along_its_path(kind: CommandKind) -> None:
    path = PATHS[kind]
    first = "host" if kind == "unload" else path[0]  # an agent may unload by itself, too
    assert TRANSITIONS[first][kind] in path
    assert begins_at(kind, first)
    assert not begins_at(kind, path[-1]) or kind in ("register", "unload")
    for state in PENDING_STATES[kind]:
        assert TRANSITIONS[state][COMPLETED[kind]] == path[-1]
        assert TRANSITIONS[state][FAILED[kind]] in ("failed", "resident", state)


def test_a_failure_before_residency_holds_no_device_memory() -> None:
    assert "failed" not in DEVICE_STATES
    assert follow("load", "loaded", "swap_in", "swap_in_failed").state == "failed"
    assert follow("register", "register_failed", "register").state == "cold"


def test_a_swap_in_that_is_called_off_is_a_swap_out() -> None:
    arriving: list[Cause] = ["load", "loaded", "swap_in", "swap_out"]
    assert follow(*arriving).state == "draining"
    assert follow(*arriving, "drained", "swapped_out").state == "host"
    assert follow(*arriving, "swap_out_failed").state == "resident"


def test_only_an_image_whose_model_is_not_on_the_device_is_unloaded() -> None:
    assert follow("load", "loaded", "unloaded").state == "cold"
    assert [state for state, row in TRANSITIONS.items() if "unloaded" in row] == ["cold", "host"]


def test_a_failed_swap_out_changes_nothing() -> None:
    life = follow("load", "loaded", "swap_in", "swapped_in", "swap_out", "swap_out_failed")
    assert life.state == "resident"


def test_an_invalid_transition_tells_the_story() -> None:
    life = follow("load", "loaded")
    with pytest.raises(InvalidTransition) as caught:
        life.move("swap_out", 3.0)
    assert str(caught.value) == (
        "replica gpu0/llama: no transition from 'host' by 'swap_out' "
        "(allowed: swap_in, unload, unloaded, unload_failed, lost); recent history, oldest first:\n"
        "  0.000 cold --load--> loading\n"
        "  1.000 loading --loaded--> host"
    )
    assert (caught.value.state, caught.value.cause) == ("host", "swap_out")
    assert life.state == "host"


def test_adopt_takes_any_state_and_says_why() -> None:
    life = follow("load")
    life.adopt("resident", 5.0, "the agent insists")
    assert life.state == "resident"
    assert life.history[-1] == "5.000 loading --reported--> resident (the agent insists)"
    life.adopt("resident", 6.0, "again")
    assert len(life.history) == 2


def test_the_history_is_short() -> None:
    causes: list[Cause] = ["lost"] * 100
    life = follow(*causes)
    assert len(life.history) == HISTORY_LENGTH
    assert life.history[-1].startswith("99.000 ")


@pytest.mark.parametrize(
    ("kind", "ours", "theirs", "behind"),
    [
        ("swap_in", "resident", "swapping_in", True),
        ("swap_in", "resident", "host", True),
        ("swap_in", "swapping_in", "resident", False),
        ("swap_out", "host", "draining", True),
        ("swap_out", "host", "swapping_in", True),
        ("unload", "cold", "host", True),
        ("unload", "cold", "draining", True),
        ("swap_out", "host", "cold", False),
        ("load", "host", "host", False),
        (None, "host", "resident", False),
    ],
)
def test_is_behind(
    kind: CommandKind | None, ours: ReplicaState, theirs: ReplicaState, behind: bool
) -> None:
    assert is_behind(kind, ours, theirs) is behind
