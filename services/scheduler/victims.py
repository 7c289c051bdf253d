"""Who leaves the device so that another model may come in: pure choices.

    idle    nobody runs there or waits for it          leaves at once
    busy    it had its quantum, the other is overdue   preempted: its requests are suspended

A deployment that must not be interrupted is drained instead: it leaves when its requests ended.
"""

from collections.abc import Callable, Collection, Sequence

from services.scheduler.replica import Agent, Replica
from services.scheduler.state import ClusterState


def _can_leave(replica: Replica, now: float) -> bool:
    """Resident and free to be commanded; one that failed to leave is left alone for a while."""
    return (
        replica.state == "resident"
        and replica.is_settled
        and (replica.failure is None or replica.failure.retry_at <= now)
    )


def is_idle(state: ClusterState, replica: Replica) -> bool:
    """Nobody runs on it, is suspended there, or waits for its model."""
    return replica.in_flight == 0 and replica.model not in state.waiting


def idle_victims(state: ClusterState, agent: Agent, now: float) -> list[Replica]:
    """Idle residents, least recently used first."""
    idle = [r for r in agent.replicas.values() if _can_leave(r, now) and is_idle(state, r)]
    return sorted(idle, key=lambda r: r.last_used)


def quantum_s(state: ClusterState, replica: Replica) -> float:
    """How long a busy replica may stay, once it is in memory (seconds).

    In proportion to what its swap-in took, or models that are slow to bring in would spend their
    turns on being swapped.
    """
    return max(state.config.run_quantum_s, state.config.preempt_factor * replica.swap_s)


def busy_victims(state: ClusterState, agent: Agent, now: float) -> list[Replica]:
    """Busy residents that had their run quantum, least recently swapped in first."""
    busy = [
        r
        for r in agent.replicas.values()
        if _can_leave(r, now)
        and not is_idle(state, r)
        and now - r.resident_since >= quantum_s(state, r)
    ]
    return sorted(busy, key=lambda r: r.resident_since)


def may_preempt(state: ClusterState, replica: Replica) -> bool:
    """Whether the settings of its deployment let its requests be suspended."""
    spec = state.deployments.get(replica.model)
    return spec is None or spec.preemption != "drain"


def drains_to_cut_short(
    state: ClusterState, agent: Agent, closed: Collection[str], now: float
) -> list[Replica]:
    """Victims that were idle when they were chosen, took a request all the same, and still drain.

    Not where the GPU is closed: those make room in host memory, which only their end does.
    """
    return [
        r
        for r in agent.replicas.values()
        if agent.gpu not in closed
        and r.state == "draining"
        and r.in_flight
        and r.pending
        and not r.pending.preempt
        and now - r.pending.sent_at > state.config.run_quantum_s
        and may_preempt(state, r)
    ]


def device_bytes(replica: Replica) -> int:
    return replica.device_bytes


def image_bytes(replica: Replica) -> int:
    return replica.image_bytes


def choose_victims(
    candidates: Sequence[Replica],
    need_bytes: int,
    size: Callable[[Replica], int] = device_bytes,
) -> tuple[Replica, ...] | None:
    """The smallest prefix of ``candidates`` that frees ``need_bytes``, less what it can spare.

    ``size`` says what one of them frees. None if all of them together do not free enough.
    ``need_bytes <= 0`` needs nobody.
    """
    chosen: list[Replica] = []
    freed_bytes = 0
    for replica in candidates:
        if freed_bytes >= need_bytes:
            break
        chosen.append(replica)
        freed_bytes += size(replica)
    if freed_bytes < need_bytes:
        return None
    # The last one may be so large that some before it can stay: spare the most recent first.
    for replica in reversed(chosen[:-1]):
        if freed_bytes - size(replica) >= need_bytes:
            chosen.remove(replica)
            freed_bytes -= size(replica)
    return tuple(chosen)
