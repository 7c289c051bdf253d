"""Whose turn it is: everything that waits for device memory, as one line.

Two kinds of requests wait:

- *waiters* are in the work queue. Any replica of their model will do.
- *suspended* requests were preempted in the middle of their answers. An agent holds them, with
  what was computed, so they wait for one replica: their model on that GPU.

A replica with suspended requests has a turn of its own until it is on the device or on its way
there. It waits since it was swapped out, or as long as its model's earliest waiter where nobody
else serves that one. A model without suspended requests has one turn for all its waiters, unless
some replica serves them.

Each turn is *due* at some time: waiters when their first token should be out, suspended requests
when they have used up what they were ahead of their target. The line is ordered by that::

     long waiting         still in time           late
    | oldest first | the one due first first | oldest first |      within one priority
      > starvation_s        due > now

Those in time go before those that are late anyway, but nobody waits for ever.

Turns for tenants that had more than their share (`services.scheduler.shares`) are a line of their
own behind that one, in the same order. They have waited long when it is ``put_back_s`` longer.
So are turns for nothing but requests of class batch (`services.scheduler.batches`), but behind
those of all priorities.
"""

import math
from collections.abc import Iterator
from itertools import groupby, islice
from typing import TYPE_CHECKING, TypeAlias

import msgspec
from sortedcontainers import SortedDict, SortedKeyList

from services.scheduler.batches import is_batch_only
from services.scheduler.replica import Replica

if TYPE_CHECKING:
    from services.scheduler.state import ClusterState
    from services.scheduler.waiting import Move, Wish

_Key: TypeAlias = tuple[float, float, str, str, str]
_Level: TypeAlias = tuple[int, int]  # -priority, and within it one of the following
_USUAL, _PUT_BACK, _BATCH = range(3)


class Turn(msgspec.Struct, frozen=True):
    """One place in the line. ``gpu``: the only one that will do; empty: any.

    ``request_id``: the waiter due first; empty where only suspended requests wait. Times are unix
    seconds.
    """

    model: str
    gpu: str
    since: float
    request_id: str
    due_at: float = 0.0
    priority: int = 0
    # Nobody waits: a pinned model, another replica of one that is served, but too slowly, or one
    # that moves to ``gpu``.
    is_extra: bool = False
    is_asked: bool = False  # of those, what an operator asked for: it may be loaded first
    # All who wait are of tenants beyond their share, or of class batch: how much longer than others
    # they may.
    put_back_s: float = 0.0
    is_batch: bool = False  # all are of class batch

    @property
    def order(self) -> _Key:
        """The one due first first; the rest breaks ties so that replays agree."""
        return (self.due_at, self.since, self.request_id, self.model, self.gpu)

    @property
    def level(self) -> _Level:
        """The part of the line that it is in, the first one first."""
        if self.is_batch:
            return (-self.priority, _BATCH)
        return (-self.priority, _PUT_BACK if self.put_back_s > 0 else _USUAL)

    @property
    def waits_since(self) -> float:
        """From when on it counts as waiting, where that is a claim on others."""
        return self.since + self.put_back_s


_Part: TypeAlias = "tuple[SortedKeyList[tuple[_Key, Turn], _Key], list[tuple[_Key, Turn]]]"


class Line:
    """All turns in order. `refresh` files those of models whose waiters or replicas changed."""

    def __init__(self) -> None:
        self._turns: dict[str, list[Turn]] = {}  # by model
        self._levels: SortedDict[_Level, SortedKeyList[tuple[_Key, Turn], _Key]] = SortedDict()

    def __len__(self) -> int:
        return sum(len(level) for level in self._levels.values())

    def __bool__(self) -> bool:
        return bool(self._turns)

    def has_others(self) -> bool:
        """Not all turns are for class batch."""
        return any(kind != _BATCH for _, kind in self._levels)

    def of(self, model: str) -> list[Turn]:
        return self._turns.get(model, [])

    def refresh(self, state: "ClusterState") -> tuple[list[str], bool]:
        """File anew what changed. The models that have turns among those that did, and whether
        another has none any more: it is in nobody's way now.
        """
        changed = state.index.changed.turns
        if not changed:
            return [], False
        models = list(changed)
        changed.clear()
        num_before = len(self._turns)
        with_turns = []
        for model in models:
            had = model in self._turns
            turns = turns_of(state, model)
            if had or turns:
                self._file(model, turns)
            if turns:
                with_turns.append(model)
                num_before += not had
        return with_turns, len(self._turns) < num_before

    def _file(self, model: str, turns: list[Turn]) -> None:
        was = self._turns.pop(model, None)
        if was == turns:
            self._turns[model] = turns
            return
        for turn in was or ():
            level = self._levels[turn.level]
            level.remove((turn.order, turn))
            if not level:
                del self._levels[turn.level]
        if turns:
            self._turns[model] = turns
        for turn in turns:
            if turn.level not in self._levels:
                self._levels[turn.level] = SortedKeyList(key=_order)
            self._levels[turn.level].add((turn.order, turn))

    def in_order(self, now: float, starvation_s: float, most: int) -> Iterator[Turn]:
        """Whose turn it is at ``now``; of long lines ``most`` of each part."""
        put_off: list[_Part] = []  # of class batch, in all priorities
        for _, levels in groupby(list(self._levels.items()), key=_priority):
            parts: list[_Part] = []
            all_starving: list[tuple[_Key, Turn]] = []
            for (_, kind), level in levels:
                late = list(islice(level.irange_key(None, _at(now)), most))
                oldest = sorted(late, key=_since)
                starving = [one for one in oldest if now - _since(one)[0] > starvation_s]
                all_starving += starving
                part = (level, oldest[len(starving) :])
                (put_off if kind == _BATCH else parts).append(part)
            if len(all_starving) > 1:
                all_starving.sort(key=_since)
            yield from [turn for _, turn in all_starving]
            for level, late in parts:
                yield from _in_time_first(level, late, now, most)
        for level, late in put_off:
            yield from _in_time_first(level, late, now, most)

    def everything(self) -> list[Turn]:
        return [turn for level in self._levels.values() for _, turn in level]


def _in_time_first(
    level: "SortedKeyList[tuple[_Key, Turn], _Key]",
    late: list[tuple[_Key, Turn]],
    now: float,
    most: int,
) -> list[Turn]:
    in_time = islice(level.irange_key(_at(now), None), most)
    return [turn for _, turn in (*in_time, *late)]


def _order(filed: tuple[_Key, Turn]) -> _Key:
    return filed[0]


def _at(now: float) -> _Key:
    return (now, 0.0, "", "", "")


def _since(filed: tuple[_Key, Turn]) -> tuple[float, _Key]:
    return (filed[1].waits_since, filed[0])


def _priority(filed: tuple[_Level, object]) -> int:
    return filed[0][0]


def line(state: "ClusterState") -> list[Turn]:
    """All turns by priority, the one due first first, from a look at everything."""
    suspended = [replica.model for replica in state.suspended_replicas()]
    models = dict.fromkeys([*state.waiting, *suspended, *state.deployments])
    turns = [turn for model in models for turn in turns_of(state, model)]
    return sorted(turns, key=lambda turn: (turn.level, turn.order))


def turns_of(state: "ClusterState", model: str) -> list[Turn]:
    """The turns of ``model``, the one due first first: none where nobody waits unserved."""
    waiters = state.waiting.get(model)
    places = state.index.places.get(model)
    if places is None:
        return []
    suspended = [r for r in places.suspended.values() if r.agent.is_usable]
    serving = any(_serving(state, model))
    if serving and not suspended:
        if move := state.moves.get(model):
            return [_moving(state, move)]
        wish = state.wishes.get(model)
        if wish and wish.gpu and wish.gpu not in places.device:
            return [_wished(state, wish)]
        return [_extra(state, model)] if _is_too_slow(state, model) else []
    priority = state.priority(model)
    if waiters is None and not suspended:
        # Last of all in its priority: it hurts nobody.
        if wish := state.wishes.get(model):
            return [_wished(state, wish)]
        is_wanted = state.is_pinned(model) and places.host
        return [Turn(model, "", 0.0, "", math.inf, priority, is_extra=True)] if is_wanted else []
    first = waiters if not serving else None
    turns = []
    for replica in suspended:
        since, due_at = replica.host_since, replica.slack_at + replica.slack_s
        if first:
            since, due_at = min(since, first.earliest.at), min(due_at, first.due_at)
        request_id = first.earliest.request_id if first else ""
        put_back_s = state.config.put_back_s if state.yields(replica) else 0.0
        is_batch = is_batch_only(state, replica)
        if is_batch:
            since = replica.host_since
            # Nobody told where another leader saw them start.
            late_at = replica.batch_late_at or since + state.config.batch_patience_s
            due_at = max(since, late_at)
            put_back_s = due_at - since
        place = (model, replica.gpu, since, request_id, due_at, priority)
        turns.append(Turn(*place, put_back_s=put_back_s, is_batch=is_batch))
    if first and not suspended:
        waiter = first.earliest
        who = (model, "", waiter.at, waiter.request_id)
        is_batch = waiter.klass == "batch"
        turns.append(
            Turn(*who, first.due_at, priority, put_back_s=waiter.put_back_s, is_batch=is_batch)
        )
    return sorted(turns, key=lambda turn: (turn.level, turn.order))


def _is_too_slow(state: "ClusterState", model: str) -> bool:
    """More requests come than its replicas can begin with in time."""
    config, tempo = state.config, state.tempos.get(model)
    if not config.replicate or tempo is None:
        return False
    if tempo.first_s <= state.ttft_target_s(model, "interactive") / 4:
        return False
    return all(r.in_flight >= config.crowd for r in _serving(state, model))


def _serving(state: "ClusterState", model: str) -> Iterator[Replica]:
    places = state.index.of(model)
    return (r for r in places.device.values() if r.serves and r.agent.is_usable)


def _extra(state: "ClusterState", model: str) -> Turn:
    since = max(r.resident_since for r in _serving(state, model))
    return Turn(model, "", since, "", since, state.priority(model), is_extra=True)


def _moving(state: "ClusterState", move: "Move") -> Turn:
    """Last of all in its priority, and where it goes is settled."""
    priority = state.priority(move.model)
    is_asked = move.until > 0
    who = (move.model, move.gpu, move.at, "")
    return Turn(*who, math.inf, priority, is_extra=True, is_asked=is_asked)


def _wished(state: "ClusterState", wish: "Wish") -> Turn:
    who = (wish.model, wish.gpu, wish.at, "")
    return Turn(*who, math.inf, state.priority(wish.model), is_extra=True, is_asked=True)


def turn_at(state: "ClusterState", model: str, gpu: str) -> Turn | None:
    """The turn that ``model`` can take on ``gpu``, if it has one."""
    return next((turn for turn in turns_of(state, model) if turn.gpu in ("", gpu)), None)


def note_decision(state: "ClusterState", turn: Turn, now: float) -> None:
    """A command is given now for ``turn``; only its first one counts."""
    if turn.is_extra:
        return
    if not turn.gpu:
        state.waiting[turn.model].note_decision(now)
        return
    replica = state.agents[turn.gpu].replicas[turn.model]
    if replica.decided_at < turn.since:
        replica.decided_at = max(now, turn.since)  # the two clocks may differ


def decided_at(state: "ClusterState", turn: Turn) -> float:
    """When the first command for ``turn`` was given (unix seconds), as far as noted."""
    if turn.is_extra:
        return 0.0
    if not turn.gpu:
        return state.waiting[turn.model].decided_at
    return state.agents[turn.gpu].replicas[turn.model].decided_at
