"""Who waits for what, and what is kept for them: plain containers, without a policy.

`services.scheduler.turns` makes turns of the waiters; `decide` makes plans and holds.
"""

from bisect import insort
from collections.abc import Iterator
from typing import TypeAlias

import msgspec

from schemas.admin import AdminAnswer
from schemas.names import RequestClass

_Place: TypeAlias = tuple[float, float, float, str]  # (put back, due at, at, id)


class Waiter(msgspec.Struct, frozen=True):
    """One request in the work queue that no agent has started.

    ``tenant``: None where nobody told, as after another leader. ``put_back_s``: how much longer it
    may wait than others, where its tenant had more than its share when it came, or where it is of
    class batch; else 0.
    """

    request_id: str
    model: str
    klass: RequestClass
    at: float  # unix seconds, when it entered the queue
    tenant: str | None = None
    put_back_s: float = 0.0


class WaitingLine:
    """The waiters of one model, the one due first first; after them those that are put back.

    ``decided_at``: when the first command for the first one's switch was given (unix seconds);
    before that, whatever was decided for those before it.
    """

    __slots__ = ("_by_id", "_ordered", "decided_at")

    def __init__(self) -> None:
        self.decided_at = 0.0
        self._by_id: dict[str, Waiter] = {}
        self._ordered: list[_Place] = []

    def __len__(self) -> int:
        return len(self._ordered)

    def __iter__(self) -> Iterator[Waiter]:
        return (self._by_id[place[-1]] for place in self._ordered)

    def by_due_time(self) -> list[Waiter]:
        """All of them as if none were put back."""
        return [self._by_id[place[-1]] for place in sorted(self._ordered, key=_due)]

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    @property
    def earliest(self) -> Waiter:
        """The first of them."""
        return self._by_id[self._ordered[0][-1]]

    @property
    def order(self) -> tuple[float, float, str]:
        """Where its first waiter comes among those of other models; ties broken for replays."""
        put_back_s, due_at, at, request_id = self._ordered[0]
        return (due_at + put_back_s, at, request_id)

    @property
    def due_at(self) -> float:
        return self._ordered[0][1]

    def add(self, waiter: Waiter, due_at: float) -> None:
        """Take a place in line; an id that is already there keeps the place it has."""
        if waiter.request_id not in self._by_id:
            self._by_id[waiter.request_id] = waiter
            insort(self._ordered, (waiter.put_back_s, due_at, waiter.at, waiter.request_id))

    def note_decision(self, now: float) -> None:
        """A command is given now for the first waiter; only its first one counts."""
        if self.decided_at < self.earliest.at:
            self.decided_at = max(now, self.earliest.at)  # the two clocks may differ

    def remove(self, request_id: str) -> Waiter | None:
        """The one that leaves; None if it was not in line."""
        waiter = self._by_id.pop(request_id, None)
        if waiter is not None:
            at = next(i for i, place in enumerate(self._ordered) if place[-1] == request_id)
            del self._ordered[at]
        return waiter

    def is_sorted(self) -> bool:
        return self._ordered == sorted(self._ordered)


class Plan(msgspec.Struct, frozen=True):
    """Bytes on ``gpu`` are being freed for ``model``: nobody else may take them."""

    model: str
    gpu: str
    request_id: str  # the waiter it was made for; empty: suspended requests
    is_batch: bool = False  # all who waited were of class batch


class Move(msgspec.Struct, frozen=True):
    """``model`` goes from ``source`` to ``gpu``, two GPUs, since ``at`` (unix seconds)."""

    model: str
    source: str
    gpu: str
    at: float
    until: float = 0.0  # when an operator gives it up; 0: nobody asked for it


class Wish(msgspec.Struct, frozen=True):
    """An operator wants ``model`` in, since ``at``, until ``until`` (unix seconds).

    ``gpu``: empty: any.
    """

    model: str
    gpu: str
    at: float
    until: float


class Verdict(msgspec.Struct, frozen=True):
    """What became of the question ``number`` (`services.scheduler.inputs.Asked`)."""

    number: int
    answer: AdminAnswer


class Holds:
    """What models ahead in line keep those behind from taking, until the whole line is looked at
    again: bytes of a GPU that they claim, and GPUs that are closed for them.
    """

    def __init__(self) -> None:
        self.claims: dict[str, int] = {}  # gpu -> bytes
        self.closed: dict[str, None] = {}  # GPUs
        self.models: dict[str, None] = {}  # that hold something

    def claim(self, model: str, gpu: str, num_bytes: int) -> None:
        self.claims[gpu] = self.claims.get(gpu, 0) + num_bytes
        self.models[model] = None

    def close(self, model: str, gpu: str) -> None:
        self.closed[gpu] = None
        self.models[model] = None

    def clear(self) -> None:
        self.claims.clear()
        self.closed.clear()
        self.models.clear()


def _due(place: _Place) -> tuple[float, float, str]:
    return place[1:]
