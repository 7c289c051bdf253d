"""What must hold at any moment, and what the index must say: all of it from a look at everything.

`services.scheduler.state.ClusterState.validate` raises what is found here. It runs in tests and
simulations, never in the service: it costs in proportion to all replicas.
"""

from typing import TYPE_CHECKING

from services.scheduler import turns
from services.scheduler.index import Index
from services.scheduler.lifecycle import DEVICE_STATES, PENDING_STATES
from services.scheduler.replica import Replica

if TYPE_CHECKING:
    from services.scheduler.state import ClusterState


def faults(state: "ClusterState") -> list[str]:
    """Everything that is wrong, as text; empty when all is well."""
    wrong: list[str] = []
    for agent in state.agents.values():
        if agent.reserved_bytes > agent.budget_bytes:
            held = {r.model: r.device_bytes for r in agent.replicas.values() if r.device_bytes}
            wrong.append(f"{agent.gpu}: {held} exceeds budget of {agent.budget_bytes} bytes")
        for model, replica in agent.replicas.items():
            wrong += replica_faults(agent.gpu, model, replica)
        groups = [
            state.group(r.model)
            for r in agent.device.values()
            if r.serves and r.model not in state.unwelcome  # else it is told to leave
        ]
        wrong += [
            f"{agent.gpu}: two models of group {group!r} at a time"
            for group in dict.fromkeys(groups)
            if group and groups.count(group) > 1
        ]
    wrong += [
        f"{key} of {model!r}, which is not deployed"
        for key in ("moves", "wishes", "with_ttl", "fingerprints")
        for model in getattr(state, key)
        if model not in state.deployments
    ]
    wrong += _line_faults(state)
    wrong += _plan_faults(state)
    wrong += _index_faults(state)
    wrong += state.shares.faults()
    return wrong


def _line_faults(state: "ClusterState") -> list[str]:
    wrong = []
    for model, line in state.waiting.items():
        if model not in state.deployments:
            wrong.append(f"waiters for {model!r}, which is not deployed")
        if not line:
            wrong.append(f"an empty line is kept for {model!r}")
        if not line.is_sorted():
            wrong.append(f"line of {model!r} is out of order")
    return wrong


def _plan_faults(state: "ClusterState") -> list[str]:
    wrong = []
    for model, plan in state.plans.items():
        if plan.model != model or plan.gpu not in state.agents:
            wrong.append(f"plan for {model!r} is {plan}")
        pinned = [r.gpu for r in state.suspended_replicas() if r.model == model]
        if pinned and plan.gpu not in pinned:
            wrong.append(f"{plan}, but {model!r} has suspended requests on {pinned}")
    wrong += [
        f"move of {model!r} is {move}"
        for model, move in state.moves.items()
        if move.model != model or move.source == move.gpu or move.gpu not in state.agents
    ]
    for agent in state.agents.values():
        planned = [model for model, plan in state.plans.items() if plan.gpu == agent.gpu]
        if list(agent.planned) != planned:
            wrong.append(f"{agent.gpu}: plans for {list(agent.planned)}, not {planned}")
    return wrong


def _index_faults(state: "ClusterState") -> list[str]:
    """Where what is filed differs from what is: an index made anew is the measure."""
    wrong = []
    fresh, index = Index(), state.index
    for agent in state.agents.values():
        replicas = agent.replicas.values()
        for replica in replicas:
            fresh.refile(replica)
        image_bytes = sum(r.image_bytes for r in replicas)
        if agent.image_bytes != image_bytes:
            wrong.append(f"{agent.gpu}: image_bytes {agent.image_bytes}, not {image_bytes}")
        by_state = {
            "device": [r.model for r in replicas if r.state in DEVICE_STATES],
            "suspended": [r.model for r in replicas if r.is_suspended],
            "loading": [r.model for r in replicas if r.state == "loading"],
            "cold": [r.model for r in replicas if r.state == "cold" and r.facts],
        }
        for name, models in by_state.items():
            if sorted(getattr(agent, name)) != sorted(models):
                wrong.append(f"{agent.gpu}: {name} has {list(getattr(agent, name))}, not {models}")
        if (agent.gpu in index.usable) != agent.is_usable:
            wrong.append(f"{agent.gpu}: filed as usable: {agent.gpu in index.usable}")
    wrong += [
        f"{name} has {sorted(getattr(index, name))}"
        for name in ("pending", "arriving", "large", "troubled", "unregistered")
        if sorted(getattr(index, name)) != sorted(getattr(fresh, name))
    ]
    for model, places in fresh.places.items():
        for ours, theirs in zip(index.of(model).all(), places.all(), strict=True):
            if sorted(ours) != sorted(theirs):
                wrong.append(f"places of {model!r}: {sorted(ours)}, not {sorted(theirs)}")
    filed, found = state.line.everything(), turns.line(state)
    if not index.changed.turns and {t.order for t in filed} != {t.order for t in found}:
        wrong.append(f"the line is {filed}, not {found}")
    return wrong


def replica_faults(gpu: str, model: str, replica: Replica) -> list[str]:
    """What must never be in one replica, as text; empty when all is well."""
    wrong = []
    name = f"{gpu}/{model} ({replica.state}, generation {replica.generation})"
    if (replica.gpu, replica.model) != (gpu, model):
        wrong.append(f"{name} is filed as {replica.gpu}/{replica.model}")
    if replica.floor > replica.generation:
        wrong.append(f"{name}: floor {replica.floor} is above its generation")
    if replica.in_flight < 0:
        wrong.append(f"{name}: in_flight is {replica.in_flight}")
    if replica.pending and replica.state not in PENDING_STATES[replica.pending.kind]:
        wrong.append(f"{name}: {replica.pending.kind} is pending; history {replica.life.history}")
    if replica.pending and replica.pending.preempt and replica.pending.kind != "swap_out":
        wrong.append(f"{name}: a {replica.pending.kind} that preempts is pending")
    if replica.state == "failed" and replica.failure is None:
        wrong.append(f"{name} has no failure; history {replica.life.history}")
    if replica.state in DEVICE_STATES and replica.facts is None:
        wrong.append(f"{name} holds device memory of unknown size")
    return wrong
