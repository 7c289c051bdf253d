"""Whose turn it is: everything that waits for device memory, as one line.

Two kinds of requests wait:

- *waiters* are in the work queue. Any replica of their model will do.
- *suspended* requests were preempted in the middle of their answers. An agent holds them, with
  what was computed, so they wait for one replica: their model on that GPU.

A replica with suspended requests has a turn of its own until it is on the device or on its way
there. It waits since it was swapped out, or as long as its model's earliest waiter where nobody
else serves that one. A model without suspended requests has one turn for all its waiters, unless
some replica serves them.
"""

import msgspec

from services.scheduler.state import ClusterState


class Turn(msgspec.Struct, frozen=True):
    """One place in the line. ``gpu``: the only one that will do; empty: any.

    ``request_id``: the earliest waiter; empty where only suspended requests wait.
    """

    model: str
    gpu: str
    since: float  # unix seconds
    request_id: str

    @property
    def order(self) -> tuple[float, str, str, str]:
        """Earliest first; the names break ties so that replays agree."""
        return (self.since, self.request_id, self.model, self.gpu)


def line(state: ClusterState) -> list[Turn]:
    """All turns, the earliest first."""
    models = dict.fromkeys([*state.waiting, *(r.model for r in state.suspended_replicas())])
    return sorted((turn for model in models for turn in turns_of(state, model)), key=_order)


def turns_of(state: ClusterState, model: str) -> list[Turn]:
    """The turns of ``model``, the earliest first: none where nobody waits, or all are served."""
    replicas = state.usable_replicas(model)
    waiters = None if any(r.serves for r in replicas) else state.waiting.get(model)
    first = waiters.earliest if waiters else None
    request_id = first.request_id if first else ""
    turns = [
        Turn(model, r.gpu, min(r.host_since, first.at) if first else r.host_since, request_id)
        for r in replicas
        if r.is_suspended
    ]
    if first and not turns:
        turns = [Turn(model, "", first.at, request_id)]
    return sorted(turns, key=_order)


def turn_at(state: ClusterState, model: str, gpu: str) -> Turn | None:
    """The turn that ``model`` can take on ``gpu``, if it has one."""
    return next((turn for turn in turns_of(state, model) if turn.gpu in ("", gpu)), None)


def note_decision(state: ClusterState, turn: Turn, now: float) -> None:
    """A command is given now for ``turn``; only its first one counts."""
    if not turn.gpu:
        state.waiting[turn.model].note_decision(now)
        return
    replica = state.agents[turn.gpu].replicas[turn.model]
    if replica.decided_at < turn.since:
        replica.decided_at = max(now, turn.since)  # the two clocks may differ


def decided_at(state: ClusterState, turn: Turn) -> float:
    """When the first command for ``turn`` was given (unix seconds), as far as noted."""
    if not turn.gpu:
        return state.waiting[turn.model].decided_at
    return state.agents[turn.gpu].replicas[turn.model].decided_at


def _order(turn: Turn) -> tuple[float, str, str, str]:
    return turn.order
