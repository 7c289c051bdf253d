"""A cluster at one moment, to ask where a model goes and who leaves for it. Times are seconds."""

from collections.abc import Sequence

from schemas.state import (
    AgentStatus,
    ModelFacts,
    ModelSpec,
    ReplicaState,
    ReplicaStatus,
)
from services.scheduler.policy import (
    Placement,
    choose,
    weigh,
)
from services.scheduler.reconcile import absorb_status
from services.scheduler.replica import Agent, Replica
from services.scheduler.state import ClusterState, PolicyConfig
from services.scheduler.turns import Turn, turns_of
from services.scheduler.waiting import Waiter

NOW = 100.0


def facts(size: int) -> ModelFacts:
    return ModelFacts("Llama", "float32", 1, size - 1, 1, 2048, 8)


def resident(model: str, size: int) -> Replica:
    replica = Replica(Agent("gpu0"), model)
    replica.facts = facts(size)
    replica.life.adopt("resident", 0.0, "test")
    return replica


class Scene:
    """A cluster as its agents' first statuses tell it."""

    def __init__(self, config: PolicyConfig | None = None) -> None:
        self.state = ClusterState(1, config)

    def gpu(self, name: str, budget: int, /, **replicas: tuple[ReplicaState, int, int]) -> Agent:
        """``model=(state, size, in_flight)``; swapped in long ago, in the order given."""
        statuses = tuple(
            ReplicaStatus(model, state, 1, in_flight, facts(size))
            for model, (state, size, in_flight) in replicas.items()
        )
        status = AgentStatus(name, "i1", 1, "cpu", "cpu", budget, 0, 1, statuses)
        agent = self.state.agent(name)
        absorb_status(agent, status, self.state.config, 0.0)
        for at, (model, replica) in enumerate(agent.replicas.items()):
            replica.last_used = replica.resident_since = float(at)
            self.state.deployments.setdefault(model, ModelSpec(model, "/m", preload=False))
        return agent

    def waits(self, model: str, at: float = NOW) -> None:
        self.state.add_waiter(Waiter(f"{model}@{at}", model, "interactive", at), at)

    def place(self, model: str, claims: dict[str, int] | None = None) -> Placement | None:
        return self.place_turn(turns_of(self.state, model)[0], claims)

    def place_turn(
        self, turn: Turn, claims: dict[str, int] | None = None, closed: Sequence[str] = ()
    ) -> Placement | None:
        best = choose(self.state, weigh(self.state, turn, claims or {}, NOW, closed))
        return best.placement if best else None
