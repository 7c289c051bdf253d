"""Preemption: busy models give way, their requests wait as suspended ones, and come back."""

import pytest

from schemas.commands import Load, SwapIn, SwapOut
from schemas.events import CommandFailed
from schemas.state import Preemption
from services.scheduler.inputs import DeploymentAdded, QueueDepths
from services.scheduler.state import InvariantViolation
from services.scheduler.waiting import Plan
from tests.unit.decide_story import EPOCH, GPU, Story, on, running, spec


def preempted(num_suspended: int = 2) -> Story:
    """``a`` was preempted (generation 2) for ``b``, which is resident now (generation 2)."""
    story = running(on("a", "resident", 60, in_flight=num_suspended), on("b", "host", 60))
    story.demand("r1", "b")
    assert story.tick(1.1) == [SwapOut(GPU, "a", EPOCH, 2, "r1", preempt=True)]
    assert story.swapped_out("a", 2, num_suspended) == [SwapIn(GPU, "b", EPOCH, 2, "r1")]
    story.swapped_in("b", 2)
    story.started("r1", "b")
    return story


# -- there and back ------------------------------------------------------------------------


def test_suspended_requests_come_back_though_nobody_is_in_the_queue() -> None:
    story = preempted()
    since = story.now
    assert story.tick(0.9) == []
    assert story.tick(0.2) == [SwapOut(GPU, "b", EPOCH, 3, preempt=True)]
    decided_at = story.now
    assert story.tick(0.5) == []
    assert story.swapped_out("b", 3, 1) == [SwapIn(GPU, "a", EPOCH, 3)]
    assert story.commands[-1] == SwapIn(GPU, "a", EPOCH, 3, "", since, decided_at)
    assert story.swapped_in("a", 3) == []
    assert story.replica("a").in_flight == 2
    assert story.tick(0.9) == []
    assert story.tick(0.2) == []  # they waited 1.6 s: not ahead of their target yet
    assert story.tick(1.6) == [SwapOut(GPU, "a", EPOCH, 4, preempt=True)]


def test_they_come_back_at_once_where_the_other_is_done() -> None:
    story = preempted()
    assert story.ended("r1", "b") == [SwapOut(GPU, "b", EPOCH, 3)]  # idle: nothing to suspend
    assert story.swapped_out("b", 3) == [SwapIn(GPU, "a", EPOCH, 3)]


def test_a_request_for_them_waits_for_the_same_swap() -> None:
    story = preempted()
    since = story.now
    story.now += 0.5
    assert story.demand("r2", "a") == []
    assert story.ended("r1", "b") == [SwapOut(GPU, "b", EPOCH, 3, "r2")]
    assert story.swapped_out("b", 3) == [SwapIn(GPU, "a", EPOCH, 3, "r2")]
    assert story.commands[-1].waiting_since == since  # type: ignore[union-attr]


def test_an_earlier_waiter_makes_them_wait_since_then() -> None:
    story = running(on("a", "resident", 60, in_flight=2), on("b", "host", 60))
    asked_at = story.now
    story.demand("r0", "a")  # the batch is full
    story.demand("r1", "b")
    story.tick(1.1)
    story.swapped_out("a", 2, 2)
    story.swapped_in("b", 2)
    story.started("r1", "b")
    assert story.tick(0.9) == []
    assert story.tick(0.2) == [SwapOut(GPU, "b", EPOCH, 3, "r0", preempt=True)]
    story.swapped_out("b", 3, 1)
    assert story.commands[-1].waiting_since == asked_at  # type: ignore[union-attr]


def test_cancelled_ones_do_not_come_back() -> None:
    story = preempted()
    story.ended("r8", "a", "cancelled")
    story.ended("r9", "a", "cancelled")
    assert story.tick(5.0) == []
    assert story.replica("b").state == "resident"


def test_a_plan_whose_last_suspended_request_left_is_called_off() -> None:
    story = preempted(1)
    assert story.tick(1.1) == [SwapOut(GPU, "b", EPOCH, 3, preempt=True)]
    assert story.state.plans == {"a": Plan("a", GPU, "")}
    story.ended("r9", "a", "cancelled")
    assert story.state.plans == {}
    assert story.swapped_out("b", 3, 1) == [SwapIn(GPU, "b", EPOCH, 4)]  # nobody else wants it


def test_a_swap_in_for_suspended_requests_is_called_off_only_when_they_are_gone() -> None:
    story = preempted(1)
    story.ended("r1", "b")
    assert story.swapped_out("b", 3) == [SwapIn(GPU, "a", EPOCH, 3)]
    assert story.tick(1.0) == []
    assert story.ended("r9", "a", "cancelled") == [SwapOut(GPU, "a", EPOCH, 4)]


def test_a_slow_swap_in_buys_a_longer_stay() -> None:
    story = preempted()
    story.tick(1.1)
    story.swapped_out("b", 3, 1)
    story.swapped_in("a", 3, swap_s=1.2)
    assert story.tick(4.7) == []
    assert story.tick(0.2) == [SwapOut(GPU, "a", EPOCH, 4, preempt=True)]


# -- what is never interrupted -------------------------------------------------------------


@pytest.mark.parametrize(("preemption", "preempt"), [("drain", False), ("recompute", True)])
def test_the_deployment_says_whether_it_may_be_interrupted(
    preemption: Preemption, preempt: bool
) -> None:
    story = Story()
    story.tell(DeploymentAdded(spec("a", preemption=preemption)))
    story.tell(DeploymentAdded(spec("b")))
    story.status(on("a", "resident", 60, in_flight=2), on("b", "host", 60))
    story.demand("r1", "b")
    assert story.tick(1.1) == [SwapOut(GPU, "a", EPOCH, 2, "r1", preempt=preempt)]
    assert story.tick(50.0) == []


def test_room_in_host_memory_is_made_by_draining() -> None:
    """With its image the requests of a preempted model would lose what was computed."""
    story = running(on("a", "resident", 60, in_flight=1), on("b", "cold", 60), host_budget=100)
    story.demand("r1", "b")
    assert story.tick(1.1) == [SwapOut(GPU, "a", EPOCH, 2, "r1")]
    assert story.tick(50.0) == []
    story.ended("r0", "a")
    assert story.swapped_out("a", 2) == [Load(GPU, "b", EPOCH, 2, "r1")]


def test_an_image_with_suspended_requests_is_kept_until_they_ended() -> None:
    story = running(on("a", "host", 60), on("b", "cold", 60), on("c", "host", 60), host_budget=110)
    story.replica("a").in_flight = 1
    story.state.agents[GPU].is_alive = False
    story.demand("r1", "b", at=story.now - 2.0)
    story.state.agents[GPU].is_alive = True
    assert story.demand("r2", "c") == [SwapIn(GPU, "a", EPOCH, 2)]  # closed to c: behind b
    story.swapped_in("a", 2)
    assert story.tick(1.1) == [SwapOut(GPU, "a", EPOCH, 3, "r1")]
    story.ended("r0", "a")
    assert story.swapped_out("a", 3) == [Load(GPU, "b", EPOCH, 2, "r1")]


# -- drains that last ----------------------------------------------------------------------


def test_a_victim_that_took_a_request_as_it_left_is_not_waited_for() -> None:
    story = running(on("a", "resident", 60), on("b", "host", 60))
    assert story.demand("r1", "b") == [SwapOut(GPU, "a", EPOCH, 2, "r1")]
    story.started("r0", "a")
    assert story.tick(0.9) == []
    assert story.tick(0.2) == [SwapOut(GPU, "a", EPOCH, 3, "r1", preempt=True)]
    assert story.tick(50.0) == []
    assert story.tick(10.1) == [SwapOut(GPU, "a", EPOCH, 4, "r1", preempt=True)]  # no answer
    assert story.swapped_out("a", 4, 1) == [SwapIn(GPU, "b", EPOCH, 2, "r1")]


def test_a_drain_that_nobody_waits_for_may_last() -> None:
    story = running(on("a", "resident", 60), on("b", "host", 60))
    story.demand("r1", "b")
    story.started("r0", "a")
    story.withdrawn("r1", "b")
    assert story.tick(50.0) == []


# -- what is told ---------------------------------------------------------------------------


def test_a_new_leader_learns_of_suspended_requests_from_statuses() -> None:
    story = running(on("a", "host", 60, in_flight=1), on("b", "resident", 60, in_flight=1))
    assert story.tell(QueueDepths({"a": 1, "b": 1}, story.now)) == []  # nobody else waits
    assert story.state.waiting == {}
    assert story.tick(0.9) == []
    assert story.tick(0.2) == [SwapOut(GPU, "b", EPOCH, 2, preempt=True)]
    assert story.status(on("a", "host", 60, in_flight=1), on("b", "swapping_out", 60, 2, 1)) == []
    assert story.status(on("a", "host", 60, in_flight=1), on("b", "host", 60, 2, 1)) == [
        SwapIn(GPU, "a", EPOCH, 2)
    ]
    assert story.replica("b").is_suspended


def test_queue_depths_count_suspended_requests() -> None:
    story = preempted()
    story.demand("r2", "a")
    story.tell(QueueDepths({"a": 4, "b": 1}, story.now + 1.0))
    waiters = [w.request_id for w in story.state.waiting["a"]]
    assert waiters == ["r2", "recovered-1"]


def test_a_start_that_is_told_late_makes_them_due_at_another_time() -> None:
    """It was on average that they were ahead, and one more was not ahead at all."""
    story = preempted()
    (was,) = story.state.line.of("a")
    story.now += 0.3
    story.started("late", "a")
    (now,) = story.state.line.of(
        "a"
    )  # as filed: `Story.tell` compares it with a look at everything
    assert now.due_at < was.due_at


def test_a_late_status_does_not_make_running_requests_look_suspended() -> None:
    story = running(on("a", "resident", 60, in_flight=1), on("b", "host", 60))
    story.demand("r1", "b")
    story.tick(1.1)
    story.ended("r0", "a")
    story.swapped_out("a", 2)
    story.withdrawn("r1", "b")
    late = on("a", "swapping_out", 60, 2, in_flight=1)
    story.status(late, on("b", "host", 60))
    assert story.replica("a").in_flight == 0


def test_a_swap_in_that_fails_gives_them_back_to_the_queue() -> None:
    story = preempted(1)
    story.ended("r1", "b")
    story.swapped_out("b", 3)
    story.tell(CommandFailed(GPU, "a", 3, story.now, "swap_in", "out of pages"))
    assert not story.replica("a").is_suspended
    story.status(on("a", "host", 60, 3), on("b", "host", 60, 3))
    assert story.replica("a").in_flight == 0
    story.tell(QueueDepths({"a": 1}, story.now))
    assert [w.request_id for w in story.state.waiting["a"]] == ["recovered-1"]


def test_an_image_that_was_dropped_gives_them_back_to_the_queue() -> None:
    story = preempted()
    assert story.unloaded("a", 2) == []
    assert story.replica("a").in_flight == 0
    assert story.tick(5.0) == []


def test_a_plan_for_suspended_requests_is_for_their_gpu() -> None:
    story = preempted()
    story.state.add_plan(Plan("a", GPU, ""))
    story.state.validate()
    story.status(gpu="gpu1")
    story.state.add_plan(Plan("a", "gpu1", ""))
    with pytest.raises(InvariantViolation, match="has suspended requests on"):
        story.state.validate()
