"""What the scheduler believes about the cluster: who waits, deployments, queries, `validate()`.

    ClusterState -- agents: gpu -> Agent -- replicas: model -> Replica (Lifecycle inside)
                 |- deployments: model -> ModelSpec
                 |- waiting: model -> WaitingLine of Waiter     (models with waiters only)
                 '- plans: model -> Plan                        (bytes being freed for a model)

Requests that wait are of two kinds, waiters and suspended ones: see `services.scheduler.turns`.

Only `decide` writes to it. Dicts keep insertion order, which is the order of decisions.
"""

from collections.abc import Callable
from typing import Literal

import msgspec

from schemas.names import RequestClass
from schemas.state import ModelFacts, ModelSpec
from services.scheduler import batches, invariants
from services.scheduler.decisions import Decisions
from services.scheduler.estimates import Tempo
from services.scheduler.index import Index
from services.scheduler.replica import Agent, Replica
from services.scheduler.shares import Shares
from services.scheduler.turns import Line
from services.scheduler.waiting import (
    Holds,
    Move,
    Plan,
    Verdict,
    Waiter,
    WaitingLine,
    Wish,
)

MIB = 2**20
NUM_GONE_REQUESTS = 4096


class PolicyConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The policy's knobs. ``_s``: seconds.

    ``eviction``: which idle model leaves, see `services.scheduler.eviction`. ``placement``: where
    the least is running and arriving ("load"), or only where the most memory is free
    ("memory"). ``order``: the one due first first, or first come first served. ``preemption``:
    busy models give way while their requests are ahead of their target ("slack"), or never do.
    """

    run_quantum_s: float = 1.0  # a busy replica may be preempted after this long in memory,
    preempt_factor: float = 4.0  # and after so many times what its last swap-in took
    ttft_target_s: float = 2.0  # of interactive requests whose deployment names none
    batch_patience_s: float = 4 * 3600.0  # of class batch, where nobody told their window
    batch_after_idle_s: float = 5.0  # for them an idle model leaves no sooner
    token_target_s: float = 0.1
    starvation_s: float = 3.0  # who waited this long goes first, and may preempt without slack
    preempt_after_s: float = 0.2  # who waited less than this, and is in no hurry, preempts nobody
    harm_at_most: float = 0.2  # no preemption that makes more requests late, as it seems
    guard_factor: float = 2.5  # no preemption where two swaps take more than so many quanta
    eviction: Literal["value", "lru", "gdsf", "belady"] = "value"
    placement: Literal["load", "memory"] = "load"
    order: Literal["deadline", "arrival"] = "deadline"
    preemption: Literal["slack", "off"] = "slack"
    replicate: bool = True  # another replica of a model that is served, but too slowly,
    crowd: int = 8  # where each has so many requests
    keep_large: bool = True  # of many GPUs some stay with models that need most of one
    prefetch: bool = False  # what may be wanted next comes in unasked, if it hurts nobody
    migrate: bool = False  # a model of a GPU where too much runs moves to another one
    fair_shares: bool = True  # who used more than others waits behind them,
    put_back_s: float = 10.0  # but for so much longer at most than `starvation_s`
    retry_s: float = 10.0  # first retry of a failed replica; doubles with each failure
    retry_max_s: float = 300.0
    command_timeout_s: float = 60.0  # an unanswered command is sent again
    settle_s: float = 2.0  # no status is older than this when it arrives
    dispute_s: float = 10.0  # statuses that contradict us for this long are right
    agent_silent_s: float = 15.0  # an agent that sends no status for this long is lost


class InvariantViolation(Exception):
    """`ClusterState.validate` found what must never be; the text lists all of it."""


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
        self.plans: dict[str, Plan] = {}  # changed by `add_plan` and `drop_plan`
        self.moves: dict[str, Move] = {}  # by model; changed by `add_move` and `drop_move`
        self.moved_at: dict[str, float] = {}  # models -> when they last began to move
        self.index = Index()
        self.line = Line()
        self.holds = Holds()
        self.decisions = Decisions()  # that were made and not told yet
        self.tempos: dict[str, Tempo] = {}  # how fast models write
        self.shares = Shares()  # what tenants have used
        self.with_ttl: dict[str, float] = {}  # models that leave after so many idle seconds
        self.knows_all = False  # all deployments that there are have been told
        self.fingerprints: dict[str, str] = {}  # of what agents should have been told, by model
        self.unwelcome: dict[str, None] = {}  # models that may have replicas which must leave
        self.ending: dict[str, str] = {}  # removed models -> why their requests end at once
        self.wishes: dict[str, Wish] = {}  # by model; changed by `add_wish` and `drop_wish`
        self.verdicts: list[Verdict] = []  # on what operators asked, not told yet
        self.inflation = 0.0  # what the last victim was worth, where an eviction policy counts that
        # When a model is wanted next (model, now -> unix seconds): known to simulations only.
        self.next_use: Callable[[str, float], float] | None = None
        self.gone: dict[str, float] = {}  # requests lately started or withdrawn -> when
        self.num_recovered = 0  # waiters made up by a reconcile so far

    def agent(self, gpu: str) -> Agent:
        """The agent of ``gpu``, made (not alive, no budget) if it was unknown."""
        if gpu not in self.agents:
            self.agents[gpu] = Agent(gpu, self.index)
        return self.agents[gpu]

    def tempo(self, model: str) -> Tempo:
        if model not in self.tempos:
            self.tempos[model] = Tempo()
        return self.tempos[model]

    # -- queries ---------------------------------------------------------------------------

    def usable_agents(self) -> list[Agent]:
        return [agent for agent in self.agents.values() if agent.is_usable]

    def suspended_replicas(self) -> list[Replica]:
        """Those whose suspended requests wait for their next swap-in."""
        return [replica for agent in self.usable_agents() for replica in agent.suspended.values()]

    def find_replica(self, gpu: str, model: str) -> Replica | None:
        agent = self.agents.get(gpu)
        return agent.replicas.get(model) if agent else None

    def num_in_flight(self, model: str, klass: RequestClass) -> int:
        """Requests of ``model`` that live agents have, running or suspended."""
        places = self.index.of(model)
        held = [r for r in places.device.values() if r.agent.is_usable]
        held += [r for r in places.suspended.values() if r.agent.is_usable]
        num_batch = sum(r.batch_in_flight for r in held)
        return num_batch if klass == "batch" else sum(r.in_flight for r in held) - num_batch

    def priority(self, model: str) -> int:
        spec = self.deployments.get(model)
        return spec.priority if spec else 0

    def is_pinned(self, model: str) -> bool:
        """Brought in unasked, and never swapped out for another model."""
        spec = self.deployments.get(model)
        return spec is not None and spec.pinned and not spec.drained

    def fingerprint(self, model: str) -> str:
        """Of the settings that agents should have been told (`ModelSpec.fingerprint`)."""
        if model not in self.fingerprints:
            self.fingerprints[model] = self.deployments[model].fingerprint()
        return self.fingerprints[model]

    def min_residency_s(self, model: str) -> float:
        """What just came in leaves for no other model before this."""
        spec = self.deployments.get(model)
        return spec.min_residency_s if spec else 0.0

    def group(self, model: str) -> str:
        """Of the models of one group one at most is on a GPU; empty: no group."""
        spec = self.deployments.get(model)
        return spec.exclusive_group if spec else ""

    def ttft_target_s(self, model: str, klass: RequestClass) -> float:
        """Time to first token that is aimed at."""
        spec = self.deployments.get(model)
        target_s = spec.ttft_target_s if spec else None
        return target_s or self.config.ttft_target_s

    def token_target_s(self, model: str) -> float:
        """Time per output token that is aimed at."""
        spec = self.deployments.get(model)
        return (spec.token_target_s if spec else None) or self.config.token_target_s

    def slack_s(self, replica: Replica, now: float) -> float:
        """What the requests of ``replica`` are ahead of their target, on average (seconds)."""
        passed_s = now - replica.slack_at
        if replica.is_suspended:
            return replica.slack_s - passed_s
        rate = self.tempo(replica.model).slack_per_s(self.token_target_s(replica.model))
        return replica.slack_s + passed_s * rate

    def yields(self, replica: Replica) -> bool:
        """It is busy with nothing but requests of tenants that had more than their share."""
        if not self.shares.are_compared or not replica.in_flight:
            return False
        line = self.waiting.get(replica.model)
        if line is not None and not line.earliest.put_back_s:
            return False
        return self.shares.all_beyond((replica.gpu, replica.model))

    def is_idle(self, replica: Replica) -> bool:
        """Nobody runs on it, is suspended there, or waits for its model."""
        return replica.in_flight == 0 and replica.model not in self.waiting

    def take_touched(self) -> list[str]:
        """Models whose `deployment_view` may have changed since this was asked last."""
        touched = [m for m in self.index.changed.views if m in self.deployments]
        self.index.changed.views.clear()
        return touched

    def deployment_view(self, model: str) -> DeploymentView:
        """Whether ``model`` can serve, and if not, why, in words for the user.

        Raises KeyError for a model that is not deployed.
        """
        if model not in self.deployments:
            raise KeyError(f"no deployment {model!r}; there are: {', '.join(self.deployments)}")
        agents = self.usable_agents()
        if not agents:
            return DeploymentView("pending", "no GPU agent is up", self._known_facts(model))
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
            words = "a GPU agent is reading the model's files"
            return DeploymentView("pending", words, self._known_facts(model))
        words = "; ".join(dict.fromkeys(reasons))
        return DeploymentView("failed", words, self._known_facts(model))

    def _known_facts(self, model: str) -> ModelFacts | None:
        known = [a.replicas[model] for a in self.agents.values() if model in a.replicas]
        return next((r.facts for r in known if r.facts), None)

    # -- waiters ---------------------------------------------------------------------------

    def add_waiter(self, waiter: Waiter, now: float, window_s: float = 0.0) -> None:
        """Put it in line, unless its model is unknown or it has been started already.

        ``window_s``: of class batch, how long it may wait; 0: nobody told.
        """
        if waiter.model not in self.deployments:
            return
        if waiter.at <= self.gone.get(waiter.request_id, float("-inf")):
            return  # the event that ended its wait overtook the demand
        due_at = waiter.at
        if waiter.klass == "batch":
            late_s = batches.put_back_s(self.config, window_s)
            waiter = msgspec.structs.replace(waiter, put_back_s=late_s)
            due_at += late_s
        elif self.config.order == "deadline":
            due_at += self.ttft_target_s(waiter.model, waiter.klass)
        line = self.waiting.get(waiter.model)
        if line is None:
            line = self.waiting[waiter.model] = WaitingLine()
        tenant = waiter.tenant
        is_shared = self.config.fair_shares and waiter.klass == "interactive"
        if tenant is not None and is_shared and waiter.request_id not in line:
            if self.shares.is_beyond(tenant):
                waiter = msgspec.structs.replace(waiter, put_back_s=self.config.put_back_s)
            self.shares.charge(tenant, now)
        line.add(waiter, due_at)
        self.index.waiting_changed(waiter.model)

    def remove_waiter(self, model: str, request_id: str, at: float) -> Waiter | None:
        """It was started or withdrawn at ``at``; remembered for a demand that comes late.

        None if it was not in line.
        """
        self.gone.pop(request_id, None)
        self.gone[request_id] = at
        if len(self.gone) > NUM_GONE_REQUESTS:
            del self.gone[next(iter(self.gone))]
        return self.drop_waiter(model, request_id)

    def drop_waiter(self, model: str, request_id: str) -> Waiter | None:
        line = self.waiting.get(model)
        waiter = line.remove(request_id) if line is not None else None
        if waiter is not None:
            if not line:
                del self.waiting[model]
            self.index.waiting_changed(model)
        return waiter

    def match_depths(
        self, depths: dict[str, int], at: float, klass: RequestClass = "interactive"
    ) -> None:
        """Make each line as long as the queue was at ``at``, less what agents have in flight.

        Of the requests of one class: those of the other are in a queue of their own.

        The queue holds a request until it ends, so suspended ones are in its count too.

        Waiters younger than ``at`` are not in the count and stay. A surplus is dropped from the
        front: those are the ones whose start was missed. Missing ones get a made-up id.
        """
        for model in dict.fromkeys([*self.waiting, *depths]):
            expected = max(0, depths.get(model, 0) - self.num_in_flight(model, klass))
            line = self.waiting.get(model)
            ours = [w for w in line.by_due_time() if w.klass == klass] if line is not None else []
            counted = [w for w in ours if w.at <= at]
            for waiter in counted[: max(0, len(counted) - expected)]:
                self.drop_waiter(model, waiter.request_id)
            if model not in self.deployments:
                continue
            for _ in range(expected - len(counted)):
                self.num_recovered += 1
                request_id = f"recovered-{self.num_recovered}"
                self.add_waiter(Waiter(request_id, model, klass, at), at)

    # -- plans -----------------------------------------------------------------------------

    def add_plan(self, plan: Plan) -> None:
        self.plans[plan.model] = plan
        self.agents[plan.gpu].planned[plan.model] = None
        self.index.changed.agents[plan.gpu] = None

    def drop_plan(self, model: str) -> None:
        plan = self.plans.pop(model)
        self.agents[plan.gpu].planned.pop(model, None)
        self.index.changed.agents[plan.gpu] = None

    # -- moves -----------------------------------------------------------------------------

    def add_move(self, move: Move) -> None:
        self.moves[move.model] = move
        self.moved_at[move.model] = move.at
        self.index.changed.turns[move.model] = None

    def drop_move(self, model: str) -> None:
        del self.moves[model]
        self.index.changed.turns[model] = None

    # -- wishes ----------------------------------------------------------------------------

    def add_wish(self, wish: Wish) -> None:
        self.wishes[wish.model] = wish
        self.index.changed.turns[wish.model] = None

    def drop_wish(self, model: str) -> None:
        """Does nothing where there is none."""
        if self.wishes.pop(model, None) is not None:
            self.index.changed.turns[model] = None

    def validate(self) -> None:
        """Raise `InvariantViolation` unless all that must hold, holds."""
        if wrong := invariants.faults(self):
            raise InvariantViolation("; ".join(wrong))


def _too_large(facts: ModelFacts, largest_budget_bytes: int) -> str:
    return (
        f"needs {_mib(facts.footprint_bytes)} MiB of device memory "
        f"({_mib(facts.weight_bytes)} weights + {_mib(facts.kv_bytes)} KV), "
        f"largest device budget is {_mib(largest_budget_bytes)} MiB"
    )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:.1f}".removesuffix(".0")
