"""What the scheduler believes about the cluster: waiters, deployments, queries, `validate()`.

    ClusterState -- agents: gpu -> Agent -- replicas: model -> Replica (Lifecycle inside)
                 |- deployments: model -> ModelSpec
                 |- waiting: model -> WaitingLine of Waiter     (models with waiters only)
                 '- plans: model -> Plan                        (bytes being freed for a model)

Requests that wait are of two kinds, waiters and suspended ones: see `services.scheduler.turns`.

Only `decide` writes to it. Dicts keep insertion order, which is the order of decisions.
"""

from bisect import insort
from collections.abc import Iterator
from typing import Literal

import msgspec

from schemas.names import RequestClass
from schemas.state import ModelFacts, ModelSpec
from services.scheduler.replica import Agent, Replica, replica_faults

MIB = 2**20
NUM_GONE_REQUESTS = 4096


class PolicyConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The policy's knobs. ``_s``: seconds."""

    run_quantum_s: float = 1.0  # a busy replica may be preempted after this long in memory,
    preempt_factor: float = 4.0  # and after so many times what its last swap-in took
    retry_s: float = 10.0  # first retry of a failed replica; doubles with each failure
    retry_max_s: float = 300.0
    command_timeout_s: float = 60.0  # an unanswered command is sent again
    settle_s: float = 2.0  # no status is older than this when it arrives
    dispute_s: float = 10.0  # statuses that contradict us for this long are right
    agent_silent_s: float = 15.0  # an agent that sends no status for this long is lost


class InvariantViolation(Exception):
    """`ClusterState.validate` found what must never be; the text lists all of it."""


class Waiter(msgspec.Struct, frozen=True):
    """One request in the work queue that no agent has started."""

    request_id: str
    model: str
    klass: RequestClass
    at: float  # unix seconds, when it entered the queue


def line_order(waiter: Waiter) -> tuple[float, str]:
    """Earliest first; the id breaks ties so that replays agree."""
    return (waiter.at, waiter.request_id)


class WaitingLine:
    """The waiters of one model, earliest first.

    ``decided_at``: when the first command for the earliest one's switch was given (unix
    seconds); before that, whatever was decided for those before it.
    """

    __slots__ = ("_by_id", "_ordered", "decided_at")

    def __init__(self) -> None:
        self.decided_at = 0.0
        self._by_id: dict[str, Waiter] = {}
        self._ordered: list[Waiter] = []

    def __len__(self) -> int:
        return len(self._ordered)

    def __iter__(self) -> Iterator[Waiter]:
        return iter(self._ordered)

    @property
    def earliest(self) -> Waiter:
        return self._ordered[0]

    def add(self, waiter: Waiter) -> None:
        """Take a place in line; an id that is already there keeps the place it has."""
        if waiter.request_id not in self._by_id:
            self._by_id[waiter.request_id] = waiter
            insort(self._ordered, waiter, key=line_order)

    def note_decision(self, now: float) -> None:
        """A command is given now for the earliest waiter; only its first one counts."""
        if self.decided_at < self.earliest.at:
            self.decided_at = max(now, self.earliest.at)  # the two clocks may differ

    def remove(self, request_id: str) -> None:
        waiter = self._by_id.pop(request_id, None)
        if waiter is not None:
            self._ordered.remove(waiter)


class Plan(msgspec.Struct, frozen=True):
    """Bytes on ``gpu`` are being freed for ``model``: nobody else may take them."""

    model: str
    gpu: str
    request_id: str  # the waiter it was made for; empty: suspended requests


class DeploymentView(msgspec.Struct, frozen=True):
    """What users are told about a deployment (`schemas.state.DeploymentRecord`)."""

    status: Literal["pending", "ready", "failed"]
    reason: str = ""
    facts: ModelFacts | None = None


class ClusterState:
    """All that `decide` knows. ``epoch`` is the leader's fencing number in every command."""

    def __init__(self, epoch: int, config: PolicyConfig | None = None) -> None:
        self.epoch = epoch
        self.config = config or PolicyConfig()
        self.agents: dict[str, Agent] = {}
        self.deployments: dict[str, ModelSpec] = {}
        self.waiting: dict[str, WaitingLine] = {}
        self.plans: dict[str, Plan] = {}
        self.gone: dict[str, float] = {}  # requests lately started or withdrawn -> when
        self.num_recovered = 0  # waiters made up by a reconcile so far

    def agent(self, gpu: str) -> Agent:
        """The agent of ``gpu``, made (not alive, no budget) if it was unknown."""
        if gpu not in self.agents:
            self.agents[gpu] = Agent(gpu)
        return self.agents[gpu]

    # -- queries ---------------------------------------------------------------------------

    def usable_agents(self) -> list[Agent]:
        return [agent for agent in self.agents.values() if agent.is_usable]

    def usable_replicas(self, model: str) -> list[Replica]:
        agents = self.usable_agents()
        return [agent.replicas[model] for agent in agents if model in agent.replicas]

    def suspended_replicas(self) -> list[Replica]:
        """Those whose suspended requests wait for their next swap-in."""
        return [
            replica
            for agent in self.usable_agents()
            for replica in agent.replicas.values()
            if replica.is_suspended
        ]

    def find_replica(self, gpu: str, model: str) -> Replica | None:
        agent = self.agents.get(gpu)
        return agent.replicas.get(model) if agent else None

    def num_in_flight(self, model: str) -> int:
        """Requests of ``model`` that live agents have, running or suspended."""
        return sum(r.in_flight for r in self.usable_replicas(model))

    def deployment_view(self, model: str) -> DeploymentView:
        """Whether ``model`` can serve, and if not, why, in words for the user.

        Raises KeyError for a model that is not deployed.
        """
        if model not in self.deployments:
            raise KeyError(f"no deployment {model!r}; there are: {', '.join(self.deployments)}")
        known = [a.replicas[model] for a in self.agents.values() if model in a.replicas]
        facts = next((r.facts for r in known if r.facts), None)
        agents = self.usable_agents()
        if not agents:
            return DeploymentView("pending", "no GPU agent is up", facts)
        reasons: list[str] = []
        largest = max(agent.budget_bytes for agent in agents)
        for agent in agents:
            replica = agent.replicas.get(model)
            if replica and replica.failure and replica.failure.is_visible:
                reasons.append(f"{agent.gpu}: {replica.failure.reason}")
            elif replica is None or replica.facts is None:
                continue
            elif replica.footprint_bytes <= agent.budget_bytes:
                return DeploymentView("ready", "", replica.facts)
            else:
                reasons.append(_too_large(replica.facts, largest))
        if len(reasons) < len(agents):
            return DeploymentView("pending", "a GPU agent is reading the model's files", facts)
        return DeploymentView("failed", "; ".join(dict.fromkeys(reasons)), facts)

    # -- waiters ---------------------------------------------------------------------------

    def add_waiter(self, waiter: Waiter) -> None:
        """Put it in line, unless its model is unknown or it has been started already."""
        if waiter.model not in self.deployments:
            return
        if waiter.at <= self.gone.get(waiter.request_id, float("-inf")):
            return  # the event that ended its wait overtook the demand
        self.waiting.setdefault(waiter.model, WaitingLine()).add(waiter)

    def remove_waiter(self, model: str, request_id: str, at: float) -> None:
        """It was started or withdrawn at ``at``; remembered for a demand that comes late."""
        self.gone.pop(request_id, None)
        self.gone[request_id] = at
        if len(self.gone) > NUM_GONE_REQUESTS:
            del self.gone[next(iter(self.gone))]
        self.drop_waiter(model, request_id)

    def drop_waiter(self, model: str, request_id: str) -> None:
        line = self.waiting.get(model)
        if line is not None:
            line.remove(request_id)
            if not line:
                del self.waiting[model]

    def match_depths(self, depths: dict[str, int], at: float) -> None:
        """Make each line as long as the queue was at ``at``, less what agents have in flight.

        The queue holds a request until it ends, so suspended ones are in its count too.

        Waiters younger than ``at`` are not in the count and stay. A surplus is dropped from the
        front: those are the ones whose start was missed. Missing ones get a made-up id.
        """
        for model in dict.fromkeys([*self.waiting, *depths]):
            expected = max(0, depths.get(model, 0) - self.num_in_flight(model))
            counted = [w for w in self.waiting.get(model, ()) if w.at <= at]
            for waiter in counted[: max(0, len(counted) - expected)]:
                self.drop_waiter(model, waiter.request_id)
            if model not in self.deployments:
                continue
            for _ in range(expected - len(counted)):
                self.num_recovered += 1
                self.add_waiter(Waiter(f"recovered-{self.num_recovered}", model, "interactive", at))

    # -- invariants ------------------------------------------------------------------------

    def validate(self) -> None:
        """Raise `InvariantViolation` unless all that must hold, holds."""
        wrong: list[str] = []
        for agent in self.agents.values():
            if agent.reserved_bytes > agent.budget_bytes:
                held = {r.model: r.device_bytes for r in agent.replicas.values() if r.device_bytes}
                wrong.append(f"{agent.gpu}: {held} exceeds budget of {agent.budget_bytes} bytes")
            for model, replica in agent.replicas.items():
                wrong += replica_faults(agent.gpu, model, replica)
        for model, line in self.waiting.items():
            if model not in self.deployments:
                wrong.append(f"waiters for {model!r}, which is not deployed")
            if not line:
                wrong.append(f"an empty line is kept for {model!r}")
            if [line_order(w) for w in line] != sorted(line_order(w) for w in line):
                wrong.append(f"line of {model!r} is out of order")
        for model, plan in self.plans.items():
            if plan.model != model or plan.gpu not in self.agents:
                wrong.append(f"plan for {model!r} is {plan}")
            pinned = [r.gpu for r in self.suspended_replicas() if r.model == model]
            if pinned and plan.gpu not in pinned:
                wrong.append(f"{plan}, but {model!r} has suspended requests on {pinned}")
        if wrong:
            raise InvariantViolation("; ".join(wrong))


def _too_large(facts: ModelFacts, largest_budget_bytes: int) -> str:
    return (
        f"needs {_mib(facts.footprint_bytes)} MiB of device memory "
        f"({_mib(facts.weight_bytes)} weights + {_mib(facts.kv_bytes)} KV), "
        f"largest device budget is {_mib(largest_budget_bytes)} MiB"
    )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:.1f}".removesuffix(".0")
