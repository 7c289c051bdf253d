"""Who leaves the device for another model, and who need not: what `victims` and `policy` choose."""

import pytest

from schemas.state import (
    ModelSpec,
    SwapTrace,
)
from services.scheduler.policy import (
    Placement,
)
from services.scheduler.state import PolicyConfig
from services.scheduler.victims import busy_victims, choose_victims, num_made_late
from tests.unit.policy_scene import NOW, Scene, resident


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


@pytest.mark.parametrize(("swap_s", "preempts"), [(0.0, False), (0.1, True), (0.11, False)])
def test_5_where_swaps_are_known_to_be_quick_models_take_turns(
    swap_s: float, preempts: bool
) -> None:
    """a had its quantum and is behind its target, and ten swap-ins fit in a quantum."""
    scene = Scene()
    agent = scene.gpu("gpu0", 10, a=("resident", 8, 1), b=("host", 8, 0))
    agent.link.note(SwapTrace(0.0, total_s=swap_s))  # 0: still unknown
    agent.replicas["a"].slack_s = -2 * NOW
    scene.waits("b", NOW - 0.3)
    assert (scene.place("b") == Placement("gpu0", "evict", ("a",))) is preempts
    agent.replicas["a"].resident_since = NOW - 0.9
    assert scene.place("b") is None


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
    """Ten swap-ins in a run quantum: answers pause no longer than anybody waits."""
    scene = Scene()
    agent = scene.gpu("gpu0", 10, a=("host", 8, 2), c=("resident", 8, 1))
    agent.link.note(SwapTrace(0.0, total_s=0.1))
    a = agent.replicas["a"]
    a.slack_at, a.slack_s = NOW - 0.1, 9.0
    a.host_since = NOW - 0.1
    assert scene.place("a") is None
    a.host_since = NOW - 0.3
    assert scene.place("a") == Placement("gpu0", "evict", ("c",))


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
