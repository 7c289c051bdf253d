"""What is brought in before anybody asks: into memory that nobody uses, over a link that is idle.

Off unless ``prefetch`` is set: of models that are all equally likely next, a guess moves bytes for
nothing. So it is kept from hurting anybody::

    begins     nobody is in line, nothing is on its way into that GPU, and it fits without a victim
    gives way  as soon as its GPU is chosen for anybody who waits: it is called off,
               and what has arrived stays on the device until its pages are needed
    stays      when somebody asks for it on its way, or once it is there: then it is like any other

The model that was asked for most often lately comes first, if it is asked for at all.
"""

from collections.abc import Iterator
from heapq import nlargest

from services.scheduler import policy
from services.scheduler.replica import Agent, Replica
from services.scheduler.state import ClusterState

ASKED_PER_S_AT_LEAST = 0.01  # lately; less often is as good as never
_MOST_MODELS = 32  # that are looked at for a GPU


def choose(state: ClusterState, now: float) -> Iterator[Replica]:
    """One replica at most for each GPU."""
    if state.line or state.plans:
        return
    models = _likely(state, now)
    chosen: set[str] = set()
    for agent in state.index.usable.values():
        if any(r.state == "swapping_in" for r in agent.device.values()):
            continue
        for model in models:
            replica = agent.replicas.get(model)
            if replica and model not in chosen and _fits(state, agent, replica, now):
                chosen.add(model)
                yield replica
                break


def _likely(state: ClusterState, now: float) -> list[str]:
    """Models on no GPU, the one asked for most often lately first."""
    asked = [
        (tempo.asked_per_s(now), model)
        for model, tempo in state.tempos.items()
        if model not in state.with_ttl and not state.index.of(model).device
    ]
    able = (one for one in asked if one[0] >= ASKED_PER_S_AT_LEAST)
    return [model for _, model in nlargest(_MOST_MODELS, able)]


def _fits(state: ClusterState, agent: Agent, replica: Replica, now: float) -> bool:
    spec = state.deployments.get(replica.model)
    return (
        replica.state == "host"
        and spec is not None
        and (not spec.gpus or agent.gpu in spec.gpus)
        and policy.can_host(agent, replica, now)
        and not policy.rivals(state, replica)
        and replica.footprint_bytes <= agent.free_bytes
    )
