"""News that is late, lost, doubled, contradictory or about nothing known, and what it changes."""

import pytest

from schemas.commands import Load, SwapIn
from schemas.events import (
    AgentStarted,
    AgentStopped,
    CommandFailed,
    CommandRejected,
    LeaderElected,
    LoadProgressed,
    ModelLoaded,
    ModelRegistered,
    RequestEnded,
    RequestStarted,
    RequestWithdrawn,
    SwapInCompleted,
    SwapOutCompleted,
    WorkerDied,
)
from schemas.state import (
    SwapTrace,
)
from schemas.stream import RequestTiming
from services.scheduler.inputs import (
    AgentLost,
    Demand,
    DeploymentAdded,
    Input,
    QueueDepths,
    Tick,
)
from services.scheduler.state import MIB, InvariantViolation
from tests.unit.decide_story import EPOCH, GPU, Story, facts, on, register, running, spec

# -- statuses and races --------------------------------------------------------------------


def test_a_status_sent_before_our_command_does_not_undo_it() -> None:
    story = running(on("a", "resident", 60), on("b", "host", 60))
    story.demand("r1", "b")
    assert story.status(on("a", "resident", 60), on("b", "host", 60)) == []
    assert story.replica("a").state == "draining"
    assert story.status(on("a", "swapping_out", 60, generation=2), on("b", "host", 60)) == []
    assert story.replica("a").state == "swapping_out"


def test_a_status_stands_in_for_a_lost_event() -> None:
    story = running(on("a", "resident", 60), on("b", "host", 60))
    story.demand("r1", "b")
    assert story.status(on("a", "host", 60, generation=2), on("b", "host", 60)) == [
        SwapIn(GPU, "b", EPOCH, 2, "r1")
    ]
    assert story.swapped_out("a", 2) == []  # the event, late


def test_a_late_status_does_not_undo_an_answer() -> None:
    story = running(on("a", "host", 60))
    story.demand("r1", "a")
    story.swapped_in("a", 2)
    story.status(on("a", "swapping_in", 60, generation=2))
    assert story.replica("a").state == "resident"
    story.status(on("a", "resident", 60, generation=2))
    assert story.replica("a").is_settled


def test_statuses_that_insist_are_right() -> None:
    story = running(on("a", "host", 60))
    story.demand("r1", "a")
    story.swapped_in("a", 2)
    for _ in range(4):
        story.now += 5.0
        story.status(on("a", "host", 60, generation=2))
    assert story.replica("a").state == "swapping_in"  # adopted host, and commanded again


def test_a_new_instance_starts_from_nothing() -> None:
    story = running(on("a", "resident", 60, generation=5))
    story.demand("r1", "a")
    assert story.status(instance="i2") == [register("a", 7)]
    assert story.status(on("a", "resident", 60, generation=5), instance="i1") == []  # a ghost
    assert story.replica("a").state == "cold"
    assert story.swapped_in("a", 5) == []
    assert story.registered("a", 60, 7) == [Load(GPU, "a", EPOCH, 8, "r1")]


def test_a_stray_command_that_reaches_the_next_instance_is_counted() -> None:
    story = running(on("a", "host", 60), on("b", "host", 60))
    assert story.demand("r1", "a") == [SwapIn(GPU, "a", EPOCH, 2, "r1")]
    story.status(instance="i2")  # before the new process read that SwapIn
    assert story.registered("a", 60, 4) == []  # is it cold? only a status can tell
    assert story.status(on("a", "swapping_in", 60, 2), instance="i2") == []
    assert story.state.agents[GPU].reserved_bytes == 60 * MIB


def test_a_dead_worker_frees_nothing_before_a_status_says_so() -> None:
    story = running(on("a", "resident", 60), on("b", "host", 60))
    assert story.tell(WorkerDied(GPU, story.now, "killed")) == []
    assert story.demand("r1", "b") == []
    assert story.replica("a").state == "resident"
    assert story.status(on("a", "cold", 60), on("b", "cold", 60), pid=0, budget=0) == []
    assert story.status(on("a", "cold", 60), on("b", "cold", 60), pid=11) == [
        Load(GPU, "b", EPOCH, 2, "r1")
    ]


def test_a_lost_agent_is_replaced_and_its_bytes_stay_counted() -> None:
    story = running(on("a", "host", 60))
    story.status(on("a", "host", 60), gpu="gpu1", budget=60)
    assert story.demand("r1", "a") == [SwapIn(GPU, "a", EPOCH, 2, "r1")]
    assert story.tell(AgentLost(GPU)) == [SwapIn("gpu1", "a", EPOCH, 2, "r1")]
    assert story.state.agents[GPU].reserved_bytes == 60 * MIB
    assert story.status(on("a", "host", 60)) == []  # back; the command may still arrive
    assert story.replica("a").state == "swapping_in"


def test_a_silent_agent_is_lost_and_a_stopped_one_forgotten() -> None:
    story = running(on("a", "resident", 60))
    assert story.tell(Tick(), after=14.0) == []
    assert story.state.agents[GPU].is_alive
    story.tell(Tick(), after=2.0)
    assert not story.state.agents[GPU].is_alive
    story.status(on("a", "resident", 60))
    assert story.tell(AgentStopped(GPU, "another", story.now)) == []
    assert story.replica("a").state == "resident"
    assert story.tell(AgentStopped(GPU, "i1", story.now)) == []
    assert story.replica("a").state == "cold"


def test_a_refused_command_waits_for_a_status_that_is_surely_newer() -> None:
    story = running(on("a", "host", 60))
    story.demand("r1", "a")
    story.tell(CommandRejected(GPU, "a", 2, story.now, "swap_in", "is cold"))
    assert story.status(on("a", "cold", 60)) == []
    assert story.state.agents[GPU].reserved_bytes == 60 * MIB
    story.now += 2.0
    assert story.status(on("a", "cold", 60)) == [Load(GPU, "a", EPOCH, 3, "r1")]


def test_an_unanswered_command_is_repeated_unless_the_agent_is_at_it() -> None:
    story = running(on("a", "cold", 60))
    assert story.demand("r1", "a") == [Load(GPU, "a", EPOCH, 2, "r1")]
    story.tick(50.0)
    story.tell(LoadProgressed(GPU, "a", story.now, 1, 2))
    story.tick(50.0)
    story.status(on("a", "loading", 60, generation=2))
    assert story.tick(59.0) == []
    assert story.tick(1.0) == [Load(GPU, "a", EPOCH, 3, "r1")]
    assert story.loaded("a", 2) == []  # the answer to the first; the second will be answered too
    assert story.loaded("a", 3) == [SwapIn(GPU, "a", EPOCH, 4, "r1")]


def test_a_new_leader_takes_over_what_it_finds() -> None:
    story = Story()
    story.tell(DeploymentAdded(spec("a")))
    story.tell(DeploymentAdded(spec("b")))
    story.status(on("a", "swapping_in", 60, generation=9), on("b", "host", 60, generation=4))
    assert story.demand("r1", "a") == []
    assert story.swapped_in("a", 9) == []
    assert story.replica("a").state == "resident"
    assert story.demand("r2", "b") == []
    story.started("r1", "a")
    story.ended("r1", "a")
    story.tell(Tick())
    assert story.replica("a").pending is not None
    assert story.replica("a").generation == 10


# -- waiters -------------------------------------------------------------------------------


def waiters(story: Story, model: str) -> list[str]:
    return [w.request_id for w in story.state.waiting.get(model, ())]


def test_queue_depths_heal_lost_and_duplicate_demand() -> None:
    story = running(on("a", "resident", 60, in_flight=1))
    for number in range(3):
        story.demand(f"r{number}", "a", at=float(number))
    story.demand("r0", "a", at=0.0)
    assert waiters(story, "a") == ["r0", "r1", "r2"]
    story.tell(QueueDepths({"a": 2}, at=1.5))  # one in flight, one waits; r2 came after
    assert waiters(story, "a") == ["r1", "r2"]
    story.tell(QueueDepths({"a": 4, "nobody": 1}, at=5.0))
    assert waiters(story, "a") == ["r1", "r2", "recovered-1"]
    story.tell(QueueDepths({}, at=6.0))
    assert waiters(story, "a") == []


def test_recovered_demand_is_served() -> None:
    story = running(on("a", "host", 60))
    assert story.tell(QueueDepths({"a": 1}, at=5.0)) == [SwapIn(GPU, "a", EPOCH, 2, "recovered-1")]


def test_demand_that_comes_after_the_start_is_no_waiter() -> None:
    story = running(on("a", "resident", 60))
    at = story.now
    story.now += 1.0
    story.started("r1", "a")
    story.demand("r1", "a", at=at)
    assert waiters(story, "a") == []
    story.demand("r1", "a", at=story.now + 1.0)  # published once more, after its agent died
    assert waiters(story, "a") == ["r1"]


# -- totality ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "event",
    [
        AgentLost("gpu9"),
        AgentStopped("gpu9", "i", 0.0),
        WorkerDied("gpu9", 0.0, "?"),
        AgentStarted("gpu9", "i", 0.0, "cpu", "cpu", 1),
        ModelRegistered("gpu9", "a", 1, 0.0, facts(1)),
        ModelLoaded(GPU, "nobody", 1, 0.0, 1, 1.0),
        SwapInCompleted(GPU, "a", 99, 0.0, SwapTrace(0.0)),
        SwapOutCompleted(GPU, "a", 0, 0.0, SwapTrace(0.0)),
        CommandFailed(GPU, "a", 1, 0.0, "swap_out", "?"),
        CommandRejected(GPU, "a", 1, 0.0, "load", "?"),
        RequestStarted("gpu9", "nobody", "r", 0.0, 1, 0.0),
        RequestWithdrawn("nobody", "r", 0.0, "deadline"),
        Demand("r", "nobody", "batch", 0.0),
        LeaderElected("me", 4, 0.0),
        Tick(),
    ],
)
def test_news_about_nothing_known_changes_nothing(event: Input) -> None:
    story = running(on("a", "host", 60))
    assert story.tell(event) == []
    assert story.replica("a").state == "host"
    assert story.demand("r1", "a") == [SwapIn(GPU, "a", EPOCH, 2, "r1")]


def test_validate_names_what_is_wrong() -> None:
    story = running(on("a", "resident", 60))
    story.state.agents[GPU].budget_bytes = 1
    with pytest.raises(InvariantViolation, match=r"gpu0: .* exceeds budget of 1 bytes"):
        story.state.validate()


def test_a_crowd_that_shrinks_asks_for_no_other_replica() -> None:
    story = running(on("a", "resident", 60, in_flight=11))
    timing = RequestTiming(prefill_s=1.5, decode_s=1.0)
    for number in range(3):
        story.tell(RequestEnded(GPU, "a", f"r{number}", story.now, "stop", 9, 9, timing))
    assert [turn.is_extra for turn in story.state.line.of("a")] == [True]
    story.tell(RequestEnded(GPU, "a", "r3", story.now, "stop", 9, 9, timing))  # and validated
    assert not story.state.line
