"""Scenarios: what is told, and exactly what is commanded. `validate` runs after every input.

Sizes are MiB. A `Story` answers nothing by itself: each test says what agents report.
"""

import pytest

from schemas.commands import Command, Load, Register, SwapIn, SwapOut
from schemas.events import (
    AgentStarted,
    AgentStopped,
    CommandFailed,
    CommandRejected,
    LeaderElected,
    LoadProgressed,
    ModelLoaded,
    ModelRegistered,
    RequestEnded,
    RequestStarted,
    RequestWithdrawn,
    SwapInCompleted,
    SwapOutCompleted,
    WorkerDied,
)
from schemas.state import (
    AgentStatus,
    ModelFacts,
    ModelSpec,
    ReplicaState,
    ReplicaStatus,
    SwapTrace,
)
from schemas.stream import RequestTiming
from services.scheduler.decide import decide
from services.scheduler.inputs import (
    AgentLost,
    Demand,
    DeploymentAdded,
    Input,
    QueueDepths,
    Tick,
)
from services.scheduler.lifecycle import CommandKind
from services.scheduler.replica import Replica
from services.scheduler.state import MIB, ClusterState, DeploymentView, InvariantViolation

EPOCH = 3
GPU = "gpu0"


def spec(model: str, preload: bool = False) -> ModelSpec:
    return ModelSpec(model, f"/models/{model}", preload=preload)


def facts(weights: int, kv: int = 0) -> ModelFacts:
    return ModelFacts("Llama", "bfloat16", 1, weights * MIB, kv * MIB, 2048, 8)


class Story:
    def __init__(self) -> None:
        self.state = ClusterState(EPOCH)
        self.now = 1000.0

    def tell(self, event: Input, after: float = 0.0) -> list[Command]:
        self.now += after
        commands = decide(self.state, event, self.now)
        self.state.validate()
        return commands

    def replica(self, model: str, gpu: str = GPU) -> Replica:
        return self.state.agents[gpu].replicas[model]

    # -- what may be told ------------------------------------------------------------------

    def tick(self, after: float = 0.0) -> list[Command]:
        """Time passes, and healthy agents were heard meanwhile."""
        for agent in self.state.agents.values():
            agent.seen_at = self.now + after
        return self.tell(Tick(), after)

    def status(
        self,
        *replicas: ReplicaStatus,
        gpu: str = GPU,
        budget: int = 100,
        instance: str = "i1",
        pid: int = 10,
    ) -> list[Command]:
        return self.tell(
            AgentStatus(gpu, instance, pid, "cpu", "cpu", budget * MIB, 0, 1, replicas)
        )

    def demand(self, request_id: str, model: str, at: float | None = None) -> list[Command]:
        at = self.now if at is None else at
        return self.tell(Demand(request_id, model, "interactive", at))

    def registered(self, model: str, size: int, generation: int = 1) -> list[Command]:
        return self.tell(ModelRegistered(GPU, model, generation, self.now, facts(size)))

    def loaded(self, model: str, generation: int) -> list[Command]:
        return self.tell(ModelLoaded(GPU, model, generation, self.now, 1, 0.1))

    def swapped_in(self, model: str, generation: int) -> list[Command]:
        return self.tell(SwapInCompleted(GPU, model, generation, self.now, SwapTrace(0.0)))

    def swapped_out(self, model: str, generation: int) -> list[Command]:
        return self.tell(SwapOutCompleted(GPU, model, generation, self.now, SwapTrace(0.0)))

    def failed(self, model: str, generation: int, kind: CommandKind) -> list[Command]:
        return self.tell(CommandFailed(GPU, model, generation, self.now, kind, f"{kind} broke"))

    def started(self, request_id: str, model: str) -> list[Command]:
        return self.tell(RequestStarted(GPU, model, request_id, self.now, 1, 0.0))

    def ended(self, request_id: str, model: str) -> list[Command]:
        timing = RequestTiming()
        return self.tell(RequestEnded(GPU, model, request_id, self.now, "stop", 1, 1, timing))


def on(model: str, state: ReplicaState, size: int, generation: int = 1, in_flight: int = 0,
       reason: str = "") -> ReplicaStatus:  # fmt: skip
    return ReplicaStatus(model, state, generation, in_flight, facts(size), reason)


def running(*replicas: ReplicaStatus, budget: int = 100) -> Story:
    """An agent with these replicas, their deployments known."""
    story = Story()
    for replica in replicas:
        story.tell(DeploymentAdded(spec(replica.model)))
    assert story.status(*replicas, budget=budget) == []
    return story


# -- the whole way -------------------------------------------------------------------------


def test_from_nothing_to_the_first_token() -> None:
    story = Story()
    assert story.tell(DeploymentAdded(spec("a"))) == []
    assert story.status() == [Register(GPU, "a", EPOCH, 1, spec("a"))]
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


def test_a_busy_model_keeps_its_quantum_then_drains() -> None:
    story = running(on("a", "resident", 60, in_flight=1), on("b", "host", 60))
    assert story.demand("r1", "b") == []
    assert story.tick(0.9) == []
    assert story.tick(0.2) == [SwapOut(GPU, "a", EPOCH, 2, "r1")]
    assert story.ended("r0", "a") == []
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
        assert story.tick(1.1) == [SwapOut(GPU, other, EPOCH, generations[other], request_id)]
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
    assert story.tick(0.8) == [SwapOut(GPU, "a", EPOCH, 2, "r1")]


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
    assert story.status() == [Register(GPU, "a", EPOCH, 1, spec("a"))]
    generation = 1
    for wait_s in (10, 20, 40, 80, 160, 300, 300):
        assert story.failed("a", generation, "register") == []
        assert story.state.deployment_view("a").status == "failed"
        assert story.state.deployment_view("a").reason == "gpu0: register broke"
        assert story.tick(wait_s - 0.1) == []
        generation += 1
        assert story.tick(0.2) == [Register(GPU, "a", EPOCH, generation, spec("a"))]
        assert story.state.deployment_view("a").status == "failed"  # until it works
    story.registered("a", 10, generation)
    assert story.state.deployment_view("a").status == "ready"


def test_a_failed_load_is_loaded_again_without_anybody_asking() -> None:
    story = running(on("a", "cold", 10))
    assert story.demand("r1", "a") == [Load(GPU, "a", EPOCH, 2, "r1")]
    assert story.failed("a", 2, "load") == []
    story.tell(RequestWithdrawn("a", "r1", story.now, "model_failed"))
    assert story.tick(10.0) == [Register(GPU, "a", EPOCH, 3, spec("a"))]
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


# -- statuses and races --------------------------------------------------------------------


def test_a_status_sent_before_our_command_does_not_undo_it() -> None:
    story = running(on("a", "resident", 60), on("b", "host", 60))
    story.demand("r1", "b")
    assert story.status(on("a", "resident", 60), on("b", "host", 60)) == []
    assert story.replica("a").state == "draining"
    assert story.status(on("a", "swapping_out", 60, generation=2), on("b", "host", 60)) == []
    assert story.replica("a").state == "swapping_out"


def test_a_status_stands_in_for_a_lost_event() -> None:
    story = running(on("a", "resident", 60), on("b", "host", 60))
    story.demand("r1", "b")
    assert story.status(on("a", "host", 60, generation=2), on("b", "host", 60)) == [
        SwapIn(GPU, "b", EPOCH, 2, "r1")
    ]
    assert story.swapped_out("a", 2) == []  # the event, late


def test_a_late_status_does_not_undo_an_answer() -> None:
    story = running(on("a", "host", 60))
    story.demand("r1", "a")
    story.swapped_in("a", 2)
    story.status(on("a", "swapping_in", 60, generation=2))
    assert story.replica("a").state == "resident"
    story.status(on("a", "resident", 60, generation=2))
    assert story.replica("a").is_settled


def test_statuses_that_insist_are_right() -> None:
    story = running(on("a", "host", 60))
    story.demand("r1", "a")
    story.swapped_in("a", 2)
    for _ in range(4):
        story.now += 5.0
        story.status(on("a", "host", 60, generation=2))
    assert story.replica("a").state == "swapping_in"  # adopted host, and commanded again


def test_a_new_instance_starts_from_nothing() -> None:
    story = running(on("a", "resident", 60, generation=5))
    story.demand("r1", "a")
    assert story.status(instance="i2") == [Register(GPU, "a", EPOCH, 7, spec("a"))]
    assert story.status(on("a", "resident", 60, generation=5), instance="i1") == []  # a ghost
    assert story.replica("a").state == "cold"
    assert story.swapped_in("a", 5) == []
    assert story.registered("a", 60, 7) == [Load(GPU, "a", EPOCH, 8, "r1")]


def test_a_stray_command_that_reaches_the_next_instance_is_counted() -> None:
    story = running(on("a", "host", 60), on("b", "host", 60))
    assert story.demand("r1", "a") == [SwapIn(GPU, "a", EPOCH, 2, "r1")]
    story.status(instance="i2")  # before the new process read that SwapIn
    assert story.registered("a", 60, 4) == []  # is it cold? only a status can tell
    assert story.status(on("a", "swapping_in", 60, 2), instance="i2") == []
    assert story.state.agents[GPU].reserved_bytes == 60 * MIB


def test_a_dead_worker_frees_nothing_before_a_status_says_so() -> None:
    story = running(on("a", "resident", 60), on("b", "host", 60))
    assert story.tell(WorkerDied(GPU, story.now, "killed")) == []
    assert story.demand("r1", "b") == []
    assert story.replica("a").state == "resident"
    assert story.status(on("a", "cold", 60), on("b", "cold", 60), pid=0, budget=0) == []
    assert story.status(on("a", "cold", 60), on("b", "cold", 60), pid=11) == [
        Load(GPU, "b", EPOCH, 2, "r1")
    ]


def test_a_lost_agent_is_replaced_and_its_bytes_stay_counted() -> None:
    story = running(on("a", "host", 60))
    story.status(on("a", "host", 60), gpu="gpu1", budget=60)
    assert story.demand("r1", "a") == [SwapIn(GPU, "a", EPOCH, 2, "r1")]
    assert story.tell(AgentLost(GPU)) == [SwapIn("gpu1", "a", EPOCH, 2, "r1")]
    assert story.state.agents[GPU].reserved_bytes == 60 * MIB
    assert story.status(on("a", "host", 60)) == []  # back; the command may still arrive
    assert story.replica("a").state == "swapping_in"


def test_a_silent_agent_is_lost_and_a_stopped_one_forgotten() -> None:
    story = running(on("a", "resident", 60))
    assert story.tell(Tick(), after=14.0) == []
    assert story.state.agents[GPU].is_alive
    story.tell(Tick(), after=2.0)
    assert not story.state.agents[GPU].is_alive
    story.status(on("a", "resident", 60))
    assert story.tell(AgentStopped(GPU, "another", story.now)) == []
    assert story.replica("a").state == "resident"
    assert story.tell(AgentStopped(GPU, "i1", story.now)) == []
    assert story.replica("a").state == "cold"


def test_a_refused_command_waits_for_a_status_that_is_surely_newer() -> None:
    story = running(on("a", "host", 60))
    story.demand("r1", "a")
    story.tell(CommandRejected(GPU, "a", 2, story.now, "swap_in", "is cold"))
    assert story.status(on("a", "cold", 60)) == []
    assert story.state.agents[GPU].reserved_bytes == 60 * MIB
    story.now += 2.0
    assert story.status(on("a", "cold", 60)) == [Load(GPU, "a", EPOCH, 3, "r1")]


def test_an_unanswered_command_is_repeated_unless_the_agent_is_at_it() -> None:
    story = running(on("a", "cold", 60))
    assert story.demand("r1", "a") == [Load(GPU, "a", EPOCH, 2, "r1")]
    story.tick(50.0)
    story.tell(LoadProgressed(GPU, "a", story.now, 1, 2))
    story.tick(50.0)
    story.status(on("a", "loading", 60, generation=2))
    assert story.tick(59.0) == []
    assert story.tick(1.0) == [Load(GPU, "a", EPOCH, 3, "r1")]
    assert story.loaded("a", 2) == []  # the answer to the first; the second will be answered too
    assert story.loaded("a", 3) == [SwapIn(GPU, "a", EPOCH, 4, "r1")]


def test_a_new_leader_takes_over_what_it_finds() -> None:
    story = Story()
    story.tell(DeploymentAdded(spec("a")))
    story.tell(DeploymentAdded(spec("b")))
    story.status(on("a", "swapping_in", 60, generation=9), on("b", "host", 60, generation=4))
    assert story.demand("r1", "a") == []
    assert story.swapped_in("a", 9) == []
    assert story.replica("a").state == "resident"
    assert story.demand("r2", "b") == []
    story.started("r1", "a")
    story.ended("r1", "a")
    story.tell(Tick())
    assert story.replica("a").pending is not None
    assert story.replica("a").generation == 10


# -- waiters -------------------------------------------------------------------------------


def waiters(story: Story, model: str) -> list[str]:
    return [w.request_id for w in story.state.waiting.get(model, ())]


def test_queue_depths_heal_lost_and_duplicate_demand() -> None:
    story = running(on("a", "resident", 60, in_flight=1))
    for number in range(3):
        story.demand(f"r{number}", "a", at=float(number))
    story.demand("r0", "a", at=0.0)
    assert waiters(story, "a") == ["r0", "r1", "r2"]
    story.tell(QueueDepths({"a": 2}, at=1.5))  # one in flight, one waits; r2 came after
    assert waiters(story, "a") == ["r1", "r2"]
    story.tell(QueueDepths({"a": 4, "nobody": 1}, at=5.0))
    assert waiters(story, "a") == ["r1", "r2", "recovered-1"]
    story.tell(QueueDepths({}, at=6.0))
    assert waiters(story, "a") == []


def test_recovered_demand_is_served() -> None:
    story = running(on("a", "host", 60))
    assert story.tell(QueueDepths({"a": 1}, at=5.0)) == [SwapIn(GPU, "a", EPOCH, 2, "recovered-1")]


def test_demand_that_comes_after_the_start_is_no_waiter() -> None:
    story = running(on("a", "resident", 60))
    at = story.now
    story.now += 1.0
    story.started("r1", "a")
    story.demand("r1", "a", at=at)
    assert waiters(story, "a") == []
    story.demand("r1", "a", at=story.now + 1.0)  # published once more, after its agent died
    assert waiters(story, "a") == ["r1"]


# -- totality ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "event",
    [
        AgentLost("gpu9"),
        AgentStopped("gpu9", "i", 0.0),
        WorkerDied("gpu9", 0.0, "?"),
        AgentStarted("gpu9", "i", 0.0, "cpu", "cpu", 1),
        ModelRegistered("gpu9", "a", 1, 0.0, facts(1)),
        ModelLoaded(GPU, "nobody", 1, 0.0, 1, 1.0),
        SwapInCompleted(GPU, "a", 99, 0.0, SwapTrace(0.0)),
        SwapOutCompleted(GPU, "a", 0, 0.0, SwapTrace(0.0)),
        CommandFailed(GPU, "a", 1, 0.0, "swap_out", "?"),
        CommandRejected(GPU, "a", 1, 0.0, "load", "?"),
        RequestStarted("gpu9", "nobody", "r", 0.0, 1, 0.0),
        RequestWithdrawn("nobody", "r", 0.0, "deadline"),
        Demand("r", "nobody", "batch", 0.0),
        LeaderElected("me", 4, 0.0),
        Tick(),
    ],
)
def test_news_about_nothing_known_changes_nothing(event: Input) -> None:
    story = running(on("a", "host", 60))
    assert story.tell(event) == []
    assert story.replica("a").state == "host"
    assert story.demand("r1", "a") == [SwapIn(GPU, "a", EPOCH, 2, "r1")]


def test_validate_names_what_is_wrong() -> None:
    story = running(on("a", "resident", 60))
    story.state.agents[GPU].budget_bytes = 1
    with pytest.raises(InvariantViolation, match=r"gpu0: .* exceeds budget of 1 bytes"):
        story.state.validate()
