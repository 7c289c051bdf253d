"""decide(state, event, now) -> commands: the whole scheduler, without a clock or a bus.

Pure in this sense: it reads nothing but its arguments and changes nothing but ``state``, so
replaying the same inputs from an equal state gives the same commands. Total: every input has
an answer in every state, also one about a GPU, model or generation that nobody knows.

Every call takes three steps:

1. *Absorb*: the news moves the belief (`services.scheduler.absorb`).
2. *Keep house*, unless the news was about a request: register what agents do not know yet; on a
   `Tick` also give up silent agents, try failed replicas again, and repeat what got no answer.
3. *Serve*: call off what nobody waits for, then the models in line in turn
   (`services.scheduler.turns` orders them, `services.scheduler.policy` chooses), then preload.

A command moves the belief as it is written, so that no later choice counts its bytes as free.
"""

from schemas.commands import Command, Load, Register, SwapIn, SwapOut
from schemas.events import RequestEnded, RequestStarted, RequestWithdrawn
from services.scheduler import host_memory, policy, turns, victims
from services.scheduler.absorb import absorb
from services.scheduler.inputs import Demand, Input, Tick
from services.scheduler.lifecycle import CommandKind
from services.scheduler.replica import Pending, Replica
from services.scheduler.state import ClusterState, Plan


def decide(state: ClusterState, event: Input, now: float) -> list[Command]:
    """What to command after ``event``, seen at ``now`` (unix seconds), in this order."""
    absorb(state, event, now)
    commands: list[Command] = []
    if not isinstance(event, Demand | RequestStarted | RequestEnded | RequestWithdrawn):
        if isinstance(event, Tick):
            _give_up_silent_agents(state, now)
            commands += _retry_failed(state, now)
            commands += _repeat_unanswered(state, now)
        commands += _register_missing(state, now)
        _let_requests_try(state, now)
    commands += _call_off(state, now)
    commands += _serve(state, now)
    commands += _preload(state, now)
    return commands


# -- 2. keep house -------------------------------------------------------------------------


def _give_up_silent_agents(state: ClusterState, now: float) -> None:
    for agent in state.agents.values():
        if now - agent.seen_at >= state.config.agent_silent_s:
            agent.is_alive = False


def _retry_failed(state: ClusterState, now: float) -> list[Command]:
    """From the start: whatever failed, its files may be others now."""
    return [
        _command(state, replica, "register", now)
        for agent in state.usable_agents()
        for replica in agent.replicas.values()
        if replica.state == "failed"
        and replica.model in state.deployments
        and replica.is_settled
        and replica.failure
        and replica.failure.retry_at <= now
    ]


def _repeat_unanswered(state: ClusterState, now: float) -> list[Command]:
    """Under a new generation, so that an agent that missed nothing just answers once more."""
    timeout_s = state.config.command_timeout_s
    return [
        _command(
            state,
            replica,
            replica.pending.kind,
            now,
            replica.pending.request_id,
            waiting_since=replica.pending.waiting_since,
            decided_at=replica.pending.decided_at,
            preempt=replica.pending.preempt,
        )
        for agent in state.usable_agents()
        for replica in agent.replicas.values()
        if replica.pending
        and (replica.pending.kind != "register" or replica.model in state.deployments)
        and now - max(replica.pending.sent_at, replica.pending.seen_at) >= timeout_s
    ]


def _register_missing(state: ClusterState, now: float) -> list[Command]:
    commands = []
    for agent in state.usable_agents():
        for model in state.deployments:
            replica = agent.replica(model)
            if replica.facts is None and replica.state == "cold" and replica.is_settled:
                commands.append(_command(state, replica, "register", now))
    return commands


def _let_requests_try(state: ClusterState, now: float) -> None:
    """Broken models without room in host memory: nothing loads them unasked, so let users ask."""
    for agent in state.usable_agents():
        for replica in agent.replicas.values():
            if (
                replica.failure
                and replica.state == "cold"
                and policy.can_host(agent, replica, now)
                and host_memory.may_ever_fit(agent, replica)
                and not host_memory.fits_unasked(agent, replica)
            ):
                replica.failure.is_visible = False


# -- 3. serve ------------------------------------------------------------------------------


def _call_off(state: ClusterState, now: float) -> list[Command]:
    arrivals = policy.arrivals_to_call_off(state)
    return [_command(state, replica, "swap_out", now) for replica in arrivals]


def _serve(state: ClusterState, now: float) -> list[Command]:
    """Bring the models in line closer to memory: those with a plan first, then by waiting time."""
    claims: policy.Claims = {}
    closed: dict[str, None] = {}
    commands = _follow_plans(state, claims, now)
    for turn in turns.line(state):
        model = turn.model
        if model in state.plans:
            continue
        placement = policy.place(state, turn, claims, now, closed)
        if placement is None:
            continue
        gpu = placement.gpu
        replica = state.agents[gpu].replicas[model]
        if placement.victims or placement.action in ("swap_in", "load", "wait"):
            turns.note_decision(state, turn, now)
        if placement.action == "swap_in":
            commands.append(_swap_in(state, replica, turn, now))
            continue
        if placement.action == "load":
            commands.append(_command(state, replica, "load", now, turn.request_id))
            continue
        for victim in placement.victims:
            leaving = state.agents[gpu].replicas[victim]
            preempt = (
                placement.action == "evict"
                and not victims.is_idle(state, leaving)
                and victims.may_preempt(state, leaving)
            )
            commands.append(
                _command(state, leaving, "swap_out", now, turn.request_id, preempt=preempt)
            )
        if placement.action == "make_room":
            closed[gpu] = None
            continue
        if placement.action != "claim":
            state.plans[model] = Plan(model, gpu, turn.request_id)
        claims[gpu] = claims.get(gpu, 0) + replica.footprint_bytes
    return commands + _cut_drains_short(state, closed, now)


def _follow_plans(state: ClusterState, claims: policy.Claims, now: float) -> list[Command]:
    """Go on with what was begun, in the order in which it was begun:

    1. nobody waits for it there any more, or it can not be done: call it off.
    2. the bytes are there: swap in.
    3. the bytes are on their way out: they stay claimed.
    4. they are not (a victim would not leave): call it off, back in line by its own turn.
    """
    commands: list[Command] = []
    for model, plan in list(state.plans.items()):
        agent = state.agents[plan.gpu]
        replica = agent.replica(model)
        size = replica.footprint_bytes
        spare = agent.free_bytes + agent.leaving_bytes - claims.get(plan.gpu, 0)
        possible = (
            agent.is_usable and replica.state == "host" and policy.can_host(agent, replica, now)
        )
        turn = turns.turn_at(state, model, plan.gpu)
        if turn is None or not possible:  # 1
            del state.plans[model]
        elif spare >= size and agent.free_bytes >= size:  # 2
            del state.plans[model]
            turns.note_decision(state, turn, now)
            commands.append(_swap_in(state, replica, turn, now))
        elif spare >= size:  # 3
            claims[plan.gpu] = claims.get(plan.gpu, 0) + size
        else:  # 4
            del state.plans[model]
    return commands


def _cut_drains_short(state: ClusterState, closed: dict[str, None], now: float) -> list[Command]:
    """Where a plan waits for bytes whose owner was idle when it was told to leave, and is not."""
    gpus = dict.fromkeys(plan.gpu for plan in state.plans.values())
    return [
        _command(state, replica, "swap_out", now, replica.pending.request_id, preempt=True)
        for gpu in gpus
        for replica in victims.drains_to_cut_short(state, state.agents[gpu], closed, now)
        if replica.pending
    ]


def _preload(state: ClusterState, now: float) -> list[Command]:
    commands = []
    for agent in state.usable_agents():
        replica = policy.choose_preload(state, agent, now)
        if replica:
            commands.append(_command(state, replica, "load", now))
    return commands


def _swap_in(state: ClusterState, replica: Replica, turn: turns.Turn, now: float) -> Command:
    since, decided_at = turn.since, turns.decided_at(state, turn)
    return _command(
        state,
        replica,
        "swap_in",
        now,
        turn.request_id,
        waiting_since=since,
        decided_at=decided_at,
    )


def _command(
    state: ClusterState,
    replica: Replica,
    kind: CommandKind,
    now: float,
    request_id: str = "",
    *,
    waiting_since: float = 0.0,
    decided_at: float = 0.0,
    preempt: bool = False,
) -> Command:
    """Write the command and believe at once that it is under way.

    A command that repeats the unanswered one moves nothing.
    """
    if replica.pending is None or replica.pending.kind != kind:
        replica.life.move(kind, now, f"generation {replica.generation + 1}")
    replica.generation += 1
    replica.floor = replica.generation
    replica.last_kind = kind
    replica.believe_at = None
    replica.pending = Pending(kind, request_id, now, now, waiting_since, decided_at, preempt)
    where = (replica.gpu, replica.model, state.epoch, replica.generation)
    match kind:
        case "register":
            return Register(*where, state.deployments[replica.model])
        case "load":
            return Load(*where, request_id)
        case "swap_in":
            return SwapIn(*where, request_id, waiting_since, decided_at)
        case "swap_out":
            return SwapOut(*where, request_id, preempt)
