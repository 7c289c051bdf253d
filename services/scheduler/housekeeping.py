"""What is done without anybody waiting for it, and the one place where commands are written.

Register what agents do not know, give up silent agents, try failed replicas again, repeat what got
no answer, swap out what its time to live says, preload, prefetch.
"""

from schemas.commands import Command, Load, Register, SwapIn, SwapOut, Unload
from services.scheduler import host_memory, policy, prefetch, reasons
from services.scheduler.inputs import Input, Tick
from services.scheduler.lifecycle import CommandKind
from services.scheduler.replica import Pending, Replica
from services.scheduler.state import ClusterState


def keep_house(state: ClusterState, event: Input, now: float) -> list[Command]:
    """Everything but preloads, which come after those who wait."""
    commands: list[Command] = []
    if isinstance(event, Tick):
        _give_up_silent_agents(state, now)
        commands += _retry_failed(state, now)
        commands += _repeat_unanswered(state, now)
        commands += _swap_out_idle(state, now)
    commands += _register_missing(state, now)
    _let_requests_try(state, now)
    return commands


def _give_up_silent_agents(state: ClusterState, now: float) -> None:
    for agent in state.agents.values():
        if now - agent.seen_at >= state.config.agent_silent_s:
            agent.is_alive = False


def _retry_failed(state: ClusterState, now: float) -> list[Command]:
    """From the start: whatever failed, its files may be others now."""
    return [
        command(state, replica, "register", now)
        for replica in list(state.index.troubled.values())
        if replica.state == "failed"
        and replica.agent.is_usable
        and replica.model in state.deployments
        and replica.is_settled
        and replica.failure
        and replica.failure.retry_at <= now
    ]


def _repeat_unanswered(state: ClusterState, now: float) -> list[Command]:
    """Under a new generation, so that an agent that missed nothing just answers once more."""
    timeout_s = state.config.command_timeout_s
    return [
        command(
            state,
            replica,
            replica.pending.kind,
            now,
            replica.pending.request_id,
            waiting_since=replica.pending.waiting_since,
            decided_at=replica.pending.decided_at,
            preempt=replica.pending.preempt,
            end_requests=replica.pending.end_requests,
            is_unasked=replica.pending.is_unasked,
            is_prefetch=replica.pending.is_prefetch,
        )
        for replica in list(state.index.pending.values())
        if replica.pending
        and replica.agent.is_usable
        and (replica.pending.kind != "register" or replica.model in state.deployments)
        and now - max(replica.pending.sent_at, replica.pending.seen_at) >= timeout_s
    ]


def _swap_out_idle(state: ClusterState, now: float) -> list[Command]:
    """Models whose settings say that they leave when nobody wanted them for a while."""
    leaving = [
        replica
        for model, ttl_s in state.with_ttl.items()
        for replica in list(state.index.of(model).device.values())
        if replica.state == "resident"
        and replica.is_settled
        and replica.agent.is_usable
        and state.is_idle(replica)
        and now - max(replica.last_used, replica.resident_since) >= ttl_s
        and (replica.failure is None or replica.failure.retry_at <= now)
    ]
    for replica in leaving:
        reasons.note_ttl(state, replica, now)
    return [command(state, replica, "swap_out", now) for replica in leaving]


def _register_missing(state: ClusterState, now: float) -> list[Command]:
    return [
        command(state, replica, "register", now)
        for replica in list(state.index.unregistered.values())
        if replica.agent.is_usable and replica.is_settled and replica.model in state.deployments
    ]


def _let_requests_try(state: ClusterState, now: float) -> None:
    """Broken models without room in host memory: nothing loads them unasked, so let users ask."""
    for replica in list(state.index.troubled.values()):
        agent = replica.agent
        if (
            replica.state == "cold"
            and agent.is_usable
            and policy.can_host(agent, replica, now)
            and host_memory.may_ever_fit(agent, replica)
            and not host_memory.fits_unasked(agent, replica)
        ):
            replica.hide_failure()


def preload(state: ClusterState, now: float) -> list[Command]:
    """One load for each GPU that may have room, or time, for one."""
    commands = []
    changed = state.index.changed.preloads
    for gpu in list(changed):
        agent = state.agents[gpu]
        replica = policy.choose_preload(state, agent, now) if agent.is_usable else None
        if replica:
            reasons.note_preload(state, replica, now)
            commands.append(command(state, replica, "load", now))
        elif not any(r.failure for r in agent.cold.values()):  # else time alone may change it
            del changed[gpu]
    return commands


def prefetches(state: ClusterState, now: float) -> list[Command]:
    """Swap-ins of models that may be wanted next, where it hurts nobody."""
    if not state.config.prefetch:
        return []
    commands: list[Command] = []
    for replica in list(prefetch.choose(state, now)):
        reasons.note_prefetch(state, replica, now)
        commands.append(command(state, replica, "swap_in", now, is_unasked=True, is_prefetch=True))
    return commands


def command(
    state: ClusterState,
    replica: Replica,
    kind: CommandKind,
    now: float,
    request_id: str = "",
    *,
    waiting_since: float = 0.0,
    decided_at: float = 0.0,
    preempt: bool = False,
    end_requests: str = "",
    is_unasked: bool = False,
    is_prefetch: bool = False,
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
    replica.pending = Pending(
        kind,
        request_id,
        now,
        now,
        waiting_since,
        decided_at,
        preempt,
        is_unasked,
        is_prefetch,
        end_requests,
    )
    where = (replica.gpu, replica.model, state.epoch, replica.generation)
    match kind:
        case "register":
            replica.is_stale = False
            spec = state.deployments[replica.model]
            return Register(*where, spec.for_agents(), state.fingerprint(replica.model))
        case "load":
            return Load(*where, request_id)
        case "swap_in":
            return SwapIn(*where, request_id, waiting_since, decided_at)
        case "swap_out":
            return SwapOut(*where, request_id, preempt, end_requests)
        case "unload":
            return Unload(*where, end_requests)
