"""`decide` against agents that die, events that come twice, late or never, and lost commands.

What must come of all this is in `tests.unit.decide_cluster`.
"""

import random
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test

from schemas.admin import Ask, MoveDeployment, SwapInDeployment, SwapOutDeployment
from schemas.commands import SwapOut
from schemas.events import (
    CommandFailed,
    RequestStarted,
    RequestWithdrawn,
    SwapInCompleted,
)
from schemas.state import ModelSpec, SwapTrace
from services.scheduler.inputs import (
    AgentLost,
    Asked,
    Demand,
    DeploymentRemoved,
    DeploymentsKnown,
    Tick,
)
from tests.unit.decide_agents import SIZES, UNINTERRUPTED, klass_of
from tests.unit.decide_cluster import CONFIG, GPUS, TENANTS, TOO_LARGE, Cluster

FATES = ("once", "once", "once", "twice", "never")
WINDOW_S = 20.0  # of requests of class batch
LENGTHS = (1, 2, 10)  # of answers, in quarter seconds
PRELOADED = ("a", "b", "e")  # more than host memory holds


class Walk(Cluster):
    """Rules are what may happen at any moment."""

    @initialize()
    def start(self) -> None:
        for model in (*SIZES, TOO_LARGE):
            self.deploy(
                ModelSpec(
                    model,
                    f"/models/{model}",
                    preload=model in PRELOADED,
                    preemption="drain" if model in UNINTERRUPTED else "preserve",
                )
            )
        self.tell(DeploymentsKnown())
        for agent in self.agents.values():
            agent.report(self.now)

    @rule(dt=st.sampled_from([0.01, 0.1, 0.5, 1.1, 3.0]))
    def pass_time(self, dt: float) -> None:
        self.now += dt
        self.tell(Tick())

    @rule(model=st.sampled_from(sorted(SIZES)), is_seen=st.sampled_from([True, True, False]))
    def request(self, model: str, is_seen: bool) -> None:
        if model not in self.state.deployments:
            return  # the api refuses it
        self.num_requests += 1
        request_id = f"r{self.num_requests}"
        self.queue[request_id] = model
        self.steps_left[request_id] = LENGTHS[self.num_requests % len(LENGTHS)]
        names = tuple(TENANTS)  # as a rule a model is asked for by one of them
        whose = self.num_requests if self.num_requests % 4 == 0 else ord(model)
        tenant = self.tenants[request_id] = names[whose % len(names)]
        if is_seen:
            self.tell(Demand(request_id, model, klass_of(request_id), self.now, tenant, WINDOW_S))

    @precondition(lambda self: self.queue)
    @rule(where=st.floats(0.0, 0.999), is_seen=st.booleans())
    def leave(self, where: float, is_seen: bool) -> None:
        """A client that waits takes its request back."""
        waiting = sorted(set(self.queue) - self.running)
        if waiting:
            request_id = waiting[int(where * len(waiting))]
            model = self.queue.pop(request_id)
            if is_seen:
                self.tell(RequestWithdrawn(model, request_id, self.now, "client_left"))

    @rule(
        model=st.sampled_from(sorted(SIZES)),
        max_batch=st.sampled_from([2, 4]),
        group=st.sampled_from(["", "", "g"]),
        stay_s=st.sampled_from([0.0, 0.5]),
    )
    def configure(self, model: str, max_batch: int, group: str, stay_s: float) -> None:
        """Other settings; a removed model comes back with them."""
        settings = {"max_batch": max_batch, "exclusive_group": group, "min_residency_s": stay_s}
        self.deploy(msgspec.structs.replace(self.specs[model], **settings))

    @rule(model=st.sampled_from(sorted(SIZES)), at_once=st.booleans())
    def remove(self, model: str, at_once: bool) -> None:
        """As an api does, end what waits for it."""
        self.tell(DeploymentRemoved(model, "removed" if at_once else ""))
        for request_id in sorted(set(self.queue) - self.running):
            if self.queue[request_id] == model:
                del self.queue[request_id]
                self.tell(RequestWithdrawn(model, request_id, self.now, "model_failed"))

    @rule(
        model=st.sampled_from(sorted(SIZES)),
        gpu=st.sampled_from(sorted(GPUS)),
        what=st.sampled_from(["in", "in there", "out", "move"]),
    )
    def ask(self, model: str, gpu: str, what: str) -> None:
        source = next(one for one in GPUS if one != gpu)
        until = self.now + 5.0
        asks: dict[str, Ask] = {
            "in": SwapInDeployment(model, until),
            "in there": SwapInDeployment(model, until, gpu=gpu),
            "out": SwapOutDeployment(model, gpu=gpu),
            "move": MoveDeployment(model, source, gpu, until),
        }
        num = len(self.verdicts)
        self.tell(Asked(num, asks[what]))
        assert [verdict.number for verdict in self.verdicts[num:]] == [num]

    @rule(seed=st.integers(0, 2**32 - 1), count=st.sampled_from([30, 100]))
    def go_wild(self, seed: int, count: int) -> None:
        """Many small steps, weighted so that things often get far before they go wrong."""
        rng = random.Random(seed)

        def gpu() -> str:
            return rng.choice(sorted(GPUS))

        def model() -> str:
            return rng.choice(sorted(SIZES))

        common: list[Callable[[], None]] = [
            *[lambda: self.pass_time(rng.choice([0.01, 0.1, 0.5, 1.1]))] * 3,
            *[lambda: self.request(model(), rng.random() < 0.7)] * 3,
            *[lambda: self.take_commands(gpu(), rng.randint(1, 8))] * 4,
            *[lambda: self.work(gpu(), rng.random() < 0.85)] * 5,
            *[lambda: self.end(gpu(), model())] * 3,
            *[lambda: self.leave(rng.random(), rng.random() < 0.7)] * 2,
            *[lambda: self.deliver_any(gpu(), rng.random(), rng.choice(FATES))] * 3,
            *[lambda: self.deliver_events(gpu(), rng.randint(1, 5))] * 3,
            *[lambda: self.deliver_status(gpu(), rng.randint(0, 2), rng.random() < 0.5)] * 6,
            lambda: self.count_queue(0.0),
        ]
        rare: list[Callable[[], None]] = [
            lambda: self.lose_command(gpu()),
            lambda: self.corrupt(gpu(), model()),
            lambda: self.lose_lease(gpu()),
            lambda: self.configure(
                model(), rng.choice([2, 4]), rng.choice(["", "", "g"]), rng.choice([0.0, 0.5])
            ),
            lambda: self.remove(model(), rng.random() < 0.5),
            lambda: self.ask(model(), gpu(), rng.choice(["in", "in there", "out", "move"])),
            lambda: self.lose_worker(gpu()),
            lambda: self.restart(gpu(), rng.random() < 0.5),
        ]
        share = rng.choice([0.0, 0.03, 0.1])
        for _ in range(count):
            rng.choice(rare if rng.random() < share else common)()
            self.bytes_fit()

    @rule(count=st.integers(1, 4))
    def go_well(self, count: int) -> None:
        """Without this, noise alone seldom gets a model into memory."""
        for _ in range(count):
            self.quiet_step()

    @rule(gpu=st.sampled_from(sorted(GPUS)), count=st.integers(1, 8))
    def take_commands(self, gpu: str, count: int) -> None:
        agent = self.agents[gpu]
        for _ in range(min(count, len(agent.inbox))):
            agent.accept(self.now)
        self.settle(agent)

    @rule(gpu=st.sampled_from(sorted(GPUS)))
    def lose_command(self, gpu: str) -> None:
        if self.agents[gpu].inbox:
            self.agents[gpu].inbox.pop()

    @rule(gpu=st.sampled_from(sorted(GPUS)), luck=st.sampled_from([True, True, True, False]))
    def work(self, gpu: str, luck: bool) -> None:
        agent = self.agents[gpu]
        for model in agent.replicas:
            agent.advance(model, self.now, luck)
            self.start_requests(agent, model)

    @rule(gpu=st.sampled_from(sorted(GPUS)), model=st.sampled_from(sorted(SIZES)))
    def end(self, gpu: str, model: str) -> None:
        if model in self.agents[gpu].replicas:
            self.end_request(self.agents[gpu], model, may_cancel=True)

    @rule(gpu=st.sampled_from(sorted(GPUS)), model=st.sampled_from(sorted(SIZES)))
    def corrupt(self, gpu: str, model: str) -> None:
        if model in self.agents[gpu].replicas:
            self.agents[gpu].corrupt(model, self.now)

    @rule(
        gpu=st.sampled_from(sorted(GPUS)),
        where=st.floats(0.0, 0.999),
        fate=st.sampled_from(FATES),
    )
    def deliver_any(self, gpu: str, where: float, fate: str) -> None:
        events = self.agents[gpu].events
        if events:
            index = int(where * len(events))
            event = events[index] if fate == "twice" else events.pop(index)
            if fate != "never":
                self.tell(event)

    @rule(gpu=st.sampled_from(sorted(GPUS)), count=st.integers(1, 5))
    def deliver_events(self, gpu: str, count: int) -> None:
        events = self.agents[gpu].events
        for _ in range(min(count, len(events))):
            self.tell(events.pop(0))

    @rule(gpu=st.sampled_from(sorted(GPUS)), skip=st.integers(0, 2), is_new=st.booleans())
    def deliver_status(self, gpu: str, skip: int, is_new: bool) -> None:
        agent = self.agents[gpu]
        if is_new:
            agent.report(self.now)
        on_time = [s for s in agent.statuses if self.now - s[0] < CONFIG.settle_s]
        agent.statuses = on_time[skip:]
        if agent.statuses:
            self.tell(agent.statuses.pop(0)[1])

    @rule(drift=st.sampled_from([0.0, 0.0, 0.2]))
    def count_queue(self, drift: float) -> None:
        self.count(self.now - drift)

    @rule(gpu=st.sampled_from(sorted(GPUS)))
    def lose_lease(self, gpu: str) -> None:
        self.tell(AgentLost(gpu))

    @rule(gpu=st.sampled_from(sorted(GPUS)))
    def lose_worker(self, gpu: str) -> None:
        self.agents[gpu].lose_worker(self.now)

    @rule(gpu=st.sampled_from(sorted(GPUS)), in_order=st.booleans())
    def restart(self, gpu: str, in_order: bool) -> None:
        self.agents[gpu].restart(self.now, in_order)

    @rule(event=st.sampled_from(["unknown gpu", "unknown model"]))
    def nonsense(self, event: str) -> None:
        gpu, model = ("gpu9", "a") if event == "unknown gpu" else ("gpu0", "nobody")
        trace = SwapTrace(self.now)
        self.tell(SwapInCompleted(gpu, model, 3, self.now, trace))
        self.tell(CommandFailed(gpu, model, 3, self.now, "load", "what?"))
        self.tell(RequestStarted(gpu, model, "nobody", self.now, 1, 0.0))
        self.tell(Demand("nobody", "nobody", "batch", self.now))
        self.tell(AgentLost(gpu) if gpu == "gpu9" else Tick())


def test_invariants_hold_and_everybody_is_served_whatever_happens() -> None:
    run_state_machine_as_test(
        Walk,
        settings=settings(
            max_examples=30,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("seeds", [range(first, first + 20) for first in range(0, 60, 20)], ids=str)
@pytest.mark.parametrize("prefetch", [False, True], ids=["asked", "prefetch"])
def test_long_walks(seeds: range, prefetch: bool) -> None:
    """Hypothesis prefers short stories; these are long. The seed of a failure names its walk."""
    for seed in seeds:
        walk = Walk()
        walk.state.config = msgspec.structs.replace(CONFIG, prefetch=prefetch)
        try:
            walk.start()
            for part in range(4):
                walk.go_wild(seed * 4 + part, 100)
            walk.teardown()
        except Exception as error:
            error.add_note(f"in walk {seed}, at {walk.now:.2f}")
            raise


@pytest.mark.parametrize("host_budgets", [(120, 75), (100, 50), (80, 50)], ids=str)
def test_nobody_starves_though_everybody_always_waits(host_budgets: tuple[int, int]) -> None:
    """All models are wanted all the time, and host memory holds only some of them. Some answers
    take many run quanta.
    """
    rng = random.Random(7)
    cluster = Walk()
    for agent, budget in zip(cluster.agents.values(), host_budgets, strict=True):
        agent.host_budget_bytes = budget
    cluster.start()
    asked_at: dict[str, float] = {}
    end = cluster.now + 200.0
    while cluster.now < end:
        for model in SIZES:
            if cluster.depths().get(model, 0) < 4:  # one ends at a time
                cluster.request(model, is_seen=True)
                request_id = f"r{cluster.num_requests}"
                cluster.steps_left[request_id] = rng.choice([1, 2, 8, 30])
                asked_at[request_id] = cluster.now
        for _ in range(4):
            cluster.quiet_step()
        waiting = set(cluster.queue) - cluster.running
        waited_s = {cluster.now - asked_at[request_id] for request_id in waiting}
        assert max(waited_s, default=0.0) < 100.0, cluster.story()
    cluster.teardown()


def test_long_answers_take_turns_and_all_end() -> None:
    """Two models that never fit together, each with an answer of 10 s, and more all the time."""
    cluster = Walk()
    del cluster.agents["gpu0"]
    cluster.agents["gpu1"].host_budget_bytes = 120
    cluster.start()
    first = {}
    for model in ("a", "b"):
        cluster.request(model, is_seen=True)
        first[model] = f"r{cluster.num_requests}"
        cluster.steps_left[first[model]] = 40
    turns: list[str] = []
    begun_at = cluster.now
    while set(first.values()) & set(cluster.queue):
        assert cluster.now < begun_at + 60.0, cluster.story()
        cluster.quiet_step()
        for model, replica in cluster.agents["gpu1"].replicas.items():
            if replica.state == "resident" and turns[-1:] != [model]:
                turns.append(model)
                cluster.request(model, is_seen=True)  # waits behind the long one
    assert turns[:8] == ["a", "b"] * 4
    swap_outs = [c for c in cluster.commands if isinstance(c, SwapOut)]
    assert sum(command.preempt for command in swap_outs) >= 8
    cluster.teardown()
