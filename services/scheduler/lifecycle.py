"""The life of a replica: one table.

Theory of operation
-------------------
A replica is one deployment on one GPU. What the scheduler holds is its *belief* about it; the
agent holds the truth. Belief changes in two ways, and both are written to the history:

- `Lifecycle.move`: by the table below. A command moves the belief the moment it is sent
  (``host --swap_in--> swapping_in``), so that bytes are counted before the agent has heard of
  it; the answer moves it on (``swapping_in --swapped_in--> resident``).
- `Lifecycle.adopt`: a status said otherwise and is to be believed (`services.scheduler.reconcile`
  decides that). Any state may follow any other, because answers get lost and workers die.

::

    cold --load--> loading --loaded--> host --swap_in--> swapping_in --swapped_in--> resident
      ^                                |  ^                        |                    |
      '-----------unloaded-------------'  | swapped_out   swap_out |           swap_out |
                                          |                        v                    v
                                          '--- swapping_out <----drained---------- draining

    cold, loading, swapping_in  --*_failed-->  failed  --register-->  cold      (try again)

A swap-in that nobody waits for any more is called off: a ``swap_out`` from ``swapping_in``. At
the agent it may have been done by then, so from here on it is a swap-out like any other.
A swap-out that preempts takes the same path, but does not stay in ``draining``: what runs is
suspended, and the replica is ``host`` with requests in flight. Those go on after its next swap-in,
on this GPU alone; should the agent lose the image or the worker, they are back in the queue.
``unloaded`` is the agent's own doing, where it drops host images to make room for others, or the
answer to ``unload``: then the agent has forgotten the model, and it is to be registered anew.

Before ``cold`` there is a stage that the agent has no state for: the model is not registered,
so nobody knows what it needs. It is ``cold`` with ``Replica.facts is None`` here too; a pending
``register`` is then the only thing that can happen to it.

``failed`` holds no device memory: an agent that could not swap in, or found the weights damaged,
has dropped what it had taken. A failed swap-out changes nothing, so its replica is ``resident``
again.
``lost`` is the agent process restarting: whatever it was, it is ``cold``.
"""

from collections import deque
from collections.abc import Callable
from typing import Literal, TypeAlias

from schemas.state import ReplicaState

CommandKind: TypeAlias = Literal["register", "load", "swap_in", "swap_out", "unload"]
Cause: TypeAlias = Literal[
    "register",
    "load",
    "swap_in",
    "swap_out",
    "unload",
    "registered",
    "loaded",
    "swapped_in",
    "drained",
    "swapped_out",
    "unloaded",
    "register_failed",
    "load_failed",
    "swap_in_failed",
    "swap_out_failed",
    "unload_failed",
    "lost",
]

TRANSITIONS: dict[ReplicaState, dict[Cause, ReplicaState]] = {
    "cold": {
        "register": "cold",
        "registered": "cold",
        "register_failed": "failed",
        "load": "loading",
        "unload": "cold",
        "unloaded": "cold",
        "unload_failed": "cold",
        "lost": "cold",
    },
    "loading": {"loaded": "host", "load_failed": "failed", "lost": "cold"},
    "host": {
        "swap_in": "swapping_in",
        "unload": "host",
        "unloaded": "cold",
        "unload_failed": "host",
        "lost": "cold",
    },
    "swapping_in": {
        "swapped_in": "resident",
        "swap_in_failed": "failed",
        "swap_out": "draining",
        "lost": "cold",
    },
    "resident": {"swap_out": "draining", "lost": "cold"},
    "draining": {
        "drained": "swapping_out",
        "swapped_out": "host",
        "swap_out_failed": "resident",
        "lost": "cold",
    },
    "swapping_out": {"swapped_out": "host", "swap_out_failed": "resident", "lost": "cold"},
    "failed": {"register": "cold", "unload": "cold", "lost": "cold"},
}

# The states one command leads through, in order. Within one generation an agent only goes
# forward along its path, so a status that shows an earlier state than ours was sent earlier.
PATHS: dict[CommandKind, tuple[ReplicaState, ...]] = {
    "register": ("cold",),
    "load": ("cold", "loading", "host"),
    "swap_in": ("host", "swapping_in", "resident"),
    "swap_out": ("swapping_in", "resident", "draining", "swapping_out", "host"),
    # Where the agent unloads uncommanded, that shares its generation with what came before it.
    "unload": ("loading", "swapping_in", "resident", "draining", "swapping_out", "host", "cold"),
}

COMPLETED: dict[CommandKind, Cause] = {
    "register": "registered",
    "load": "loaded",
    "swap_in": "swapped_in",
    "swap_out": "swapped_out",
    "unload": "unloaded",
}
FAILED: dict[CommandKind, Cause] = {
    "register": "register_failed",
    "load": "load_failed",
    "swap_in": "swap_in_failed",
    "swap_out": "swap_out_failed",
    "unload": "unload_failed",
}

# Where a replica may be while a command is unanswered.
PENDING_STATES: dict[CommandKind, tuple[ReplicaState, ...]] = {
    "register": ("cold",),
    "load": ("loading",),
    "swap_in": ("swapping_in",),
    "swap_out": ("draining", "swapping_out"),
    "unload": ("host", "cold"),
}

# Device memory is counted in these; in the last two it is on its way out.
DEVICE_STATES: tuple[ReplicaState, ...] = ("swapping_in", "resident", "draining", "swapping_out")
LEAVING_STATES: tuple[ReplicaState, ...] = ("draining", "swapping_out")
# Host memory is taken in these; the host image stays while its model is on the device.
IMAGE_STATES: tuple[ReplicaState, ...] = ("loading", "host", *DEVICE_STATES)

HISTORY_LENGTH = 12


class InvalidTransition(Exception):
    """A move that the table does not have: a defect in the scheduler, never in an agent.

    The text carries the replica, the attempted move and its recent history.
    """

    def __init__(self, name: str, state: ReplicaState, cause: Cause, history: list[str]) -> None:
        allowed = ", ".join(TRANSITIONS[state])
        story = "\n".join(f"  {line}" for line in history) or "  (none)"
        super().__init__(
            f"replica {name}: no transition from {state!r} by {cause!r} (allowed: {allowed}); "
            f"recent history, oldest first:\n{story}"
        )
        self.state = state
        self.cause = cause


def begins_at(kind: CommandKind, state: ReplicaState) -> bool:
    """Whether the table lets the command be given in ``state``."""
    return kind in TRANSITIONS[state]


def is_behind(kind: CommandKind | None, ours: ReplicaState, theirs: ReplicaState) -> bool:
    """Whether ``theirs`` comes before ``ours`` on the path of the last command."""
    path = PATHS[kind] if kind else ()
    return ours in path and theirs in path and path.index(theirs) < path.index(ours)


class Lifecycle:
    """The state of one replica with the story of how it got there.

    ``name`` is used in errors only (``gpu/model``). ``on_move`` is called after each change of
    state.
    """

    __slots__ = ("_history", "_on_move", "name", "state")

    def __init__(self, name: str, on_move: Callable[[], None] | None = None) -> None:
        self.name = name
        self.state: ReplicaState = "cold"  # written here only
        self._history: deque[tuple[float, ReplicaState, str, ReplicaState, str]] = deque(
            maxlen=HISTORY_LENGTH
        )
        self._on_move = on_move

    @property
    def history(self) -> list[str]:
        """The last moves, oldest first, as text."""
        return [
            f"{at:.3f} {was} --{cause}--> {target}" + (f" ({why})" if why else "")
            for at, was, cause, target, why in self._history
        ]

    def move(self, cause: Cause, now: float, why: str = "") -> None:
        """Follow the table. Raises `InvalidTransition` where it has no such row."""
        target = TRANSITIONS[self.state].get(cause)
        if target is None:
            raise InvalidTransition(self.name, self.state, cause, self.history)
        self._note(target, cause, now, why)

    def adopt(self, state: ReplicaState, now: float, why: str) -> None:
        """Take over what the agent says, whatever was believed before."""
        if state != self.state:
            self._note(state, "reported", now, why)

    def _note(self, target: ReplicaState, cause: str, now: float, why: str) -> None:
        self._history.append((now, self.state, cause, target, why))
        self.state = target
        if self._on_move:
            self._on_move()
