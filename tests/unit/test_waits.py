"""How long a model is expected to be waited for. Sizes are MiB, of which the link copies 100 a
second; a load takes 2 s for 100.
"""

from typing import Any

import msgspec
import pytest

from schemas.commands import SwapOut
from schemas.state import PredictedWait, ReplicaStatus, SwapTrace
from services.scheduler import waits
from services.scheduler.inputs import DeploymentAdded
from services.scheduler.state import MIB
from tests.unit.decide_story import EPOCH, GPU, Story, on, running, spec


def measured(*replicas: ReplicaStatus, gpus: tuple[str, ...] = (GPU,)) -> Story:
    """GPUs of 100 MiB with these replicas, whose links and disks have been measured."""
    story = running(*replicas)
    for gpu in gpus:
        if gpu != GPU:
            story.status(*replicas, gpu=gpu)
        agent = story.state.agents[gpu]
        agent.link.note(SwapTrace(0.0, copy_s=1.0, total_s=1.0, num_bytes=100 * MIB))
        agent.disk.note(100 * MIB, 2.0)
    return story


def expected(story: Story, model: str, num_ahead: int = 0) -> Any:
    wait_s = waits.of_model(story.state, model, story.now, num_ahead)
    return wait_s if wait_s is None else pytest.approx(wait_s)


def with_slack(story: Story, gpu: str = GPU, resident_s: float = 0.0) -> None:
    """``a`` came in so long ago, and its requests can spare the time of any turn."""
    replica = story.replica("a", gpu)
    replica.resident_since, replica.slack_s = story.now - resident_s, 9.0


def test_a_resident_model_is_there() -> None:
    assert expected(measured(on("a", "resident", 60)), "a") == 0.0


def test_nobody_knows_before_a_swap_was_measured_or_of_a_model_that_nobody_wants() -> None:
    story = running(on("a", "host", 60))
    story.demand("r1", "a")
    assert expected(story, "a") is None
    assert expected(measured(on("a", "host", 60)), "a") is None
    assert expected(story, "never heard of") is None


def test_a_swap_in_under_way_takes_what_is_left_of_it() -> None:
    story = measured(on("a", "host", 60), on("b", "host", 30))
    story.demand("r1", "a")
    assert expected(story, "a") == 0.6
    story.now += 0.2
    assert expected(story, "a") == 0.4
    story.demand("r2", "b")
    assert expected(story, "b") == 0.4 + 0.3  # the link has both to do
    assert expected(story, "a") == 0.4
    story.now += 5.0
    assert expected(story, "a") == 0.0  # any moment


def test_a_load_comes_before_the_swap_in() -> None:
    story = measured(on("a", "cold", 50))
    story.demand("r1", "a")
    assert expected(story, "a") == 1.0 + 0.5
    story.now += 0.4
    assert expected(story, "a") == 0.6 + 0.5


def test_busy_models_in_front_stay_for_their_quantum() -> None:
    story = measured(on("a", "resident", 60, in_flight=1), on("b", "host", 60))
    with_slack(story)
    story.demand("r1", "b")
    assert expected(story, "b") == 1.0 + 0.6
    story.replica("a").in_flight = 0  # an idle one leaves at once
    assert expected(story, "b") == 0.6


def test_busy_models_leave_when_their_requests_can_spare_the_time_or_who_waits_starves() -> None:
    story = measured(on("a", "resident", 60, in_flight=1), on("b", "host", 60))
    story.state.tempo("a").token_s = 0.1 / 3  # two seconds of slack in a second
    story.demand("r1", "b")
    story.replica("a").slack_s = 0.2
    assert expected(story, "b") == 1.0 + 0.6  # two swaps and a quantum are 2.2 s: 1 s from now
    story.replica("a").slack_s = -2.0
    assert expected(story, "b") == 2.1 + 0.6
    story.state.tempo("a").token_s = 1.0  # it never will
    assert expected(story, "b") == 20 * 0.6 + 0.6  # until it need not ask


def test_where_swaps_are_quick_a_busy_model_leaves_after_its_quantum() -> None:
    story = running(on("a", "resident", 60, in_flight=1), on("b", "host", 60))
    story.state.agents[GPU].link.note(SwapTrace(0.0, total_s=0.02))
    story.state.tempo("a").token_s = 1.0  # it never has any slack
    story.demand("r1", "b")
    assert expected(story, "b") == 1.0 + 0.02


@pytest.mark.parametrize("idle_s", [19.0, 21.0])
def test_a_large_model_that_is_kept_leaves_for_a_smaller_one_that_starves(idle_s: float) -> None:
    story = measured(on("a", "resident", 80), on("b", "host", 40))
    for number in range(1, 8):
        story.status(gpu=f"gpu{number}")
    story.replica("a").last_used = story.now - idle_s
    is_kept = idle_s < 20.0
    assert story.demand("r1", "b") == ([] if is_kept else [SwapOut(GPU, "a", EPOCH, 2, "r1")])
    assert expected(story, "b") == (20 * 0.4 if is_kept else 0.0) + 0.4


def test_pinned_and_uninterrupted_ones_leave_when_nobody_knows() -> None:
    for settings in ({"pinned": True}, {"preemption": "drain"}):
        story = measured(on("a", "resident", 60, in_flight=1), on("b", "host", 60))
        story.tell(DeploymentAdded(msgspec.structs.replace(spec("a"), **settings)))
        story.demand("r1", "b")
        assert expected(story, "b") is None


def test_a_drain_is_cut_short_after_a_quantum() -> None:
    story = measured(on("a", "resident", 60), on("b", "host", 60))
    story.demand("r1", "b")
    assert expected(story, "b") == 0.6
    story.started("r0", "a")
    story.now += 0.3
    assert expected(story, "b") == 0.7 + 0.6


def test_each_one_ahead_takes_the_link_and_a_quantum_where_there_is_no_room() -> None:
    story = measured(on("a", "resident", 60, in_flight=1), on("b", "host", 60))
    with_slack(story)
    story.demand("r1", "b")
    assert expected(story, "b", num_ahead=2) == 1.0 + 2 * (0.6 + 1.0) + 0.6
    story.replica("a").in_flight = 0
    assert expected(story, "b", num_ahead=2) == 2 * 0.6 + 0.6


def test_the_gpus_that_may_take_it_share_those_ahead_and_the_soonest_counts() -> None:
    story = measured(on("a", "resident", 60, in_flight=1), on("b", "host", 60), gpus=(GPU, "gpu1"))
    with_slack(story)
    with_slack(story, "gpu1", resident_s=0.5)
    story.demand("r1", "b")
    assert expected(story, "b", num_ahead=2) == 0.5 + 1 * (0.6 + 1.0) + 0.6


def test_one_whose_bytes_are_being_freed_comes_first_and_stays_for_its_quantum() -> None:
    story = measured(on("a", "resident", 60), on("b", "host", 60), on("c", "host", 60))
    story.demand("r1", "b")  # a leaves for it
    story.demand("r2", "c")
    assert list(story.state.plans) == ["b"]
    assert expected(story, "b") == 0.6
    assert expected(story, "c") == (0.6 + 1.0) + 0.6
    assert [(told.model, told.place) for told in waits.predictions(story.state, 0.0, 0, 9)] == [
        ("c", 1),
        ("b", 0),
    ]


# -- what is sent --------------------------------------------------------------------------


def test_those_who_wait_are_told_in_the_order_of_the_line() -> None:
    story = measured(on("a", "resident", 60, in_flight=1), on("b", "host", 60), on("c", "host", 60))
    with_slack(story)
    since = story.now
    story.demand("r1", "b")
    story.demand("r2", "c")
    story.demand("r3", "c")
    story.demand("r4", "a")  # served: it waits for no swap
    told = waits.predictions(story.state, story.now, 0, 10)
    assert told == [
        PredictedWait("b", since, 1.6, 1, 0, since, 1),
        PredictedWait("c", since, 3.2, 2, 0, since, 2),
    ]


def test_one_on_its_way_in_has_no_place_in_line() -> None:
    story = measured(on("a", "host", 60))
    since = story.now
    story.demand("r1", "a")
    story.now += 0.1
    [told] = waits.predictions(story.state, story.now, 0, 10)
    assert told == PredictedWait("a", story.now, 0.5, 1, 0, since, 0)


def test_one_that_should_have_arrived_is_still_waited_for() -> None:
    story = measured(on("a", "host", 60))
    story.demand("r1", "a")
    story.now += 5.0
    [told] = waits.predictions(story.state, story.now, 0, 10)
    assert told.wait_s == 0.0
    story.swapped_in("a", 2)
    assert waits.predictions(story.state, story.now, 0, 10) == []


def test_suspended_requests_wait_too() -> None:
    story = measured(on("a", "host", 60, in_flight=2), on("b", "resident", 60, in_flight=1))
    [told] = waits.predictions(story.state, story.now, 0, 10)
    assert (told.model, told.num_waiters, told.num_suspended, told.place) == ("a", 0, 2, 1)


def test_a_long_line_is_told_in_turns() -> None:
    others = [on(f"m{number}", "host", 60) for number in range(5)]
    story = measured(on("a", "resident", 60, in_flight=1), *others)
    for number in range(5):
        story.demand(f"r{number}", f"m{number}")
    rounds = [
        [told.model for told in waits.predictions(story.state, story.now, first, 2)]
        for first in (0, 2, 4, 6)
    ]
    assert rounds == [["m0", "m1"], ["m2", "m3"], ["m4", "m0"], ["m1", "m2"]]
    assert len(waits.predictions(story.state, story.now, 0, 10)) == 5


def test_nobody_waits_nobody_is_told() -> None:
    assert waits.predictions(measured(on("a", "host", 60)).state, 0.0, 7, 10) == []
