"""Choices: who has to leave, where a model goes, who comes next. Sizes in bytes, times in s."""

from typing import Literal

import pytest

from schemas.state import (
    ModelSpec,
    SwapTrace,
)
from services.scheduler.decide import decide
from services.scheduler.inputs import Tick
from services.scheduler.policy import (
    Placement,
    choose_preload,
)
from services.scheduler.state import PolicyConfig
from services.scheduler.turns import Turn, line, turns_of
from services.scheduler.waiting import Plan
from tests.unit.policy_scene import NOW, Scene, facts


def test_1_free_bytes_are_used_first() -> None:
    scene = Scene()
    scene.gpu("gpu0", 10, a=("resident", 8, 0), b=("host", 8, 0))
    scene.gpu("gpu1", 10, b=("host", 8, 0))
    scene.waits("b")
    assert scene.place("b") == Placement("gpu1", "swap_in")
    assert scene.place("b", {"gpu1": 3}) == Placement("gpu0", "evict", ("a",))


def test_1_among_equals_the_least_pressed() -> None:
    scene = Scene()
    scene.gpu("gpu0", 30, a=("resident", 10, 1), b=("host", 8, 0))
    scene.gpu("gpu1", 20, c=("resident", 10, 0), b=("host", 8, 0))
    scene.waits("b")
    assert scene.place("b") == Placement("gpu1", "swap_in")


def test_1_then_where_more_of_it_is_still_on_the_device() -> None:
    scene = Scene()
    for gpu, budget in (("gpu0", 30), ("gpu1", 20), ("gpu2", 20)):
        scene.gpu(gpu, budget, b=("host", 8, 0))
    scene.waits("b")
    assert scene.place("b") == Placement("gpu0", "swap_in")  # most free bytes
    scene.state.agents["gpu1"].replicas["b"].cached_bytes = 3
    scene.state.agents["gpu2"].replicas["b"].cached_bytes = 4
    assert scene.place("b") == Placement("gpu2", "swap_in")
    scene.gpu("gpu2", 20, a=("resident", 5, 1), b=("host", 8, 0))
    assert scene.place("b") == Placement("gpu1", "swap_in")  # pressure counts more


def test_2_bytes_on_their_way_out_save_a_victim() -> None:
    scene = Scene()
    agent = scene.gpu("gpu0", 20, a=("draining", 10, 0), b=("host", 8, 0), c=("resident", 9, 0))
    scene.waits("b")
    assert agent.free_bytes == 1
    assert scene.place("b") == Placement("gpu0", "wait")


def test_3_the_idle_model_whose_bytes_are_worth_least_leaves() -> None:
    scene = Scene()
    agent = scene.gpu("gpu0", 20, a=("resident", 9, 1), c=("resident", 5, 0), d=("resident", 5, 0),
                      b=("host", 5, 0))  # fmt: skip
    scene.waits("b")
    assert scene.place("b") == Placement("gpu0", "evict", ("c",))
    agent.replicas["c"].last_used = 50.0  # equal sizes: the least recently used
    assert scene.place("b") == Placement("gpu0", "evict", ("d",))
    agent.replicas["c"].facts = facts(6)  # 6 x 50 byte seconds against 5 x 98
    assert scene.place("b") == Placement("gpu0", "evict", ("d",))
    agent.replicas["d"].last_used = 45.0  # 5 x 55
    assert scene.place("b") == Placement("gpu0", "evict", ("c",))


@pytest.mark.parametrize(("eviction", "first"), [("lru", "c"), ("gdsf", "d"), ("belady", "e")])
def test_other_eviction_policies(eviction: Literal["lru", "gdsf", "belady"], first: str) -> None:
    scene = Scene(PolicyConfig(eviction=eviction))
    agent = scene.gpu("gpu0", 15, c=("resident", 5, 0), d=("resident", 5, 0), e=("resident", 5, 0),
                      b=("host", 5, 0))  # fmt: skip
    for model, worth in (("c", 2.0), ("d", 1.0), ("e", 3.0)):
        agent.replicas[model].worth = worth
    scene.state.next_use = lambda model, now: {"c": 5.0, "d": 6.0, "e": 7.0}[model] + now
    scene.waits("b")
    assert scene.place("b") == Placement("gpu0", "evict", (first,))


def test_placement_by_memory_evicts_who_was_used_longest_ago_anywhere() -> None:
    scene = Scene(PolicyConfig(placement="memory"))
    for gpu, used in (("gpu0", 50.0), ("gpu1", 40.0)):
        agent = scene.gpu(gpu, 20, a=("resident", 10, int(gpu == "gpu1")), c=("resident", 10, 0),
                          b=("host", 5, 0))  # fmt: skip
        agent.replicas["a"].last_used = agent.replicas["c"].last_used = used
    scene.waits("b")
    assert scene.place("b") == Placement("gpu1", "evict", ("c",))  # though it is pressed


def test_rooms_for_the_largest_model_are_kept_whole() -> None:
    scene = Scene()
    for gpu, size, in_flight in (("gpu0", 8, 0), ("gpu1", 12, 1)):
        scene.gpu(gpu, 38, a=("host", 10, 0), z=("host", 30, 0), c=("resident", size, in_flight))
        scene.state.agents[gpu].link.note(SwapTrace(0.0, total_s=1.0, copy_s=1.0, num_bytes=30))
    scene.waits("a")
    assert scene.place("a") == Placement("gpu1", "swap_in")


def test_of_many_gpus_those_with_most_room_are_looked_at() -> None:
    scene = Scene(PolicyConfig(agent_silent_s=1000.0))
    for number in range(40):
        in_flight = int(number != 33)
        scene.gpu(f"gpu{number:02}", 10, a=("resident", 8, in_flight), b=("host", 8, 0))
    scene.waits("b", NOW)
    decide(scene.state, Tick(), NOW)
    assert scene.state.plans == {"b": Plan("b", "gpu33", f"b@{NOW}")}


def test_3_a_model_with_waiters_is_not_idle_nor_is_one_that_comes_in() -> None:
    scene = Scene()
    scene.gpu("gpu0", 20, a=("resident", 10, 0), c=("swapping_in", 10, 0), b=("host", 5, 0))
    scene.waits("a")
    scene.waits("b")
    assert scene.place("b") is None


def test_4_load_where_there_is_room_rather_than_wait_for_a_busy_gpu() -> None:
    scene = Scene()
    scene.gpu("gpu0", 10, a=("resident", 10, 2), b=("host", 8, 0))
    scene.gpu("gpu1", 10, b=("cold", 8, 0))
    scene.waits("b")
    assert scene.place("b") == Placement("gpu1", "load")


def test_6_load_before_there_is_room_one_at_a_time() -> None:
    scene = Scene()
    scene.gpu("gpu0", 10, a=("resident", 10, 2), b=("cold", 8, 0), c=("loading", 8, 0))
    scene.waits("b")
    assert scene.place("b") == Placement("gpu0", "load")
    scene.waits("c")
    assert scene.place("b") is None


def test_7_the_overdue_claim_what_is_not_free_yet() -> None:
    scene = Scene()
    agent = scene.gpu("gpu0", 10, a=("resident", 8, 1), b=("host", 8, 0), c=("host", 2, 0))
    agent.replicas["a"].resident_since = NOW - 0.5
    scene.waits("b", NOW - 1.1)
    scene.waits("c")
    assert scene.place("b") == Placement("gpu0", "claim")
    assert scene.place("c") == Placement("gpu0", "swap_in")
    assert scene.place("c", {"gpu0": 8}) is None


def test_8_room_in_host_memory() -> None:
    scene = Scene()
    agent = scene.gpu("gpu0", 30, a=("resident", 11, 0), c=("resident", 6, 1), b=("cold", 6, 0))
    scene.waits("b")
    assert scene.place("b") == Placement("gpu0", "load")
    agent.host_budget_bytes = 15
    assert scene.place("b") == Placement("gpu0", "make_room", ("a",))
    agent.replicas["a"].in_flight = 1
    assert scene.place("b") is None
    scene.waits("b", NOW - 1.1)
    assert scene.place("b") == Placement("gpu0", "make_room", ("a",))
    agent.replicas["a"].life.move("swap_out", NOW)
    assert scene.place("b") == Placement("gpu0", "make_room")  # until it has left
    agent.replicas["a"].life.move("swapped_out", NOW)
    agent.replicas["a"].in_flight = 0
    assert scene.place("b") == Placement("gpu0", "load")
    scene.gpu("gpu1", 30, b=("host", 6, 0))
    assert scene.place("b") == Placement("gpu1", "swap_in")


def test_8_images_with_suspended_requests_are_not_dropped_but_let_in() -> None:
    scene = Scene()
    agent = scene.gpu("gpu0", 12, a=("host", 11, 2), c=("resident", 6, 1), b=("cold", 6, 0))
    agent.host_budget_bytes = 15
    scene.waits("b")
    assert scene.place("b") is None
    scene.waits("b", NOW - 1.1)
    agent.replicas["a"].host_since = NOW
    assert scene.place("b") == Placement("gpu0", "make_room", ("c",))  # c's will do
    agent.replicas["c"].resident_since = NOW
    assert scene.place("b") == Placement("gpu0", "make_room")
    agent.host_budget_bytes = 10
    agent.replicas["c"].life.adopt("host", NOW, "test")
    agent.replicas["c"].in_flight = 0
    assert scene.place("b") == Placement("gpu0", "make_room")
    scene.waits("c")
    (a, c) = turns_of(scene.state, "a")[0], turns_of(scene.state, "c")[0]
    assert scene.place_turn(c, closed=["gpu0"]) is None
    assert scene.place_turn(a, closed=["gpu0"]) == Placement("gpu0", "swap_in")


# -- suspended requests --------------------------------------------------------------------


def test_suspended_requests_wait_for_the_gpu_that_has_them() -> None:
    scene = Scene()
    scene.gpu("gpu0", 10, a=("host", 8, 2), c=("resident", 8, 1))
    scene.gpu("gpu1", 10, a=("host", 8, 0))
    a = scene.state.agents["gpu0"].replicas["a"]
    a.host_since, a.slack_at, a.slack_s = NOW - 0.1, NOW - 0.1, 5.0
    assert turns_of(scene.state, "a") == [Turn("a", "gpu0", NOW - 0.1, "", NOW + 4.9)]
    assert scene.place("a") is None
    scene.waits("a", NOW - 1.0)
    assert turns_of(scene.state, "a") == [Turn("a", "gpu0", NOW - 1.0, f"a@{NOW - 1.0}", NOW + 1.0)]
    assert scene.place("a") == Placement("gpu0", "evict", ("c",))


def test_who_is_served_elsewhere_does_not_hasten_suspended_requests() -> None:
    scene = Scene()
    scene.gpu("gpu0", 10, a=("host", 8, 2))
    scene.gpu("gpu1", 10, a=("resident", 8, 1))
    scene.state.agents["gpu0"].replicas["a"].host_since = NOW - 0.5
    scene.waits("a", NOW - 9.0)  # the batch on gpu1 is full
    assert line(scene.state) == [Turn("a", "gpu0", NOW - 0.5, "", 0.0)]


def test_each_replica_with_suspended_requests_has_a_turn() -> None:
    scene = Scene()
    for at, gpu in enumerate(("gpu0", "gpu1")):
        scene.gpu(gpu, 10, a=("host", 8, 2), b=("host", 8, 0))
        replica = scene.state.agents[gpu].replicas["a"]
        replica.host_since, replica.slack_at, replica.slack_s = NOW - at, NOW - at, 2.0
    scene.waits("b", NOW - 0.5)
    assert [(turn.model, turn.gpu) for turn in line(scene.state)] == [
        ("a", "gpu1"),
        ("b", ""),
        ("a", "gpu0"),
    ]
    scene.state.agents["gpu1"].is_alive = False  # the queue will deliver those again
    assert [(turn.model, turn.gpu) for turn in line(scene.state)] == [("b", ""), ("a", "gpu0")]


def test_a_gpu_that_owes_suspended_requests_is_pressed() -> None:
    scene = Scene()
    scene.gpu("gpu0", 30, a=("host", 10, 1), b=("host", 8, 0))
    scene.gpu("gpu1", 20, b=("host", 8, 0))
    scene.waits("b")
    assert scene.place("b") == Placement("gpu1", "swap_in")


# -- who goes nowhere ----------------------------------------------------------------------


def test_a_model_larger_than_the_device_goes_nowhere() -> None:
    scene = Scene()
    scene.gpu("gpu0", 10, b=("host", 11, 0))
    scene.gpu("gpu1", 10, b=("cold", 11, 0))
    scene.waits("b", NOW - 50)
    assert scene.place("b") is None


def test_an_agent_that_is_gone_or_has_no_worker_is_no_place() -> None:
    scene = Scene()
    scene.gpu("gpu0", 10, b=("host", 8, 0)).is_alive = False
    scene.gpu("gpu1", 10, b=("host", 8, 0)).worker_died = True
    scene.waits("b")
    assert scene.place("b") is None


def test_models_are_served_by_their_earliest_waiter() -> None:
    scene = Scene()
    scene.gpu(
        "gpu0", 10, a=("host", 5, 0), b=("host", 5, 0), c=("resident", 5, 0), d=("cold", 5, 0)
    )
    for model, at in (("a", 3.0), ("b", 2.0), ("c", 1.0), ("a", 1.5), ("d", 1.0)):
        scene.waits(model, at)
    assert [turn.model for turn in line(scene.state)] == ["d", "a", "b"]


def test_preload_goes_in_order_one_at_a_time() -> None:
    scene = Scene()
    agent = scene.gpu("gpu0", 10, a=("cold", 5, 0), b=("cold", 50, 0), c=("cold", 5, 0))
    for model in "abc":
        scene.state.deployments[model] = ModelSpec(model, "/m", preload=model != "a")
    chosen = choose_preload(scene.state, agent, NOW)
    assert chosen is agent.replicas["c"]  # a does not want it, b never fits
    agent.replicas["a"].life.move("load", NOW)
    assert choose_preload(scene.state, agent, NOW) is None
