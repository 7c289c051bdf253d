"""The requests of one batch: asked, looked after, answered; each of its lines ends once.

todo --feed--> waiting --answers--> done, a line of one of two files
  ^               |
  '---- again ----'      the answer had gaps, or the request was lost
"""

import asyncio
import contextlib
import logging
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import IO, Literal, TypeAlias

import msgspec

from schemas import names
from schemas.batches import BatchRecord
from schemas.events import RequestWithdrawn, kind_of
from schemas.requests import CancelRequest, Request
from schemas.stream import Chunk
from services.api import errors
from services.api.batches import answers
from services.api.batches.lines import Line
from services.api.batches.queued import Queued, Run
from services.api.catalog import Catalog
from services.api.errors import ApiError
from services.api.parsing import Parsed
from services.api.tool_answers import with_tools
from services.bus import (
    Bus,
    BusError,
    BusUnavailable,
    JetStreamError,
    QueueFull,
    WorkQueue,
    history,
)
from services.bus.connection import Hook, RawMessage

log = logging.getLogger(__name__)

MAX_IN_QUEUE = 128  # of one model
MAX_RUNS = 4  # of one line; then an error is the better answer
LOOK_EVERY_S = 10.0  # at the queue, for what is lost
_MODEL_PATIENCE_S = 600.0  # a model that can not be served may heal; then its lines fail
_TRY_AGAIN_S = 2.0
_WIND_DOWN_S = 10.0  # for what runs to hear that it is cancelled
_AT_A_TIME = 200  # lines; the HTTP side of this process has its turns in between

Admit: TypeAlias = Callable[[Request], None]  # raises ApiError where it may not be queued


def anybody(request: Request) -> None:
    """An `Admit` that refuses nothing."""


class Work:
    """``record``: as it was when the work began. ``lines``: by number. Close it in the end.

    ``output``, ``error``: what becomes of the lines.
    """

    def __init__(
        self,
        bus: Bus,
        catalog: Catalog,
        queued: Queued,
        record: BatchRecord,
        lines: dict[int, Line],
        admit: Admit = anybody,
    ) -> None:
        self.all_done = asyncio.Event()
        self.output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (see `close`)
        self.error: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._bus = bus
        self._catalog = catalog
        self._admit = admit
        self._queued = queued
        self._queue = WorkQueue(bus)
        self._record = record
        self._lines = lines
        self._decoder: msgspec.json.Decoder[Chunk] = msgspec.json.Decoder(Chunk)
        self._news = asyncio.Event()
        self._done: set[int] = set()
        self._num_failed = 0
        self._runs: dict[int, int] = {}  # line -> its newest run, from 1
        self._waiting: dict[int, int] = {}  # line -> the run that is in the queue or at an agent
        self._num_waiting: Counter[str] = Counter()  # of these, by model
        self._missed: dict[int, int] = {}  # line -> run that was not in the queue at the last look
        self._answers: dict[tuple[int, str], answers.RunAnswer] = {}
        self._todo: dict[str, deque[int]] = {}  # model -> lines to be asked
        self._unready: dict[str, float] = {}  # model -> since when it can not be served (monotonic)
        self._is_called_off = False
        for number, line in lines.items():
            self._todo.setdefault(line.model, deque()).append(number)

    @property
    def is_whole(self) -> bool:
        return len(self._done) == len(self._lines)

    @property
    def num_done(self) -> int:
        return len(self._done)

    @property
    def counts(self) -> dict[str, int]:
        """For the record."""
        completed = len(self._done) - self._num_failed
        return {
            "num_requests": len(self._lines),
            "num_completed": completed,
            "num_failed": self._num_failed,
        }

    def close(self) -> None:
        self.output.close()
        self.error.close()

    async def begin(self) -> Hook:
        """Learn what was asked and answered so far, and listen. Returns its undo.

        Raises BusError, TimeoutError.
        """
        found = await self._queued.look()
        for run in found.of(self._record.batch):
            if run.number in self._lines:
                self._runs[run.number] = max(self._runs.get(run.number, 0), run.attempt)
                self._wait_for(run.number, run.attempt)
        subject = names.result_subject(self._record.batch)
        return await history.follow(self._bus, names.STREAM_RESULTS, subject, self._on_result)

    # -- out ---------------------------------------------------------------------------------

    async def feed(self) -> None:
        """Ask what was not asked yet, for ever."""
        while True:
            self._news.clear()
            num = 0
            is_stuck = False
            for model, line in self._todo.items():
                while line and self._num_waiting[model] < MAX_IN_QUEUE:
                    number = line.popleft()
                    if number in self._done or number in self._waiting:
                        continue
                    if not await self._ask(self._lines[number]):
                        line.appendleft(number)
                        is_stuck = True
                        break
                    num += 1
                    if num % _AT_A_TIME == 0:
                        await asyncio.sleep(0)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), _TRY_AGAIN_S if is_stuck else None)

    async def _ask(self, line: Line) -> bool:
        """Queue ``line``, or answer it if nobody else has to. False: not now."""
        attempt = self._runs.get(line.number, 0) + 1
        try:
            ask = self._parse(line)
            if self._catalog.missing():
                return False  # what there is, is not known yet
            deployment = answers.require(self._catalog, ask)
            run = Run(self._record.batch, line.number, attempt)
            request = answers.request_of(
                ask,
                deployment,
                run.request_id,
                names.result_subject(self._record.batch, line.number),
                time.time(),
                self._record.expires_at,
                self._record.tenant,
            )
            self._admit(request)
        except ApiError as error:
            if error.status != 503:
                self._settle_error(line, error)
                return True
            since = self._unready.setdefault(line.model, time.monotonic())
            if time.monotonic() - since < _MODEL_PATIENCE_S:
                return False
            self._settle_error(line, error)
            return True
        self._unready.pop(line.model, None)
        # Its answer may be here before the queue's own.
        self._runs[line.number] = attempt
        self._wait_for(line.number, attempt)
        try:
            await self._queue.enqueue(request)
        except (QueueFull, BusUnavailable, JetStreamError) as error:
            # It may be in the queue all the same: then the queue drops the second one.
            self._runs[line.number] = attempt - 1
            self._wait_no_more(line.number)
            if not isinstance(error, QueueFull):
                log.warning("request %s is not queued yet: %s", run.request_id, error)
            return line.number in self._done
        except BusError as error:  # it never fits
            self._settle_error(line, ApiError(413, "request_too_large", f"{error}."))
        return True

    def _parse(self, line: Line) -> answers.Ask:
        what = (self._record.endpoint, line, self._record.batch)
        ask = answers.parse(*what, self._catalog.prepare)
        if isinstance(ask, Parsed):
            return with_tools(ask, self._catalog, self._deployment_of(ask.model))
        return ask

    def _deployment_of(self, model: str) -> str:
        """Of a name or an alias; as it is where nobody knows it any more."""
        found = self._catalog.find(model)
        return found.spec.name if found else model

    def _wait_for(self, number: int, attempt: int) -> None:
        if number not in self._waiting:
            self._num_waiting[self._lines[number].model] += 1
        self._waiting[number] = attempt

    def _wait_no_more(self, number: int) -> None:
        if self._waiting.pop(number, None) is not None:
            self._num_waiting[self._lines[number].model] -= 1
        self._missed.pop(number, None)

    async def find_lost(self) -> None:
        """Look for requests that are neither queued nor answered, for ever."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            before = dict(self._waiting)
            try:
                found = await self._queued.look()
            except (BusError, TimeoutError) as error:
                log.warning(
                    "batch %s: the queue can not be looked at: %s", self._record.batch, error
                )
                continue
            there = {(run.number, run.attempt) for run in found.of(self._record.batch)}
            missing = {
                number: attempt
                for number, attempt in before.items()
                if (number, attempt) not in there and self._waiting.get(number) == attempt
            }
            for number, attempt in missing.items():
                if self._missed.get(number) == attempt:
                    self._run_again(number, attempt, "it is neither in the queue nor answered")
            self._missed = {n: a for n, a in missing.items() if self._waiting.get(n) == a}

    def _run_again(self, number: int, attempt: int, why: str) -> None:
        """``attempt`` ended without an answer: once more, unless a newer one is under way."""
        if number in self._done or attempt < self._runs.get(number, 0):
            return
        line = self._lines[number]
        self._runs[number] = attempt
        self._wait_no_more(number)
        if self._is_called_off:
            self._news.set()
            return
        log.warning("batch %s, line %d runs again: %s", self._record.batch, number, why)
        if attempt >= MAX_RUNS:
            words = f"{why}; the request was run {attempt} times. Please try again."
            self._settle_error(line, errors.engine_failed(words))
            return
        self._todo.setdefault(line.model, deque()).appendleft(number)
        self._news.set()

    # -- in ----------------------------------------------------------------------------------

    async def _on_result(self, raw: RawMessage) -> None:
        number = int(raw.subject.rsplit(".", 1)[1])
        line = self._lines.get(number)
        if line is None or number in self._done:
            return
        try:
            chunk = self._decoder.decode(raw.data)
        except msgspec.DecodeError as error:
            log.error("batch %s, line %d: unreadable chunk: %s", self._record.batch, number, error)
            return  # the request is run again
        run = Run.parse(chunk.request_id)
        if run is None or run.number != number:
            return
        self._runs[number] = max(self._runs.get(number, 0), run.attempt)
        key = (number, chunk.request_id)
        answer = self._answers.get(key)
        if answer is None:
            try:
                ask = self._parse(line)
            except ApiError as error:  # an api of another version took it
                self._settle_error(line, error)
                return
            created_at = self._record.created_at
            what = (ask, self._deployment_of(line.model), chunk.request_id)
            request = answers.request_of(*what, "", created_at, 0.0, "")
            answer = self._answers[key] = answers.RunAnswer(ask, request)
        match answer.add(chunk):
            case bytes() as body:
                self._settle(line, answers.answered(line, chunk.request_id, 200, body), True)
            case answers.Again() as again:
                del self._answers[key]
                self._run_again(number, run.attempt, again.why)
            case ApiError() as problem if problem.info.code == "deadline_exceeded":
                self._settle(line, answers.not_run(line, chunk.request_id, answers.EXPIRED), False)
            case ApiError() as problem if problem.status == 503:
                self._run_again(number, run.attempt, str(problem))
            case ApiError() as problem:
                self._settle_error(line, problem)

    def _settle_error(self, line: Line, error: ApiError) -> None:
        run = Run(self._record.batch, line.number, max(1, self._runs.get(line.number, 0)))
        text = answers.answered(line, run.request_id, error.status, error.body)
        self._settle(line, text, False)

    def _settle(self, line: Line, text: bytes, is_good: bool) -> None:
        """The one end of a line."""
        assert line.number not in self._done, f"line {line.number} ends twice"
        (self.output if is_good else self.error).write(text)
        self._done.add(line.number)
        self._num_failed += not is_good
        self._wait_no_more(line.number)
        for attempt in range(1, self._runs.get(line.number, 0) + 1):
            run = Run(self._record.batch, line.number, attempt)
            self._answers.pop((line.number, run.request_id), None)
        self._news.set()
        if self.is_whole:
            self.all_done.set()

    # -- the end -----------------------------------------------------------------------------

    async def take_back(self, reason: Literal["client_left", "deadline"]) -> None:
        """Nobody waits for what is not answered: out of the queue, and stopped where it runs."""
        self._is_called_off = True
        found = await self._queued.look()
        for run in found.of(self._record.batch):
            line = self._lines.get(run.number)
            if line is None:
                continue
            await self._queue.withdraw(run.stream_seq, "batch")
            model = self._deployment_of(line.model)
            event = RequestWithdrawn(model, run.request_id, time.time(), reason)
            event_subject = names.event_subject(kind_of(event), model=model)
            await self._bus.publish(event_subject, event)
        for number, attempt in list(self._waiting.items()):
            model = self._deployment_of(self._lines[number].model)
            request_id = Run(self._record.batch, number, attempt).request_id
            cancel = CancelRequest(request_id=request_id, model=model)
            await self._bus.publish(names.cancel_subject(model), cancel)
        # Agents say that they have cancelled; those in the queue had nobody to say anything.
        give_up_at = time.monotonic() + _WIND_DOWN_S
        started = {n for n, a in self._waiting.items() if self._has_begun(n, a)}
        while started & self._waiting.keys() and time.monotonic() < give_up_at:
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), give_up_at - time.monotonic())
        code = answers.EXPIRED if reason == "deadline" else answers.CANCELLED
        for number, line in self._lines.items():
            if number in self._done:
                continue
            try:
                self._parse(line)
            except ApiError as error:  # another api had found that out
                self._settle_error(line, error)
            else:
                run = Run(self._record.batch, number, max(1, self._runs.get(number, 0)))
                self._settle(line, answers.not_run(line, run.request_id, code), False)

    def _has_begun(self, number: int, attempt: int) -> bool:
        request_id = Run(self._record.batch, number, attempt).request_id
        return (number, request_id) in self._answers
