"""decide(state, event, now) -> commands: the whole scheduler, without a clock or a bus.

Pure in this sense: it reads nothing but its arguments and changes nothing but ``state``, so
replaying the same inputs from an equal state gives the same commands. What it decided and why is
noted on the state, to be told (`services.scheduler.decisions`). Total: every input has
an answer in every state, also one about a GPU, model or generation that nobody knows.

Every call takes three steps:

1. *Absorb*: the news moves the belief (`services.scheduler.absorb`).
2. *Keep house* (`services.scheduler.housekeeping`), unless the news was about a request: register
   what agents do not know yet, have what must not be there leave (`services.scheduler.changes`), do
   what operators ask for (`services.scheduler.asks`); on a `Tick` also give up silent agents, try
   failed replicas again, and repeat what got no answer.
3. *Serve*: call off what nobody waits for, then the models in line in turn
   (`services.scheduler.turns` orders them, `services.scheduler.policy` chooses), then preload and
   prefetch. Before that, models that move off a hot GPU go on (`services.scheduler.migration`).

News about a request is most of it, and most of that changes nothing: the model is there. So what
is looked at is what changed (`services.scheduler.index`): the models whose waiters or replicas
did, and the whole line only where some GPU has more room than before, or time passed.

A command moves the belief as it is written, so that no later choice counts its bytes as free.
"""

from schemas.commands import Command
from schemas.events import RequestEnded, RequestStarted, RequestWithdrawn
from services.scheduler import (
    asks,
    batches,
    changes,
    eviction,
    housekeeping,
    migration,
    policy,
    reasons,
    turns,
    victims,
)
from services.scheduler.absorb import absorb
from services.scheduler.housekeeping import command
from services.scheduler.inputs import Asked, Demand, Input, Tick
from services.scheduler.replica import Agent, Replica
from services.scheduler.state import ClusterState
from services.scheduler.waiting import Plan

_ABOUT_REQUESTS = (Demand, RequestStarted, RequestEnded, RequestWithdrawn)
_MOST_TURNS = 32  # of a long line, at news; more of it each tick
_MOST_TURNS_AT_TICK = 256


def decide(state: ClusterState, event: Input, now: float) -> list[Command]:
    """What to command after ``event``, seen at ``now`` (unix seconds), in this order."""
    absorb(state, event, now)
    if isinstance(event, _ABOUT_REQUESTS):
        commands = _call_off(state, list(state.index.of(event.model).arriving.values()), now)
        return commands + _serve(state, now, 0)
    commands = changes.tend(state, now)
    if isinstance(event, Asked):
        commands += asks.take(state, event.number, event.ask, now)
    commands += housekeeping.keep_house(state, event, now)
    commands += _call_off(state, list(state.index.arriving.values()), now)
    is_tick = isinstance(event, Tick)
    commands += migration.go_on(state, now)
    if is_tick:
        migration.begin(state, now)
    commands += _serve(state, now, _MOST_TURNS_AT_TICK if is_tick else _MOST_TURNS)
    commands += _cut_drains_short(state, now)
    commands += housekeeping.preload(state, now)
    return commands + housekeeping.prefetches(state, now) if is_tick else commands


def _call_off(state: ClusterState, arriving: list[Replica], now: float) -> list[Command]:
    commands = []
    for replica in arriving:
        if policy.to_call_off(state, replica):
            reasons.note_call_off(state, replica, now)
            commands.append(command(state, replica, "swap_out", now))
    return commands


def _serve(state: ClusterState, now: float, most: int) -> list[Command]:
    """Bring models in line closer to memory: those with a plan first, then by their turns.

    ``most``: how much of the line is looked at. 0: as little as the news allows.
    """
    changed = state.index.changed
    if not (most or changed.turns or changed.agents):
        return []
    plans = [
        plan
        for plan in state.plans.values()
        if most or plan.model in changed.turns or plan.gpu in changed.agents or plan.is_batch
    ]
    models, one_has_left = state.line.refresh(state)
    has_more_room = _refresh_rooms(state) or one_has_left
    commands = _follow_plans(state, plans, now)
    if not state.line:
        return commands
    if not (most or has_more_room or any(model in state.holds.models for model in models)):
        for model in models:
            for turn in state.line.of(model):
                commands += _serve_turn(state, turn, now)
        return commands
    state.holds.clear()
    for turn in list(state.line.in_order(now, state.config.starvation_s, most or _MOST_TURNS)):
        commands += _serve_turn(state, turn, now)
    return commands


def _serve_turn(state: ClusterState, turn: turns.Turn, now: float) -> list[Command]:
    """Do for the model of ``turn`` what can be done now."""
    if turn.model in state.plans:
        return []
    _refresh_rooms(state)
    options = policy.weigh(state, turn, state.holds.claims, now, state.holds.closed)
    best = policy.choose(state, options)
    if best is None:
        return []
    placement = best.placement
    agent = state.agents[placement.gpu]
    replica = agent.replicas[turn.model]
    reasons.note_choice(state, turn, options, best, now)
    if placement.victims or placement.action in ("swap_in", "load", "wait"):
        turns.note_decision(state, turn, now)
    commands = _give_way(state, agent, placement, turn, now)
    if placement.action == "swap_in":
        return [*commands, _swap_in(state, replica, turn, now)]
    if placement.action == "load":
        return [command(state, replica, "load", now, turn.request_id)]
    commands += [
        _evict(state, agent.replicas[model], turn, placement.action, now)
        for model in placement.victims
    ]
    if placement.action == "make_room":
        state.holds.close(turn.model, placement.gpu)
    elif placement.action == "claim":
        state.holds.claim(turn.model, placement.gpu, replica.footprint_bytes)
    else:
        state.add_plan(Plan(turn.model, placement.gpu, turn.request_id, turn.is_batch))
    return commands


def _give_way(
    state: ClusterState, agent: Agent, placement: policy.Placement, turn: turns.Turn, now: float
) -> list[Command]:
    """The link is for those who wait: call off what is prefetched there, victims apart."""
    if not state.config.prefetch or placement.action not in ("swap_in", "wait", "evict"):
        return []
    commands = []
    for replica in list(agent.device.values()):
        if replica.model not in placement.victims and victims.gives_way(state, replica):
            reasons.note_gave_way(state, replica, turn.model, now)
            commands.append(command(state, replica, "swap_out", now))
    return commands


def _evict(
    state: ClusterState, victim: Replica, turn: turns.Turn, action: policy.Action, now: float
) -> Command:
    preempt = action == "evict" and not state.is_idle(victim) and victims.may_preempt(state, victim)
    preempt = preempt and state.config.preemption != "off"  # class batch then ends what it began
    eviction.note_eviction(state, victim)
    return command(state, victim, "swap_out", now, turn.request_id, preempt=preempt)


def _follow_plans(state: ClusterState, plans: list[Plan], now: float) -> list[Command]:
    """Go on with what was begun, in the order in which it was begun:

    1. nobody waits for it there any more, or it can not be done, or it is for class batch and
       somebody else waits now: call it off.
    2. the bytes are there: swap in.
    3. the bytes are on their way out: they stay claimed.
    4. they are not (a victim would not leave): call it off, back in line by its own turn.
    """
    commands: list[Command] = []
    for plan in plans:
        model, agent = plan.model, state.agents[plan.gpu]
        replica = agent.replica(model)
        size = replica.footprint_bytes
        spare = agent.free_bytes + agent.leaving_bytes - _planned_before(agent, model)
        possible = (
            agent.is_usable and replica.state == "host" and policy.can_host(agent, replica, now)
        )
        turn = turns.turn_at(state, model, plan.gpu)
        if turn is None or not possible or batches.gives_way(state, turn, now):  # 1
            reasons.note_plan(state, turn, replica, "call_off", now)
            state.drop_plan(model)
        elif spare >= size and agent.free_bytes >= size and not policy.rivals(state, replica):  # 2
            state.drop_plan(model)
            reasons.note_plan(state, turn, replica, "swap_in", now)
            turns.note_decision(state, turn, now)
            commands.append(_swap_in(state, replica, turn, now))
        elif spare < size:  # 4
            reasons.note_plan(state, turn, replica, "call_off", now)
            state.drop_plan(model)
    return commands


def _planned_before(agent: Agent, model: str) -> int:
    """Bytes of plans for ``agent`` that were made before that for ``model``."""
    planned = 0
    for other in agent.planned:
        if other == model:
            break
        planned += agent.replicas[other].footprint_bytes
    return planned


def _refresh_rooms(state: ClusterState) -> bool:
    """File anew the GPUs where something changed; whether one has more room than before."""
    changed = state.index.changed.agents
    if not changed:
        return False
    has_more = False
    for gpu in changed:
        agent = state.agents[gpu]
        room = policy.room_bytes(state, agent) if agent.is_usable else None
        has_more |= state.index.file_room(gpu, room)
    changed.clear()
    return has_more


def _cut_drains_short(state: ClusterState, now: float) -> list[Command]:
    """Where a plan waits for bytes whose owner was idle when it was told to leave, and is not."""
    commands = []
    for gpu in dict.fromkeys(plan.gpu for plan in state.plans.values()):
        agent = state.agents[gpu]
        for replica in victims.drains_to_cut_short(state, agent, state.holds.closed, now):
            if replica.pending:
                reasons.note_cut_drain(state, replica, now)
                request_id = replica.pending.request_id
                commands.append(command(state, replica, "swap_out", now, request_id, preempt=True))
    return commands


def _swap_in(state: ClusterState, replica: Replica, turn: turns.Turn, now: float) -> Command:
    if turn.is_extra:
        state.tempo(turn.model).first_s = 0.0  # whether yet another one is due is to be seen
    replica.came_late = turn.is_batch and not batches.is_put_back(turn, now)
    return command(
        state,
        replica,
        "swap_in",
        now,
        turn.request_id,
        is_unasked=turn.is_extra,
        waiting_since=0.0 if turn.is_extra else turn.since,
        decided_at=turns.decided_at(state, turn),
    )
