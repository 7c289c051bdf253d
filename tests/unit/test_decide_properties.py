"""`decide` against agents that die, events that come twice, late or never, and lost commands.

`FakeAgent` keeps its own books: it is the independent count of device memory. A SwapIn that
does not fit there fails the test. When the noise stops, every request has to end.
"""

import random
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from schemas.commands import Command
from schemas.events import (
    CommandFailed,
    RequestEnded,
    RequestStarted,
    RequestWithdrawn,
    SwapInCompleted,
)
from schemas.state import (
    ModelSpec,
    SwapTrace,
)
from schemas.stream import RequestTiming
from services.scheduler.decide import decide
from services.scheduler.inputs import (
    AgentLost,
    Demand,
    DeploymentAdded,
    Entry,
    Input,
    QueueDepths,
    Tick,
)
from services.scheduler.state import ClusterState, PolicyConfig
from tests.unit.decide_agents import SIZES, FakeAgent

CONFIG = PolicyConfig(
    retry_s=1.0,
    retry_max_s=4.0,
    command_timeout_s=5.0,
    settle_s=2.0,
    dispute_s=6.0,
    agent_silent_s=8.0,
)
GPUS = {"gpu0": 100, "gpu1": 70}
TOO_LARGE = "huge"
PATIENCE_S = 60.0
FATES = ("once", "once", "once", "twice", "never")


class Cluster(RuleBasedStateMachine):
    """Rules are what may happen at any moment; `teardown` is what must come of it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.state = ClusterState(epoch=7, config=CONFIG)
        self.agents = {gpu: FakeAgent(gpu, size) for gpu, size in GPUS.items()}
        self.queue: dict[str, str] = {}  # request id -> model, until it ends
        self.num_requests = 0
        self.log: list[Entry] = []
        self.commands: list[Command] = []
        self.generations: dict[tuple[str, str], int] = {}

    def tell(self, event: Input) -> None:
        self.log.append(Entry(self.now, event))
        for command in decide(self.state, event, self.now):
            replica = (command.gpu, command.model)
            assert command.epoch == 7
            assert command.generation > self.generations.get(replica, 0)
            self.generations[replica] = command.generation
            self.commands.append(command)
            self.agents[command.gpu].inbox.append(command)
        self.state.validate()

    @property
    def running(self) -> set[str]:
        replicas = [r for agent in self.agents.values() for r in agent.replicas.values()]
        return {request_id for r in replicas for request_id in r.running}

    def start_requests(self, agent: FakeAgent, model: str) -> None:
        if agent.replicas[model].state != "resident":
            return
        running = self.running
        for request_id in [r for r, m in self.queue.items() if m == model and r not in running]:
            agent.replicas[model].running.append(request_id)
            agent.events.append(RequestStarted(agent.gpu, model, request_id, self.now, 1, 0.0))

    def end_request(self, agent: FakeAgent, model: str) -> None:
        if agent.replicas[model].running:
            request_id = agent.replicas[model].running.pop(0)
            self.queue.pop(request_id, None)
            timing = RequestTiming()
            agent.events.append(
                RequestEnded(agent.gpu, model, request_id, self.now, "stop", 1, 1, timing)
            )

    # -- what may happen -------------------------------------------------------------------

    @initialize()
    def start(self) -> None:
        for model in (*SIZES, TOO_LARGE):
            self.tell(DeploymentAdded(ModelSpec(model, f"/models/{model}", preload=model == "a")))
        for agent in self.agents.values():
            agent.report(self.now)

    @rule(dt=st.sampled_from([0.01, 0.1, 0.5, 1.1, 3.0]))
    def pass_time(self, dt: float) -> None:
        self.now += dt
        self.tell(Tick())

    @rule(model=st.sampled_from(sorted(SIZES)), is_seen=st.sampled_from([True, True, False]))
    def request(self, model: str, is_seen: bool) -> None:
        self.num_requests += 1
        request_id = f"r{self.num_requests}"
        self.queue[request_id] = model
        if is_seen:
            self.tell(Demand(request_id, model, "interactive", self.now))

    @precondition(lambda self: self.queue)
    @rule(data=st.data(), is_seen=st.booleans())
    def withdraw(self, data: st.DataObject, is_seen: bool) -> None:
        waiting = sorted(set(self.queue) - self.running)
        if waiting:
            request_id = data.draw(st.sampled_from(waiting))
            model = self.queue.pop(request_id)
            if is_seen:
                self.tell(RequestWithdrawn(model, request_id, self.now, "client_left"))

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
            *[lambda: self.deliver_any(gpu(), rng.random(), rng.choice(FATES))] * 3,
            *[lambda: self.deliver_events(gpu(), rng.randint(1, 5))] * 3,
            *[lambda: self.deliver_status(gpu(), rng.randint(0, 2), rng.random() < 0.5)] * 6,
            lambda: self.count_queue(0.0),
        ]
        rare: list[Callable[[], None]] = [
            lambda: self.lose_command(gpu()),
            lambda: self.lose_lease(gpu()),
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
            self.end_request(self.agents[gpu], model)

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
        self.tell(QueueDepths(self.depths(), self.now - drift))

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

    @invariant()
    def bytes_fit(self) -> None:
        for agent in self.agents.values():
            assert agent.used_bytes <= agent.budget_bytes

    # -- what must come of it --------------------------------------------------------------

    def depths(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for model in self.queue.values():
            counts[model] = counts.get(model, 0) + 1
        return counts

    def quiet_step(self) -> None:
        """A quarter second of a healthy cluster: nothing fails, nothing gets lost."""
        for agent in self.agents.values():
            while agent.inbox:
                agent.accept(self.now)
            for model in agent.replicas:
                self.end_request(agent, model)
                agent.advance(model, self.now)
                self.start_requests(agent, model)
            agent.report(self.now)
            agent.statuses = [s for s in agent.statuses if self.now - s[0] < CONFIG.settle_s]
            while agent.events:
                self.tell(agent.events.pop(0))
            while agent.statuses:
                self.tell(agent.statuses.pop(0)[1])
        self.tell(QueueDepths(self.depths(), self.now))
        self.now += 0.25
        self.tell(Tick())

    def teardown(self) -> None:
        if not self.log:
            return  # hypothesis checks the class itself once
        give_up_at = self.now + PATIENCE_S
        while (self.queue or self.state.waiting) and self.now < give_up_at:
            self.quiet_step()
        assert not self.queue, f"never served: {self.queue}; {self.story()}"
        assert not self.state.waiting
        assert self.state.deployment_view(TOO_LARGE).status in ("failed", "pending")
        self.check_replay()

    def story(self) -> str:
        return "\n".join(
            f"{r.life.name} {r.state} pending={r.pending} failure={r.failure} {r.life.history}"
            for agent in self.state.agents.values()
            for r in agent.replicas.values()
        )

    def check_replay(self) -> None:
        """The log as JSON, told to a fresh state: the same commands."""
        log = msgspec.json.decode(msgspec.json.encode(self.log), type=list[Entry])
        state = ClusterState(epoch=7, config=CONFIG)
        again = [command for entry in log for command in decide(state, entry.event, entry.now)]
        assert again == self.commands


def test_invariants_hold_and_everybody_is_served_whatever_happens() -> None:
    run_state_machine_as_test(
        Cluster,
        settings=settings(
            max_examples=30,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("seeds", [range(first, first + 20) for first in range(0, 60, 20)], ids=str)
def test_long_walks(seeds: range) -> None:
    """Hypothesis prefers short stories; these are long. The seed of a failure names its walk."""
    for seed in seeds:
        walk = Cluster()
        try:
            walk.start()
            for part in range(4):
                walk.go_wild(seed * 4 + part, 100)
            walk.teardown()
        except Exception as error:
            error.add_note(f"in walk {seed}, at {walk.now:.2f}")
            raise
