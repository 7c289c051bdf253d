"""Choices: who has to leave, where a model goes, who comes next. Sizes in bytes, times in s."""

from typing import Literal

import pytest

from schemas.state import (
    AgentStatus,
    ModelFacts,
    ModelSpec,
    ReplicaState,
    ReplicaStatus,
    SwapTrace,
)
from services.scheduler.decide import decide
from services.scheduler.inputs import Tick
from services.scheduler.policy import (
    Placement,
    choose_preload,
    place,
)
from services.scheduler.reconcile import absorb_status
from services.scheduler.replica import Agent, Replica
from services.scheduler.state import ClusterState, PolicyConfig
from services.scheduler.turns import Turn, line, turns_of
from services.scheduler.victims import busy_victims, choose_victims, num_made_late
from services.scheduler.waiting import Plan, Waiter

NOW = 100.0


def facts(size: int) -> ModelFacts:
    return ModelFacts("Llama", "float32", 1, size - 1, 1, 2048, 8)


def resident(model: str, size: int) -> Replica:
    replica = Replica(Agent("gpu0"), model)
    replica.facts = facts(size)
    replica.life.adopt("resident", 0.0, "test")
    return replica


class Scene:
    """A cluster as its agents' first statuses tell it."""

    def __init__(self, config: PolicyConfig | None = None) -> None:
        self.state = ClusterState(1, config)

    def gpu(self, name: str, budget: int, /, **replicas: tuple[ReplicaState, int, int]) -> Agent:
        """``model=(state, size, in_flight)``; swapped in long ago, in the order given."""
        statuses = tuple(
            ReplicaStatus(model, state, 1, in_flight, facts(size))
            for model, (state, size, in_flight) in replicas.items()
        )
        status = AgentStatus(name, "i1", 1, "cpu", "cpu", budget, 0, 1, statuses)
        agent = self.state.agent(name)
        absorb_status(agent, status, self.state.config, 0.0)
        for at, (model, replica) in enumerate(agent.replicas.items()):
            replica.last_used = replica.resident_since = float(at)
            self.state.deployments.setdefault(model, ModelSpec(model, "/m", preload=False))
        return agent

    def waits(self, model: str, at: float = NOW) -> None:
        self.state.add_waiter(Waiter(f"{model}@{at}", model, "interactive", at), at)

    def place(self, model: str, claims: dict[str, int] | None = None) -> Placement | None:
        return place(self.state, turns_of(self.state, model)[0], claims or {}, NOW)


@pytest.mark.parametrize(
    ("sizes", "need", "chosen"),
    [
        ([1, 1, 4], 0, ""),
        ([1, 1, 4], 1, "a"),
        ([1, 1, 4], 2, "ab"),
        ([1, 1, 4], 4, "c"),  # a and b are spared: c alone is enough
        ([1, 1, 4], 5, "ac"),  # b is spared first, it was used later
        ([3, 1, 2], 5, "ac"),
        ([1, 1, 4], 7, None),
        ([], 1, None),
    ],
)
def test_smallest_sufficient_prefix(sizes: list[int], need: int, chosen: str | None) -> None:
    candidates = [resident(name, size) for name, size in zip("abc", sizes, strict=False)]
    victims = choose_victims(candidates, need)
    assert (None if victims is None else "".join(v.model for v in victims)) == chosen


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


def kept_for_large(
    used_at: float, num_gpus: int = 8, in_flight: int = 0, swap_s: float = 0.6
) -> Scene:
    """A large model on gpu0, used at ``used_at``; all other GPUs are full of busy models."""
    scene = Scene()
    large = scene.gpu("gpu0", 10, z=("resident", 8, in_flight), y=("host", 8, 0), b=("host", 5, 0))
    large.replicas["z"].last_used = used_at
    large.link.note(SwapTrace(0.0, total_s=swap_s))
    for number in range(1, num_gpus):
        name = f"gpu{number}"
        agent = scene.gpu(
            name,
            10,
            a=("resident", 5, 1),
            c=("resident", 5, 1),
            b=("host", 5, 0),
            y=("host", 8, 0),
        )
        for replica in agent.device.values():
            replica.resident_since = replica.slack_at = NOW
    return scene


def test_one_gpu_of_eight_stays_with_large_models_while_they_are_wanted() -> None:
    scene = kept_for_large(NOW - 19.0)
    scene.waits("b", NOW - 0.5)
    assert scene.place("b") is None
    scene.waits("y")
    assert scene.place("y") == Placement("gpu0", "evict", ("z",))  # as large: they take turns
    scene.waits("b", NOW - 12.1)  # too long: it need not stand back any more
    assert scene.place("b") == Placement("gpu0", "evict", ("z",))


def test_where_swaps_are_quick_none_does() -> None:
    scene = kept_for_large(NOW - 1.0, swap_s=0.4)
    scene.waits("b", NOW - 0.5)
    assert scene.place("b") == Placement("gpu0", "evict", ("z",))


@pytest.mark.parametrize(("used_at", "num_gpus"), [(NOW - 21.0, 8), (NOW - 1.0, 7)])
def test_it_does_not_where_nobody_wants_them_or_gpus_are_few(used_at: float, num_gpus: int) -> None:
    scene = kept_for_large(used_at, num_gpus)
    scene.waits("b", NOW - 0.5)
    assert scene.place("b") == Placement("gpu0", "evict", ("z",))


def test_of_more_large_models_than_are_kept_any_may_leave() -> None:
    scene = kept_for_large(NOW - 1.0, num_gpus=7)
    agent = scene.gpu("gpu7", 10, x=("resident", 8, 0), b=("host", 5, 0))
    agent.replicas["x"].last_used = NOW - 2.0
    agent.link.note(SwapTrace(0.0, total_s=0.6))
    scene.waits("b", NOW - 0.5)
    assert scene.place("b") == Placement("gpu7", "evict", ("x",))


def test_a_busy_one_is_not_preempted_for_smaller_ones_either() -> None:
    scene = kept_for_large(NOW - 1.0, in_flight=1)
    scene.waits("b", NOW - 0.5)
    assert scene.place("b") is None
    scene.waits("y", NOW - 0.5)
    assert scene.place("y") == Placement("gpu0", "evict", ("z",))


def test_a_pinned_model_does_not_stand_back() -> None:
    scene = kept_for_large(NOW - 1.0)
    scene.state.deployments["b"] = ModelSpec("b", "/m", preload=False, pinned=True)
    assert scene.place("b") == Placement("gpu0", "evict", ("z",))


def test_a_large_model_takes_the_place_of_another_one() -> None:
    """Though the idle models of gpu1 are back sooner: those have more places to go to."""
    scene = Scene()
    for gpu, idle in (("gpu0", {"z": ("resident", 8, 0)}), ("gpu1", {"a": ("resident", 3, 0)})):
        agent = scene.gpu(gpu, 10, y=("host", 8, 0), **idle)  # type: ignore[arg-type]
        agent.link.note(SwapTrace(0.0, total_s=0.1, copy_s=0.1, num_bytes=1))
        for replica in agent.device.values():
            replica.last_used = NOW - 1.0
    scene.waits("y")
    assert scene.place("y") == Placement("gpu0", "evict", ("z",))


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


def test_5_busy_models_leave_if_they_can_spare_the_time() -> None:
    scene = Scene()
    agent = scene.gpu("gpu0", 10, a=("resident", 5, 1), c=("resident", 5, 1), b=("host", 5, 0))
    a, c = agent.replicas["a"], agent.replicas["c"]
    a.slack_at, c.slack_at = NOW - 4.0, NOW - 3.0
    scene.waits("b", NOW - 0.1)
    assert scene.place("b") is None  # one of them may be done before it is due
    scene.waits("b", NOW - 0.3)
    assert scene.place("b") == Placement("gpu0", "evict", ("a",))  # the most slack
    a.resident_since = NOW - 0.5
    assert scene.place("b") == Placement("gpu0", "evict", ("c",))
    c.slack_at = NOW - 0.9  # less than a turn of b takes
    assert scene.place("b") is None
    scene.waits("b", NOW - 3.1)  # long enough
    assert scene.place("b") == Placement("gpu0", "evict", ("c",))


def test_5_how_much_they_can_spare_is_told_by_their_tempo() -> None:
    scene = Scene()
    agent = scene.gpu("gpu0", 10, a=("resident", 8, 1), b=("host", 8, 0))
    agent.replicas["a"].slack_at = NOW - 2.0
    scene.waits("b", NOW - 0.5)
    scene.state.tempo("a").note(0.1, decode_s=0.9, num_tokens=10)  # the target is 0.1 s per token
    assert scene.state.slack_s(agent.replicas["a"], NOW) == pytest.approx(2.0 * 0.1 / 0.9)
    assert scene.place("b") is None
    scene.state.tempos["a"].token_s = 0.05
    assert scene.place("b") == Placement("gpu0", "evict", ("a",))


@pytest.mark.parametrize(("swap_s", "preempts"), [(0.4, True), (1.2, True), (1.3, False)])
def test_5_slow_swaps_are_not_worth_it(swap_s: float, preempts: bool) -> None:
    scene = Scene()
    agent = scene.gpu("gpu0", 10, a=("resident", 8, 1), b=("host", 8, 0))
    agent.link.note(SwapTrace(0.0, total_s=swap_s))
    scene.waits("b", NOW - 2.0)
    assert (scene.place("b") == Placement("gpu0", "evict", ("a",))) is preempts


@pytest.mark.parametrize(("num_asked", "preempts"), [(4, True), (40, False)])
def test_5_no_preemption_that_makes_others_late(num_asked: int, preempts: bool) -> None:
    """a would be away for 2.6 s, 0.6 s longer than its requests can wait: how many will come?"""
    scene = Scene()
    agent = scene.gpu("gpu0", 10, a=("resident", 8, 1), b=("host", 8, 0))
    agent.link.note(SwapTrace(0.0, total_s=0.8))
    for number in range(num_asked):
        scene.state.tempo("a").note_demand(NOW - number / num_asked)
    assert num_made_late(
        scene.state, agent, agent.replicas["b"], [agent.replicas["a"]], NOW
    ) == pytest.approx(0.6 * num_asked / 30.0, rel=0.05)
    scene.waits("b", NOW - 2.0)
    assert (scene.place("b") == Placement("gpu0", "evict", ("a",))) is preempts
    scene.waits("b", NOW - 16.1)  # 20 swap-ins: it must come in, whoever is late then
    assert scene.place("b") == Placement("gpu0", "evict", ("a",))


def test_5_nobody_is_preempted_where_that_is_off() -> None:
    scene = Scene(PolicyConfig(preemption="off"))
    scene.gpu("gpu0", 10, a=("resident", 8, 1), b=("host", 8, 0))
    scene.waits("b", NOW - 50.0)
    assert scene.place("b") == Placement("gpu0", "claim")


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
    assert place(scene.state, c, {}, NOW, closed=["gpu0"]) is None
    assert place(scene.state, a, {}, NOW, closed=["gpu0"]) == Placement("gpu0", "swap_in")


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


def test_suspended_requests_leave_others_alone_until_they_are_nearly_due() -> None:
    """Three times what the swap-in takes: sooner it would only move bytes to and fro."""
    scene = Scene()
    agent = scene.gpu("gpu0", 10, a=("host", 8, 2), c=("resident", 8, 1))
    agent.link.note(SwapTrace(0.0, total_s=0.5))
    a = agent.replicas["a"]
    a.host_since = a.slack_at = NOW - 0.9
    a.slack_s = 0.9 + 1.6  # due in 1.6 s
    assert scene.place("a") is None
    a.slack_s = 0.9 + 1.4
    assert scene.place("a") == Placement("gpu0", "evict", ("c",))


def test_where_swaps_cost_next_to_nothing_suspended_requests_need_not_wait_until_they_are_due() -> (
    None
):
    """Twenty swap-ins in a run quantum: answers pause no longer than anybody waits."""
    scene = Scene()
    agent = scene.gpu("gpu0", 10, a=("host", 8, 2), c=("resident", 8, 1))
    agent.link.note(SwapTrace(0.0, total_s=0.05))
    a = agent.replicas["a"]
    a.slack_at, a.slack_s = NOW - 0.1, 9.0
    a.host_since = NOW - 0.1
    assert scene.place("a") is None
    a.host_since = NOW - 0.3
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


@pytest.mark.parametrize(
    ("swap_s", "stayed_s", "may_leave"),
    [(0.0, 0.9, False), (0.0, 1.0, True), (2.0, 7.9, False), (2.0, 8.0, True)],
)
def test_a_busy_model_stays_for_some_times_what_its_swap_in_took(
    swap_s: float, stayed_s: float, may_leave: bool
) -> None:
    scene = Scene()
    agent = scene.gpu("gpu0", 10, a=("resident", 8, 1))
    agent.replicas["a"].swap_s = swap_s
    agent.replicas["a"].resident_since = NOW - stayed_s
    assert bool(busy_victims(scene.state, agent, NOW)) is may_leave


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
