"""What a deployment's own settings change: pins, GPUs, priorities, targets, groups, times."""

from typing import Any

import msgspec

from schemas.commands import Command, Load, SwapIn, SwapOut
from schemas.events import RequestEnded
from schemas.state import ReplicaStatus
from schemas.stream import RequestTiming
from services.scheduler.inputs import Demand, DeploymentAdded
from services.scheduler.service import policy_config
from services.scheduler.state import PolicyConfig
from services.settings import SchedulerSettings
from tests.unit.decide_story import EPOCH, GPU, Story, on, running, spec


def deployed(story: Story, model: str, **settings: Any) -> list[Command]:
    return story.tell(DeploymentAdded(msgspec.structs.replace(spec(model), **settings)))


def started(*replicas: ReplicaStatus, **settings: dict[str, Any]) -> Story:
    """An agent with these replicas; ``settings`` by model."""
    story = Story()
    for replica in replicas:
        deployed(story, replica.model, **settings.get(replica.model, {}))
    story.status(*replicas)
    return story


# -- pinned --------------------------------------------------------------------------------


def test_a_pinned_model_comes_in_unasked_and_stays() -> None:
    story = started(on("a", "host", 60), on("b", "host", 60), a={"pinned": True})
    assert story.commands == [SwapIn(GPU, "a", EPOCH, 2)]
    assert story.swapped_in("a", 2) == []
    story.demand("r1", "b")
    assert story.tick(50.0) == []
    assert story.withdrawn("r1", "b") == []
    assert story.replica("a").state == "resident"


def test_a_pinned_model_is_loaded_though_preload_is_off() -> None:
    story = started(on("a", "cold", 60), a={"pinned": True})
    assert story.commands == [Load(GPU, "a", EPOCH, 2)]
    assert story.loaded("a", 2) == [SwapIn(GPU, "a", EPOCH, 3)]


def test_a_pinned_model_evicts_the_idle_but_not_the_busy() -> None:
    story = started(on("a", "host", 60), on("b", "resident", 60, in_flight=1), a={"pinned": True})
    assert story.tick(50.0) == []
    assert story.ended("r1", "b") == [SwapOut(GPU, "b", EPOCH, 2)]
    assert story.swapped_out("b", 2) == [SwapIn(GPU, "a", EPOCH, 2)]


# -- where, and in which order -------------------------------------------------------------


def test_a_model_goes_to_the_gpus_it_may_use() -> None:
    story = started(on("a", "host", 60), a={"gpus": ("gpu1",)})
    story.status(on("a", "host", 60), gpu="gpu1", budget=60)
    assert story.demand("r1", "a") == [SwapIn("gpu1", "a", EPOCH, 2, "r1")]


def test_the_higher_priority_goes_first() -> None:
    story = started(
        on("a", "resident", 60, in_flight=1), on("b", "host", 60), on("c", "host", 60),
        c={"priority": 1},
    )  # fmt: skip
    story.demand("r1", "b")
    story.demand("r2", "c")
    assert story.ended("r0", "a") == [SwapOut(GPU, "a", EPOCH, 2, "r2")]


def test_who_is_due_first_goes_first() -> None:
    story = started(
        on("a", "resident", 60, in_flight=1), on("b", "host", 60), on("c", "host", 60),
        c={"ttft_target_s": 0.5},
    )  # fmt: skip
    story.demand("r1", "b")
    story.now += 0.1
    story.demand("r2", "c")
    assert story.ended("r0", "a") == [SwapOut(GPU, "a", EPOCH, 2, "r2")]


def test_batch_requests_wait_for_interactive_ones() -> None:
    story = running(on("a", "resident", 60, in_flight=1), on("b", "host", 60), on("c", "host", 60))
    story.tell(Demand("r1", "b", "batch", story.now))
    story.demand("r2", "c")
    assert story.ended("r0", "a") == [SwapOut(GPU, "a", EPOCH, 2, "r2")]


def test_those_in_time_go_before_those_that_are_late_anyway() -> None:
    story = running(on("a", "resident", 60, in_flight=1), on("b", "host", 60), on("c", "host", 60))
    story.replica("a").resident_since = story.now + 100.0
    story.demand("r1", "b")
    story.now += 2.5
    story.demand("r2", "c")
    assert story.ended("r0", "a") == [SwapOut(GPU, "a", EPOCH, 2, "r2")]


def test_nobody_waits_for_ever_behind_those_in_time() -> None:
    story = running(on("a", "resident", 60, in_flight=1), on("b", "host", 60), on("c", "host", 60))
    story.replica("a").resident_since = story.now + 100.0
    story.demand("r1", "b")
    story.now += 3.5
    story.demand("r2", "c")
    assert story.ended("r0", "a") == [SwapOut(GPU, "a", EPOCH, 2, "r1")]


# -- groups --------------------------------------------------------------------------------


def test_models_of_one_group_are_never_there_together() -> None:
    group = {"exclusive_group": "g"}
    story = started(on("a", "resident", 30), on("b", "host", 30), on("c", "resident", 30),
                    a=group, b=group)  # fmt: skip
    assert story.demand("r1", "b") == [SwapOut(GPU, "a", EPOCH, 2, "r1")]  # though it would fit
    assert story.tick(0.2) == []
    assert story.swapped_out("a", 2) == [SwapIn(GPU, "b", EPOCH, 2, "r1")]


def test_a_group_is_kept_apart_on_each_gpu() -> None:
    group = {"exclusive_group": "g"}
    story = started(on("a", "resident", 30, in_flight=1), on("b", "host", 30), a=group, b=group)
    story.status(on("a", "host", 30), on("b", "host", 30), gpu="gpu1", budget=40)
    assert story.demand("r1", "b") == [SwapIn("gpu1", "b", EPOCH, 2, "r1")]


# -- time to live --------------------------------------------------------------------------


def test_an_idle_model_leaves_after_its_time_to_live() -> None:
    story = started(on("a", "resident", 30, in_flight=1), on("b", "resident", 30),
                    a={"ttl_s": 5.0})  # fmt: skip
    assert story.tick(50.0) == []
    assert story.ended("r0", "a") == []
    assert story.tick(4.9) == []
    assert story.tick(0.2) == [SwapOut(GPU, "a", EPOCH, 2)]
    assert story.swapped_out("a", 2) == []
    assert story.demand("r1", "a") == [SwapIn(GPU, "a", EPOCH, 3, "r1")]


def test_a_pin_outlives_a_time_to_live() -> None:
    story = started(on("a", "resident", 30), a={"ttl_s": 5.0, "pinned": True})
    assert story.tick(50.0) == []


# -- another replica -----------------------------------------------------------------------


def crowded(prefill_s: float) -> tuple[Story, list[Command]]:
    """``a`` runs eight requests on one of two GPUs; a ninth ended after ``prefill_s`` + decode."""
    story = running(on("a", "resident", 60, in_flight=9))
    story.status(on("a", "host", 60), gpu="gpu1", budget=100)
    commands: list[Command] = []
    for number in range(3):
        timing = RequestTiming(prefill_s=prefill_s, decode_s=1.0)
        story.started(f"n{number}", "a")
        commands += story.tell(
            RequestEnded(GPU, "a", f"n{number}", story.now, "stop", 9, 9, timing)
        )
    return story, commands


def test_a_model_that_begins_too_slowly_gets_another_replica() -> None:
    story, commands = crowded(prefill_s=1.5)
    assert commands == [SwapIn("gpu1", "a", EPOCH, 2)]
    assert story.tick(0.2) == []  # nobody waits for it, and still it is not called off
    story.swapped_in("a", 2)


def test_one_that_begins_in_time_does_not() -> None:
    story, commands = crowded(prefill_s=0.2)
    assert commands == []
    assert story.tick(0.2) == []


def test_the_policy_that_is_simulated_is_the_one_that_is_shipped() -> None:
    assert policy_config(SchedulerSettings()) == PolicyConfig()
