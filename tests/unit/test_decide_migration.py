"""Migration: a model of a hot GPU is swapped in on a cooler one, then drained where it was."""

from schemas.commands import Command, SwapIn, SwapOut
from schemas.events import RequestStarted, SwapInCompleted, SwapOutCompleted
from schemas.state import AgentStatus, ReplicaStatus, SwapTrace
from services.scheduler.inputs import DeploymentAdded
from services.scheduler.state import MIB, ClusterState, PolicyConfig
from tests.unit.decide_story import EPOCH, GPU, Story, on, spec

COOL = "gpu1"


def hot(*on_cool: ReplicaStatus, token_s: float = 0.2, migrate: bool = True) -> Story:
    """``a`` and ``b`` run on gpu0, ``a`` at ``token_s`` per token: the target is 0.1."""
    story = Story()
    story.state = ClusterState(EPOCH, PolicyConfig(migrate=migrate))
    for model in "abc":
        story.tell(DeploymentAdded(spec(model)))
    busy = (on("a", "resident", 40, in_flight=1), on("b", "resident", 50, in_flight=1))
    story.status(*busy)
    status_of(story, *(on_cool or (on("a", "host", 40), on("b", "host", 50))))
    for model in "ab":
        story.state.tempo(model).token_s = token_s if model == "a" else 0.05
    return story


def status_of(story: Story, *replicas: ReplicaStatus) -> list[Command]:
    who = (COOL, "i2", 11, "cpu", "cpu", 100 * MIB, 0, 1)
    return story.tell(AgentStatus(*who, replicas, 0, 0))


def arrived(story: Story, model: str, generation: int) -> list[Command]:
    who = (COOL, model, generation, story.now)
    return story.tell(SwapInCompleted(*who, SwapTrace(0.0, total_s=0.1)))


def test_it_serves_there_before_it_drains_here() -> None:
    story = hot()
    assert story.tick(1.1) == [SwapIn(COOL, "a", EPOCH, 2)]
    assert "moves off gpu0" in story.decided()[-1].reason
    assert story.tick(0.5) == []
    assert arrived(story, "a", 2) == [SwapOut(GPU, "a", EPOCH, 2)]  # drained, not preempted
    assert "it moved to gpu1" in story.decided()[-1].reason
    assert story.state.moves == {}
    assert story.tell(RequestStarted(COOL, "a", "r1", story.now, 1, 0.0)) == []
    story.ended("r0", "a")
    assert story.swapped_out("a", 2) == []


def test_it_takes_the_place_of_idle_models() -> None:
    story = hot(on("a", "host", 40), on("c", "resident", 70))
    assert story.tick(1.1) == [SwapOut(COOL, "c", EPOCH, 2)]
    trace = SwapTrace(0.0)
    gone = SwapOutCompleted(COOL, "c", 2, story.now, trace, 0)
    assert story.tell(gone) == [SwapIn(COOL, "a", EPOCH, 2)]


def test_not_where_it_would_hurt_somebody() -> None:
    story = hot(on("a", "host", 40), on("c", "resident", 70, in_flight=1))
    assert story.tick(1.1) == []
    assert story.tick(20.0) == []


def test_nor_where_targets_are_met_or_it_is_off() -> None:
    assert hot(token_s=0.09).tick(1.1) == []
    assert hot(migrate=False).tick(1.1) == []


def test_nor_to_a_gpu_that_is_hardly_cooler() -> None:
    story = hot(on("a", "host", 40), on("c", "resident", 20, in_flight=1))
    assert story.tick(1.1) == []  # 60 of 100 busy there with it, 90 here


def test_nobody_moves_to_and_fro() -> None:
    """gpu1 is hot, too, as soon as c runs there, and gpu0 empty; but a has just come."""
    story = hot(on("a", "host", 40), on("b", "host", 50), on("c", "resident", 60))
    assert story.tick(1.1) == [SwapIn(COOL, "a", EPOCH, 2)]
    arrived(story, "a", 2)
    story.ended("r0", "a")
    story.ended("r9", "b")
    story.swapped_out("a", 2)
    for model in "ac":
        story.tell(RequestStarted(COOL, model, f"{model}1", story.now, 1, 0.0))
    story.state.tempo("a").token_s = 0.2
    assert [story.tick(9.0) for _ in range(6)] == [[]] * 6
    assert SwapIn(GPU, "a", EPOCH, 3) in story.tick(9.0)


def test_a_move_whose_swap_in_does_not_begin_is_given_up() -> None:
    story = hot(on("a", "host", 40), on("c", "resident", 70))
    story.tick(1.1)
    assert list(story.state.moves) == ["a"]
    story.state.agents[COOL].is_alive = False
    story.tell(RequestStarted(GPU, "b", "r7", story.now, 1, 0.0))
    story.now += 0.1
    story.status(on("a", "resident", 40, in_flight=1), on("b", "resident", 50, in_flight=1))
    assert story.state.moves == {}
    assert story.state.plans == {}
