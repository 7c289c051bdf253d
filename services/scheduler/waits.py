"""How long a model that is waited for will be waited for: a guess in seconds, from what is known.

Nothing is decided by it: people and clients are told. For one GPU::

    now                                                            resident
     |---- its load, if it has no image here ----|                     |
     |---- what the link does first ----|        |-- ahead --|-- own --|
     |---- until there is room ----|

- *own*: its swap-in, as the link has measured others. None has been measured: unknown.
- *load*: as the loads of that GPU went so far.
- *room*: idle models leave at once, drained ones within a run quantum, busy ones when they had
  theirs and the slack of their requests covers two swaps and a run quantum, where these are quick
  at once, or when who waits is starving. A large model that is kept leaves for a smaller one no
  sooner than that. Those that may not be interrupted leave at a time that nobody knows.
- *ahead*: each one before it in line takes the link for as long as it does itself and, where there
  is no room, stays for a run quantum. The GPUs that may take the model share them.

Of the GPUs that may take it the soonest counts. Left out are those who will come, who will give up,
and requests that will end: it is what the line looks like now.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import islice

from schemas.state import PredictedWait
from services.scheduler import batches, policy
from services.scheduler.lifecycle import LEAVING_STATES
from services.scheduler.replica import Replica
from services.scheduler.state import ClusterState
from services.scheduler.turns import Turn
from services.scheduler.victims import arrival_s, is_kept, may_preempt, missing_slack_s, quantum_s

MOST_PLACES = 256  # of a long line: whoever comes later counts as the next one


def of_model(state: ClusterState, model: str, now: float, num_ahead: int = 0) -> float | None:
    """Seconds until ``model`` is expected to be resident, with ``num_ahead`` before it in line.

    0 for a resident one. None where it is not known, or nobody waits for it.
    """
    places = state.index.places.get(model)
    if places is None:
        return None
    device = [r for r in places.device.values() if r.agent.is_usable and r.serves]
    if device:
        return _soonest(on_gpu(state, replica, now, now) for replica in device)
    waits = (of_turn(state, turn, now, num_ahead) for turn in state.line.of(model))
    return _soonest(waits)


def of_turn(state: ClusterState, turn: Turn, now: float, num_ahead: int = 0) -> float | None:
    """Likewise, where the model may only go where its turn may."""
    plan = state.plans.get(turn.model)
    agents = policy.candidates(state, turn)[: policy.MOST_GPUS]
    if plan and turn.gpu in ("", plan.gpu):
        agents = [state.agents[plan.gpu]]
    replicas = [agent.replicas[turn.model] for agent in agents if turn.model in agent.replicas]
    share = num_ahead / max(len(replicas), 1)
    return _soonest(on_gpu(state, replica, turn.since, now, share) for replica in replicas)


def on_gpu(
    state: ClusterState, replica: Replica, since: float, now: float, num_ahead: float = 0.0
) -> float | None:
    """Seconds until this very replica could be resident. See the top of the file.

    ``since``: when the wait began (unix seconds). ``num_ahead``: the share of this GPU.
    """
    agent = replica.agent
    if replica.state == "resident":
        return 0.0
    if not agent.is_usable or replica.facts is None or replica.state == "failed":
        return None
    if not agent.link.is_known:
        return None
    if replica.state == "swapping_in":
        return _arrives_in_s(replica, now)
    load_s, room_s = _load_s(replica, now), _room_s(state, replica, since, now)
    if load_s is None or room_s is None:
        return None
    own_s = replica.swap_in_s
    each_s = own_s + (quantum_s(state, replica) if room_s > 0 else 0.0)
    return max(load_s, room_s, arrival_s(state, agent, now)) + num_ahead * each_s + own_s


def place_in_line(state: ClusterState, turn: Turn, now: float) -> int:
    """How many turns come before ``turn``, `MOST_PLACES` at most."""
    before = 0
    for other in islice(_waiting_in_order(state, now), MOST_PLACES):
        if (other.model, other.gpu) == (turn.model, turn.gpu):
            break
        before += 1
    return before


def predictions(state: ClusterState, now: float, first: int, most: int) -> list[PredictedWait]:
    """What those who wait are told: ``most`` of the models, from number ``first`` on, round and
    round.

    A model that is served needs none: its requests wait for other requests, not for a swap.
    """
    places: dict[str, int] = {}  # model -> place, from 1
    for place, turn in enumerate(islice(_waiting_in_order(state, now), MOST_PLACES), 1):
        places.setdefault(turn.model, place)
    models = list(dict.fromkeys([*places, *state.plans, *state.waiting]))
    start = first % len(models) if models else 0
    told = []
    for model in (models[start:] + models[:start])[:most]:
        line = state.waiting.get(model)
        suspended = state.index.of(model).suspended.values()
        num_suspended = sum(r.in_flight for r in suspended if r.agent.is_usable)
        if _is_resident(state, model) or (line is None and not num_suspended):
            continue
        place, turns = places.get(model, 0), state.line.of(model)
        since = turns[0].since if turns else line.earliest.at if line else now
        wait_s = of_model(state, model, now, max(place - 1, 0))
        wait_s = None if wait_s is None else round(wait_s, 3)
        num_waiters = len(line) if line else 0
        told.append(PredictedWait(model, now, wait_s, num_waiters, num_suspended, since, place))
    return told


def _is_resident(state: ClusterState, model: str) -> bool:
    device = state.index.of(model).device.values()
    return any(r.state == "resident" and r.agent.is_usable for r in device)


def _waiting_in_order(state: ClusterState, now: float) -> Iterator[Turn]:
    """Those for whom nothing is under way yet."""
    order = state.line.in_order(now, state.config.starvation_s, MOST_PLACES)
    return (
        turn
        for turn in order
        if not turn.is_extra
        and turn.model not in state.plans
        and (turn.gpu or not state.index.of(turn.model).arriving)
    )


def _soonest(waits: Iterable[float | None]) -> float | None:
    return min((wait_s for wait_s in waits if wait_s is not None), default=None)


def _load_s(replica: Replica, now: float) -> float | None:
    """What is left of its load; 0 where its host image is there."""
    if replica.state not in ("cold", "loading"):
        return 0.0
    load_s = replica.agent.disk.load_s(replica.weight_bytes)
    if load_s is None or replica.pending is None or replica.state == "cold":
        return load_s
    return max(0.0, replica.pending.sent_at + load_s - now)


def _arrives_in_s(replica: Replica, now: float) -> float:
    """What the link has left to do up to the end of this swap-in."""
    left_s = 0.0
    for other in replica.agent.device.values():  # in the order in which they were commanded
        if other.state == "swapping_in":
            left_s += other.arrives_in_s(now)
        if other is replica:
            break
    return left_s


def _room_s(state: ClusterState, replica: Replica, since: float, now: float) -> float | None:
    """Until it fits beside what stays; None: nobody knows, or never."""
    agent = replica.agent
    planned = [agent.replicas[model] for model in agent.planned if model != replica.model]
    need = replica.footprint_bytes + sum(r.footprint_bytes for r in planned) - agent.free_bytes
    if need <= 0:
        return 0.0
    leaving = [
        (_leaves_in_s(state, r, replica, since, now), r.device_bytes) for r in agent.device.values()
    ]
    leaving += [(r.swap_in_s + quantum_s(state, r), r.footprint_bytes) for r in planned]
    known = [(left_s, num_bytes) for left_s, num_bytes in leaving if left_s is not None]
    for left_s, num_bytes in sorted(known):
        need -= num_bytes
        if need <= 0:
            return left_s
    return None


def _leaves_in_s(
    state: ClusterState, replica: Replica, newcomer: Replica, since: float, now: float
) -> float | None:
    """When it may have left the device for ``newcomer``; None: nobody knows, or never."""
    may_be_interrupted = may_preempt(state, replica) and state.config.preemption != "off"
    if replica.state in LEAVING_STATES:
        pending = replica.pending
        if not replica.in_flight or pending is None or pending.preempt:
            return 0.0
        drain_s = max(0.0, pending.sent_at + state.config.run_quantum_s - now)
        return drain_s if may_be_interrupted else None
    if state.is_pinned(replica.model):
        return None
    starving_s = since + policy.patience_s(state, newcomer) - now
    kept = is_kept(state, newcomer, replica, now)
    if state.is_idle(replica):
        return max(0.0, starving_s) if kept else 0.0
    if not may_be_interrupted:
        return None
    if replica.state == "resident" and batches.is_batch_only(state, replica):
        return 0.0
    if replica.state == "swapping_in":
        return _arrives_in_s(replica, now) + quantum_s(state, replica)
    turn_s = replica.resident_since + quantum_s(state, replica) - now
    slack_in_s = math.inf if kept else _slack_in_s(state, replica, newcomer, now)
    return max(0.0, turn_s, min(slack_in_s, starving_s))


def _slack_in_s(state: ClusterState, replica: Replica, newcomer: Replica, now: float) -> float:
    """Until its requests can spare the time of a turn of ``newcomer``; infinite: never."""
    missing_s = missing_slack_s(state, newcomer, replica, now)
    per_s = state.tempo(replica.model).slack_per_s(state.token_target_s(replica.model))
    if missing_s <= 0:
        return 0.0
    return missing_s / per_s if per_s > 0 else math.inf
