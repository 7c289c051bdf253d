"""Deployments that come, change and go while everything runs.

What is wanted changes at once; what is there follows, step by step, at each news (`tend`):

    settings the scheduler goes by    at once
    settings that agents must know    drain, swap out, unload, register anew: it is *stale*
    a GPU or group it may not share   drain, swap out
    removed                           drain, swap out, unload; the agent forgets it

A stale replica takes no part in anything but letting its requests end: those that are suspended are
brought in once more, by their turn. `ClusterState.unwelcome` has the models to be looked at.
"""

from schemas.commands import Command
from schemas.state import AgentStatus, ModelSpec
from services.scheduler import eviction, reasons
from services.scheduler.housekeeping import command
from services.scheduler.lifecycle import DEVICE_STATES
from services.scheduler.replica import Agent, Replica
from services.scheduler.state import ClusterState

_REMOVED = "its deployment was removed"


def add(state: ClusterState, spec: ModelSpec) -> None:
    """Take over ``spec``, which may be new, other settings, or what is known already."""
    name, changed = spec.name, state.index.changed
    known = state.deployments.get(name)
    state.deployments[name] = spec
    state.ending.pop(name, None)
    state.with_ttl.pop(name, None)
    if spec.drained:
        state.with_ttl[name] = 0.0
    elif spec.ttl_s and not spec.pinned:
        state.with_ttl[name] = spec.ttl_s
    changed.views[name] = None
    changed.turns[name] = None
    if known is None:
        for agent in state.agents.values():
            agent.replica(name)
    if known is None or known == spec:
        return
    state.fingerprints.pop(name, None)
    if known.for_agents() != spec.for_agents():
        _make_stale(state, name)
    state.unwelcome[name] = None
    for gpu in state.agents:
        changed.agents[gpu] = None
        changed.preloads[gpu] = None


def remove(state: ClusterState, model: str, end_requests: str) -> None:
    """Forget all that was wanted of ``model``; its replicas are left to `tend`."""
    if state.deployments.pop(model, None) is None:
        return
    for kept in (state.with_ttl, state.fingerprints, state.tempos, state.moved_at):
        kept.pop(model, None)
    state.drop_wish(model)
    if model in state.plans:
        state.drop_plan(model)
    if model in state.moves:
        state.drop_move(model)
    if state.waiting.pop(model, None) is not None:
        state.index.waiting_changed(model)
    if end_requests:
        state.ending[model] = end_requests
    _make_stale(state, model)
    state.unwelcome[model] = None
    state.index.changed.turns[model] = None


def know_all(state: ClusterState) -> None:
    """From now on what agents hold and nobody deployed has to go."""
    state.knows_all = True
    for agent in state.agents.values():
        for model in agent.replicas:
            if model not in state.deployments:
                state.unwelcome[model] = None


def note_status(state: ClusterState, agent: Agent, status: AgentStatus) -> None:
    """Which of the replicas that ``status`` shows are unwelcome."""
    for theirs in status.replicas:
        model = theirs.model
        if model not in state.deployments:
            if state.knows_all:
                state.unwelcome[model] = None
            continue
        replica = agent.replicas[model]
        is_answer = replica.pending is not None and replica.pending.kind == "register"
        if not theirs.settings or is_answer or theirs.generation < replica.floor:
            continue
        is_stale = theirs.settings != state.fingerprint(model)
        if is_stale != replica.is_stale:
            replica.is_stale = is_stale
            state.index.changed.turns[model] = None
        if is_stale:
            state.unwelcome[model] = None


def _make_stale(state: ClusterState, model: str) -> None:
    for agent in state.agents.values():
        replica = agent.replicas.get(model)
        if replica and (replica.facts or replica.pending or replica.state != "cold"):
            replica.is_stale = True
            if replica.failure:
                replica.failure.retry_at = 0.0  # what failed was wanted otherwise


def tend(state: ClusterState, now: float) -> list[Command]:
    """The next step of each replica that has to leave, and of what operators wished for."""
    for wish in list(state.wishes.values()):
        device = state.index.of(wish.model).device
        there = [device[wish.gpu]] if wish.gpu in device else [] if wish.gpu else device.values()
        if now > wish.until or any(r.state == "resident" for r in there):
            state.drop_wish(wish.model)
    commands: list[Command] = []
    for model in list(state.unwelcome):
        is_over = True
        for agent in state.agents.values():
            replica = agent.replicas.get(model)
            if replica:
                step, has_left = _step(state, replica, now)
                commands += step
                is_over &= has_left
        if is_over:
            del state.unwelcome[model]
            if model not in state.deployments:
                state.ending.pop(model, None)
    return commands


def why_leave(state: ClusterState, replica: Replica) -> str:
    """Why ``replica`` must not be on its GPU, in words; empty: it may."""
    spec = state.deployments.get(replica.model)
    if spec is None:
        return _REMOVED
    if replica.is_stale:
        return "its settings were changed: it is loaded anew"
    if spec.gpus and replica.gpu not in spec.gpus:
        return f"by its settings it may not be on {replica.gpu} any more"
    if spec.exclusive_group and replica.serves:
        others = [
            r.model
            for r in replica.agent.device.values()
            if r is not replica and r.serves and state.group(r.model) == spec.exclusive_group
        ]
        if others:
            return f"{others[0]} of its group {spec.exclusive_group!r} is there"
    return ""


def _step(state: ClusterState, replica: Replica, now: float) -> tuple[list[Command], bool]:
    """What is to be commanded now, and whether nothing is left to be done."""
    why = why_leave(state, replica)
    is_removed = replica.model not in state.deployments
    if not why:
        return [], True
    if is_removed and _is_nothing(replica):
        replica.agent.forget(replica)
        return [], True
    must_wait = replica.failure is not None and replica.failure.retry_at > now
    if not is_removed and replica.state in ("failed", "cold"):
        must_wait = False  # that was with other settings
    if must_wait or not replica.agent.is_usable:
        return [], False
    end_requests = state.ending.get(replica.model, "")
    if replica.state in DEVICE_STATES:
        return _leave(state, replica, why, end_requests, now), False
    if not replica.is_settled or replica.state == "loading":
        return [], False
    if replica.is_suspended and not end_requests:
        return [], False  # they are brought in by their turn
    if not is_removed and not replica.is_stale:
        return [], True  # it is off the device, and may stay in host memory
    if replica.state == "host" or is_removed:
        return [command(state, replica, "unload", now, end_requests=end_requests)], False
    if replica.state == "failed":
        return [command(state, replica, "register", now)], True
    replica.failure = None  # of other settings
    replica.facts = None  # look again
    replica.is_stale = False
    return [], True


def _leave(
    state: ClusterState, replica: Replica, why: str, end_requests: str, now: float
) -> list[Command]:
    """Have it swapped out when its requests have ended, if that is not under way."""
    pending = replica.pending
    if replica.serves and (replica.is_settled or (pending and pending.kind == "swap_in")):
        reasons.note_must_leave(state, replica, why, now)
        eviction.note_eviction(state, replica)
        return [command(state, replica, "swap_out", now, end_requests=end_requests)]
    if (
        replica.state == "draining"
        and pending
        and pending.kind == "swap_out"
        and end_requests
        and not pending.end_requests
    ):
        return [command(state, replica, "swap_out", now, end_requests=end_requests)]
    return []


def _is_nothing(replica: Replica) -> bool:
    return replica.state == "cold" and replica.facts is None and replica.is_settled
