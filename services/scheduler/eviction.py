"""Which idle model leaves first, by the policy that is set: pure choices.

value    the one whose bytes are worth least: least likely to be wanted soon, per byte. How
likely is told by how long nobody wanted it. Equal sizes: the least recently used
lru      least recently used
gdsf     GreedyDual-Size-Frequency: uses x cost / size, aged by what was evicted before
(Cherkasova, HPL-98-69)
belady   the one that is wanted last, by foresight: what no policy can beat where sizes are
equal. In simulations only
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from services.scheduler.replica import Replica

if TYPE_CHECKING:
    from services.scheduler.state import ClusterState


def in_order(state: "ClusterState", idle: Iterable[Replica], now: float) -> list[Replica]:
    """``idle`` replicas, the first to leave first."""
    match state.config.eviction:
        case "lru":
            return sorted(idle, key=_last_used)
        case "gdsf":
            return sorted(idle, key=_worth)
        case "belady":
            return sorted(idle, key=_wanted_last_first(state, now))
        case "value":
            return sorted(idle, key=lambda r: -max(now - r.last_used, 0.0) * r.footprint_bytes)


def note_use(state: "ClusterState", replica: Replica) -> None:
    """A request started on it."""
    replica.num_uses += 1
    if state.config.eviction == "gdsf":
        gib = max(replica.footprint_bytes, 1) / 2**30
        cost_s = replica.agent.link.swap_in_s(replica.weight_bytes) or 1.0
        replica.worth = state.inflation + replica.num_uses * cost_s / gib


def note_eviction(state: "ClusterState", replica: Replica) -> None:
    """It is told to leave."""
    state.inflation = max(state.inflation, replica.worth)
    replica.num_uses = 0


def _last_used(replica: Replica) -> float:
    return replica.last_used


def _worth(replica: Replica) -> float:
    return replica.worth


def _wanted_last_first(state: "ClusterState", now: float) -> Callable[[Replica], float]:
    next_use = state.next_use
    if next_use is None:
        raise ValueError("eviction = 'belady' needs foresight, which only simulations have")
    return lambda replica: -next_use(replica.model, now)
