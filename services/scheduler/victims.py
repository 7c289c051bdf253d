"""Who leaves the device so that another model may come in: pure choices.

    idle    nobody runs there or waits for it                   leaves at once
    coming  prefetched, and nobody has asked for it yet         is called off
    busy    it had its quantum, and its requests are so far     preempted: its requests are
            ahead of their target that they can be kept         suspended
            waiting for the newcomer's turn; or swaps are
            quick; or the newcomer has waited so long that
            it must come in

A deployment that must not be interrupted is drained instead: it leaves when its requests ended. A
pinned one does not leave at all, one that just came in not before its minimum residency, and a
*large* model, one that needs more than half of its GPU, not always for smaller ones (`is_kept`).
"""

from collections.abc import Callable, Collection, Iterable, Sequence

from services.scheduler import batches, eviction
from services.scheduler.replica import Agent, Replica
from services.scheduler.state import ClusterState

_GPUS_PER_LARGE = 8  # one GPU of so many is kept for large models,
_KEPT_S = 20.0  # until nobody has asked for the one that is there for so long,
_WORTH_KEEPING = 0.25  # if its swap-in takes more than so much of its target for first tokens
_QUICK = 10.0  # swap-ins in a run quantum: where so many fit, each costs next to nothing


def gives_way(state: ClusterState, replica: Replica) -> bool:
    """It is prefetched (`services.scheduler.prefetch`), on its way in, and nobody wants it yet."""
    pending = replica.pending
    return (
        replica.state == "swapping_in"
        and pending is not None
        and pending.is_prefetch
        and state.is_idle(replica)
    )


def _can_leave(state: ClusterState, replica: Replica, now: float) -> bool:
    """Resident and free to be commanded; one that failed to leave is left alone for a while."""
    return gives_way(state, replica) or (
        replica.state == "resident"
        and replica.is_settled
        and (replica.failure is None or replica.failure.retry_at <= now)
        and not state.is_pinned(replica.model)
        and not _is_new(state, replica, now)
    )


def _is_new(state: ClusterState, replica: Replica, now: float) -> bool:
    """It has not been there for as long as its settings say that it stays."""
    at_least_s = state.min_residency_s(replica.model)
    return at_least_s > 0 and now - replica.resident_since < at_least_s


def idle_victims(state: ClusterState, agent: Agent, now: float) -> list[Replica]:
    """Idle residents, the first to leave first (`services.scheduler.eviction`)."""
    idle = [r for r in agent.device.values() if state.is_idle(r) and _can_leave(state, r, now)]
    return eviction.in_order(state, idle, now) if len(idle) > 1 else idle


def is_kept(state: ClusterState, newcomer: Replica, victim: Replica, now: float) -> bool:
    """Whether ``victim`` is a large model that does not leave for ``newcomer``, a smaller one.

    Small models break a room for a large one wherever they go, and the next large request waits
    until a whole GPU can be cleared without harm. So one GPU in eight stays with large models,
    which take turns there, while they are asked for. Pinned newcomers are not held up. Where swaps
    are quick there is no need for it.
    """
    return (
        victim.is_large
        and state.config.keep_large
        and not newcomer.is_large
        and len(state.index.large) <= len(state.index.usable) // _GPUS_PER_LARGE
        and (victim.in_flight > 0 or now - victim.last_used < _KEPT_S)
        and not state.is_pinned(newcomer.model)
        and victim.agent.link.swap_in_s(victim.weight_bytes)
        > _WORTH_KEEPING * state.ttft_target_s(victim.model, "interactive")
    )


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
        for r in agent.device.values()
        if not state.is_idle(r)
        and now - r.resident_since >= quantum_s(state, r)
        and _can_leave(state, r, now)
    ]
    return sorted(busy, key=lambda r: r.resident_since)


def batch_victims(state: ClusterState, agent: Agent, now: float) -> list[Replica]:
    """Residents that serve nothing but requests of class batch, and give way without a quantum, but
    for one that was brought in because these had waited for very long.
    """
    able = [
        r
        for r in agent.device.values()
        if batches.is_batch_only(state, r)
        and not (r.came_late and now - r.resident_since < quantum_s(state, r))
        and _can_leave(state, r, now)
    ]
    return sorted(able, key=lambda r: r.resident_since)


def slack_victims(
    state: ClusterState, agent: Agent, newcomer: Replica, now: float
) -> list[Replica]:
    """Of `busy_victims` those that can spare the time of one turn of ``newcomer``
    (`missing_slack_s`). The most slack first. None where swaps are slow for a quantum, or the link
    is busy.
    """
    config = state.config
    in_s = arrival_s(state, agent, now)
    able = []
    for replica in busy_victims(state, agent, now):
        swaps_s = in_s + newcomer.swap_in_s + replica.swap_in_s
        if swaps_s > config.guard_factor * config.run_quantum_s:
            continue
        if missing_slack_s(state, newcomer, replica, now, in_s) <= 0:
            able.append((-state.slack_s(replica, now), replica.model, replica))
    return [replica for _, _, replica in sorted(able)]


def missing_slack_s(
    state: ClusterState, newcomer: Replica, victim: Replica, now: float, in_s: float = 0.0
) -> float:
    """What the slack of ``victim`` lacks of the time that a turn of ``newcomer`` takes: two swaps,
    what the link does before that (``in_s``), and a run quantum. 0 or less: nothing.

    Where swaps are quick nobody asks for slack: models take turns of a quantum at next to no cost,
    and requests that write hardly faster than they have to would never earn the time of one.
    """
    if takes_turns(state, newcomer, victim):
        return 0.0
    turn_s = in_s + newcomer.swap_in_s + victim.swap_in_s + state.config.run_quantum_s
    return turn_s - state.slack_s(victim, now)


def takes_turns(state: ClusterState, newcomer: Replica, victim: Replica) -> bool:
    """Whether swaps of both are known to be quick."""
    swap_s = max(newcomer.swap_in_s, victim.swap_in_s)
    return newcomer.agent.link.is_known and is_quick(state, swap_s)


def is_quick(state: ClusterState, swap_in_s: float) -> bool:
    """So many such swap-ins fit in a run quantum that one costs next to nothing."""
    return _QUICK * swap_in_s <= state.config.run_quantum_s


def num_made_late(
    state: ClusterState, agent: Agent, newcomer: Replica, victims: Iterable[Replica], now: float
) -> float:
    """How many requests for the busy ones of ``victims`` are likely to come too late for their
    first token to be in time, because ``newcomer`` has one turn there.
    """
    away_s = arrival_s(state, agent, now) + newcomer.swap_in_s + state.config.run_quantum_s
    num = 0.0
    for replica in victims:
        if not state.is_idle(replica) and not batches.is_batch_only(state, replica):
            target_s = state.ttft_target_s(replica.model, "interactive")
            too_long_s = max(0.0, away_s + replica.swap_in_s - target_s)
            num += too_long_s * state.tempo(replica.model).asked_per_s(now)
    return num


def arrival_s(state: ClusterState, agent: Agent, now: float) -> float:
    """How long the link into ``agent`` is still busy with swap-ins, by what they should take."""
    left_s = 0.0
    for replica in agent.device.values():
        if replica.state == "swapping_in":
            left_s += replica.arrives_in_s(now)
    return left_s


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
        for r in agent.device.values()
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
