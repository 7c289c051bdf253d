"""Deployments that change and go, and what operators ask for, while everything runs."""

from typing import Any

import msgspec
import pytest

from schemas.admin import (
    AdminAnswer,
    Ask,
    MoveDeployment,
    SwapInDeployment,
    SwapOutDeployment,
)
from schemas.commands import Command, Load, SwapIn, SwapOut, Unload
from schemas.events import ModelUnloaded, SwapInCompleted
from schemas.state import ModelSpec, ReplicaStatus, SwapTrace
from services.scheduler.inputs import (
    Asked,
    DeploymentAdded,
    DeploymentRemoved,
    DeploymentsKnown,
)
from tests.unit.decide_story import EPOCH, GPU, Story, on, register, running, spec

OTHER = "gpu1"


def changed(story: Story, model: str, **settings: Any) -> list[Command]:
    known = story.state.deployments[model]
    return story.tell(DeploymentAdded(msgspec.structs.replace(known, **settings)))


def wanted(**settings: Any) -> ModelSpec:
    return msgspec.structs.replace(spec("a"), **settings)


def asked(story: Story, ask: Ask) -> tuple[AdminAnswer, list[Command]]:
    commands = story.tell(Asked(1, ask))
    [verdict] = story.state.verdicts
    story.state.verdicts.clear()
    return verdict.answer, commands


def told(status: ReplicaStatus, wanted: ModelSpec) -> ReplicaStatus:
    """``status`` as of an agent that was told ``wanted``."""
    return msgspec.structs.replace(status, settings=wanted.fingerprint())


# -- settings --------------------------------------------------------------------------------


def test_what_agents_need_not_know_changes_at_once_and_moves_nothing() -> None:
    story = running(on("a", "resident", 60, in_flight=1))
    assert changed(story, "a", priority=3, aliases=("x",), defaults={"top_p": 0.5}) == []
    assert changed(story, "a", preemption="drain", preload=True) == []
    assert story.tick(1.0) == []
    assert story.replica("a").state == "resident"


def test_what_agents_must_know_takes_a_drain_an_unload_and_a_new_registration() -> None:
    story = running(on("a", "resident", 60, in_flight=1))
    assert changed(story, "a", max_batch=2) == [SwapOut(GPU, "a", EPOCH, 2)]
    story.demand("r1", "a")  # waits for the new settings
    assert story.ended("r0", "a") == []
    assert story.swapped_out("a", 2) == [Unload(GPU, "a", EPOCH, 3)]
    assert story.tick(1.0) == []
    new = wanted(max_batch=2)
    assert story.unloaded("a", 3) == [register("a", 4, new)]
    assert story.registered("a", 60, 4) == [Load(GPU, "a", EPOCH, 5, "r1")]
    assert story.loaded("a", 5) == [SwapIn(GPU, "a", EPOCH, 6, "r1")]


def test_settings_that_change_twice_on_the_way_end_as_they_were_last() -> None:
    story = running(on("a", "host", 60))
    assert changed(story, "a", max_batch=2) == [Unload(GPU, "a", EPOCH, 2)]
    assert changed(story, "a", max_batch=3) == []
    assert story.unloaded("a", 2) == [register("a", 3, wanted(max_batch=3))]
    assert changed(story, "a", max_batch=4) == []  # it may have been registered by now
    assert story.registered("a", 60, 3) == [register("a", 4, wanted(max_batch=4))]
    assert story.registered("a", 60, 4) == []


def test_a_load_under_way_ends_first() -> None:
    story = running(on("a", "loading", 60))
    assert changed(story, "a", max_batch=2) == []
    assert story.status(on("a", "host", 60)) == [Unload(GPU, "a", EPOCH, 2)]


def test_requests_that_are_suspended_end_with_the_settings_they_began_with() -> None:
    story = running(on("a", "host", 60, in_flight=1), on("b", "resident", 60, in_flight=1))
    assert changed(story, "a", max_batch=2) == []
    assert story.ended("r1", "b") == [SwapOut(GPU, "b", EPOCH, 2)]
    assert story.swapped_out("b", 2) == [SwapIn(GPU, "a", EPOCH, 2)]
    assert story.swapped_in("a", 2) == [SwapOut(GPU, "a", EPOCH, 3)]
    story.ended("r0", "a")
    assert story.swapped_out("a", 3) == [Unload(GPU, "a", EPOCH, 4)]


def test_a_new_leader_sees_who_was_told_other_settings() -> None:
    story = Story()
    story.tell(DeploymentAdded(wanted(max_batch=2)))
    assert story.status(told(on("a", "host", 60), wanted(max_batch=2))) == []
    assert story.status(told(on("a", "host", 60), wanted())) == [Unload(GPU, "a", EPOCH, 2)]


def test_an_agent_that_tells_no_settings_is_believed() -> None:
    assert running(on("a", "host", 60)).tick(0.2) == []


def test_new_settings_of_a_failed_model_are_tried_at_once() -> None:
    story = Story()
    story.tell(DeploymentAdded(spec("a")))
    story.status()
    assert story.failed("a", 1, "register") == []
    new = wanted(source="/models/there")
    assert changed(story, "a", source="/models/there") == [register("a", 2, new)]


def test_a_model_leaves_a_gpu_that_it_may_not_use_any_more() -> None:
    story = running(on("a", "resident", 60))
    story.status(on("a", "host", 60), gpu=OTHER)
    assert changed(story, "a", gpus=(OTHER,)) == [SwapOut(GPU, "a", EPOCH, 2)]
    assert story.swapped_out("a", 2) == []  # its image may stay
    assert story.demand("r1", "a") == [SwapIn(OTHER, "a", EPOCH, 2, "r1")]


def test_a_model_leaves_the_group_that_it_came_to_be_in() -> None:
    story = running(on("a", "resident", 30), on("b", "resident", 30))
    assert changed(story, "a", exclusive_group="g") == []
    assert changed(story, "b", exclusive_group="g") == [SwapOut(GPU, "b", EPOCH, 2)]


def test_a_drained_model_leaves_when_its_requests_have_ended() -> None:
    story = running(on("a", "resident", 60, in_flight=1), on("b", "host", 30))
    assert changed(story, "a", drained=True, pinned=True) == []
    assert story.tick(9.0) == []
    story.ended("r0", "a")
    assert story.tick(0.2) == [SwapOut(GPU, "a", EPOCH, 2)]
    story.swapped_out("a", 2)
    assert story.tick(9.0) == []  # in spite of the pin
    assert changed(story, "a", drained=False) == [SwapIn(GPU, "a", EPOCH, 3)]


def test_a_model_that_just_came_in_is_no_victim() -> None:
    story = Story()
    story.tell(DeploymentAdded(wanted(min_residency_s=20.0)))
    story.tell(DeploymentAdded(spec("b")))
    story.status(on("a", "resident", 60), on("b", "host", 60))
    assert story.demand("r1", "b") == []
    assert story.tick(19.0) == []
    assert story.tick(1.5) == [SwapOut(GPU, "a", EPOCH, 2, "r1")]


# -- removed ---------------------------------------------------------------------------------


def test_a_removed_model_is_drained_unloaded_and_forgotten() -> None:
    story = running(on("a", "resident", 60, in_flight=1), on("b", "host", 30))
    story.demand("r1", "a")
    assert story.tell(DeploymentRemoved("a")) == [SwapOut(GPU, "a", EPOCH, 2)]
    assert "a" not in story.state.waiting
    assert story.demand("r2", "a") == []
    assert story.tick(9.0) == []
    assert story.ended("r0", "a") == []
    assert story.swapped_out("a", 2) == [Unload(GPU, "a", EPOCH, 3)]
    assert story.unloaded("a", 3) == []
    assert "a" not in story.state.agents[GPU].replicas
    assert not story.state.unwelcome
    assert story.status(on("b", "host", 30)) == []


def test_its_requests_may_be_ended_at_once() -> None:
    story = running(on("a", "resident", 60, in_flight=1), on("b", "host", 60, in_flight=1))
    assert story.tell(DeploymentRemoved("a", "gone")) == [
        SwapOut(GPU, "a", EPOCH, 2, end_requests="gone")
    ]
    assert story.tell(DeploymentRemoved("b", "gone")) == [
        Unload(GPU, "b", EPOCH, 2, end_requests="gone")
    ]


def test_a_swap_in_of_a_removed_model_is_called_off() -> None:
    story = running(on("a", "host", 60))
    assert story.demand("r1", "a") == [SwapIn(GPU, "a", EPOCH, 2, "r1")]
    assert story.tell(DeploymentRemoved("a")) == [SwapOut(GPU, "a", EPOCH, 3)]


def test_bytes_that_were_being_freed_for_a_removed_model_are_free() -> None:
    story = running(on("a", "resident", 60), on("b", "host", 60), on("c", "host", 60))
    assert story.demand("r1", "b") == [SwapOut(GPU, "a", EPOCH, 2, "r1")]
    story.demand("r2", "c")
    story.tell(DeploymentRemoved("b"))
    assert story.swapped_out("a", 2) == [SwapIn(GPU, "c", EPOCH, 2, "r2")]


def test_a_name_that_comes_again_is_registered_under_a_later_generation() -> None:
    story = running(on("a", "host", 60))
    assert story.tell(DeploymentRemoved("a")) == [Unload(GPU, "a", EPOCH, 2)]
    story.unloaded("a", 2)
    assert story.tell(DeploymentAdded(spec("a"))) == [register("a", 3)]
    assert story.registered("a", 60, 1) == []  # an answer of before
    assert story.replica("a").facts is None


def test_a_name_that_comes_back_before_it_has_gone_is_loaded_anew() -> None:
    story = running(on("a", "resident", 60, in_flight=1))
    story.tell(DeploymentRemoved("a"))
    assert story.tell(DeploymentAdded(wanted(max_batch=2))) == []
    story.ended("r0", "a")
    assert story.swapped_out("a", 2) == [Unload(GPU, "a", EPOCH, 3)]
    assert story.unloaded("a", 3) == [register("a", 4, wanted(max_batch=2))]


def test_what_agents_hold_and_nobody_deployed_goes_once_all_deployments_are_known() -> None:
    story = Story()
    assert story.status(on("x", "resident", 30), on("y", "host", 30)) == []
    assert story.tell(DeploymentsKnown()) == [
        SwapOut(GPU, "x", EPOCH, 2),
        Unload(GPU, "y", EPOCH, 2),
    ]


def test_an_unload_that_failed_is_tried_again_and_one_without_an_answer_repeated() -> None:
    story = running(on("a", "host", 60))
    story.tell(DeploymentRemoved("a"))
    assert story.failed("a", 2, "unload") == []
    assert story.tick(9.0) == []
    assert story.tick(1.5) == [Unload(GPU, "a", EPOCH, 3)]
    assert story.tick(60.0) == [Unload(GPU, "a", EPOCH, 4)]
    assert story.status() == []  # too early a status to say that it is done
    assert story.tell(ModelUnloaded(GPU, "a", 4, story.now, 1)) == []
    assert not story.state.unwelcome


# -- what operators ask for ------------------------------------------------------------------


def swap_in(gpu: str = "") -> SwapInDeployment:
    return SwapInDeployment("a", until=1060.0, gpu=gpu)


def test_a_model_that_is_asked_for_is_loaded_and_comes_in() -> None:
    story = running(on("a", "cold", 60), on("b", "resident", 60))
    answer, commands = asked(story, swap_in())
    assert (answer, commands) == (AdminAnswer("accepted"), [Load(GPU, "a", EPOCH, 2)])
    assert story.loaded("a", 2) == [SwapOut(GPU, "b", EPOCH, 2)]
    assert story.swapped_out("b", 2) == [SwapIn(GPU, "a", EPOCH, 3)]
    assert story.tick(0.2) == []
    story.swapped_in("a", 3)
    assert not story.state.wishes
    assert asked(story, swap_in())[0].outcome == "done"


def test_it_waits_for_busy_models_and_is_given_up_in_time() -> None:
    story = running(on("a", "host", 60), on("b", "resident", 60, in_flight=1))
    answer, commands = asked(story, swap_in())
    assert (answer.outcome, commands) == ("accepted", [])
    assert answer.reason == "it waits for room: busy are b"
    assert story.tick(59.0) == []
    assert story.tick(2.0) == []
    assert not story.state.wishes
    assert story.ended("r0", "b") == []


@pytest.mark.parametrize(
    ("settings", "gpu", "outcome", "reason"),
    [
        ({"drained": True}, "", "conflict", "a is drained: undrain it first"),
        ({"gpus": (OTHER,)}, GPU, "conflict", "a may only be on gpu1, by its setting gpus"),
        ({"gpus": (OTHER,)}, "", "unavailable", "no agent is up for gpu1"),
        ({}, "gpu7", "invalid", "there is no GPU 'gpu7'; there are: gpu0"),
        (
            {},
            "",
            "conflict",
            "no room for a: gpu0: it needs 60 of 100 MiB, and pinned models (b) hold 60 MiB",
        ),
    ],
    ids=["drained", "other GPUs", "no agent", "unknown GPU", "pinned"],
)
def test_what_can_not_be_is_refused_with_the_reason(
    settings: dict[str, Any], gpu: str, outcome: str, reason: str
) -> None:
    story = Story()
    story.tell(DeploymentAdded(wanted(**settings)))
    story.tell(DeploymentAdded(msgspec.structs.replace(spec("b"), pinned=True)))
    story.status(on("a", "host", 60), on("b", "resident", 60))
    answer, commands = asked(story, swap_in(gpu))
    assert (answer.outcome, answer.reason, commands) == (outcome, reason, [])
    assert not story.state.wishes


def test_an_unknown_model_is_not_found() -> None:
    assert asked(running(), swap_in())[0].outcome == "not_found"


def test_swap_out_drains_and_the_next_request_brings_it_back() -> None:
    story = running(on("a", "resident", 60, in_flight=2))
    answer, commands = asked(story, SwapOutDeployment("a"))
    assert commands == [SwapOut(GPU, "a", EPOCH, 2)]
    assert answer == AdminAnswer("accepted", "2 running requests end first")
    story.ended("r0", "a")
    story.ended("r1", "a")
    assert story.swapped_out("a", 2) == []
    assert asked(story, SwapOutDeployment("a"))[0].outcome == "done"
    assert story.demand("r2", "a") == [SwapIn(GPU, "a", EPOCH, 3, "r2")]


def test_a_pinned_model_is_not_swapped_out() -> None:
    story = running(on("a", "resident", 60))
    changed(story, "a", pinned=True)
    answer, commands = asked(story, SwapOutDeployment("a"))
    assert (answer.outcome, commands) == ("conflict", [])
    assert "unpin it first" in answer.reason


def move(source: str = GPU, gpu: str = OTHER) -> MoveDeployment:
    return MoveDeployment("a", source, gpu, until=1060.0)


def test_a_move_loads_there_and_leaves_here_when_it_has_arrived() -> None:
    story = running(on("a", "resident", 60, in_flight=1))
    story.status(on("a", "cold", 60), gpu=OTHER)
    answer, commands = asked(story, move())
    assert answer.outcome == "accepted"
    assert commands == [Load(OTHER, "a", EPOCH, 2)]
    story.now += 15.0  # longer than the scheduler's own moves are given
    assert story.status(on("a", "host", 60, generation=2), gpu=OTHER) == [
        SwapIn(OTHER, "a", EPOCH, 3)
    ]
    arrived = SwapInCompleted(OTHER, "a", 3, story.now, SwapTrace(0.0))
    assert story.tell(arrived) == [SwapOut(GPU, "a", EPOCH, 2)]


@pytest.mark.parametrize(
    ("ask", "outcome", "words"),
    [
        (move(gpu=GPU), "invalid", "both 'gpu0'"),
        (move(source=OTHER, gpu=GPU), "conflict", "not resident on gpu1, but on gpu0"),
        (move(gpu="gpu7"), "invalid", "no GPU 'gpu7'"),
    ],
)
def test_a_move_that_can_not_be_is_refused(ask: Ask, outcome: str, words: str) -> None:
    story = running(on("a", "resident", 60))
    story.status(on("a", "host", 60), gpu=OTHER)
    answer, commands = asked(story, ask)
    assert (answer.outcome, commands) == (outcome, [])
    assert words in answer.reason
