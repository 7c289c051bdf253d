"""What a stream that waits is told: comments in its event stream, which clients skip.

    : hotswap {"state":"waiting","waited_s":1.0,"position":2,"predicted_wait_s":1.3}
    : hotswap {"state":"loading","waited_s":2.0,"done_bytes":52428800,"total_bytes":209715200}
    : hotswap {"state":"swapping_in","waited_s":3.0}

    waiting       for room on a GPU: `position` among the models that do
    loading       its files are read into host memory
    swapping_in   it is on its way to a GPU
    queued        it is on a GPU, and its batch is full
    computing     an agent works on the request, but no token has come for a while
    suspended     the answer pauses for another model
    resuming      the agent died; another one, or the same anew, will go on with it

The last comment of a stream that began with one has no state; it is `Served`, as beside `usage`.

Lines that begin with a colon are comments by the standard (server-sent events, WHATWG HTML). They
also keep proxies from closing a connection on which nothing comes.
"""

import time
from collections.abc import Callable, Mapping
from typing import Final, Literal, TypeAlias

import msgspec

from schemas import names
from schemas.events import LoadProgressed
from schemas.state import ReplicaState
from services.api.call import Call
from services.api.deployment_settings import nearest
from services.api.waits import Waits
from services.bus import Bus, Message
from services.bus.connection import Hook

EVERY_S: Final = 1.0  # between two comments that say the same
CHECK_S: Final = 0.25  # between two looks at whether there is something new to say
QUIET_S: Final = 5.0  # without a token, once there was one: then likewise
_FORGET_S = 5.0  # a load tells ten times a second

State: TypeAlias = Literal[
    "waiting", "loading", "swapping_in", "queued", "computing", "suspended", "resuming"
]
States: TypeAlias = Callable[[str], Mapping[str, ReplicaState]]  # model -> by live GPU


class WaitState(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of a comment. ``position``: of its model among those that wait for room, from 1."""

    state: State
    waited_s: float
    position: int | None = None
    predicted_wait_s: float | None = None
    done_bytes: int | None = None
    total_bytes: int | None = None

    def is_news_after(self, other: "WaitState") -> bool:
        return (self.state, self.position) != (other.state, other.position)


_encode = msgspec.json.Encoder().encode


def comment(body: msgspec.Struct) -> bytes:
    """``body`` as a comment in an event stream."""
    return b": hotswap " + _encode(body) + b"\n\n"


class Progress:
    """Where requests are, from what everybody publishes. ``states``: replicas, by model."""

    def __init__(
        self,
        bus: Bus,
        waits: Waits,
        states: States,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._bus = bus
        self._waits = waits
        self._states = states
        self._clock = clock
        self._loads: dict[str, tuple[float, LoadProgressed]] = {}  # model -> heard at
        self._stop: Hook | None = None

    async def start(self) -> None:
        subject = names.events_subject("load_progressed")
        self._stop = await self._bus.subscribe(subject, LoadProgressed, self._on_load)

    async def stop(self) -> None:
        if self._stop:
            await self._stop()

    def note(self, load: LoadProgressed) -> None:
        """An agent said so just now."""
        self._loads[load.model] = (self._clock(), load)

    async def _on_load(self, message: Message[LoadProgressed]) -> None:
        self.note(message.body)

    def of(self, call: Call) -> WaitState:
        """What is known now of a request that is open."""
        now = self._clock()
        waited_s = round(max(0.0, now - call.request.created_at), 1)
        state = state_of(call, self._states(call.model))
        if state == "loading":
            heard_at, load = self._loads.get(call.model, (0.0, None))
            if load is None or now - heard_at > _FORGET_S:
                return WaitState(state, waited_s)
            done, total = load.done_bytes, load.total_bytes
            return WaitState(state, waited_s, done_bytes=done, total_bytes=total)
        if state in ("waiting", "swapping_in") and (wait := self._waits.of(call.model)):
            position = wait.place if state == "waiting" and wait.place else None
            return WaitState(state, waited_s, position, wait.left_s)
        return WaitState(state, waited_s)


def state_of(call: Call, states: Mapping[str, ReplicaState]) -> State:
    """``states``: of its model's replicas, by GPU, of agents that are alive."""
    if call.has_begun and call.started:
        match states.get(call.started.gpu):
            case "resident":
                return "computing"
            case "host" | "swapping_in" | "swapping_out" | "draining":
                return "suspended"
            case _:
                return "resuming"
    match nearest(states):
        case "resident":
            return "queued"
        case "swapping_in":
            return "swapping_in"
        case "loading":
            return "loading"
        case _:
            return "waiting"
