"""Scenarios: what is told, and exactly what is commanded."""

from schemas.commands import Load, SwapIn, SwapOut
from schemas.events import (
    ModelRegistered,
    RequestWithdrawn,
)
from services.scheduler.inputs import (
    DeploymentAdded,
)
from services.scheduler.state import DeploymentView
from tests.unit.decide_story import EPOCH, GPU, Story, facts, on, register, running, spec

# -- the whole way -------------------------------------------------------------------------


def test_from_nothing_to_the_first_token() -> None:
    story = Story()
    assert story.tell(DeploymentAdded(spec("a"))) == []
    assert story.status() == [register("a", 1)]
    assert story.registered("a", 60) == []
    assert story.demand("r1", "a") == [Load(GPU, "a", EPOCH, 2, "r1")]
    assert story.demand("r2", "a") == []
    assert story.loaded("a", 2) == [SwapIn(GPU, "a", EPOCH, 3, "r1")]
    assert story.swapped_in("a", 3) == []
    assert story.started("r1", "a") == []
    assert story.ended("r1", "a") == []


def test_a_resident_model_needs_no_command() -> None:
    story = running(on("a", "resident", 60))
    assert story.demand("r1", "a") == []
    assert story.tick(30.0) == []


def test_a_switch_frees_first_then_fills() -> None:
    story = running(on("a", "resident", 60, generation=4), on("b", "host", 60, generation=7))
    assert story.demand("r1", "b") == [SwapOut(GPU, "a", EPOCH, 5, "r1")]
    assert story.tick(0.2) == []
    assert story.swapped_out("a", 5) == [SwapIn(GPU, "b", EPOCH, 8, "r1")]


def test_a_busy_model_keeps_its_quantum_then_gives_way() -> None:
    story = running(on("a", "resident", 60, in_flight=1), on("b", "host", 60))
    assert story.demand("r1", "b") == []
    assert story.tick(0.9) == []
    assert story.tick(0.2) == [SwapOut(GPU, "a", EPOCH, 2, "r1", preempt=True)]
    assert story.ended("r0", "a") == []  # just before it would have been suspended
    assert story.swapped_out("a", 2) == [SwapIn(GPU, "b", EPOCH, 2, "r1")]


def test_two_busy_models_on_one_device_alternate() -> None:
    story = running(on("a", "resident", 60, in_flight=1), on("b", "host", 60))
    order = ["b", "a"] * 4
    generations = {"a": 1, "b": 1}
    for number, model in enumerate(order):
        other = "a" if model == "b" else "b"
        request_id = f"r{number}"
        assert story.demand(request_id, model) == []
        generations[other] += 1
        assert story.tick(1.1) == [
            SwapOut(GPU, other, EPOCH, generations[other], request_id, preempt=True)
        ]
        generations[model] += 1
        assert story.swapped_out(other, generations[other]) == [
            SwapIn(GPU, model, EPOCH, generations[model], request_id)
        ]
        story.swapped_in(model, generations[model])
        story.started(request_id, model)  # and goes on running: the model stays busy


def test_freed_bytes_are_for_the_waiter_they_were_freed_for() -> None:
    story = running(on("a", "resident", 90), on("b", "host", 90), on("c", "host", 40))
    story.state.agents[GPU].replicas["a"].in_flight = 0
    assert story.demand("r1", "b") == [SwapOut(GPU, "a", EPOCH, 2, "r1")]
    assert story.demand("r2", "c", at=story.now - 5) == []  # came late, though it is older
    assert story.swapped_out("a", 2) == [SwapIn(GPU, "b", EPOCH, 2, "r1")]


def test_a_swap_whose_last_waiter_left_is_called_off() -> None:
    story = running(on("a", "resident", 60), on("b", "host", 60), on("c", "host", 60))
    assert story.demand("r1", "b") == [SwapOut(GPU, "a", EPOCH, 2, "r1")]
    assert story.tell(RequestWithdrawn("b", "r1", story.now, "client_left")) == []
    assert story.demand("r2", "c") == []  # a is leaving anyway: no other victim
    assert story.swapped_out("a", 2) == [SwapIn(GPU, "c", EPOCH, 2, "r2")]


def test_the_overdue_are_not_passed_by_small_models() -> None:
    story = running(
        on("a", "resident", 50, in_flight=1), on("big", "host", 100), on("c", "host", 40)
    )
    story.demand("r1", "big")
    story.tick(0.9)
    story.state.agents[GPU].replicas["a"].resident_since = story.now  # freshly swapped in
    story.tick(0.2)
    assert story.demand("r2", "c") == []
    assert story.tick(0.8) == [SwapOut(GPU, "a", EPOCH, 2, "r1", preempt=True)]


def test_earliest_waiter_first() -> None:
    story = running(on("a", "swapping_out", 100), on("b", "host", 100), on("c", "host", 100))
    story.state.agents[GPU].is_alive = False
    assert story.demand("r1", "c", at=2.0) == []
    assert story.demand("r2", "b", at=1.0) == []
    assert story.status(on("a", "host", 100), on("b", "host", 100), on("c", "host", 100)) == [
        SwapIn(GPU, "b", EPOCH, 2, "r2")
    ]


# -- deployments ---------------------------------------------------------------------------


def test_preload_fills_host_images_one_by_one_but_waiters_go_first() -> None:
    story = Story()
    for model in ("a", "b", "c"):
        story.tell(DeploymentAdded(spec(model, preload=True)))
    story.status()
    assert story.registered("a", 10) == [Load(GPU, "a", EPOCH, 2)]
    assert story.registered("b", 10) == []
    assert story.registered("c", 10) == []
    assert story.demand("r1", "c") == [Load(GPU, "c", EPOCH, 2, "r1")]
    assert story.loaded("a", 2) == []
    assert story.loaded("c", 2) == [
        SwapIn(GPU, "c", EPOCH, 3, "r1"),
        Load(GPU, "b", EPOCH, 2),
    ]


def test_a_model_larger_than_every_device_says_the_numbers() -> None:
    story = Story()
    story.tell(DeploymentAdded(spec("a", preload=True)))
    assert story.state.deployment_view("a") == DeploymentView("pending", "no GPU agent is up")
    story.status(budget=400)
    assert story.state.deployment_view("a").status == "pending"
    story.tell(ModelRegistered(GPU, "a", 1, story.now, facts(400, 112)))
    assert story.state.deployment_view("a") == DeploymentView(
        "failed",
        "needs 512 MiB of device memory (400 weights + 112 KV), largest device budget is 400 MiB",
        facts(400, 112),
    )
    assert story.demand("r1", "a") == []
    story.status(gpu="gpu1", budget=600)
    assert story.state.deployment_view("a").status == "pending"
    story.tell(ModelRegistered("gpu1", "a", 1, story.now, facts(400, 112)))
    assert story.state.deployment_view("a") == DeploymentView("ready", "", facts(400, 112))


def test_failures_are_retried_ever_more_rarely_and_stay_visible() -> None:
    story = Story()
    story.tell(DeploymentAdded(spec("a")))
    assert story.status() == [register("a", 1)]
    generation = 1
    for wait_s in (10, 20, 40, 80, 160, 300, 300):
        assert story.failed("a", generation, "register") == []
        assert story.state.deployment_view("a").status == "failed"
        assert story.state.deployment_view("a").reason == "gpu0: register broke"
        assert story.tick(wait_s - 0.1) == []
        generation += 1
        assert story.tick(0.2) == [register("a", generation)]
        assert story.state.deployment_view("a").status == "failed"  # until it works
    story.registered("a", 10, generation)
    assert story.state.deployment_view("a").status == "ready"


def test_a_failed_load_is_loaded_again_without_anybody_asking() -> None:
    story = running(on("a", "cold", 10))
    assert story.demand("r1", "a") == [Load(GPU, "a", EPOCH, 2, "r1")]
    assert story.failed("a", 2, "load") == []
    story.tell(RequestWithdrawn("a", "r1", story.now, "model_failed"))
    assert story.tick(10.0) == [register("a", 3)]
    assert story.registered("a", 10, 3) == [Load(GPU, "a", EPOCH, 4)]
    assert story.state.deployment_view("a").status == "failed"
    assert story.loaded("a", 4) == []
    assert story.state.deployment_view("a").status == "ready"


def test_where_it_failed_it_is_not_tried_while_another_gpu_can() -> None:
    story = running(on("a", "host", 10))
    story.status(on("a", "host", 10), gpu="gpu1", budget=50)
    assert story.demand("r1", "a") == [SwapIn(GPU, "a", EPOCH, 2, "r1")]
    assert story.failed("a", 2, "swap_in") == [SwapIn("gpu1", "a", EPOCH, 2, "r1")]
    assert story.state.deployment_view("a").status == "ready"


def test_a_replica_that_fails_to_leave_is_left_alone_for_a_while() -> None:
    story = running(on("a", "resident", 60), on("b", "host", 60))
    assert story.demand("r1", "b") == [SwapOut(GPU, "a", EPOCH, 2, "r1")]
    assert story.failed("a", 2, "swap_out") == []
    assert story.replica("a").state == "resident"
    assert story.state.deployment_view("a").status == "ready"
    assert story.tick(9.0) == []
    assert story.tick(1.0) == [SwapOut(GPU, "a", EPOCH, 3, "r1")]
