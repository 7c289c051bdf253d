"""One open request, from admission to its one end, as the HTTP side reads it.

    queued ── Started ──> started ── Tokens* ──> ended: Finished, or an error, or the client left
       `──────────────────────────────────────────^

Vectors of a request for embeddings come in the place of tokens.

`Relay` writes into a Call; the HTTP handler reads from it. Whatever happens, `read` comes to
an end: with [] where the answer is complete, else with ApiError or ClientLeft.
"""

import asyncio
import contextvars
import logging
import time
from collections.abc import Coroutine
from typing import Any

from schemas.requests import ChatPrompt, EmbedRequest, GenerateRequest, Request
from schemas.stream import ErrorCode, Finished, Started
from services.api.answer import Answer, Piece
from services.api.errors import ApiError, slow_reader
from services.api.vectors import VectorAnswer
from services.bus import BusError

log = logging.getLogger(__name__)

MAX_BUFFERED_TOKENS = 10_000  # per request; a client that reads slower than that loses its stream


class ClientLeft(Exception):
    """Nobody reads the answer any more."""


class Call:
    """One open request. Only `Relay` calls the methods that change it."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.started: Started | None = None  # the newest one: where it is now
        self.first_started: Started | None = None  # how it began
        self.waited_s = 0.0  # until then
        self.num_resumed = 0  # how often another agent, or the same one anew, went on with it
        self.finished: Finished | None = None
        self.answer = Answer()
        # Of a request for embeddings: they come as one, there is nothing to `read` before the end.
        self.vectors = VectorAnswer(request) if isinstance(request, EmbedRequest) else None
        # Each time the request was given to the queue, its id there -> stream sequence.
        self.runs: dict[str, int | None] = {}
        self.context = contextvars.copy_context()  # later runs belong to the same trace
        self.timer: asyncio.TimerHandle | None = None
        self._cause: Exception | None = None
        self._pieces: list[Piece] = []
        self._buffered_tokens = 0
        self.news = asyncio.Event()  # of whoever reads: several calls may share one

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def model(self) -> str:
        return self.request.model

    @property
    def param(self) -> str:
        """The field of the HTTP body that holds what the model was given."""
        if isinstance(self.request, EmbedRequest):
            return "input"
        return "messages" if isinstance(self.request.prompt, ChatPrompt) else "prompt"

    def param_of(self, code: ErrorCode) -> str:
        """The field that a failure with ``code`` is about, where it is about one."""
        if code == "invalid_grammar" and isinstance(self.request, GenerateRequest):
            grammar = self.request.sampling.grammar
            return grammar.field if grammar else self.param
        return self.param

    @property
    def timeout_s(self) -> float:
        """From its admission to its end."""
        return self.request.deadline_at - self.request.created_at

    @property
    def ended(self) -> bool:
        return self.finished is not None or self._cause is not None

    @property
    def has_failed(self) -> bool:
        """It ended with an error."""
        return isinstance(self._cause, Exception) and not isinstance(self._cause, ClientLeft)

    @property
    def newest_run(self) -> str:
        return next(reversed(self.runs), self.request_id)

    @property
    def stage(self) -> str:
        """Where it is, in words for an error message."""
        if self.started is None:
            age_s = time.time() - self.request.created_at
            return f"still waiting for model {self.model!r} after {age_s:.0f} s"
        num_tokens = len(self.answer.token_ids)
        return f"running on gpu {self.started.gpu!r} with {num_tokens} tokens done"

    @property
    def has_begun(self) -> bool:
        """Whether an agent has said that it works on the newest run."""
        return self.started is not None and self.started.request_id == self.newest_run

    # -- the relay's side ------------------------------------------------------------------

    def start(self, started: Started) -> None:
        """An agent has begun with it, or goes on with it."""
        self.started = started
        if self.first_started is None:
            self.first_started = started
            self.waited_s = max(0.0, time.time() - self.request.created_at)

    def push(self, piece: Piece, num_tokens: int) -> ApiError | None:
        """Add a piece for the reader. An error where it is too far behind."""
        self._pieces.append(piece)
        self._buffered_tokens += num_tokens
        self.news.set()
        if self._buffered_tokens > MAX_BUFFERED_TOKENS:
            return slow_reader(self._buffered_tokens)
        return None

    def end(self, how: Finished | Exception) -> None:
        """The one end; what is still unread can be read."""
        assert not self.ended, f"request {self.request_id} ends twice"
        if isinstance(how, Finished):
            self.finished = how
        else:
            self._cause = how
        if self.timer:
            self.timer.cancel()
        self.news.set()

    # -- the HTTP side ---------------------------------------------------------------------

    @property
    def has_news(self) -> bool:
        """Whether `read` has something to say at once."""
        return bool(self._pieces) or self.ended

    async def read(self) -> list[Piece]:
        """The pieces that came since the last call; [] once the answer is complete.

        Waits until there is something. Raises ApiError or ClientLeft where the request ended so.
        """
        while not self.has_news:
            self.news.clear()
            await self.news.wait()
        return self.take()

    def take(self) -> list[Piece]:
        """As `read`, but at once; also [] where there is nothing now."""
        if isinstance(self._cause, ClientLeft):
            raise self._cause
        if self._pieces:
            pieces, self._pieces, self._buffered_tokens = self._pieces, [], 0
            return pieces
        if self._cause:
            raise self._cause
        return []


class Background:
    """What is done for calls beside their HTTP requests."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def run(self, call: Call | None, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start ``work``, in the trace of ``call`` if it is for one."""
        task = asyncio.create_task(work, context=call.context.copy() if call else None)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)
        return task

    async def wait(self, timeout_s: float) -> None:
        """Until everything is done, ``timeout_s`` seconds at the most."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)

    def _on_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            if isinstance(error, BusError):  # whoever waits for the task answers it
                log.debug("bus: %s", error)
            else:
                log.error("a background task of the relay failed", exc_info=error)
