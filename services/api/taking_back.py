"""Requests that are taken back: out of the queue, off their agents, and told of where nobody else
tells their end.

    in the queue only     withdrawn                                    RequestWithdrawn
    an agent has begun    cancelled, and the agent says that it ended  the agent's RequestEnded
    ... and died since    no word of it for a while                    RequestWithdrawn

What an agent pulled just before it was withdrawn is cancelled when it speaks up.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from typing import Final, Literal, TypeAlias

from schemas.events import RequestWithdrawn, kind_of
from schemas.names import cancel_subject, event_subject
from schemas.requests import CancelRequest
from schemas.stream import Chunk, Failed, Finished
from services.api.call import Call
from services.bus import Bus, BusError, WorkQueue

log = logging.getLogger(__name__)

WithdrawReason: TypeAlias = Literal[
    "client_left", "deadline", "model_failed", "shutdown", "choice_failed"
]

SETTLE_S: Final = (
    0.05  # an agent that pulled a request just before it was withdrawn says so by then
)
CONFIRM_S: Final = 4.0  # an agent that is told to cancel a request says so by then, or is gone
_REMEMBERED: Final = 2048


class _Leaving:
    """One that is being taken back right now, and what its agent says meanwhile."""

    def __init__(self, call: Call) -> None:
        self.run = call.newest_run
        self.has_begun = call.has_begun
        self.end_told = asyncio.Event()


class TakingBack:
    """The way back of requests whose call is over at this api."""

    def __init__(self, bus: Bus, queue: WorkQueue) -> None:
        self._bus = bus
        self._queue = queue
        self._leaving: dict[str, _Leaving] = {}  # by request id
        # Request id -> its model, or "" where its agent has ended it; oldest first.
        self._over: OrderedDict[str, str] = OrderedDict()

    def note_end(self, call: Call) -> None:
        """Its agent has ended it, and said so."""
        self._remember(call.request_id, "")

    def note_given_up(self, call: Call) -> None:
        """It ends from this side; `take_back` follows."""
        self._remember(call.request_id, call.model)

    def _remember(self, request_id: str, model: str) -> None:
        self._over[request_id] = model
        while len(self._over) > _REMEMBERED:
            self._over.popitem(last=False)

    def has_ended(self, request_id: str) -> bool:
        """Whether an agent has ended the request; False where it was given up, or is not known."""
        return self._over.get(request_id) == ""

    def on_chunk(self, request_id: str, chunk: Chunk) -> str:
        """An agent says something about a request whose call is over.

        Returns its model where the agent has to be told (by `cancel`), else "".
        """
        leaving = self._leaving.get(request_id)
        if isinstance(chunk, Finished | Failed):
            if leaving and chunk.request_id == leaving.run:
                leaving.end_told.set()
            return ""
        if leaving and chunk.request_id == leaving.run:
            leaving.has_begun = True
        if model := self._over.get(request_id):
            # Its agent pulled it before it was withdrawn, and saw the cancellation too early.
            self._over[request_id] = ""  # once is enough
        return model or ""

    async def take_back(self, call: Call, runs: list[str], reason: WithdrawReason | None) -> None:
        """Withdraw and cancel ``runs`` of ``call``. With ``reason`` its end is told, by whoever is
        there to tell it.
        """
        leaving = self._leaving[call.request_id] = _Leaving(call)
        try:
            for run in runs:
                await self.withdraw(call, run)
            is_told = reason is None or await self._is_told_by_agent(leaving)
        finally:
            del self._leaving[call.request_id]
        if reason is None or is_told:
            return
        event = RequestWithdrawn(
            model=call.model, request_id=leaving.run, at=time.time(), reason=reason
        )
        await self._bus.publish(event_subject(kind_of(event), model=call.model), event)

    async def _is_told_by_agent(self, leaving: _Leaving) -> bool:
        await asyncio.sleep(SETTLE_S)
        if not leaving.has_begun:
            return False
        try:
            await asyncio.wait_for(leaving.end_told.wait(), CONFIRM_S)
        except TimeoutError:
            log.warning("no agent says that request %s has ended: withdrawn", leaving.run)
            return False
        return True

    async def withdraw(self, call: Call, run: str) -> None:
        """Out of the queue first, so that whoever pulled it before gets the cancellation after.

        What is known to run is cancelled first; if it is pulled again all the same, `on_chunk`
        knows of it.
        """
        is_running = call.started is not None and bool(self._over.get(call.request_id))
        if is_running:
            await self.cancel(call.model, run)
        seq = call.runs.get(run)
        # While the server is away the call would wait in memory, and could then hit another
        # request under the same number; a restarted server has forgotten this one anyway.
        if seq is not None and self._bus.is_connected:
            try:
                await self._queue.withdraw(seq)
            except BusError as error:
                log.warning("request %s could not be withdrawn: %s", run, error)
        if not is_running:
            await self.cancel(call.model, run)

    async def cancel(self, model: str, run: str, gpu: str = "") -> None:
        """``gpu``: only there, where it is to be forgotten, since it goes on elsewhere."""
        await self._bus.publish(cancel_subject(model), CancelRequest(run, model, gpu))
