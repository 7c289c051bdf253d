"""Questions about tokens: bus -> engine worker -> bus.

For each model that the worker has registered, wherever its weights are, this agent is one of
those that answer: a queue group, so that one does. Nothing is kept: who gets no answer in time
asks again.
"""

import itertools
import logging
from collections.abc import Callable
from typing import Final

import msgspec

from schemas.names import TOKENIZE_GROUP, tokenize_subject
from schemas.tokenize import TokenizeAnswer, TokenizeAsk, TokenizeFailed
from services.bus import Bus, BusError
from services.bus.connection import Hook, RawMessage
from services.gpu_agent import ipc

log = logging.getLogger(__name__)

MAX_WAITING: Final = 256  # at the worker, which answers one after the other


class Tokenizing:
    """``send``: to the worker, which answers each `ipc.Tokenize` with one `ipc.TokenizeAnswered`,
    or dies.
    """

    def __init__(self, bus: Bus, send: Callable[[ipc.ToWorker], None]) -> None:
        self._bus = bus
        self._send = send
        self._open: dict[str, Hook] = {}  # model -> undo of its subscription
        self._tickets = itertools.count(1)
        self._waiting: dict[int, str] = {}  # ticket -> where the answer goes
        self._decoder: msgspec.json.Decoder[TokenizeAsk] = msgspec.json.Decoder(TokenizeAsk)

    async def open(self, model: str) -> None:
        """The worker knows ``model``: answer questions about it from now on."""
        if model in self._open:
            return
        self._open[model] = await self._bus.subscribe_raw(
            tokenize_subject(model), self._on_question, queue=TOKENIZE_GROUP
        )

    async def forget(self, model: str) -> None:
        """The worker does not know ``model`` any more."""
        if model in self._open:
            await self._open.pop(model)()

    async def close(self) -> None:
        """The agent ends: leave questions to others; what waits here is told to go to them."""
        for model in list(self._open):
            await self._open.pop(model)()
        await self.give_up("the agent that was asked is shutting down")

    async def give_up(self, reason: str) -> None:
        """Nothing more comes from the worker about what it was asked."""
        waiting, self._waiting = self._waiting, {}
        for reply in waiting.values():
            await self._tell(reply, TokenizeFailed("model_unavailable", reason))

    async def on_answer(self, message: ipc.TokenizeAnswered) -> None:
        if reply := self._waiting.pop(message.ticket, ""):
            await self._tell(reply, message.answer)

    async def _on_question(self, raw: RawMessage) -> None:
        try:
            ask = self._decoder.decode(raw.data)
        except msgspec.DecodeError as error:
            log.error("dropped a message on %s: %s", raw.subject, error)
            return
        if len(self._waiting) >= MAX_WAITING:
            words = f"{MAX_WAITING} questions about tokens wait already; try again"
            await self._tell(raw.reply, TokenizeFailed("model_unavailable", words))
            return
        ticket = next(self._tickets)
        self._waiting[ticket] = raw.reply
        self._send(ipc.Tokenize(ticket, ask))

    async def _tell(self, reply: str, answer: TokenizeAnswer) -> None:
        try:
            await self._bus.publish(reply, answer)
        except BusError as error:
            log.warning("an answer about tokens was not sent: %s", error)
            words = f"the answer is too large for the message bus ({self._bus.max_payload} bytes)"
            if not isinstance(answer, TokenizeFailed):
                await self._tell(reply, TokenizeFailed("invalid_prompt", words))
