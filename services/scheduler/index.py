"""Who is where, kept by the replicas and agents themselves as they change.

A decision must not cost more because there are ten thousand models or a thousand GPUs, so nothing
here is found by looking through all of them: whoever changes files itself anew (`Index.refile`),
and what has to be looked at again is noted. `services.scheduler.state.ClusterState.validate`
compares all of it with what a look at everything gives.

::

    Index -- places: model -> Places         where its replicas are, by GPU
          |- pending, arriving, troubled, unregistered   replicas that need looking after
          |- large                           those on the device that need more than half of it
          |- rooms                           usable GPUs by room for a newcomer, most room first
          '- changed                         what to look at again: turns, agents, views
"""

from typing import TYPE_CHECKING, TypeVar

from sortedcontainers import SortedList

from services.scheduler.lifecycle import DEVICE_STATES

if TYPE_CHECKING:
    from services.scheduler.replica import Agent, Replica

T = TypeVar("T")

_DEVICE = frozenset(DEVICE_STATES)
FEW = 8  # replicas: of a model on more GPUs, a waiter says little about any one of them


class Places:
    """The replicas of one model by what they hold: GPU -> replica."""

    __slots__ = ("arriving", "cached", "device", "host", "loading", "suspended")

    def __init__(self) -> None:
        self.device: dict[str, Replica] = {}
        self.arriving: dict[str, Replica] = {}  # of those, the ones that are being swapped in
        self.host: dict[str, Replica] = {}  # host image only
        self.loading: dict[str, Replica] = {}
        self.suspended: dict[str, Replica] = {}  # host image, and requests that wait
        self.cached: dict[str, Replica] = {}  # swapped out, and some of it still on the device

    def all(self) -> "tuple[dict[str, Replica], ...]":
        return (
            self.device,
            self.arriving,
            self.host,
            self.loading,
            self.suspended,
            self.cached,
        )


class Changes:
    """What happened since these were last cleared; dicts keep the order."""

    __slots__ = ("agents", "preloads", "turns", "views")

    def __init__(self) -> None:
        self.turns: dict[str, None] = {}  # models: who waits for them, or who serves them
        self.agents: dict[str, None] = {}  # GPUs: bytes taken, freed, or not in use any more
        self.preloads: dict[str, None] = {}  # GPUs that may be able to preload something
        self.views: dict[str, None] = {}  # models: what users are told about them


class Index:
    """See the top of the file. ``key`` of a replica is its name, ``gpu/model``."""

    def __init__(self) -> None:
        self.places: dict[str, Places] = {}
        self.pending: dict[str, Replica] = {}
        self.arriving: dict[str, Replica] = {}
        self.troubled: dict[str, Replica] = {}  # failed, or with a failure that is remembered
        self.unregistered: dict[str, Replica] = {}  # cold, and nobody knows what they need
        self.large: dict[str, Replica] = {}
        self.usable: dict[str, Agent] = {}
        self.rooms: SortedList[tuple[int, str]] = SortedList()  # (-room_bytes, gpu)
        self.changed = Changes()
        self.largest_bytes = 0  # footprint of the largest model there ever was
        self._room_keys: dict[str, tuple[int, str]] = {}

    def of(self, model: str) -> Places:
        places = self.places.get(model)
        if places is None:
            places = self.places[model] = Places()
        return places

    # -- told by replicas and agents ---------------------------------------------------------

    def refile(self, replica: "Replica") -> None:
        """``replica`` changed: its state, what it needs, what it waits for."""
        model, gpu, state = replica.model, replica.gpu, replica.state
        places = self.of(model)
        key = replica.life.name
        self.largest_bytes = max(self.largest_bytes, replica.footprint_bytes)
        keep(places.device, gpu, replica, state in _DEVICE)
        keep(places.arriving, gpu, replica, state == "swapping_in")
        keep(places.host, gpu, replica, state == "host")
        keep(places.loading, gpu, replica, state == "loading")
        keep(places.suspended, gpu, replica, replica.is_suspended)
        keep(places.cached, gpu, replica, replica.cached_bytes > 0 and state == "host")
        keep(self.pending, key, replica, replica.pending is not None)
        keep(self.arriving, key, replica, state == "swapping_in")
        self._file_large(replica)
        keep(self.troubled, key, replica, replica.failure is not None or state == "failed")
        keep(self.unregistered, key, replica, state == "cold" and replica.facts is None)
        changed = self.changed
        changed.turns[model] = None
        changed.views[model] = None
        changed.agents[gpu] = None
        changed.preloads[gpu] = None

    def forget(self, replica: "Replica") -> None:
        """It is no more."""
        key, places = replica.life.name, self.of(replica.model)
        for shelf in (self.pending, self.arriving, self.troubled, self.unregistered, self.large):
            shelf.pop(key, None)
        for place in places.all():
            place.pop(replica.gpu, None)
        if not any(places.all()):
            del self.places[replica.model]
        self.changed.turns[replica.model] = None
        self.changed.agents[replica.gpu] = None

    def busy_changed(self, replica: "Replica") -> None:
        """``replica`` got its first request, or lost its last one."""
        if replica.state == "host":
            keep(self.of(replica.model).suspended, replica.gpu, replica, replica.is_suspended)
        self.changed.turns[replica.model] = None
        self.changed.agents[replica.gpu] = None

    def waiting_changed(self, model: str) -> None:
        """``model`` got its first waiter, lost its last one, or has another earliest one."""
        self.changed.turns[model] = None
        places = self.places.get(model)
        if places is not None and len(places.device) <= FEW:
            for gpu in places.device:
                self.changed.agents[gpu] = None

    def health_changed(self, agent: "Agent") -> None:
        """``agent`` became usable or unusable, or its budgets changed."""
        changed = self.changed
        keep(self.usable, agent.gpu, agent, agent.is_usable)
        changed.agents[agent.gpu] = None
        changed.preloads[agent.gpu] = None
        for replica in agent.device.values():
            self._file_large(replica)
        for models in (agent.device, agent.suspended, agent.replicas):
            for model in models:
                changed.turns[model] = None
                changed.views[model] = None

    def _file_large(self, replica: "Replica") -> None:
        belongs = replica.state in _DEVICE and replica.agent.is_usable and replica.is_large
        keep(self.large, replica.life.name, replica, belongs)

    # -- rooms -------------------------------------------------------------------------------

    def file_room(self, gpu: str, room_bytes: int | None) -> bool:
        """Note how much a newcomer could have on ``gpu``; None: it is not usable.

        Whether it is more than before.
        """
        was = self._room_keys.pop(gpu, None)
        if was is not None:
            self.rooms.remove(was)
        if room_bytes is None:
            return False
        key = self._room_keys[gpu] = (-room_bytes, gpu)
        self.rooms.add(key)
        return was is None or key < was


def keep(shelf: dict[str, T], key: str, thing: T, belongs: bool) -> None:
    """Put ``thing`` on ``shelf``, or take it off."""
    if belongs:
        shelf[key] = thing
    else:
        shelf.pop(key, None)
