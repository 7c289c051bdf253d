"""Requests of class batch: what they take, whom they give way to, and until when."""

import msgspec

from schemas.commands import Command, SwapIn, SwapOut
from schemas.events import RequestStarted
from services.scheduler.inputs import Demand, DeploymentAdded, QueueDepths
from tests.unit.decide_story import EPOCH, GPU, Story, on, running, spec

WINDOW_S = 24 * 3600.0
PUT_BACK_S = 0.75 * WINDOW_S


def batch(story: Story, request_id: str, model: str, window_s: float = WINDOW_S) -> list[Command]:
    return story.tell(Demand(request_id, model, "batch", story.now, window_s=window_s))


def started(story: Story, request_id: str, model: str) -> list[Command]:
    event = RequestStarted(GPU, model, request_id, story.now, 1, 0.0, klass="batch")
    return story.tell(event)


def works_off(model: str, rest: str = "b") -> Story:
    """``model`` is on the device with one request of class batch; ``rest`` is not, and no room."""
    story = running(on(model, "resident", 60), on(rest, "host", 60))
    story.now += 100.0
    batch(story, "j1", model)
    started(story, "j1", model)
    return story


def test_a_batch_takes_free_memory_at_once() -> None:
    story = running(on("a", "host", 60))
    assert batch(story, "j1", "a") == [SwapIn(GPU, "a", EPOCH, 2, "j1")]


def test_a_model_that_was_used_just_now_stays_and_leaves_when_nobody_wanted_it_for_a_while() -> (
    None
):
    story = running(on("a", "resident", 60), on("b", "host", 60))
    story.demand("r1", "a")
    story.started("r1", "a")
    story.ended("r1", "a")
    assert batch(story, "j1", "b") == []
    assert story.tick(after=2.0) == []
    assert story.tick(after=4.0) == [SwapOut(GPU, "a", EPOCH, 2, "j1")]


def test_a_batch_preempts_nobody_however_long_it_waits_within_most_of_its_window() -> None:
    story = running(on("a", "resident", 60), on("b", "host", 60))
    story.demand("r1", "a")
    story.started("r1", "a")
    batch(story, "j1", "b")
    for _ in range(20):
        assert story.tick(after=PUT_BACK_S / 21) == []


def test_towards_the_end_of_its_window_it_is_like_others_and_has_a_quantum() -> None:
    story = running(on("a", "resident", 60), on("b", "host", 60))
    story.demand("r1", "a")
    story.started("r1", "a")
    batch(story, "j1", "b", window_s=100.0)
    assert story.tick(after=74.0) == []
    assert story.tick(after=30.0) == [SwapOut(GPU, "a", EPOCH, 2, "j1", preempt=True)]
    assert story.swapped_out("a", 2, num_suspended=1) == [SwapIn(GPU, "b", EPOCH, 2, "j1")]
    story.swapped_in("b", 2, swap_s=0.1)
    started(story, "j1", "b")
    story.demand("r2", "a")
    assert story.tick(after=0.5) == []  # not before b had its quantum
    assert story.tick(after=1.0) == [SwapOut(GPU, "b", EPOCH, 3, "r2", preempt=True)]


def test_what_serves_only_batches_gives_way_at_once() -> None:
    story = works_off("a")
    assert story.demand("r1", "b") == [SwapOut(GPU, "a", EPOCH, 2, "r1", preempt=True)]
    assert story.swapped_out("a", 2, num_suspended=1) == [SwapIn(GPU, "b", EPOCH, 2, "r1")]


def test_preempted_batch_requests_come_back_when_nobody_wants_the_memory() -> None:
    story = works_off("a")
    story.demand("r1", "b")
    story.swapped_out("a", 2, num_suspended=1)
    story.swapped_in("b", 2)
    story.started("r1", "b")
    assert story.tick(after=100.0) == []
    story.ended("r1", "b")
    assert story.tick(after=1.0) == []  # b may be wanted again
    assert story.tick(after=5.0) == [SwapOut(GPU, "b", EPOCH, 3, "")]


def test_a_new_leader_takes_suspended_batch_requests_for_what_they_are() -> None:
    suspended = msgspec.structs.replace(on("a", "host", 60, in_flight=1), batch_in_flight=1)
    story = running(suspended, on("b", "resident", 60, in_flight=1))
    for _ in range(10):
        assert story.tick(after=100.0) == []
    [back] = story.status(suspended, on("b", "resident", 60))  # b is idle, and has been for long
    assert (type(back), back.model) == (SwapOut, "b")


def test_one_interactive_request_among_them_and_it_does_not_give_way() -> None:
    story = works_off("a")
    story.demand("r1", "a")
    story.started("r1", "a")
    assert story.demand("r2", "b") == []


def test_without_preemption_it_ends_what_it_began_and_takes_no_more() -> None:
    story = works_off("a")
    story.state.config = msgspec.structs.replace(story.state.config, preemption="off")
    assert story.demand("r1", "b") == [SwapOut(GPU, "a", EPOCH, 2, "r1")]


def test_interactive_requests_go_first_whoever_came_first() -> None:
    story = running(on("a", "swapping_out", 60), on("b", "host", 60), on("c", "host", 60))
    batch(story, "j1", "b")
    story.demand("r1", "c")
    story.status(on("a", "host", 60), on("b", "host", 60), on("c", "host", 60))
    swaps = [one for one in story.commands if isinstance(one, SwapIn)]
    assert [(one.model, one.request_id) for one in swaps] == [("c", "r1")]


def test_priorities_are_among_those_who_wait_for_answers() -> None:
    """A batch for a model of high priority comes after interactive requests of low priority."""
    story = running(on("a", "resident", 90), on("b", "host", 60), on("c", "host", 60))
    story.tell(DeploymentAdded(msgspec.structs.replace(spec("b"), priority=9)))
    story.demand("r0", "a")
    story.started("r0", "a")
    batch(story, "j1", "b", window_s=100.0)
    story.demand("r1", "c")
    assert order_of(story, story.now) == ["c", "b"]
    assert order_of(story, story.now + 60.0) == ["c", "b"]
    assert order_of(story, story.now + 90.0) == ["b", "c"]  # among those who waited very long


def order_of(story: Story, now: float) -> list[str]:
    return [turn.model for turn in story.state.line.in_order(now, 3.0, 10)]


def test_of_one_model_the_interactive_request_decides_when_it_comes_in() -> None:
    story = running(on("a", "resident", 60), on("b", "host", 60))
    story.demand("r0", "a")
    story.started("r0", "a")
    batch(story, "j1", "b")
    story.demand("r1", "b")
    [turn] = story.state.line.of("b")
    assert (turn.request_id, turn.is_batch) == ("r1", False)
    story.withdrawn("r1", "b")
    [turn] = story.state.line.of("b")
    assert (turn.request_id, turn.is_batch, turn.put_back_s) == ("j1", True, PUT_BACK_S)


def test_a_model_stays_while_batch_requests_are_left_for_it() -> None:
    story = works_off("a")
    batch(story, "j2", "b")
    for number in range(3, 9):
        batch(story, f"j{number}", "a")
        assert started(story, f"j{number}", "a") == []
        assert story.tick(after=60.0) == []


def test_the_queues_of_the_two_classes_are_counted_apart() -> None:
    story = works_off("a")
    story.demand("r1", "a")
    story.started("r1", "a")
    story.tell(QueueDepths({"a": 1}, story.now))
    story.tell(QueueDepths({"a": 3}, story.now, "batch"))  # one is in flight
    [first, second] = list(story.state.waiting["a"])
    assert {first.klass, second.klass} == {"batch"}
    story.tell(QueueDepths({}, story.now))
    assert len(story.state.waiting["a"]) == 2
    story.tell(QueueDepths({"a": 1}, story.now, "batch"))
    assert "a" not in story.state.waiting


def test_batches_do_not_count_as_what_a_tenant_used() -> None:
    story = running(on("a", "resident", 60))
    story.tell(Demand("j1", "a", "batch", story.now, tenant="x", window_s=WINDOW_S))
    assert not story.state.shares.accounts
