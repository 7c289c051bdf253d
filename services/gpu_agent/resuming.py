"""Requests that may have run before: the api says what it has of their answers, and we go on there.

    delivered again ── Resuming ──> api ── run, behind these tokens ──> line
                                     |  ── cancel: nobody waits ──────> ended
                                     |  ── drop: it has ended ────────> acknowledged
                                     `  no answer in time ────────────> line, from token 0

An api that has died is told by the server, at once: nobody listens where its answers go.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from schemas.requests import GenerateRequest
from schemas.stream import ResumeFrom, Resuming
from services.bus import Bus, BusError
from services.bus.connection import RawMessage
from services.gpu_agent.telling import InFlight

log = logging.getLogger(__name__)

PATIENCE_S: Final = 2.0  # for an answer; the same tokens are computed again without one

OnVerdict = Callable[[InFlight, ResumeFrom], Awaitable[None]]


class Resumption:
    """Asks for each flight that is given to `ask`, and tells ``on_verdict`` exactly once."""

    def __init__(self, bus: Bus, gpu: str, on_verdict: OnVerdict) -> None:
        self._bus = bus
        self._gpu = gpu
        self._on_verdict = on_verdict
        self._inbox = f"{bus.inbox}.resume"
        self._decoder = msgspec.json.Decoder(ResumeFrom)
        self._asked: dict[str, asyncio.Future[ResumeFrom]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        await self._bus.subscribe_raw(f"{self._inbox}.*", self._on_answer)

    def ask(self, flight: InFlight) -> None:
        """Returns at once; the verdict comes later."""
        task = asyncio.create_task(self._ask(flight))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(self, flight: InFlight) -> None:
        request = flight.request
        answer = self._asked[request.request_id] = asyncio.get_running_loop().create_future()
        query = Resuming(request.request_id, self._gpu, flight.attempt)
        try:
            reply = f"{self._inbox}.{request.request_id}"
            await self._bus.publish(request.reply_to, query, reply=reply)
            verdict = await asyncio.wait_for(answer, PATIENCE_S)
        except (BusError, TimeoutError):
            log.warning("request %s runs from its begin: no word of the api", request.request_id)
            known = request.prefix_token_ids if isinstance(request, GenerateRequest) else ()
            verdict = ResumeFrom(request.request_id, "run", known)
        finally:
            if self._asked.get(request.request_id) is answer:
                del self._asked[request.request_id]
        await self._on_verdict(flight, verdict)

    async def _on_answer(self, raw: RawMessage) -> None:
        request_id = raw.subject.rsplit(".", 1)[1]
        answer = self._asked.get(request_id)
        if answer is None or answer.done():
            return
        if raw.headers.get("Status"):  # 503: no responders
            answer.set_result(ResumeFrom(request_id, "cancel"))
            return
        try:
            answer.set_result(self._decoder.decode(raw.data))
        except msgspec.DecodeError as error:
            log.error("request %s: unreadable answer of the api: %s", request_id, error)
