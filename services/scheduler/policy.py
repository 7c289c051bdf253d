"""Where the next model goes, and who has to leave for it: pure choices.

Nothing here changes the state; `services.scheduler.decide` does what these functions choose.

Models wait in one line, by their turns (`services.scheduler.turns`). *Claims* are bytes of a GPU
that are spoken for by models ahead in line: what is freed for one model is never given to a later
one. A turn is *overdue* when it has waited longer than the run quantum.
"""

from collections.abc import Collection
from typing import Literal, TypeAlias

import msgspec

from services.scheduler import host_memory
from services.scheduler.lifecycle import DEVICE_STATES
from services.scheduler.replica import Agent, Replica
from services.scheduler.state import ClusterState
from services.scheduler.turns import Turn
from services.scheduler.victims import (
    busy_victims,
    choose_victims,
    idle_victims,
    image_bytes,
    is_idle,
)

Action: TypeAlias = Literal["swap_in", "wait", "evict", "load", "claim", "make_room"]
Claims: TypeAlias = dict[str, int]  # gpu -> bytes


class Placement(msgspec.Struct, frozen=True):
    """Where a waiting model goes and what has to be done for it now.

    ``swap_in``: it fits. ``wait``: bytes already on their way out will do. ``evict``: swap out
    ``victims`` first. ``load``: there is no host image. ``claim``: nothing can be done yet, but
    it is overdue, so models behind it must not take bytes of this GPU. ``make_room``: drain
    ``victims``, so that their host images may be dropped for this one; until then the GPU is
    *closed*: no model behind may come in, or its image would be in the way instead, but those
    with suspended requests there, whose images are in the way until these have ended.
    """

    gpu: str
    action: Action
    victims: tuple[str, ...] = ()


def can_host(agent: Agent, replica: Replica, now: float) -> bool:
    """Registered, not failed, no larger than the device, and free to be commanded."""
    return (
        replica.facts is not None
        and (
            replica.state == "cold"
            or (replica.state == "host" and not host_memory.is_dropping(agent))
        )
        and replica.is_settled
        and replica.footprint_bytes <= agent.budget_bytes
        and (replica.failure is None or replica.failure.retry_at <= now)
    )


def is_loading_for_waiters(state: ClusterState, agent: Agent) -> bool:
    """Loads for waiters go one at a time per agent: the earliest gets the whole disk."""
    return any(r.state == "loading" and r.model in state.waiting for r in agent.replicas.values())


def is_overdue(state: ClusterState, turn: Turn, now: float) -> bool:
    return now - turn.since > state.config.run_quantum_s


def arrivals_to_call_off(state: ClusterState) -> list[Replica]:
    """Replicas that are swapped in for waiters who have all left.

    Only where we commanded it: a new leader that finds a swap-in under way does not know yet
    who waits. What was freed for it is not given back: its former owner's pages are still
    cached, and come back for free when they are wanted.
    """
    return [
        replica
        for agent in state.usable_agents()
        for replica in agent.replicas.values()
        if replica.pending and replica.pending.kind == "swap_in" and is_idle(state, replica)
    ]


# -- placement -----------------------------------------------------------------------------


class _Option(msgspec.Struct, frozen=True):
    rank: int  # number in the decision tree of `place`
    placement: Placement
    pressure: float  # busy bytes / budget
    victim_bytes: int
    missing_bytes: int  # of the weights, not on the device any more
    free_bytes: int

    @property
    def order(self) -> tuple[int, float, int, int, int]:
        return (
            self.rank,
            self.pressure,
            self.victim_bytes,
            self.missing_bytes,
            -self.free_bytes,
        )


def pressure(state: ClusterState, agent: Agent) -> float:
    """Share of the budget that is held by replicas with requests running or waiting, or that
    suspended requests will need there.
    """
    busy_bytes = sum(
        r.footprint_bytes
        for r in agent.replicas.values()
        if r.is_suspended or (r.state in DEVICE_STATES and not is_idle(state, r))
    )
    return busy_bytes / agent.budget_bytes if agent.budget_bytes else 1.0


def place(
    state: ClusterState, turn: Turn, claims: Claims, now: float, closed: Collection[str] = ()
) -> Placement | None:
    """Where the model of ``turn`` goes; None if nothing can be done for it now.

    Suspended requests can go on only where they are, so their GPU is the one to look at. Else, of
    all usable agents where the model is registered and no larger than the device, take the one
    with the lowest number here; among equals the one with the least `pressure`, then the
    fewest bytes evicted, then the fewest to copy, then the most free bytes:

    1. host image there, and free bytes that nobody ahead claims: swap in.
    2. host image there, and with the bytes on their way out it fits: wait for them.
    3. host image there, and idle victims make room: evict them.
    4. no host image, but the room is there or idle victims would make it: load.
    5. host image there, overdue, and busy victims that had their quantum make room: evict. They
       are preempted: their requests are suspended, and wait for their own turn. Those of a
       deployment that must not be interrupted are drained.
    6. no host image, and no room in sight: load, so that it is ready when there is.
    7. host image there, overdue: claim.
    8. no host image, and host memory is full of images of models on the device or with suspended
       requests: swap out idle ones to make room for it; if it is overdue also drain busy ones
       that had their quantum, and let suspended ones in so that they get drained in their turn.
       Nobody is preempted here: requests whose image is dropped start over.

    4, 6 and 8 only while it is not being loaded anywhere, 6 and 8 only if it has no host image
    at all, and 4 and 6 only where host memory has room or images that may be dropped. Nothing
    is loaded where another waiting model's load still runs.
    """
    replicas = state.usable_replicas(turn.model)
    may_load = not any(r.state == "loading" for r in replicas)
    has_image = any(r.state == "host" for r in replicas)
    overdue = is_overdue(state, turn, now)
    options: list[_Option] = []
    for replica in replicas:
        agent = state.agents[replica.gpu]
        if turn.gpu not in ("", agent.gpu) or not can_host(agent, replica, now):
            continue
        free = agent.free_bytes
        is_closed = agent.gpu in closed and not turn.gpu
        claimed = agent.budget_bytes if is_closed else claims.get(agent.gpu, 0)
        deficit = replica.footprint_bytes + claimed - free - agent.leaving_bytes
        idle = idle_victims(state, agent, now)
        victims = choose_victims(idle, deficit)
        action: Action
        if replica.state == "host":
            if deficit <= 0 and free >= replica.footprint_bytes:
                rank, action = 1, "swap_in"
            elif deficit <= 0:
                rank, action = 2, "wait"
            elif victims is not None:
                rank, action = 3, "evict"
            elif not overdue:
                continue
            else:
                victims = choose_victims([*idle, *busy_victims(state, agent, now)], deficit)
                rank, action = (5, "evict") if victims is not None else (7, "claim")
        elif may_load and not is_loading_for_waiters(state, agent):
            if has_image and victims is None:
                continue
            shortage = host_memory.shortage(state, agent, replica)
            if shortage <= 0:
                rank, action = (6 if victims is None else 4), "load"
            elif has_image:
                continue
            else:
                busy = busy_victims(state, agent, now) if overdue else []
                last = host_memory.suspended_images(agent) if overdue else []
                shortage -= host_memory.leaving_bytes(agent)
                victims = choose_victims([*idle, *busy, *last], shortage, image_bytes)
                if victims is None and not overdue:
                    continue
                rank, action = 8, "make_room"
        else:
            continue
        leaving = (victims or ()) if action in ("evict", "make_room") else ()
        leaving = tuple(r for r in leaving if r.state == "resident")  # the rest is let in first
        options.append(
            _Option(
                rank=rank,
                placement=Placement(agent.gpu, action, tuple(r.model for r in leaving)),
                pressure=pressure(state, agent),
                victim_bytes=sum(r.device_bytes for r in victims or ()),
                missing_bytes=replica.weight_bytes - replica.cached_bytes,
                free_bytes=free,
            )
        )
    return min(options, key=lambda option: option.order).placement if options else None


def choose_preload(state: ClusterState, agent: Agent, now: float) -> Replica | None:
    """What ``agent`` may load while no load runs there: deployments in order, if they want it.

    Only what fits into host memory, so that it never drops another image. A model whose load
    failed is loaded again also without ``preload``: while it looks failed nobody would ask for it.
    """
    if any(r.state == "loading" for r in agent.replicas.values()):
        return None
    for model, spec in state.deployments.items():
        replica = agent.replicas.get(model)
        if replica is None or replica.state != "cold" or not can_host(agent, replica, now):
            continue
        if (spec.preload or replica.is_broken) and host_memory.fits_unasked(agent, replica):
            return replica
    return None
