"""A cluster without a bus for random walks: what must hold at any moment, and come of any story.

`FakeAgent` keeps its own books: it is the independent count of memory. A SwapIn that does not
fit there fails the test. When the noise stops, every request has to end, and then the cluster
comes to rest: no command is given any more.
"""

from collections import Counter
from typing import Literal, get_args

import msgspec
from hypothesis.stateful import RuleBasedStateMachine, invariant

from schemas.commands import Command
from schemas.events import DecisionMade, RequestEnded, RequestStarted
from schemas.names import RequestClass
from schemas.state import ModelSpec
from schemas.stream import RequestTiming
from services.scheduler.decide import decide
from services.scheduler.inputs import DeploymentAdded, Entry, Input, QueueDepths, Tick
from services.scheduler.state import ClusterState, PolicyConfig
from services.scheduler.waiting import Verdict
from tests.unit.decide_agents import FakeAgent, klass_of

CONFIG = PolicyConfig(
    migrate=True,
    retry_s=1.0,
    retry_max_s=4.0,
    command_timeout_s=5.0,
    settle_s=2.0,
    dispute_s=6.0,
    agent_silent_s=8.0,
    batch_patience_s=10.0,
    batch_after_idle_s=1.0,
)
GPUS = {"gpu0": 100, "gpu1": 70}
HOST_BUDGETS = {"gpu0": 120, "gpu1": 75}  # for weights of 50 + 50 + 20 + 20 + 80
TENANTS = {"": 0.5, "greedy": 30.0, "modest": 2.0}  # what a request of each takes, in seconds
TOO_LARGE = "huge"
PATIENCE_S = 60.0
QUIET_STEP_S = 0.25
REST_S = 15.0


class Cluster(RuleBasedStateMachine):
    """The scheduler's state and its agents, without a bus: `tell` carries commands over."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.state = ClusterState(epoch=7, config=CONFIG)
        self.agents = {gpu: FakeAgent(gpu, size, HOST_BUDGETS[gpu]) for gpu, size in GPUS.items()}
        self.queue: dict[str, str] = {}  # request id -> model, until it ends
        self.num_requests = 0
        self.specs: dict[str, ModelSpec] = {}  # as they were deployed last
        self.tenants: dict[str, str] = {}  # request id -> who it is for
        self.steps_left: dict[str, int] = {}  # of long answers, in quiet steps
        self.log: list[Entry] = []
        self.commands: list[Command] = []
        self.decisions: list[DecisionMade] = []
        self.verdicts: list[Verdict] = []
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
        self.decisions += self.state.decisions.take()
        self.verdicts += self.state.verdicts
        self.state.verdicts.clear()
        self.state.validate()

    def deploy(self, spec: ModelSpec) -> None:
        self.specs[spec.name] = spec
        self.tell(DeploymentAdded(spec))

    def settle(self, agent: FakeAgent) -> None:
        """Requests that ``agent`` has ended because it was told to."""
        for request_id in agent.ended:
            if model := self.queue.pop(request_id, None):
                who = (agent.gpu, model, request_id, self.now)
                agent.events.append(RequestEnded(*who, "failed", 1, 1, RequestTiming()))
        agent.ended.clear()

    @property
    def running(self) -> set[str]:
        replicas = [r for agent in self.agents.values() for r in agent.replicas.values()]
        return {request_id for r in replicas for request_id in r.running}

    def start_requests(self, agent: FakeAgent, model: str) -> None:
        if not agent.replicas[model].may_start:
            return
        running = self.running
        for request_id in [r for r, m in self.queue.items() if m == model and r not in running]:
            agent.replicas[model].running.append(request_id)
            who = (agent.gpu, model, request_id, self.now)
            what = (self.tenants[request_id], klass_of(request_id))
            agent.events.append(RequestStarted(*who, 1, 0.0, *what))

    def end_request(self, agent: FakeAgent, model: str, may_cancel: bool) -> None:
        """The oldest one ends. Where it can not compute (its model still arrives, or it is
        suspended) it can only be cancelled.
        """
        replica = agent.replicas[model]
        if replica.running and (may_cancel or replica.may_compute):
            request_id = replica.running[0]
            self.steps_left[request_id] = self.steps_left.get(request_id, 1) - 1
            if self.steps_left[request_id] > 0 and not may_cancel:
                return
            replica.running.pop(0)
            self.queue.pop(request_id, None)
            outcome: Literal["stop", "cancelled"] = "stop" if replica.may_compute else "cancelled"
            tenant = self.tenants[request_id]
            timing = RequestTiming(decode_s=TENANTS[tenant])
            who = (agent.gpu, model, request_id, self.now)
            agent.events.append(
                RequestEnded(*who, outcome, 1, 1, timing, tenant=tenant, klass=klass_of(request_id))
            )

    @invariant()
    def bytes_fit(self) -> None:
        for agent in self.agents.values():
            assert agent.used_bytes <= agent.budget_bytes
            assert agent.host_used_bytes <= agent.host_budget_bytes

    # -- what must come of it --------------------------------------------------------------

    def depths(self, klass: RequestClass = "interactive") -> dict[str, int]:
        models = [model for name, model in self.queue.items() if klass_of(name) == klass]
        return dict(Counter(models))

    def count(self, at: float) -> None:
        """Both queues, as of ``at``."""
        for klass in get_args(RequestClass):
            self.tell(QueueDepths(self.depths(klass), at, klass))

    def quiet_step(self) -> None:
        """A quarter second of a healthy cluster: nothing fails, nothing gets lost."""
        for agent in self.agents.values():
            while agent.inbox:
                agent.accept(self.now)
            self.settle(agent)
            for model in agent.replicas:
                self.end_request(agent, model, may_cancel=False)
                agent.advance(model, self.now)
                self.start_requests(agent, model)
            agent.report(self.now)
            agent.statuses = [s for s in agent.statuses if self.now - s[0] < CONFIG.settle_s]
            while agent.events:
                self.tell(agent.events.pop(0))
            while agent.statuses:
                self.tell(agent.statuses.pop(0)[1])
        self.count(self.now)
        self.now += QUIET_STEP_S
        self.tell(Tick())

    def teardown(self) -> None:
        if not self.log:
            return  # hypothesis checks the class itself once
        for spec in self.specs.values():  # what was removed comes back
            self.tell(DeploymentAdded(spec))
        give_up_at = self.now + PATIENCE_S
        while (self.queue or self.state.waiting) and self.now < give_up_at:
            self.quiet_step()
        assert not self.queue, f"never served: {self.queue}; {self.story()}"
        assert not self.state.waiting
        self.check_rest()
        assert self.state.deployment_view(TOO_LARGE).status in ("failed", "pending")
        self.check_replay()

    def check_rest(self) -> None:
        """Nobody waits: after retries and preloads there is nothing left to command."""
        for _ in range(int(REST_S / QUIET_STEP_S)):
            self.quiet_step()
        assert not self.state.unwelcome, self.story()
        for agent in self.agents.values():
            for model, replica in agent.replicas.items():
                if replica.facts:
                    assert replica.settings == self.specs[model].fingerprint(), self.story()
        num_commands, num_decisions = len(self.commands), len(self.decisions)
        for _ in range(int(REST_S / QUIET_STEP_S)):
            self.quiet_step()
        assert not self.commands[num_commands:], self.story()
        assert not self.decisions[num_decisions:]

    def story(self) -> str:
        return "\n".join(
            f"{r.life.name} {r.state} pending={r.pending} failure={r.failure} {r.life.history}"
            for agent in self.state.agents.values()
            for r in agent.replicas.values()
        )

    def check_replay(self) -> None:
        """The log as JSON, told to a fresh state: the same commands, for the same reasons."""
        log = msgspec.json.decode(msgspec.json.encode(self.log), type=list[Entry])
        state = ClusterState(epoch=7, config=self.state.config)
        again: list[Command] = []
        verdicts: list[Verdict] = []
        decisions: list[DecisionMade] = []
        for entry in log:
            again += decide(state, entry.event, entry.now)
            decisions += state.decisions.take()
            verdicts += state.verdicts
            state.verdicts.clear()
        assert verdicts == self.verdicts
        assert again == self.commands
        assert decisions == self.decisions
