"""What news does to the belief: events here, statuses in `services.scheduler.reconcile`.

Nothing is commanded here. An answer counts only if it is the one that is waited for: the
generation it echoes says which command it answers, and `Replica.floor` says which are past.
"""

from schemas.events import (
    AgentStopped,
    CommandFailed,
    CommandRejected,
    LoadProgressed,
    ModelLoaded,
    ModelRegistered,
    ModelUnloaded,
    RequestEnded,
    RequestStarted,
    RequestWithdrawn,
    SwapInCompleted,
    SwapOutCompleted,
    WorkerDied,
)
from schemas.state import AgentStatus
from services.scheduler import changes, eviction
from services.scheduler.inputs import (
    AgentLost,
    Demand,
    DeploymentAdded,
    DeploymentRemoved,
    DeploymentsKnown,
    Input,
    QueueDepths,
)
from services.scheduler.lifecycle import COMPLETED, PENDING_STATES, CommandKind
from services.scheduler.reconcile import absorb_status, fail, finish, retire_instance
from services.scheduler.replica import Replica
from services.scheduler.state import ClusterState
from services.scheduler.waiting import Waiter


def absorb(state: ClusterState, event: Input, now: float) -> None:
    """Move the belief by ``event``, seen at ``now`` (unix seconds)."""
    match event:
        case Demand():
            if event.model in state.deployments and event.klass == "interactive":
                state.tempo(event.model).note_demand(event.at)
            who = (event.request_id, event.model, event.klass, event.at, event.tenant)
            state.add_waiter(Waiter(*who), now, event.window_s)
        case RequestStarted():
            waiter = state.remove_waiter(event.model, event.request_id, event.at)
            _started(state, event, waiter, now)
        case RequestEnded():
            state.remove_waiter(event.model, event.request_id, event.at)
            _ended(state, event, now)
        case RequestWithdrawn():
            waiter = state.remove_waiter(event.model, event.request_id, event.at)
            is_charged = waiter is not None and waiter.klass == "interactive"
            if waiter and is_charged and waiter.tenant is not None and state.config.fair_shares:
                state.shares.refund(waiter.tenant, now)
        case QueueDepths():
            state.match_depths(event.depths, event.at, event.klass)
        case AgentStatus():
            agent = state.agent(event.gpu)
            if not agent.replicas:
                for model in state.deployments:
                    agent.replica(model)
            if absorb_status(agent, event, state.config, now):
                changes.note_status(state, agent, event)
        case ModelRegistered():
            replica = _answered(state, event.gpu, event.model, event.generation, "register")
            if replica and replica.pending:
                replica.facts = event.facts
                if not replica.may_stray:  # else it need not be cold: a status will tell
                    _complete(replica, "register", now)
        case ModelLoaded():
            replica = _answered(state, event.gpu, event.model, event.generation, "load")
            if replica:
                replica.agent.disk.note(event.num_bytes, event.load_s)
                _complete(replica, "load", now)
        case ModelUnloaded():
            _unload(state, event, now)
        case SwapInCompleted():
            replica = _answered(state, event.gpu, event.model, event.generation, "swap_in")
            if replica:
                replica.swap_s = event.trace.total_s
                replica.agent.link.note(event.trace)
                replica.slack_s -= now - replica.slack_at  # its requests waited all the while
                replica.slack_at = now
                _complete(replica, "swap_in", now)
        case SwapOutCompleted():
            replica = _answered(state, event.gpu, event.model, event.generation, "swap_out")
            if replica:
                replica.slack_s, replica.slack_at = state.slack_s(replica, now), now
                replica.in_flight = event.num_suspended
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
            changes.add(state, event.spec)
        case DeploymentRemoved():
            changes.remove(state, event.model, event.end_requests)
        case DeploymentsKnown():
            changes.know_all(state)
        case _:
            # Tick; AgentStarted, LeaderElected, VerificationFailed: nothing that a status or a
            # CommandFailed does not say better. SwapInCancelled: its SwapOutCompleted follows.
            # FirstTokenSent, ModelVerified: nothing to decide.
            pass


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


def _unload(state: ClusterState, event: ModelUnloaded, now: float) -> None:
    """The host image is gone, unless it was loaded again since, or a swap-in is on its way: the
    agent rejects that one. Requests that were suspended go back to the queue with it.
    """
    agent = state.agents.get(event.gpu)
    replica = state.find_replica(event.gpu, event.model)
    if agent is None or replica is None:
        return
    if replica.pending and replica.pending.kind == "unload":
        if replica.floor <= event.generation <= replica.generation:
            agent.host_used_bytes = max(0, agent.host_used_bytes - event.num_bytes)
            _complete(replica, "unload", now)
        return
    if replica.state != "host":
        return
    if not replica.floor <= event.generation <= replica.generation:
        return
    agent.host_used_bytes = max(0, agent.host_used_bytes - event.num_bytes)
    state.index.changed.preloads[agent.gpu] = None
    replica.life.move("unloaded", now)
    replica.last_kind = "unload"
    replica.believe_at = None
    replica.in_flight = 0


def _started(state: ClusterState, event: RequestStarted, waiter: Waiter | None, now: float) -> None:
    """Between statuses; the next status sets it right if an event was lost or came twice.

    ``waiter``: what was in line for it, as far as known.
    """
    replica = state.find_replica(event.gpu, event.model)
    if replica:
        if event.klass == "batch":
            late_s = waiter.put_back_s if waiter else state.config.batch_patience_s
            replica.batch_late_at = (waiter.at if waiter else now) + late_s
        elif state.config.fair_shares:
            place = (event.gpu, event.model)
            state.shares.note_start(place, event.tenant, is_first=not replica.in_flight)
        # On average over its requests; the newest has no slack yet.
        num = replica.in_flight
        slack_s = state.slack_s(replica, now) if num else 0.0
        replica.slack_s, replica.slack_at = slack_s * num / (num + 1), now
        replica.in_flight += 1
        if event.klass == "batch":
            replica.batch_in_flight += 1
        replica.last_used = now
        if replica.is_suspended:  # a late event: they are due at another time now
            state.index.changed.turns[event.model] = None
        eviction.note_use(state, replica)


def _ended(state: ClusterState, event: RequestEnded, now: float) -> None:
    is_shared = state.config.fair_shares and event.klass == "interactive"
    if is_shared:
        took_s = event.timing.prefill_s + event.timing.decode_s
        state.shares.settle(event.tenant, took_s, now)
    replica = state.find_replica(event.gpu, event.model)
    if replica:
        num = replica.in_flight
        if event.klass == "batch":
            replica.batch_in_flight = max(0, replica.batch_in_flight - 1)
        replica.in_flight = max(0, num - 1)
        if is_shared:
            state.shares.note_end((event.gpu, event.model), event.tenant, is_last=num <= 1)
        replica.last_used = now
        timing = event.timing
        tempo = state.tempo(event.model)
        num_decoded = event.completion_tokens - event.prefix_tokens - 1
        tempo.note(timing.prefill_s, timing.decode_s, num_decoded)
        if num >= state.config.crowd:  # another replica may be due, or not any more
            state.index.changed.turns[event.model] = None
