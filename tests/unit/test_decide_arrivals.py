"""Swap-ins as they are: requests start while the bytes arrive, waiters leave, weights break."""

from schemas.commands import Load, SwapIn, SwapOut
from schemas.events import (
    CommandFailed,
    CommandRejected,
    FirstTokenSent,
    ModelVerified,
    SwapInCancelled,
    VerificationFailed,
    WorkerDied,
)
from schemas.state import SwapTrace
from services.scheduler.inputs import DeploymentAdded, QueueDepths
from services.scheduler.state import MIB
from tests.unit.decide_story import EPOCH, GPU, Story, on, register, running, spec


def arriving(*others: str) -> Story:
    """``a`` is swapped in under generation 2, for r1; the others are host images."""
    story = running(on("a", "host", 60), *(on(model, "host", 60) for model in others))
    assert story.demand("r1", "a") == [SwapIn(GPU, "a", EPOCH, 2, "r1")]
    return story


# -- requests start while it arrives -------------------------------------------------------


def test_a_request_that_started_keeps_the_swap_in_going() -> None:
    story = arriving()
    assert story.started("r1", "a") == []
    assert story.replica("a").in_flight == 1
    assert story.tick(0.2) == []
    assert story.swapped_in("a", 2) == []
    assert story.ended("r1", "a") == []
    assert story.replica("a").state == "resident"


def test_queue_depths_count_what_started_while_it_arrives() -> None:
    story = arriving()
    story.demand("r2", "a")
    story.started("r1", "a")
    assert story.tell(QueueDepths({"a": 2}, at=story.now + 1)) == []
    assert [w.request_id for w in story.state.waiting["a"]] == ["r2"]
    assert story.tell(QueueDepths({"a": 1}, at=story.now + 2)) == []  # r2 left, nobody told
    assert "a" not in story.state.waiting
    assert story.replica("a").state == "swapping_in"


def test_a_swap_in_carries_when_it_was_asked_for_and_decided() -> None:
    story = running(on("a", "resident", 60, in_flight=1), on("b", "host", 60))
    asked_at = story.now
    story.demand("r1", "b", at=asked_at)
    assert story.tick(1.5) == [SwapOut(GPU, "a", EPOCH, 2, "r1", preempt=True)]
    decided_at = story.now
    story.ended("r0", "a")
    story.now += 0.5
    story.swapped_out("a", 2)
    assert story.commands[-1] == SwapIn(GPU, "b", EPOCH, 2, "r1", asked_at, decided_at)


def test_a_cold_start_is_decided_by_its_load() -> None:
    story = running(on("a", "cold", 60))
    story.demand("r1", "a", at=story.now - 0.5)
    decided_at = story.now
    story.now += 3.0
    story.loaded("a", 2)
    asked_at = decided_at - 0.5
    assert story.commands[-1] == SwapIn(GPU, "a", EPOCH, 3, "r1", asked_at, decided_at)


def test_each_switch_is_decided_anew_though_the_line_never_ends() -> None:
    story = arriving("b")
    story.demand("r2", "a", at=story.now + 5.0)
    story.started("r1", "a")
    story.swapped_in("a", 2)
    story.now += 6.0
    story.status(on("a", "host", 60, 3), on("b", "host", 60))  # say, another leader's doing
    assert story.commands[-1] == SwapIn(GPU, "a", EPOCH, 4, "r2", story.now - 1.0, story.now)


# -- called off ----------------------------------------------------------------------------


def test_a_swap_in_whose_last_waiter_left_is_called_off() -> None:
    story = arriving()
    story.demand("r2", "a")
    assert story.withdrawn("r1", "a") == []
    assert story.withdrawn("r2", "a") == [SwapOut(GPU, "a", EPOCH, 3)]
    assert story.replica("a").state == "draining"
    assert story.tell(SwapInCancelled(GPU, "a", 3, story.now, SwapTrace(0.0))) == []
    assert story.swapped_out("a", 3) == []
    assert story.replica("a").state == "host"
    assert story.state.agents[GPU].reserved_bytes == 0


def test_a_swap_in_whose_only_request_was_cancelled_is_called_off() -> None:
    story = arriving()
    story.started("r1", "a")
    assert story.ended("r1", "a", "cancelled") == [SwapOut(GPU, "a", EPOCH, 3)]


def test_what_was_drained_for_it_does_not_come_back_unasked() -> None:
    story = running(on("a", "host", 60), on("b", "resident", 60))
    assert story.demand("r1", "a") == [SwapOut(GPU, "b", EPOCH, 2, "r1")]
    assert story.swapped_out("b", 2) == [SwapIn(GPU, "a", EPOCH, 2, "r1")]
    assert story.withdrawn("r1", "a") == [SwapOut(GPU, "a", EPOCH, 3)]
    assert story.swapped_out("a", 3) == []
    assert story.tick(1.0) == []


def test_its_bytes_are_for_who_waits() -> None:
    story = arriving("b")
    assert story.demand("r2", "b") == []
    assert story.withdrawn("r1", "a") == [SwapOut(GPU, "a", EPOCH, 3)]
    assert story.swapped_out("a", 3) == [SwapIn(GPU, "b", EPOCH, 2, "r2")]


def test_who_asks_after_the_call_off_is_served_after_it() -> None:
    story = arriving()
    story.withdrawn("r1", "a")
    assert story.demand("r2", "a") == []
    assert story.swapped_out("a", 3) == [SwapIn(GPU, "a", EPOCH, 4, "r2")]


def test_a_swap_in_that_completed_meanwhile_is_swapped_out() -> None:
    story = arriving()
    story.withdrawn("r1", "a")
    assert story.swapped_in("a", 2) == []  # sent before the agent read the SwapOut
    assert story.swapped_in("a", 3) == []  # even if it says so after that
    assert story.replica("a").state == "draining"
    assert story.swapped_out("a", 3) == []
    assert story.replica("a").state == "host"


def test_late_statuses_do_not_undo_a_call_off() -> None:
    story = arriving()
    story.withdrawn("r1", "a")
    for late in (on("a", "host", 60), on("a", "swapping_in", 60, 2), on("a", "resident", 60, 2)):
        assert story.status(late) == []
        assert story.replica("a").state == "draining"
    assert story.status(on("a", "swapping_in", 60, 3)) == []  # accepted, not begun
    assert story.replica("a").state == "draining"
    assert story.swapped_out("a", 3) == []
    story.status(on("a", "draining", 60, 3))
    assert story.replica("a").state == "host"


def test_a_request_that_started_while_it_is_called_off_is_drained() -> None:
    story = arriving()
    story.status(on("a", "swapping_in", 60, 2))
    story.withdrawn("r1", "a")
    assert story.started("r2", "a") == []
    assert story.status(on("a", "draining", 60, 3, in_flight=1)) == []
    assert story.ended("r2", "a") == []
    assert story.swapped_out("a", 3) == []


def test_an_unanswered_call_off_is_repeated() -> None:
    story = arriving()
    story.withdrawn("r1", "a")
    assert story.tick(60.0) == [SwapOut(GPU, "a", EPOCH, 4)]
    assert story.status(on("a", "host", 60, 4)) == []
    assert story.replica("a").is_settled


def test_a_swap_in_that_failed_before_its_call_off() -> None:
    story = arriving()
    story.withdrawn("r1", "a")
    assert story.failed("a", 2, "swap_in") == []
    assert story.replica("a").state == "draining"
    assert story.swapped_out("a", 3) == []  # at the agent it was host already
    assert story.replica("a").failure is None


def test_a_worker_that_dies_during_a_call_off() -> None:
    story = arriving()
    story.withdrawn("r1", "a")
    story.tell(WorkerDied(GPU, story.now, "killed"))
    story.status(on("a", "cold", 60, 2), pid=0, budget=0)
    assert story.state.agents[GPU].reserved_bytes == 60 * MIB
    story.tell(CommandRejected(GPU, "a", 3, story.now, "swap_out", "is cold"))
    story.status(on("a", "cold", 60, 3), pid=11)
    assert story.demand("r2", "a") == [Load(GPU, "a", EPOCH, 4, "r2")]


def test_a_new_leader_calls_off_nothing_that_it_found() -> None:
    story = Story()
    story.tell(DeploymentAdded(spec("a")))
    assert story.status(on("a", "swapping_in", 60, generation=9)) == []
    assert story.tick(1.0) == []
    assert story.swapped_in("a", 9) == []


# -- verification --------------------------------------------------------------------------


def test_damaged_weights_fail_a_swap_in_and_are_loaded_again() -> None:
    story = arriving()
    assert story.tell(VerificationFailed(GPU, "a", 2, story.now, "page", "page 3 differs")) == []
    assert story.tell(CommandFailed(GPU, "a", 2, story.now, "swap_in", "page 3 differs")) == []
    assert story.status(on("a", "failed", 60, 2, reason="page 3 differs")) == []
    assert story.state.deployment_view("a").reason == "gpu0: page 3 differs"
    assert story.tick(10.0) == [register("a", 3)]
    assert story.registered("a", 60, 3) == [Load(GPU, "a", EPOCH, 4, "r1")]
    assert story.loaded("a", 4) == [SwapIn(GPU, "a", EPOCH, 5, "r1")]


def test_damage_found_while_resident() -> None:
    story = running(on("a", "resident", 60, in_flight=1))
    story.tell(VerificationFailed(GPU, "a", 1, story.now, "canary", "tokens differ"))
    assert story.status(on("a", "failed", 60, 1, reason="tokens differ")) == []
    assert story.state.agents[GPU].reserved_bytes == 0
    assert story.state.deployment_view("a").reason == "gpu0: tokens differ"
    assert story.tick(0.2) == [register("a", 2)]
    assert story.registered("a", 60, 2) == []
    # Its request went back to the queue; nobody publishes that again, the depths show it.
    assert story.tell(QueueDepths({"a": 1}, story.now)) == [Load(GPU, "a", EPOCH, 3, "recovered-1")]


def test_damage_found_while_a_swap_out_is_on_its_way() -> None:
    story = running(on("a", "resident", 60), on("b", "host", 60))
    assert story.demand("r1", "b") == [SwapOut(GPU, "a", EPOCH, 2, "r1")]
    story.tell(VerificationFailed(GPU, "a", 1, story.now, "page", "page 3 differs"))
    assert story.status(on("a", "failed", 60, 2), on("b", "host", 60)) == [
        SwapIn(GPU, "b", EPOCH, 2, "r1")
    ]
    assert story.replica("a").state == "failed"
    assert story.tell(CommandRejected(GPU, "a", 2, story.now, "swap_out", "failed")) == []


def test_damage_found_in_a_swap_in_that_is_called_off() -> None:
    story = arriving()
    story.withdrawn("r1", "a")
    story.tell(VerificationFailed(GPU, "a", 3, story.now, "page", "page 3 differs"))
    assert story.tell(CommandFailed(GPU, "a", 3, story.now, "swap_in", "page 3 differs")) == []
    assert story.replica("a").state == "draining"
    assert story.status(on("a", "failed", 60, 3, reason="page 3 differs")) == []
    assert story.replica("a").state == "failed"
    assert story.tick(0.2) == [register("a", 4)]


def test_news_that_decides_nothing() -> None:
    story = running(on("a", "resident", 60))
    assert story.tell(ModelVerified(GPU, "a", story.now, 7, 60 * MIB, 0.1)) == []
    assert story.tell(FirstTokenSent(GPU, "a", 1, story.now, "r1", 12, 0.5, 0.25)) == []
    assert story.replica("a").state == "resident"
