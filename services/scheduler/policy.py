"""Where the next model goes, and who has to leave for it: pure choices.

Nothing here changes the state; `services.scheduler.decide` does what these functions choose.

Models wait in one line, by their turns (`services.scheduler.turns`). *Claims* are bytes of a GPU
that are spoken for by models ahead in line: what is freed for one model is never given to a later
one. A turn is *overdue* when it has waited longer than the run quantum.
"""

from collections.abc import Collection
from itertools import islice
from typing import Literal, TypeAlias

import msgspec

from services.scheduler import batches, host_memory
from services.scheduler.index import FEW
from services.scheduler.lifecycle import LEAVING_STATES
from services.scheduler.replica import Agent, Replica
from services.scheduler.state import ClusterState
from services.scheduler.turns import Turn
from services.scheduler.victims import (
    arrival_s,
    batch_victims,
    busy_victims,
    choose_victims,
    idle_victims,
    image_bytes,
    is_kept,
    is_quick,
    num_made_late,
    slack_victims,
)

Action: TypeAlias = Literal["swap_in", "wait", "evict", "load", "claim", "make_room"]
Claims: TypeAlias = dict[str, int]  # gpu -> bytes

MOST_GPUS = 8  # that are looked at for one turn, of each kind
_PRESSURE_S = 0.5  # what a GPU whose memory is all in use costs a newcomer, in computing
_ROW_S = 0.001  # and each request that runs there
_HURRY = 1.5  # who is due within so many times what its swap-in takes is in a hurry
_HURRY_BACK = 3.0  # the same of suspended requests; until then they leave the link to others
_PATIENCE = 20.0  # swap-ins: where they are slow, who waits longest must wait longer
_RETURN_S = 10.0  # a model that was idle for less is as likely as not wanted again soon


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


class Option(msgspec.Struct, frozen=True):
    """One GPU as a place for a turn. ``rank``: number in the decision tree of `weigh`.

    ``cost_s``: what it costs, in seconds: until it has arrived, for computing beside others, and
    for bringing victims back that are likely to be wanted again.
    """

    rank: int
    placement: Placement
    cost_s: float
    victim_bytes: int
    missing_bytes: int  # of the weights, not on the device any more
    free_bytes: int
    victims_used_at: float  # when the one used last was used

    @property
    def by_load(self) -> tuple[int, float, int, int, int, int]:
        return (
            max(self.rank, 3),  # 1 to 3 hurt nobody
            round(self.cost_s, 2),
            self.rank,
            self.victim_bytes,
            self.missing_bytes,
            -self.free_bytes,
        )

    @property
    def by_memory(self) -> tuple[int, float, int]:
        return (self.rank, self.victims_used_at, -self.free_bytes)


def can_host(agent: Agent, replica: Replica, now: float) -> bool:
    """Registered, not failed, no larger than the device, and free to be commanded."""
    state = replica.state
    return (
        replica.facts is not None
        and (state == "cold" or (state == "host" and not host_memory.is_dropping(agent)))
        and (not replica.is_stale or replica.is_suspended)  # what is suspended ends as it began
        and replica.is_settled
        and replica.footprint_bytes <= agent.budget_bytes
        and (replica.failure is None or replica.failure.retry_at <= now)
    )


def is_loading_for_waiters(state: ClusterState, agent: Agent) -> bool:
    """Loads for waiters go one at a time per agent: the earliest gets the whole disk."""
    return any(model in state.waiting for model in agent.loading)


def is_overdue(state: ClusterState, turn: Turn, now: float) -> bool:
    since = turn.waits_since if turn.is_batch else turn.since
    return now - since > state.config.run_quantum_s


def to_call_off(state: ClusterState, replica: Replica) -> bool:
    """Whether it is swapped in for waiters who have all left.

    Only where we commanded it: a new leader that finds a swap-in under way does not know yet
    who waits. What was freed for it is not given back: its former owner's pages are still
    cached, and come back for free when they are wanted.
    """
    pending = replica.pending
    return (
        replica.state == "swapping_in"
        and pending is not None
        and pending.kind == "swap_in"
        and not pending.is_unasked
        and state.is_idle(replica)
    )


# -- placement -----------------------------------------------------------------------------


def pressure(state: ClusterState, agent: Agent) -> float:
    """Share of the budget that is held by replicas with requests running or waiting, or that
    suspended requests will need there.
    """
    return busy_bytes(state, agent) / agent.budget_bytes if agent.budget_bytes else 1.0


def busy_bytes(state: ClusterState, agent: Agent) -> int:
    busy = [r for r in agent.device.values() if r.in_flight or _is_wanted_here(state, r)]
    return sum(r.footprint_bytes for r in (*busy, *agent.suspended.values()))


def _is_wanted_here(state: ClusterState, replica: Replica) -> bool:
    """Somebody waits for its model, which is on so few GPUs that it may well be served here."""
    model = replica.model
    return model in state.waiting and len(state.index.of(model).device) <= FEW


def room_bytes(state: ClusterState, agent: Agent) -> int:
    """What a newcomer could have here without hurting anybody."""
    return agent.budget_bytes - busy_bytes(state, agent) - agent.planned_bytes


def candidates(state: ClusterState, turn: Turn) -> list[Agent]:
    """The GPUs to look at for ``turn``: all of few; of many, those with the most room, those where
    some of the model is left, and the few that have its host image, where it is only few.
    """
    usable = state.index.usable
    spec = state.deployments.get(turn.model)
    allowed = spec.gpus if spec else ()
    if turn.gpu or allowed:  # suspended ones go on where they are, whatever is allowed by now
        named = (turn.gpu,) if turn.gpu else allowed
        return [usable[gpu] for gpu in named if gpu in usable]
    if len(usable) <= MOST_GPUS:
        return list(usable.values())
    places = state.index.of(turn.model)
    chosen = dict.fromkeys(islice(places.cached, MOST_GPUS))
    if len(places.host) <= MOST_GPUS:
        chosen.update(dict.fromkeys(places.host))
    chosen.update(dict.fromkeys(gpu for _, gpu in islice(state.index.rooms, MOST_GPUS)))
    return [usable[gpu] for gpu in chosen if gpu in usable]


def choose(state: ClusterState, options: list[Option]) -> Option | None:
    """The best of them: see `weigh`."""
    if state.config.placement == "memory":
        return min(options, key=lambda option: option.by_memory, default=None)
    return min(options, key=lambda option: option.by_load, default=None)


def weigh(
    state: ClusterState, turn: Turn, claims: Claims, now: float, closed: Collection[str] = ()
) -> list[Option]:
    """What could be done for the model of ``turn``, one option at most for each GPU.

    Suspended requests can go on only where they are, so their GPU is the one to look at. Else, of
    the usable agents where the model is registered and no larger than the device, take the one
    with the lowest number here, 1 to 3 being as good as each other; among equals the cheapest
    (`Option.cost_s`), then the lowest number, the fewest bytes evicted, the fewest to copy, and the
    most free bytes:

    1. host image there, and free bytes that nobody ahead claims: swap in.
    2. host image there, and with the bytes on their way out it fits: wait for them.
    3. host image there, and idle victims make room: evict them.
    4. no host image, but the room is there or idle victims would make it: load.
    5. host image there, and busy victims make room that can spare the time, or that had their
       quantum if the turn has waited for very long, or if they serve only who has had more than a
       fair share and the turn is for others, and soon due: evict. They are preempted: their
       requests are suspended, and wait for their own turn. Those of a deployment that must not be
       interrupted are drained. Victims that serve only requests of class batch always can.
    6. no host image, and no room in sight: load, so that it is ready when there is.
    7. host image there, overdue: claim.
    8. no host image, and host memory is full of images of models on the device or with suspended
       requests: swap out idle ones to make room for it; if it is overdue also drain busy ones
       that had their quantum, and let suspended ones in so that they get drained in their turn.
       Nobody is preempted here: requests whose image is dropped start over.

    4, 6 and 8 only while it is not being loaded anywhere, 6 and 8 only if it has no host image
    at all, and 4 and 6 only where host memory has room or images that may be dropped. Nothing
    is loaded where another waiting model's load still runs. Where nobody waits (another replica
    of a model that is served, a pinned one) 1 to 3 only: it is not worth hurting anybody. What an
    operator asked for may be loaded besides, with nobody but idle ones making room.
    """
    places = state.index.of(turn.model)
    may_load = not any(r.agent.is_usable for r in places.loading.values())
    has_image = any(r.agent.is_usable for r in places.host.values())
    if turn.is_asked and turn.gpu:  # nowhere else will do
        may_load, has_image = turn.gpu not in places.loading, turn.gpu in places.host
    is_loadable = may_load and (turn.is_asked or not turn.is_extra)
    overdue = is_overdue(state, turn, now)
    options: list[Option] = []
    for agent in candidates(state, turn):
        replica = agent.replicas.get(turn.model)
        if replica is None or not can_host(agent, replica, now):
            continue
        free = agent.free_bytes
        is_closed = agent.gpu in closed and not turn.gpu
        claimed = agent.budget_bytes if is_closed else claims.get(agent.gpu, 0)
        claimed += agent.planned_bytes
        deficit = replica.footprint_bytes + claimed - free - agent.leaving_bytes
        idle = batches.not_wanted_for_long(state, turn, idle_victims(state, agent, now), now)
        idle = _leaving_for(state, replica, turn, idle, now)
        rivals_there = rivals(state, replica)
        victims = _choose(idle, rivals_there, deficit)
        action: Action
        if replica.state == "host":
            if deficit <= 0 and free >= replica.footprint_bytes and not rivals_there:
                rank, action = 1, "swap_in"
            elif deficit <= 0 and all(
                r.state in ("draining", "swapping_out") for r in rivals_there
            ):
                rank, action = 2, "wait"
            elif victims is not None:
                rank, action = 3, "evict"
            elif turn.is_extra:
                continue
            else:
                batch = [] if turn.is_batch else batch_victims(state, agent, now)
                busy = _preemptible(state, agent, replica, turn, now)
                busy = [*batch, *(r for r in busy if r not in batch)]
                busy = _leaving_for(state, replica, turn, busy, now)
                victims = _choose([*idle, *busy], rivals_there, deficit) if busy else None
                if victims is not None and _is_worth_it(state, agent, replica, turn, victims, now):
                    rank, action = 5, "evict"
                elif overdue:
                    rank, action = 7, "claim"
                else:
                    continue
        elif is_loadable and not is_loading_for_waiters(state, agent):
            if has_image and victims is None:
                continue
            shortage = host_memory.shortage(state, agent, replica)
            if shortage <= 0:
                rank, action = (6 if victims is None else 4), "load"
            elif has_image:
                continue
            else:
                is_urgent = overdue and not turn.is_extra
                busy = busy_victims(state, agent, now) if is_urgent else []
                last = host_memory.suspended_images(agent) if is_urgent else []
                shortage -= host_memory.leaving_bytes(agent)
                victims = choose_victims([*idle, *busy, *last], shortage, image_bytes)
                if victims is None and not is_urgent:
                    continue
                rank, action = 8, "make_room"
        else:
            continue
        leaving = (victims or ()) if action in ("evict", "make_room") else ()
        # Suspended ones are let in first; what is prefetched is called off.
        leaving = tuple(r for r in leaving if r.state in ("resident", "swapping_in"))
        options.append(
            Option(
                rank=rank,
                placement=Placement(agent.gpu, action, tuple(r.model for r in leaving)),
                cost_s=_cost_s(state, agent, replica, victims or (), now),
                victim_bytes=sum(r.device_bytes for r in victims or ()),
                missing_bytes=replica.weight_bytes - replica.cached_bytes,
                free_bytes=free,
                victims_used_at=max((r.last_used for r in victims or ()), default=0.0),
            )
        )
    return options


def _preemptible(
    state: ClusterState, agent: Agent, newcomer: Replica, turn: Turn, now: float
) -> list[Replica]:
    """Busy replicas that may be preempted for ``turn``, the first to leave first."""
    config = state.config
    waited_s = now - turn.since
    if config.preemption == "off" or batches.is_put_back(turn, now):
        return []
    swap_s = newcomer.swap_in_s
    if turn.request_id or is_quick(state, swap_s):
        has_time, hurry_s = waited_s < config.preempt_after_s, _HURRY * swap_s
    else:  # who is suspended has time until it is due: coming back sooner only moves bytes
        has_time, hurry_s = True, _HURRY_BACK * swap_s
    if has_time and now + hurry_s < turn.due_at:
        return []
    if _is_starving(state, newcomer, turn, now):
        return busy_victims(state, agent, now)
    able = slack_victims(state, agent, newcomer, now)
    if turn.put_back_s or turn.due_at > now + config.ttft_target_s:
        return able
    if not state.shares.are_compared:
        return able
    yielding = [r for r in busy_victims(state, agent, now) if state.yields(r)]
    return [*yielding, *(r for r in able if r not in yielding)] if yielding else able


def _leaving_for(
    state: ClusterState, newcomer: Replica, turn: Turn, able: list[Replica], now: float
) -> list[Replica]:
    """Of those that are ``able`` to leave the ones that do so for ``newcomer``: a GPU that is kept
    for large models is open to smaller ones only when these have waited for very long.
    """
    kept = [
        r for r in able if is_kept(state, newcomer, r, now) and not batches.is_batch_only(state, r)
    ]
    if not kept or (not turn.is_extra and _is_starving(state, newcomer, turn, now)):
        return able
    return [r for r in able if r not in kept]


def patience_s(state: ClusterState, newcomer: Replica) -> float:
    """Who has waited for longer may preempt without asking for slack (seconds)."""
    return max(state.config.starvation_s, _PATIENCE * newcomer.swap_in_s)


def _is_starving(state: ClusterState, newcomer: Replica, turn: Turn, now: float) -> bool:
    return now - turn.waits_since > patience_s(state, newcomer)


def _is_worth_it(
    state: ClusterState,
    agent: Agent,
    newcomer: Replica,
    turn: Turn,
    victims: Collection[Replica],
    now: float,
) -> bool:
    """Whether preempting ``victims`` makes next to no requests late that have not come yet."""
    num_late = num_made_late(state, agent, newcomer, victims, now)
    return num_late <= state.config.harm_at_most or _is_starving(state, newcomer, turn, now)


def rivals(state: ClusterState, newcomer: Replica) -> list[Replica]:
    """Those on the device that must not be there at the same time as ``newcomer``."""
    spec = state.deployments.get(newcomer.model)
    if spec is None or not spec.exclusive_group:
        return []
    return [
        r
        for r in newcomer.agent.device.values()
        if r is not newcomer and state.group(r.model) == spec.exclusive_group
    ]


def _choose(
    able: list[Replica], must_go: list[Replica], deficit: int
) -> tuple[Replica, ...] | None:
    """Of those that are ``able`` to leave: all that ``must_go``, and who else is needed."""
    if not must_go:
        return choose_victims(able, deficit)
    staying = [r for r in must_go if r.state not in LEAVING_STATES]
    if any(r not in able for r in staying):
        return None
    rest = [r for r in able if r not in staying]
    more = choose_victims(rest, deficit - sum(r.device_bytes for r in staying))
    return None if more is None else (*staying, *more)


def _cost_s(
    state: ClusterState,
    agent: Agent,
    newcomer: Replica,
    victims: Collection[Replica],
    now: float,
) -> float:
    cost_s = arrival_s(state, agent, now) + newcomer.swap_in_s
    cost_s += _PRESSURE_S * pressure(state, agent)
    cost_s += _ROW_S * sum(r.in_flight for r in agent.device.values())
    largest = state.index.largest_bytes  # rooms that are large enough for it are kept whole
    if newcomer.footprint_bytes < largest:
        room = room_bytes(state, agent)
        if room >= largest > room - newcomer.footprint_bytes:
            cost_s += agent.link.swap_in_s(largest)
    for victim in victims:
        if newcomer.is_large and victim.is_large:
            continue  # large models share a GPU rather than take another one from small ones
        idle_s = max(now - victim.last_used, 0.0) if state.is_idle(victim) else 0.0
        cost_s += victim.swap_in_s * _RETURN_S / (_RETURN_S + idle_s)
    return cost_s


def choose_preload(state: ClusterState, agent: Agent, now: float) -> Replica | None:
    """What ``agent`` may load while no load runs there: deployments in order, if they want it.

    Only what fits into host memory, so that it never drops another image. A model whose load
    failed is loaded again also without ``preload``: while it looks failed nobody would ask for it.
    """
    if agent.loading or not agent.cold:
        return None
    for model, spec in state.deployments.items():
        replica = agent.cold.get(model)
        if replica is None or not can_host(agent, replica, now):
            continue
        if (spec.preload or spec.pinned or replica.is_broken) and host_memory.fits_unasked(
            agent, replica
        ):
            return replica
    return None
