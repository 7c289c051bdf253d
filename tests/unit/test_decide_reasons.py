"""What is told of decisions: what was decided, why, whom it cost, and what else there was."""

from typing import Any

import msgspec
import pytest

from schemas.decisions import Candidate, Victim
from schemas.events import DecisionMade
from schemas.state import ReplicaStatus, SwapTrace
from services.scheduler.inputs import DeploymentAdded
from services.scheduler.reasons import MOST_CANDIDATES, MOST_VICTIMS
from services.scheduler.state import MIB
from tests.unit.decide_story import GPU, Story, on, running, spec


def told(story: Story) -> list[tuple[str, str, str]]:
    """Model, action and reason of each decision since this was asked last."""
    return [(one.model, one.action, one.reason) for one in story.decided()]


def started(*replicas: ReplicaStatus, **settings: dict[str, Any]) -> Story:
    """An agent with these replicas; ``settings`` by model."""
    story = Story()
    for replica in replicas:
        changed = msgspec.structs.replace(spec(replica.model), **settings.get(replica.model, {}))
        story.tell(DeploymentAdded(changed))
    story.status(*replicas)
    return story


# -- a turn --------------------------------------------------------------------------------


def test_a_warm_request_decides_nothing() -> None:
    story = running(on("a", "resident", 60))
    story.demand("r1", "a")
    story.started("r1", "a")
    story.ended("r1", "a")
    story.tick(1.0)
    assert story.decided() == []


def test_where_there_is_room_it_comes_in() -> None:
    story = running(on("a", "host", 60))
    story.demand("r1", "a", at=story.now - 0.5)
    assert story.decided() == [
        DecisionMade(
            model="a",
            gpu=GPU,
            action="swap_in",
            at=story.now,
            reason="there is room on gpu0",
            request_id="r1",
            waited_s=0.5,
            due_at=story.now + 1.5,
            urgency="in_time",
            num_waiters=1,
            candidates=(Candidate(GPU, "swap_in", 1, 0.0, 60 * MIB),),
            num_candidates=1,
        )
    ]


def test_an_idle_victim_is_named_with_its_idle_time() -> None:
    story = running(on("a", "resident", 60, in_flight=1), on("b", "host", 60))
    story.ended("r0", "a")
    story.now += 3.0
    story.demand("r1", "b")
    [evict] = story.decided()
    assert (evict.action, evict.reason) == ("evict", "idle on gpu0, and first to leave: a")
    assert evict.victims == (Victim("a", "idle", idle_s=3.0),)
    assert evict.candidates[0].victims == ("a",)
    story.swapped_out("a", 2)
    assert told(story) == [("b", "swap_in", "the bytes that it waited for on gpu0 are there")]


def test_a_busy_victim_is_named_with_its_slack() -> None:
    story = running(on("a", "resident", 60, in_flight=1), on("b", "host", 60))
    story.demand("r1", "b")
    assert story.decided() == []
    story.tick(1.1)
    [evict] = story.decided()
    assert evict.reason == (
        "a must give way on gpu0: it had 1.0 s there, and its answers can wait 1.1 s"
    )
    assert evict.victims == (Victim("a", "preempted", slack_s=1.1),)
    assert (evict.waited_s, evict.urgency) == (1.1, "in_time")


def test_who_waits_for_very_long_does_not_ask_for_slack() -> None:
    story = running(on("a", "resident", 60, in_flight=1), on("b", "host", 60))
    story.state.tempo("a").token_s = 1.0  # ten times too slow: never any slack
    story.demand("r1", "b")
    story.tick(2.5)
    story.decided()
    story.tick(0.6)
    [evict] = story.decided()
    assert evict.reason == "a must give way on gpu0: it waits for 3.1 s, too long to ask for slack"
    assert evict.urgency == "starving"


def test_where_swaps_are_quick_nobody_asks_for_slack() -> None:
    story = running(on("a", "resident", 60, in_flight=1), on("b", "host", 60))
    story.state.agents[GPU].link.note(SwapTrace(0.0, total_s=0.02))
    story.state.tempo("a").token_s = 1.0  # ten times too slow: never any slack
    story.demand("r1", "b")
    story.tick(1.1)
    [evict] = story.decided()
    assert evict.reason == (
        "a must give way on gpu0: it had 1.0 s there, and swaps are so quick that models take turns"
    )
    assert evict.urgency == "in_time"


def test_one_that_must_not_be_interrupted_is_drained() -> None:
    story = started(
        on("a", "resident", 60, in_flight=1), on("b", "host", 60), a={"preemption": "drain"}
    )
    story.demand("r1", "b")
    story.tick(1.1)
    [evict] = story.decided()
    assert evict.victims == (Victim("a", "drained", slack_s=1.1),)


def test_a_model_without_an_image_is_loaded_first() -> None:
    story = running(on("a", "cold", 60), on("b", "resident", 60, in_flight=1))
    story.demand("r1", "a")
    assert told(story) == [
        ("a", "load", "it has no host image: gpu0 reads its files first, by then there may be room")
    ]


def test_all_gpus_that_were_looked_at_are_told_the_best_one_first() -> None:
    story = running(on("a", "host", 60), on("b", "resident", 60))
    story.status(on("a", "host", 60), gpu="gpu1")
    story.status(on("a", "cold", 60), gpu="gpu2")
    story.demand("r1", "a")
    [swap_in] = story.decided()
    assert swap_in.reason == "there is room on gpu1; the best of 3 GPUs"
    assert [(c.gpu, c.action, c.rank) for c in swap_in.candidates] == [
        ("gpu1", "swap_in", 1),
        ("gpu0", "evict", 3),
        ("gpu2", "load", 4),
    ]


def test_suspended_requests_are_counted_and_told_apart() -> None:
    story = started(on("a", "host", 60, in_flight=2))
    [swap_in] = story.decided()
    assert swap_in.reason == "its suspended requests can go on only on gpu0; there is room on gpu0"
    assert (swap_in.request_id, swap_in.num_waiters, swap_in.num_suspended) == ("", 0, 2)


# -- not in turn ---------------------------------------------------------------------------


def test_a_swap_in_that_nobody_waits_for_is_called_off() -> None:
    story = running(on("a", "host", 60))
    story.demand("r1", "a")
    story.decided()
    story.withdrawn("r1", "a")
    [call_off] = story.decided()
    assert (call_off.action, call_off.urgency, call_off.due_at) == ("call_off", "unasked", 0.0)
    assert call_off.reason == "nobody waits for it any more: its swap-in is called off"


def test_bytes_that_nobody_waits_for_are_not_kept() -> None:
    story = running(on("a", "resident", 60), on("b", "host", 60))
    story.demand("r1", "b")
    story.decided()
    story.withdrawn("r1", "b")
    words = "nobody waits for it by now: no bytes of gpu0 are kept for it"
    assert told(story) == [("b", "call_off", words)]


def test_a_drain_that_is_cut_short_says_whose() -> None:
    story = running(on("a", "resident", 60), on("b", "host", 60))
    story.demand("r1", "b")
    story.started("r0", "a")
    story.decided()
    story.tick(1.1)
    [cut] = story.decided()
    assert (cut.model, cut.action, cut.request_id) == ("b", "cut_drain", "r1")
    assert [(victim.model, victim.how) for victim in cut.victims] == [("a", "preempted")]
    assert cut.reason == (
        "a took a request after it was told to leave, and still runs it 1.1 s later: "
        "it is preempted"
    )


def test_a_time_to_live_is_a_reason() -> None:
    story = started(on("a", "resident", 60, in_flight=1), a={"ttl_s": 5.0})
    story.ended("r0", "a")
    story.tick(5.5)
    assert told(story) == [("a", "swap_out", "nobody wanted it for 5.5 s (ttl_s = 5)")]


def test_pins_and_preloads_are_told_as_unasked() -> None:
    story = started(on("a", "cold", 60), a={"pinned": True})
    assert told(story) == [
        ("a", "load", "nobody asked: its image fits into the host memory of gpu0 (preload)")
    ]
    story.loaded("a", 2)
    [swap_in] = story.decided()
    assert swap_in.reason == "it is pinned; there is room on gpu0"
    assert (swap_in.urgency, swap_in.waited_s, swap_in.due_at) == ("unasked", 0.0, 0.0)
    msgspec.json.encode(swap_in)  # a pin is never due


# -- told once, and no more than fits --------------------------------------------------------


def waits_behind_a_claim() -> Story:
    """``b`` claims the bytes of ``a``, which can not be interrupted and has not had its quantum."""
    story = running(on("a", "resident", 60, in_flight=1), on("b", "host", 60))
    story.state.tempo("a").token_s = 1.0  # never any slack
    story.demand("r1", "b")
    story.tick(1.1)
    return story


def test_a_claim_is_told_once_though_it_is_made_at_each_tick() -> None:
    story = waits_behind_a_claim()
    [claim] = story.decided()
    assert (claim.model, claim.action) == ("b", "claim")
    assert claim.reason == "nobody on gpu0 can leave yet: what is freed there is kept for it"
    for _ in range(5):
        story.tick(0.2)
    story.demand("r2", "b")
    assert story.state.holds.claims == {GPU: 60 * MIB}
    assert story.decided() == []


def test_the_next_wait_is_told_anew() -> None:
    story = waits_behind_a_claim()
    story.decided()
    story.withdrawn("r1", "b")
    story.tick(0.2)
    assert story.decided() == []
    story.demand("r2", "b", at=story.now - 1.5)
    assert [one.action for one in story.decided()] == ["claim"]


def test_decisions_that_nobody_takes_are_forgotten() -> None:
    story = running(on("a", "host", 60))
    for number in range(3000):
        story.demand(f"r{number}", "a")
        story.replica("a").life.adopt("host", story.now, "test")
        story.replica("a").pending = None
        story.withdrawn(f"r{number}", "a")
    assert 0 < len(story.decided()) <= 1024


def test_events_stay_small_in_a_large_cluster() -> None:
    small = [on(f"small-{number}", "resident", 1) for number in range(100)]
    gpus = tuple(f"gpu{number}" for number in range(40))
    story = started(on("large", "host", 100), *small, large={"gpus": gpus})
    for gpu in gpus[1:]:
        story.status(on("large", "host", 100), *small, gpu=gpu)
    story.now += 10.0
    story.demand("r1", "large")
    [evict] = story.decided()
    assert len(evict.victims) == MOST_VICTIMS
    assert len(evict.candidates) == MOST_CANDIDATES
    assert evict.num_candidates > MOST_CANDIDATES
    assert evict.reason.endswith(f" and 92 more; the best of {evict.num_candidates} GPUs")
    assert len(msgspec.json.encode(evict)) < 10_000


def test_what_was_measured_makes_the_predicted_wait() -> None:
    story = running(on("a", "host", 60), on("b", "host", 60))
    story.state.agents[GPU].link.note(SwapTrace(0.0, copy_s=0.6, total_s=0.8, num_bytes=60 * MIB))
    story.demand("r1", "a")
    [swap_in] = story.decided()
    assert swap_in.predicted_wait_s == pytest.approx(0.8)
