"""What an agent's status does to the belief about its replicas.

A status is the truth, but the truth of the moment when it was sent: a command of ours may have
been on its way, or its answer may have overtaken the status. So each replica in it is judged by
its generation (which command the agent had last accepted) and by the path of that command.

For one replica, ``theirs`` being what the status says and ``ours`` the belief:

1. The agent had not yet accepted our last command (``theirs.generation < floor``):
   a. that command is unanswered: the status is about the past. Nothing to learn, unless it shows
      device memory taken by a stray command to an earlier instance: adopt, or nobody counts it.
   b. it was answered, or refused: a late status, or an agent that forgot. Dispute.
2. Our last command is accepted but unanswered:
   a. theirs is its goal: it is done, the event got lost or is late.
   b. theirs is on its way there: the agent is at it. Follow, and note the sign of life.
   c. theirs is where it starts: not begun yet. Nothing to learn.
   d. failed: it is. (Not for a register, which is how a failed replica is tried again, nor for
      a swap-out: that did not fail, the replica did. Adopt.)
   e. anything else: the agent lost its worker or the host image meanwhile. Adopt.
3. Nothing is unanswered:
   a. they agree.
   b. theirs comes earlier on the path of the last command, or ours is ``failed`` (an event said
      so): most likely a late status. Dispute. Its count of requests is as late: running ones
      would look like suspended ones of a replica that has left the device.
   c. anything else: adopt.

A new engine worker starts with every replica cold, so 2c for ``cold`` and 3b become: adopt.
*Dispute*: belief stays for as long as statuses may be late, the replica is not commanded
meanwhile, and if the statuses still say so after that, they are right.
"""

from schemas.state import AgentStatus, ReplicaStatus
from services.scheduler.lifecycle import (
    COMPLETED,
    DEVICE_STATES,
    FAILED,
    PATHS,
    CommandKind,
    begins_at,
    is_behind,
)
from services.scheduler.replica import Agent, Failure, Replica
from services.scheduler.state import PolicyConfig

COMMAND_ORDER: tuple[CommandKind, ...] = ("unload", "register", "load", "swap_in", "swap_out")


def absorb_status(agent: Agent, status: AgentStatus, config: PolicyConfig, now: float) -> bool:
    """Take over what ``status`` says about ``agent``; False if it is from an earlier instance.

    A new ``instance`` is a new process: its replicas start from nothing, and whatever was
    commanded before is void.
    """
    if status.instance in agent.past_instances:
        return False
    is_new = status.instance != agent.instance
    if is_new:
        retire_instance(agent, now)
        agent.instance = status.instance
    was_replaced = status.worker_pid != agent.worker_pid
    agent.is_alive = True
    agent.worker_died = False
    agent.worker_pid = status.worker_pid
    if status.worker_pid:  # without its worker the agent knows no budget, and reports none
        agent.budget_bytes = status.budget_bytes
    host = (status.host_budget_bytes, status.host_used_bytes)
    if host != (agent.host_budget_bytes, agent.host_used_bytes):
        agent.host_budget_bytes, agent.host_used_bytes = host
        agent.index.changed.preloads[agent.gpu] = None
    agent.seen_at = now
    reported = {theirs.model: theirs for theirs in status.replicas}
    for model in dict.fromkeys([*agent.replicas, *reported]):
        replica = agent.replica(model)
        theirs = reported.get(model, ReplicaStatus(model, "cold", 0))
        if theirs.state in DEVICE_STATES and not (theirs.facts or replica.facts):
            continue  # bytes of unknown size: no agent of ours says this, so believe no word of it
        replica.cached_bytes = theirs.cached_bytes
        if is_new:
            may_stray = replica.may_stray
            adopt(replica, theirs, now, "first status of this instance")
            replica.may_stray = may_stray  # it may have been sent before the stray came
        else:
            _judge(replica, theirs, was_replaced, config, now)
        failure = replica.failure
        if was_replaced and failure and failure.num_failures == 1:
            failure.retry_at = min(failure.retry_at, now)  # it may have been the worker's fault
    return True


def retire_instance(agent: Agent, now: float) -> None:
    """The agent process is gone for good, and all it held with it."""
    if not agent.instance:
        return
    agent.past_instances.append(agent.instance)
    agent.instance = ""
    agent.is_alive = False
    for replica in agent.replicas.values():
        replica.life.move("lost", now, f"instance {agent.past_instances[-1]} ended")
        replica.generation += 1  # late answers to the old instance's commands match nothing
        replica.floor = replica.generation
        replica.facts = None
        replica.in_flight = 0
        replica.cached_bytes = 0
        replica.may_stray = replica.may_stray or replica.pending is not None
        replica.pending = None
        replica.last_kind = None
        replica.failure = None
        replica.believe_at = None


def adopt(replica: Replica, theirs: ReplicaStatus, now: float, why: str) -> None:
    """Believe ``theirs``, word for word. An unanswered command is void."""
    was = replica.state
    replica.life.adopt(theirs.state, now, why)
    replica.generation = max(replica.generation, theirs.generation)
    replica.floor = theirs.generation
    replica.in_flight = theirs.in_flight
    replica.batch_in_flight = theirs.batch_in_flight
    replica.facts = theirs.facts or (replica.facts if theirs.state in DEVICE_STATES else None)
    replica.pending = None
    replica.may_stray = False
    replica.last_kind = None
    replica.believe_at = None
    replica.resident_since = now
    replica.slack_s, replica.slack_at = 0.0, now
    replica.agent.index.changed.turns[replica.model] = None  # suspended ones are due later
    if was != "host":  # else requests that are suspended wait as long as we knew
        replica.host_since = now
    if theirs.state == "failed" and replica.failure is None:
        # Nobody told what failed. The retry starts over with a register, whatever it was.
        replica.failure = Failure("register", theirs.reason or "the agent says so", 1, now)
    elif theirs.state == "resident":
        _forgive(replica, "swap_in")
    elif theirs.state == "host":
        _forgive(replica, "load")
    elif theirs.state == "cold" and replica.facts is not None:
        _forgive(replica, "register")


def _judge(
    replica: Replica, theirs: ReplicaStatus, was_replaced: bool, config: PolicyConfig, now: float
) -> None:
    pending = replica.pending
    # 1. The agent had not accepted our last command when it sent this.
    if theirs.generation < replica.floor:
        if pending is None:
            _dispute(replica, theirs, config, now)
        elif replica.may_stray and theirs.state in DEVICE_STATES:
            adopt(replica, theirs, now, "a stray command reached it")
        return
    if theirs.generation > replica.generation:
        adopt(replica, theirs, now, "commanded by an earlier leader")
        return
    in_flight, batch_in_flight = replica.in_flight, replica.batch_in_flight
    replica.in_flight = theirs.in_flight
    replica.batch_in_flight = theirs.batch_in_flight
    # 2. Accepted but unanswered.
    if pending is not None and pending.kind == "register":
        if theirs.facts is not None and theirs.state != "failed":
            adopt(replica, theirs, now, "registered, by its status")
        return
    if pending is not None:
        path = PATHS[pending.kind]
        if theirs.state == path[-1]:
            replica.life.move(COMPLETED[pending.kind], now, "by its status")
            finish(replica, pending.kind, now)
        elif begins_at(pending.kind, theirs.state) and not (
            was_replaced and theirs.state == "cold"
        ):
            pass
        elif theirs.state in path[1:]:
            if not is_behind(pending.kind, replica.state, theirs.state):
                replica.life.adopt(theirs.state, now, "under way, by its status")
            pending.seen_at = now
        elif theirs.state == "failed" and pending.kind != "swap_out":
            fail(replica, pending.kind, theirs.reason, config, now)
        else:
            adopt(replica, theirs, now, f"{pending.kind} came to nothing")
        return
    # 3. Nothing is unanswered.
    if theirs.state == replica.state:
        replica.believe_at = None
        replica.facts = theirs.facts or replica.facts
    elif was_replaced:
        adopt(replica, theirs, now, "the engine worker was replaced")
    elif replica.state == "failed":
        _dispute(replica, theirs, config, now)
    elif is_behind(replica.last_kind, replica.state, theirs.state):
        replica.in_flight = in_flight
        replica.batch_in_flight = batch_in_flight
        _dispute(replica, theirs, config, now)
    else:
        adopt(replica, theirs, now, "the agent knows better")


def _dispute(replica: Replica, theirs: ReplicaStatus, config: PolicyConfig, now: float) -> None:
    if replica.state == theirs.state and (replica.facts is None) == (theirs.facts is None):
        replica.believe_at = None
    elif replica.state == "failed" and theirs.state not in DEVICE_STATES:
        replica.believe_at = None  # the agent need not remember what failed; we do
    elif replica.believe_at is None:
        replica.believe_at = now + config.dispute_s
    elif now >= replica.believe_at:
        adopt(replica, theirs, now, "the agent insists")


def finish(replica: Replica, kind: CommandKind, now: float) -> None:
    """The command is done (its transition is made): clear what it settles."""
    replica.pending = None
    replica.believe_at = None
    if kind == "swap_in":
        replica.resident_since = now
        replica.last_used = now
    elif kind in ("load", "swap_out"):
        replica.host_since = now
    elif kind == "unload":  # the agent has forgotten it
        replica.facts = None
        replica.in_flight = 0
        replica.is_stale = False
    _forgive(replica, kind)


def fail(
    replica: Replica, kind: CommandKind, reason: str, config: PolicyConfig, now: float
) -> None:
    """The command failed at the agent; it is tried again later, ever more rarely."""
    replica.life.move(FAILED[kind], now, reason)
    replica.pending = None
    replica.believe_at = None
    replica.last_kind = None
    if kind == "swap_in":
        replica.in_flight = 0  # the agent has handed all back to the queue
    num_failures = replica.failure.num_failures + 1 if replica.failure else 1
    wait_s = min(config.retry_s * 2 ** min(num_failures - 1, 32), config.retry_max_s)
    replica.failure = Failure(
        command=kind,
        reason=reason or f"{kind} failed, and the agent gave no reason",
        num_failures=num_failures,
        retry_at=now + wait_s,
        # A replica that can not leave still serves.
        is_visible=kind not in ("swap_out", "unload"),
    )


def _forgive(replica: Replica, done: CommandKind) -> None:
    """``done`` works: forget a failure of it, or of anything that comes before it."""
    failure = replica.failure
    if failure is None:
        return
    if COMMAND_ORDER.index(done) >= COMMAND_ORDER.index(failure.command):
        replica.failure = None
    elif done == "load":
        # Only a request can show whether it swaps in now, and requests come to what looks
        # well. The count stays, so that the retries keep getting rarer.
        replica.hide_failure()
