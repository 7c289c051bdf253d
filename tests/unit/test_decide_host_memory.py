"""Host memory has a budget: images that go, preloads that wait, and room made for waiters."""

from schemas.commands import Load, SwapIn, SwapOut
from schemas.events import CommandRejected
from schemas.state import ReplicaStatus
from services.scheduler.inputs import DeploymentAdded
from tests.unit.decide_story import EPOCH, GPU, Story, on, register, running, spec

# -- unloaded ------------------------------------------------------------------------------


def test_an_unloaded_model_is_loaded_again_for_its_waiters() -> None:
    story = running(on("a", "host", 60))
    assert story.unloaded("a", 1) == []
    assert story.replica("a").state == "cold"
    assert story.demand("r1", "a") == [Load(GPU, "a", EPOCH, 2, "r1")]


def test_a_late_status_does_not_bring_the_image_back() -> None:
    story = running(on("a", "host", 60))
    story.unloaded("a", 1)
    assert story.status(on("a", "host", 60)) == []
    assert story.replica("a").state == "cold"
    assert story.demand("r1", "a") == []  # which of the two is right?
    assert story.status(on("a", "cold", 60)) == [Load(GPU, "a", EPOCH, 2, "r1")]


def test_news_of_an_image_that_was_loaded_again_since_is_stale() -> None:
    story = running(on("a", "cold", 60))
    story.demand("r1", "a")
    story.withdrawn("r1", "a")
    assert story.unloaded("a", 1) == []
    assert story.replica("a").state == "loading"
    story.loaded("a", 2)
    assert story.unloaded("a", 1) == []
    assert story.replica("a").state == "host"


def test_a_swap_in_that_crossed_with_it_is_rejected_and_the_model_loaded() -> None:
    story = running(on("a", "host", 60))
    assert story.demand("r1", "a") == [SwapIn(GPU, "a", EPOCH, 2, "r1")]
    assert story.unloaded("a", 1) == []
    assert story.replica("a").state == "swapping_in"
    assert story.tell(CommandRejected(GPU, "a", 2, story.now, "swap_in", "is cold")) == []
    assert story.status(on("a", "cold", 60, 2)) == [Load(GPU, "a", EPOCH, 3, "r1")]


def test_a_plan_ends_with_its_image() -> None:
    story = running(on("a", "resident", 60), on("b", "host", 60))
    assert story.demand("r1", "b") == [SwapOut(GPU, "a", EPOCH, 2, "r1")]
    assert story.unloaded("b", 1) == [Load(GPU, "b", EPOCH, 2, "r1")]
    assert story.swapped_out("a", 2) == []
    assert story.loaded("b", 2) == [SwapIn(GPU, "b", EPOCH, 3, "r1")]


# -- preload -------------------------------------------------------------------------------


def preloading(*models: str, host_budget: int) -> Story:
    """All registered, 40 MiB each; the first is being loaded."""
    story = Story()
    for model in models:
        story.tell(DeploymentAdded(spec(model, preload=True)))
    replicas = [on(model, "cold", 40) for model in models]
    first = story.status(*replicas, host_budget=host_budget)
    assert first == [Load(GPU, models[0], EPOCH, 2)]
    return story


def test_preload_takes_what_fits_and_the_rest_stays_cold_until_asked_for() -> None:
    story = preloading("a", "b", "c", host_budget=100)
    assert story.loaded("a", 2) == [Load(GPU, "b", EPOCH, 2)]
    assert story.loaded("b", 2) == []
    for _ in range(100):
        assert story.tick(1.0) == []
    assert story.demand("r1", "c") == [Load(GPU, "c", EPOCH, 2, "r1")]
    assert story.unloaded("a", 2, 40) == []
    assert story.loaded("c", 2) == [SwapIn(GPU, "c", EPOCH, 3, "r1")]
    story.swapped_in("c", 3)
    for _ in range(100):
        assert story.tick(1.0) == []


def test_preload_counts_what_the_agent_says_is_used() -> None:
    story = Story()
    for model in ("a", "b"):
        story.tell(DeploymentAdded(spec(model, preload=True)))
    cold = (on("a", "cold", 40), on("b", "cold", 40))
    assert story.status(*cold, host_budget=100, host_used=70) == []
    assert story.status(*cold, host_budget=100, host_used=60) == [Load(GPU, "a", EPOCH, 2)]


def test_a_model_that_failed_and_finds_no_room_may_be_asked_for() -> None:
    story = running(on("a", "resident", 60), on("b", "cold", 60), host_budget=100)
    story.replica("a").in_flight = 1
    story.demand("r1", "b")
    assert story.tick(2.0) == [SwapOut(GPU, "a", EPOCH, 2, "r1")]
    assert story.swapped_out("a", 2) == [Load(GPU, "b", EPOCH, 2, "r1")]
    story.failed("b", 2, "load")
    story.withdrawn("r1", "b")
    assert story.state.deployment_view("b").status == "failed"
    assert story.tick(10.0) == [register("b", 3)]
    assert story.registered("b", 60, 3) == []  # a's image is in the way, and nobody waits
    assert story.state.deployment_view("b").status == "ready"
    assert story.demand("r2", "b") == [Load(GPU, "b", EPOCH, 4, "r2")]


# -- room for waiters ----------------------------------------------------------------------


def test_a_load_may_drop_images_of_models_nobody_waits_for() -> None:
    story = running(on("a", "host", 60), on("b", "cold", 60), host_budget=100)
    assert story.demand("r1", "b") == [Load(GPU, "b", EPOCH, 2, "r1")]


def test_idle_models_leave_the_device_so_that_their_images_may_go() -> None:
    story = running(on("a", "resident", 40), on("b", "cold", 40), on("c", "resident", 20),
                    host_budget=80)  # fmt: skip
    assert story.demand("r1", "b") == [SwapOut(GPU, "a", EPOCH, 2, "r1")]
    assert story.tick(0.2) == []
    assert story.swapped_out("a", 2) == [Load(GPU, "b", EPOCH, 2, "r1")]
    story.unloaded("a", 2, 40)
    assert story.loaded("b", 2) == [SwapIn(GPU, "b", EPOCH, 3, "r1")]


def test_busy_models_leave_only_for_the_overdue() -> None:
    story = running(on("a", "resident", 60, in_flight=1), on("b", "cold", 60), host_budget=100)
    assert story.demand("r1", "b") == []
    assert story.tick(0.9) == []
    assert story.tick(0.2) == [SwapOut(GPU, "a", EPOCH, 2, "r1")]


def test_nobody_comes_in_where_room_is_made_for_a_model_ahead() -> None:
    story = running(
        on("a", "resident", 60, in_flight=1), on("b", "host", 40), on("c", "cold", 90),
        host_budget=100,
    )  # fmt: skip
    story.demand("r1", "c")
    story.demand("r2", "b")  # fits beside a, but c needs the room of both images
    story.replica("b").last_used = story.now
    assert story.commands == [SwapIn(GPU, "b", EPOCH, 2, "r2", story.now, story.now)]
    story.swapped_in("b", 2)
    story.started("r2", "b")
    assert story.tick(1.1) == [SwapOut(GPU, "a", EPOCH, 2, "r1"), SwapOut(GPU, "b", EPOCH, 3, "r1")]
    story.demand("r3", "a")
    story.demand("r4", "b")
    assert story.ended("r2", "b") == []
    assert story.swapped_out("b", 3) == []
    assert story.swapped_out("a", 2) == [Load(GPU, "c", EPOCH, 2, "r1")]
    assert story.tick(0.1) == []  # which images go?
    assert story.unloaded("b", 3, 40) == []
    assert story.unloaded("a", 2, 60) == []
    assert story.loaded("c", 2) == [SwapIn(GPU, "c", EPOCH, 3, "r1")]


def test_two_waiting_models_do_not_drop_each_others_images() -> None:
    story = running(
        on("z", "resident", 60, in_flight=1), on("a", "cold", 40), on("b", "cold", 40),
        host_budget=100,
    )  # fmt: skip
    story.replica("z").resident_since = story.now + 100.0
    assert story.demand("r1", "a") == [Load(GPU, "a", EPOCH, 2, "r1")]
    assert story.demand("r2", "b") == []
    assert story.loaded("a", 2) == [SwapIn(GPU, "a", EPOCH, 3, "r1")]
    story = running(
        on("z", "resident", 80, in_flight=1), on("a", "host", 40), on("b", "cold", 40),
        host_budget=120,
    )  # fmt: skip
    story.replica("z").resident_since = story.now + 100.0
    story.demand("r1", "a")
    assert story.demand("r2", "b") == []  # a is ahead: b waits until it came in, or left
    assert story.tick(50.0) == []
    assert story.withdrawn("r1", "a") == [Load(GPU, "b", EPOCH, 2, "r2")]


def test_an_image_larger_than_the_budget_is_loaded_so_that_the_agent_says_why() -> None:
    story = running(on("a", "resident", 30), on("b", "cold", 60), host_budget=50)
    assert story.demand("r1", "b") == [Load(GPU, "b", EPOCH, 2, "r1")]
    story.failed("b", 2, "load")
    assert story.tick(10.0) == [register("b", 3)]
    story.withdrawn("r1", "b")
    assert story.registered("b", 60, 3) == []
    assert story.state.deployment_view("b").status == "failed"


# -- what is left on the device ------------------------------------------------------------


def test_cached_bytes_are_known_from_statuses() -> None:
    story = running(on("a", "host", 60))
    left = ReplicaStatus("a", "host", 1, 0, on("a", "host", 60).facts, cached_bytes=7)
    story.status(left)
    assert story.replica("a").cached_bytes == 7
    story.status(instance="i2")
    assert story.replica("a").cached_bytes == 0
