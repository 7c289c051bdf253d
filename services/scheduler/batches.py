"""Requests of class batch: they get what nobody else wants, until their window is nearly over.

Nobody looks at them as they come, so a batch request may wait for most of its *window*, the time
that it has in the queue::

    comes                                      is like others               deadline
     |------------ put back: 0.75 of the window ------------|---------------------|

Put back, it stands in line behind everybody else, of whatever priority, and brings its model in
where there is room, or where an idle model has not been wanted for a while. It preempts nobody, and
a model that serves nothing but such requests gives way to others at once, without having had a
quantum. A model that is there stays while requests of class batch are left for it: few swaps.

After that it is one of those who have waited for very long, and its model gets a quantum.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.scheduler.replica import Replica
    from services.scheduler.state import ClusterState, PolicyConfig
    from services.scheduler.turns import Turn

_PATIENT = 0.75  # of its window


def put_back_s(config: "PolicyConfig", window_s: float) -> float:
    """How much longer it may wait than others. ``window_s``: 0 where nobody told."""
    return _PATIENT * window_s if window_s > 0 else config.batch_patience_s


def is_batch_only(state: "ClusterState", replica: "Replica") -> bool:
    """It is busy, with nothing but requests of class batch."""
    line = state.waiting.get(replica.model)
    if line is not None and line.earliest.klass != "batch":
        return False
    if replica.in_flight > replica.batch_in_flight:
        return False
    return replica.in_flight > 0 or line is not None


def is_put_back(turn: "Turn", now: float) -> bool:
    """``turn`` is one for requests of class batch that are not like others yet."""
    return turn.is_batch and now < turn.waits_since


def gives_way(state: "ClusterState", turn: "Turn | None", now: float) -> bool:
    """Whether what was begun for ``turn`` is given up, because somebody else is in line now."""
    return turn is not None and is_put_back(turn, now) and state.line.has_others()


def not_wanted_for_long(
    state: "ClusterState", turn: "Turn", idle: "list[Replica]", now: float
) -> "list[Replica]":
    """Of ``idle`` victims those that may leave for ``turn``: for one that is put back, the model
    that was used just now stays, or interactive requests that come one by one would find it gone
    each time.
    """
    if not is_put_back(turn, now):
        return idle
    return [r for r in idle if now - r.last_used >= state.config.batch_after_idle_s]
