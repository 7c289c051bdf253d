"""Decisions that were made and not told yet, and what was told already.

`decide` notes them (`services.scheduler.reasons` words them), whoever runs it takes them
(`Decisions.take`). Where nobody does, as in simulations, the oldest are forgotten.

A decision that gives a command is made once. One that only waits (a claim, bytes on their way out)
is made again each time that the line is looked at: of these each is told once in a wait.
"""

from collections import deque

from schemas.events import DecisionMade

MOST_UNTOLD = 1024


class Decisions:
    """``bool()``: whether there is something to take."""

    __slots__ = ("_told", "_untold")

    def __init__(self) -> None:
        self._untold: deque[DecisionMade] = deque(maxlen=MOST_UNTOLD)
        # (model, the GPU that its turn is for) -> since when it waits, and what it was told to do
        self._told: dict[tuple[str, str], tuple[float, set[tuple[str, str]]]] = {}

    def __bool__(self) -> bool:
        return bool(self._untold)

    def note(self, decision: DecisionMade) -> None:
        self._untold.append(decision)

    def take(self) -> list[DecisionMade]:
        """Those made since this was asked last, in order."""
        taken = list(self._untold)
        self._untold.clear()
        return taken

    def is_news(self, turn: tuple[str, str], since: float, action: str, gpu: str) -> bool:
        """Whether ``turn`` (model, GPU or ""), waiting since then, is told this the first time."""
        known_since, told = self._told.get(turn, (since, set()))
        if known_since != since:
            told = set()
        is_new = (action, gpu) not in told
        told.add((action, gpu))
        self._told[turn] = (since, told)
        return is_new

    def wait_ended(self, turn: tuple[str, str]) -> None:
        """It has what it waited for: forget what it was told."""
        self._told.pop(turn, None)
