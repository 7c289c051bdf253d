"""Models that come in before anybody asks: where it hurts nobody, and never in anybody's way."""

from schemas.commands import Command, SwapIn, SwapOut
from services.scheduler.simulate.policies import config_with
from services.scheduler.simulate.run import Gpus, simulate
from services.scheduler.simulate.workload import GB, ModelSize, poisson
from services.scheduler.state import PolicyConfig
from tests.unit.decide_story import EPOCH, GPU, Story, on, running


def asked_before(prefetch: bool = True) -> Story:
    """Three models of 40 in 100, none on the device; b was asked for twice lately, a once."""
    story = running(on("a", "host", 40), on("b", "host", 40), on("c", "host", 40))
    story.state.config = PolicyConfig(prefetch=prefetch)
    for model in ("b", "a", "b"):
        story.demand("r", model)
        story.withdrawn("r", model)
        for replica in story.state.agents[GPU].replicas.values():
            if replica.pending:
                generation = replica.generation
                story.swapped_out(replica.model, generation)
    story.commands.clear()
    return story


def swap_in(story: Story, model: str, request_id: str = "") -> SwapIn:
    return SwapIn(GPU, model, EPOCH, story.replica(model).generation, request_id)


def swap_out(story: Story, model: str, request_id: str = "") -> SwapOut:
    return SwapOut(GPU, model, EPOCH, story.replica(model).generation, request_id)


def test_the_one_asked_for_most_comes_in_while_nobody_waits_and_one_at_a_time() -> None:
    story = asked_before()
    assert story.tick() == [swap_in(story, "b")]
    assert story.tick(after=0.2) == []  # the link is busy
    story.swapped_in("b", story.replica("b").generation)
    assert story.tick(after=0.2) == [swap_in(story, "a")]
    story.swapped_in("a", story.replica("a").generation)
    assert story.tick(after=0.2) == []  # c was never asked for, and would not fit


def test_it_is_off_unless_it_is_set() -> None:
    assert not PolicyConfig().prefetch
    assert asked_before(prefetch=False).tick() == []


def test_what_was_asked_for_long_ago_stays_where_it_is() -> None:
    story = asked_before()
    assert story.tick(after=300.0) == []


def test_nothing_is_evicted_for_a_guess() -> None:
    story = asked_before()
    story.status(on("a", "host", 40), on("b", "host", 40), on("c", "resident", 70))
    assert story.tick(after=0.2) == []


def test_it_gives_way_to_whoever_waits_and_what_came_in_stays_for_free() -> None:
    story = asked_before()
    story.tick()
    commands = story.demand("r1", "a")  # there is room for both: the link is what a needs
    assert commands == [swap_out(story, "b"), swap_in(story, "a", "r1")]


def test_its_bytes_are_free_for_whoever_waits() -> None:
    story = running(on("a", "host", 80), on("b", "host", 40))
    story.state.config = PolicyConfig(prefetch=True)
    story.state.tempo("b").note_demand(story.now)
    assert story.tick() == [swap_in(story, "b")]
    assert story.demand("r1", "a") == [swap_out(story, "b", "r1")]
    told = story.state.decisions.take()[-1]
    assert [(victim.model, victim.how) for victim in told.victims] == [("b", "idle")]
    assert story.swapped_out("b", story.replica("b").generation) == [swap_in(story, "a", "r1")]


def test_one_that_is_asked_for_on_its_way_is_like_any_other() -> None:
    story = asked_before()
    story.tick()
    assert story.demand("r1", "b") == []
    assert story.demand("r2", "a") == [swap_in(story, "a", "r2")]  # behind b, beside it


def test_a_repeated_command_is_still_a_guess() -> None:
    story = asked_before()
    story.tick()
    assert story.tick(after=story.state.config.command_timeout_s) == [swap_in(story, "b")]
    assert story.demand("r1", "a")[0] == swap_out(story, "b")


def test_guesses_say_that_they_are_guesses() -> None:
    story = asked_before()
    story.state.decisions.take()
    story.tick()
    (told,) = story.state.decisions.take()
    assert (told.model, told.action, told.urgency) == ("b", "swap_in", "unasked")
    assert told.reason.endswith("prefetched")
    story.demand("r1", "a")
    told = story.state.decisions.take()[-1]
    assert (told.model, told.action) == ("b", "call_off")
    assert "a is wanted" in told.reason


def test_simulated_guesses_move_bytes_and_every_request_ends() -> None:
    models = {f"m{number}": ModelSize(16 * GB) for number in range(12)}
    workload = poisson(models, 0.6, 300.0, seed=3, zipf=1.0)
    commands: list[Command] = []
    config = config_with(prefetch=True)
    result = simulate(
        workload, Gpus(2), config=config, listen=lambda _event, _now, more: commands.extend(more)
    )
    assert result.num_failed == 0
    unasked = [one for one in commands if isinstance(one, SwapIn) and not one.request_id]
    assert unasked
