"""decide(state, event, now) -> commands: the whole scheduler, without a clock or a bus.

Pure in this sense: it reads nothing but its arguments and changes nothing but ``state``, so
replaying the same inputs from an equal state gives the same commands. Total: every input has
an answer in every state, also one about a GPU, model or generation that nobody knows.

Every call takes three steps:

1. *Absorb*: the news moves the belief (events here, statuses in `services.scheduler.reconcile`).
2. *Keep house*, unless the news was about a request: register what agents do not know yet; on a
   `Tick` also give up silent agents, try failed replicas again, and repeat what got no answer.
3. *Serve*: the models in line in turn (`services.scheduler.policy` chooses), then preload.

A command moves the belief as it is written, so that no later choice counts its bytes as free.
"""

from schemas.commands import Command, Load, Register, SwapIn, SwapOut
from schemas.events import (
    AgentStopped,
    CommandFailed,
    CommandRejected,
    LoadProgressed,
    ModelLoaded,
    ModelRegistered,
    RequestEnded,
    RequestStarted,
    RequestWithdrawn,
    SwapInCompleted,
    SwapOutCompleted,
    WorkerDied,
)
from schemas.state import AgentStatus
from services.scheduler import policy
from services.scheduler.inputs import (
    AgentLost,
    Demand,
    DeploymentAdded,
    Input,
    QueueDepths,
    Tick,
)
from services.scheduler.lifecycle import COMPLETED, PENDING_STATES, CommandKind
from services.scheduler.reconcile import absorb_status, fail, finish, retire_instance
from services.scheduler.replica import Pending, Replica
from services.scheduler.state import ClusterState, Plan, Waiter


def decide(state: ClusterState, event: Input, now: float) -> list[Command]:
    """What to command after ``event``, seen at ``now`` (unix seconds), in this order."""
    _absorb(state, event, now)
    commands: list[Command] = []
    if not isinstance(event, Demand | RequestStarted | RequestEnded | RequestWithdrawn):
        if isinstance(event, Tick):
            _give_up_silent_agents(state, now)
            commands += _retry_failed(state, now)
            commands += _repeat_unanswered(state, now)
        commands += _register_missing(state, now)
    commands += _serve(state, now)
    commands += _preload(state, now)
    return commands


# -- 1. absorb -----------------------------------------------------------------------------


def _absorb(state: ClusterState, event: Input, now: float) -> None:
    match event:
        case Demand():
            state.add_waiter(Waiter(event.request_id, event.model, event.klass, event.at))
        case RequestStarted():
            state.remove_waiter(event.model, event.request_id, event.at)
            _count_in_flight(state, event.gpu, event.model, 1, now)
        case RequestEnded():
            state.remove_waiter(event.model, event.request_id, event.at)
            _count_in_flight(state, event.gpu, event.model, -1, now)
        case RequestWithdrawn():
            state.remove_waiter(event.model, event.request_id, event.at)
        case QueueDepths():
            state.match_depths(event.depths, event.at)
        case AgentStatus():
            agent = state.agent(event.gpu)
            absorb_status(agent, event, state.config, now)
        case ModelRegistered():
            replica = _answered(state, event.gpu, event.model, event.generation, "register")
            if replica and replica.pending:
                replica.facts = event.facts
                if not replica.may_stray:  # else it need not be cold: a status will tell
                    _complete(replica, "register", now)
        case ModelLoaded():
            replica = _answered(state, event.gpu, event.model, event.generation, "load")
            if replica:
                _complete(replica, "load", now)
        case SwapInCompleted():
            replica = _answered(state, event.gpu, event.model, event.generation, "swap_in")
            if replica:
                _complete(replica, "swap_in", now)
        case SwapOutCompleted():
            replica = _answered(state, event.gpu, event.model, event.generation, "swap_out")
            if replica:
                _complete(replica, "swap_out", now)
        case CommandFailed():
            replica = _answered(state, event.gpu, event.model, event.generation, event.command)
            if replica and (replica.pending or event.command != "register"):
                fail(replica, event.command, event.reason, state.config, now)
        case CommandRejected():
            replica = state.find_replica(event.gpu, event.model)
            if replica and replica.pending and event.generation == replica.generation:
                # Our belief was wrong. Keep it, bytes and all, until a status that was surely
                # sent after this says what is right.
                replica.pending = None
                replica.believe_at = now + state.config.settle_s
        case LoadProgressed():
            replica = state.find_replica(event.gpu, event.model)
            if replica and replica.pending and replica.pending.kind == "load":
                replica.pending.seen_at = now
        case WorkerDied():
            # Its replicas are cold, but this event may also be a late one about an earlier
            # worker: command nothing and free no byte until a status tells.
            if event.gpu in state.agents:
                state.agents[event.gpu].worker_died = True
        case AgentLost():
            if event.gpu in state.agents:
                state.agents[event.gpu].is_alive = False
        case AgentStopped():
            stopped = state.agents.get(event.gpu)
            if stopped and stopped.instance == event.instance:
                retire_instance(stopped, now)
        case DeploymentAdded():
            _add_deployment(state, event)
        case _:
            pass  # Tick; AgentStarted, LeaderElected: nothing that a status does not say better


def _answered(
    state: ClusterState, gpu: str, model: str, generation: int, kind: CommandKind
) -> Replica | None:
    """The replica that waits for this answer; None if nobody does (any more)."""
    replica = state.find_replica(gpu, model)
    if replica is None or not replica.floor <= generation <= replica.generation:
        return None
    if replica.pending and replica.pending.kind != kind:
        return None
    return replica if replica.state in PENDING_STATES[kind] else None


def _complete(replica: Replica, kind: CommandKind, now: float) -> None:
    replica.life.move(COMPLETED[kind], now)
    replica.last_kind = kind
    finish(replica, kind, now)


def _count_in_flight(state: ClusterState, gpu: str, model: str, change: int, now: float) -> None:
    """Between statuses; the next status sets it right if an event was lost or came twice."""
    replica = state.find_replica(gpu, model)
    if replica:
        replica.in_flight = max(0, replica.in_flight + change)
        replica.last_used = now


def _add_deployment(state: ClusterState, event: DeploymentAdded) -> None:
    spec = event.spec
    known = state.deployments.get(spec.name)
    state.deployments[spec.name] = spec
    if known is None or known == spec:
        return
    for agent in state.agents.values():
        replica = agent.replicas.get(spec.name)
        if replica and replica.state == "cold" and replica.is_settled:
            replica.facts = None  # what was found under the old settings; look again


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
        _command(state, replica, replica.pending.kind, now, replica.pending.request_id)
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


# -- 3. serve ------------------------------------------------------------------------------


def _serve(state: ClusterState, now: float) -> list[Command]:
    """Bring the models in line closer to memory: those with a plan first, then by waiting time."""
    claims: policy.Claims = {}
    commands = _follow_plans(state, claims, now)
    for model in policy.unserved_models(state):
        placement = policy.place(state, model, claims, now)
        if placement is None:
            continue
        gpu = placement.gpu
        replica = state.agents[gpu].replicas[model]
        request_id = state.waiting[model].earliest.request_id
        if placement.action in ("swap_in", "load"):
            kind: CommandKind = "swap_in" if placement.action == "swap_in" else "load"
            commands.append(_command(state, replica, kind, now, request_id))
            continue
        for victim in placement.victims:
            leaving = state.agents[gpu].replicas[victim]
            commands.append(_command(state, leaving, "swap_out", now, request_id))
        if placement.action != "claim":
            state.plans[model] = Plan(model, gpu, request_id)
        claims[gpu] = claims.get(gpu, 0) + replica.footprint_bytes
    return commands


def _follow_plans(state: ClusterState, claims: policy.Claims, now: float) -> list[Command]:
    """Go on with what was begun, in the order in which it was begun:

    1. nobody waits for it any more, or it can not be done there: call it off.
    2. the bytes are there: swap in.
    3. the bytes are on their way out: they stay claimed.
    4. they are not (a victim would not leave): call it off, back in line by its waiters' time.
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
        served = any(map(policy.serves, state.usable_replicas(model)))
        if model not in state.waiting or served or not possible:  # 1
            del state.plans[model]
        elif spare >= size and agent.free_bytes >= size:  # 2
            del state.plans[model]
            request_id = state.waiting[model].earliest.request_id
            commands.append(_command(state, replica, "swap_in", now, request_id))
        elif spare >= size:  # 3
            claims[plan.gpu] = claims.get(plan.gpu, 0) + size
        else:  # 4
            del state.plans[model]
    return commands


def _preload(state: ClusterState, now: float) -> list[Command]:
    commands = []
    for agent in state.usable_agents():
        replica = policy.choose_preload(state, agent, now)
        if replica:
            commands.append(_command(state, replica, "load", now))
    return commands


def _command(
    state: ClusterState, replica: Replica, kind: CommandKind, now: float, request_id: str = ""
) -> Command:
    """Write the command and believe at once that it is under way.

    A command that repeats the unanswered one moves nothing.
    """
    if replica.pending is None:
        replica.life.move(kind, now, f"generation {replica.generation + 1}")
    replica.generation += 1
    replica.floor = replica.generation
    replica.last_kind = kind
    replica.believe_at = None
    replica.pending = Pending(kind, request_id, sent_at=now, seen_at=now)
    where = (replica.gpu, replica.model, state.epoch, replica.generation)
    match kind:
        case "register":
            return Register(*where, state.deployments[replica.model])
        case "load":
            return Load(*where, request_id)
        case "swap_in":
            return SwapIn(*where, request_id)
        case "swap_out":
            return SwapOut(*where, request_id)
