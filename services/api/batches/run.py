"""One batch, driven to its end: whoever begins this anew, after whatever death, ends it the same.

    input --> lines --> [HS_BATCH] --> agents --> [HS_RESULTS] --> answered lines --> two files

What was asked and what was answered is in streams, so nothing but what the record says has to be
remembered. A run of this begins like that:

1. It looks which of its requests are in the queue: those need not be asked again.
2. It reads all that was answered so far: each line counts once, by its first complete answer.
3. It asks what is left, a few at a time for each model: many of one model in the queue are one
   swap, and those of other batches get their part.

A request that is gone from the queue without an answer, twice in a row as it is looked at, was lost
with a connection or a disk, and is run again under another id, as is one whose answer has gaps.
"""

import asyncio
import contextlib
import logging
import tempfile
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from typing import IO, Literal, TypeAlias

import msgspec

from schemas import names
from schemas.batches import BatchError, BatchRecord, BatchStatus, FileRecord
from schemas.events import RequestWithdrawn, kind_of
from schemas.requests import CancelRequest
from schemas.stream import Chunk
from services.api import errors
from services.api.batches import answers, states
from services.api.batches.files import FileDamaged, Files
from services.api.batches.lines import Input, Line, split
from services.api.batches.queued import Queued, Run
from services.api.catalog import Catalog
from services.api.errors import ApiError
from services.bus import (
    Bucket,
    Bus,
    BusError,
    Entry,
    JetStreamError,
    QueueFull,
    WorkQueue,
    blobs,
    history,
)
from services.bus.connection import RawMessage
from services.bus.topology import KEPT_S
from services.jobs import until_first_ends

log = logging.getLogger(__name__)

Ending: TypeAlias = Literal["completed", "expired", "cancelled"]

MAX_IN_QUEUE = 128  # of one model
MAX_RUNS = 4  # of one line; then an error is the better answer
LOOK_EVERY_S = 10.0  # at the queue, for what is lost
_MODEL_PATIENCE_S = 600.0  # a model that can not be served may heal; then its lines fail
_TRY_AGAIN_S = 2.0
_REPORT_EVERY_S = 1.0
_WIND_DOWN_S = 10.0  # for what runs to hear that it is cancelled
_AT_A_TIME = 200  # lines; the HTTP side of this process has its turns in between
_WRONG_REVISION = 10071
_READ_BYTES = 256 * 1024
# An api that takes over a batch whose files are being written goes through its lines once more.
_OPEN = ("in_progress", "finalizing")


class Gone(Exception):
    """The record is not there any more, or another api drives the batch now."""


class BatchRun:
    """``is_held``: whether this api may still drive batches."""

    def __init__(
        self,
        bus: Bus,
        catalog: Catalog,
        files: Files,
        records: Bucket[BatchRecord],
        queued: Queued,
        entry: Entry[BatchRecord],
        is_held: Callable[[], bool],
        max_body_bytes: int,
    ) -> None:
        assert entry.value is not None
        self.record = entry.value
        self._revision = entry.revision
        self._bus = bus
        self._catalog = catalog
        self._files = files
        self._records = records
        self._queued = queued
        self._queue = WorkQueue(bus)
        self._is_held = is_held
        self._max_body_bytes = max_body_bytes
        self._decoder: msgspec.json.Decoder[Chunk] = msgspec.json.Decoder(Chunk)
        self._news = asyncio.Event()
        self._all_done = asyncio.Event()
        self._called_off = asyncio.Event()
        self._lines: dict[int, Line] = {}  # by number
        self._done: set[int] = set()
        self._num_failed = 0
        self._runs: dict[int, int] = {}  # line -> its newest run, from 1
        self._waiting: dict[int, int] = {}  # line -> the run that is in the queue or at an agent
        self._num_waiting: Counter[str] = Counter()  # of these, by model
        self._missed: dict[int, int] = {}  # line -> run that was not in the queue at the last look
        self._answers: dict[tuple[int, str], answers.RunAnswer] = {}
        self._todo: dict[str, deque[int]] = {}  # model -> lines to be asked
        self._unready: dict[str, float] = {}  # model -> since when it can not be served (monotonic)
        self._ending: Ending | None = None  # what it is on its way to, other than completed
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `run`)
        self._error: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115

    async def run(self) -> None:
        """Until the batch has ended. Raises BusError, TimeoutError: begin anew; and Gone."""
        try:
            await self._run()
        finally:
            self._output.close()
            self._error.close()

    def note(self, entry: Entry[BatchRecord]) -> None:
        """Somebody wrote the record: it may be cancelled."""
        if entry.value is not None and entry.revision > self._revision:
            self.record, self._revision = entry.value, entry.revision
            if self.record.status not in _OPEN:
                self._called_off.set()

    async def _run(self) -> None:
        problems = await self._read_input()
        if self.record.status == "validating":
            if problems:
                await self._move("failed", errors=problems)
                return
            await self._move("in_progress", num_requests=len(self._lines))
        elif problems and self.record.status == "in_progress":
            await self._move("failed", errors=problems)
            return
        for number, line in self._lines.items():
            self._todo.setdefault(line.model, deque()).append(number)
        found = await self._queued.look()
        for run in found.of(self.record.batch):
            if run.number in self._lines:
                self._runs[run.number] = max(self._runs.get(run.number, 0), run.attempt)
                self._wait_for(run.number, run.attempt)
        subject = names.result_subject(self.record.batch)
        stop = await history.follow(self._bus, names.STREAM_RESULTS, subject, self._on_result)
        try:
            if self.record.status in _OPEN:
                if len(self._done) == len(self._lines):
                    self._all_done.set()
                await until_first_ends(
                    self._all_done.wait(),
                    self._until_called_off(),
                    self._feed(),
                    self._find_lost(),
                    self._report(),
                )
            await self._finish()
        finally:
            with contextlib.suppress(BusError):
                await stop()

    # -- the input ---------------------------------------------------------------------------

    async def _read_input(self) -> tuple[BatchError, ...]:
        """The lines; what is wrong with them."""
        record = await self._files.get(self.record.input_file)
        if record is None:
            words = f"The input file {self.record.input_file} does not exist any more."
            return (BatchError("file_not_found", words, param="input_file_id"),)
        found = Input(self.record.endpoint, self._max_body_bytes)
        try:
            async for number, text in split(self._files.read(record)):
                found.add(number, text)
                if found.is_full:
                    break
                if number % _AT_A_TIME == 0:
                    await asyncio.sleep(0)
        except FileDamaged as error:
            return (BatchError("file_damaged", f"{error}.", param="input_file_id"),)
        self._lines = {line.number: line for line in found.lines}
        return found.end()

    # -- out ---------------------------------------------------------------------------------

    async def _feed(self) -> None:
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
            ask = answers.parse(self.record.endpoint, line, self.record.batch)
            if self._catalog.missing():
                return False  # what there is, is not known yet
            answers.require(self._catalog, ask)
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
        run = Run(self.record.batch, line.number, attempt)
        request = answers.request_of(
            ask,
            run.request_id,
            names.result_subject(self.record.batch, line.number),
            time.time(),
            self.record.expires_at,
            self.record.tenant,
        )
        # Its answer may be here before the queue's own.
        self._runs[line.number] = attempt
        self._wait_for(line.number, attempt)
        try:
            await self._queue.enqueue(request)
        except BusError as error:
            # It may be in the queue all the same: then the queue drops the second one.
            self._runs[line.number] = attempt - 1
            self._wait_no_more(line.number)
            if not isinstance(error, QueueFull):
                log.warning("request %s is not queued yet: %s", run.request_id, error)
            return line.number in self._done
        return True

    def _wait_for(self, number: int, attempt: int) -> None:
        if number not in self._waiting:
            self._num_waiting[self._lines[number].model] += 1
        self._waiting[number] = attempt

    def _wait_no_more(self, number: int) -> None:
        if self._waiting.pop(number, None) is not None:
            self._num_waiting[self._lines[number].model] -= 1
        self._missed.pop(number, None)

    async def _find_lost(self) -> None:
        """Look for requests that are neither queued nor answered, for ever."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            before = dict(self._waiting)
            try:
                found = await self._queued.look()
            except (BusError, TimeoutError) as error:
                log.warning(
                    "batch %s: the queue can not be looked at: %s", self.record.batch, error
                )
                continue
            there = {(run.number, run.attempt) for run in found.of(self.record.batch)}
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
        if self._ending is not None:
            self._news.set()
            return
        log.warning("batch %s, line %d runs again: %s", self.record.batch, number, why)
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
            log.error("batch %s, line %d: unreadable chunk: %s", self.record.batch, number, error)
            return  # the request is run again
        run = Run.parse(chunk.request_id)
        if run is None or run.number != number:
            return
        self._runs[number] = max(self._runs.get(number, 0), run.attempt)
        key = (number, chunk.request_id)
        answer = self._answers.get(key)
        if answer is None:
            try:
                ask = answers.parse(self.record.endpoint, line, self.record.batch)
            except ApiError as error:  # an api of another version took it
                self._settle_error(line, error)
                return
            created_at = self.record.created_at
            request = answers.request_of(ask, chunk.request_id, "", created_at, 0.0, "")
            answer = self._answers[key] = answers.RunAnswer(ask, request)
        match answer.add(chunk):
            case bytes() as body:
                self._settle(line, answers.answered(line, chunk.request_id, 200, body), True)
            case answers.Again() as again:
                del self._answers[key]
                self._run_again(number, run.attempt, again.why)
            case ApiError() as error if error.info.code == "deadline_exceeded":
                self._settle(line, answers.not_run(line, chunk.request_id, answers.EXPIRED), False)
            case ApiError() as error if error.status == 503:
                self._run_again(number, run.attempt, str(error))
            case ApiError() as error:
                self._settle_error(line, error)

    def _settle_error(self, line: Line, error: ApiError) -> None:
        run = Run(self.record.batch, line.number, max(1, self._runs.get(line.number, 0)))
        text = answers.answered(line, run.request_id, error.status, error.body)
        self._settle(line, text, False)

    def _settle(self, line: Line, text: bytes, is_good: bool) -> None:
        """The one end of a line."""
        assert line.number not in self._done, f"line {line.number} ends twice"
        (self._output if is_good else self._error).write(text)
        self._done.add(line.number)
        self._num_failed += not is_good
        self._wait_no_more(line.number)
        for attempt in range(1, self._runs.get(line.number, 0) + 1):
            run = Run(self.record.batch, line.number, attempt)
            self._answers.pop((line.number, run.request_id), None)
        self._news.set()
        if len(self._done) == len(self._lines):
            self._all_done.set()

    # -- the end -----------------------------------------------------------------------------

    @property
    def _counts(self) -> dict[str, int]:
        done = len(self._done)
        return {"num_completed": done - self._num_failed, "num_failed": self._num_failed}

    async def _until_called_off(self) -> None:
        with contextlib.suppress(TimeoutError):
            left_s = self.record.expires_at - time.time()
            await asyncio.wait_for(self._called_off.wait(), max(0.0, left_s))

    async def _report(self) -> None:
        """Say how far it is, for ever."""
        told = -1
        while True:
            if len(self._done) != told:
                told = len(self._done)
                await self._change(lambda now: msgspec.structs.replace(now, **self._counts))
            await asyncio.sleep(_REPORT_EVERY_S)

    async def _finish(self) -> None:
        """Take back what was not answered, write the files, say that it has ended."""
        is_whole = len(self._done) == len(self._lines)
        if self.record.status == "cancelling":
            self._ending = "cancelled"
        elif not is_whole:
            self._ending = "expired"
        if not is_whole:
            await self._take_back()
        ending: Ending = self._ending or "completed"
        if self.record.status == "in_progress":
            try:
                await self._move("finalizing", **self._counts)
            except states.InvalidMove:  # it was cancelled in this very moment
                ending = "cancelled"
        output = await self._write(self._output, "output")
        error = await self._write(self._error, "error")
        files = {"output_file": output, "error_file": error}
        await self._move(ending, ttl_s=KEPT_S, **self._counts, **files)
        subject = names.result_subject(self.record.batch)
        await blobs.remove(self._bus, names.STREAM_RESULTS, subject)
        log.info("batch %s is %s", self.record.batch, ending)

    async def _take_back(self) -> None:
        """Nobody waits for what is not answered: out of the queue, and stopped where it runs."""
        found = await self._queued.look()
        reason: Literal["client_left", "deadline"] = "client_left"
        if self._ending == "expired":
            reason = "deadline"
        for run in found.of(self.record.batch):
            line = self._lines.get(run.number)
            if line is None:
                continue
            await self._queue.withdraw(run.stream_seq, "batch")
            event = RequestWithdrawn(line.model, run.request_id, time.time(), reason)
            event_subject = names.event_subject(kind_of(event), model=line.model)
            await self._bus.publish(event_subject, event)
        for number, attempt in list(self._waiting.items()):
            model = self._lines[number].model
            request_id = Run(self.record.batch, number, attempt).request_id
            cancel = CancelRequest(request_id=request_id, model=model)
            await self._bus.publish(names.cancel_subject(model), cancel)
        # Agents say that they have cancelled; those in the queue had nobody to say anything.
        give_up_at = time.monotonic() + _WIND_DOWN_S
        started = {n for n, a in self._waiting.items() if self._has_begun(n, a)}
        while started & self._waiting.keys() and time.monotonic() < give_up_at:
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), give_up_at - time.monotonic())
        code = answers.EXPIRED if self._ending == "expired" else answers.CANCELLED
        for number, line in self._lines.items():
            if number in self._done:
                continue
            try:
                answers.parse(self.record.endpoint, line, self.record.batch)
            except ApiError as error:  # another api had found that out
                self._settle_error(line, error)
            else:
                run = Run(self.record.batch, number, max(1, self._runs.get(number, 0)))
                self._settle(line, answers.not_run(line, run.request_id, code), False)

    def _has_begun(self, number: int, attempt: int) -> bool:
        request_id = Run(self.record.batch, number, attempt).request_id
        return (number, request_id) in self._answers

    async def _write(self, spool: IO[bytes], kind: str) -> str:
        """A file of what is in ``spool``; empty where that is nothing."""
        size = spool.tell()
        if not size:
            return ""
        spool.seek(0)
        record: FileRecord = await self._files.add(
            f"{self.record.batch}_{kind}.jsonl",
            "batch_output",
            _parts(spool),
            tenant=self.record.tenant,
        )
        return record.file

    # -- the record --------------------------------------------------------------------------

    async def _move(self, status: BatchStatus, ttl_s: int | None = None, **changes: object) -> None:
        def change(record: BatchRecord) -> BatchRecord:
            moved = states.moved(record, status, time.time())
            return msgspec.structs.replace(moved, **changes)

        if status == "failed":
            ttl_s = KEPT_S
        await self._change(change, ttl_s)

    async def _change(
        self, change: Callable[[BatchRecord], BatchRecord], ttl_s: int | None = None
    ) -> None:
        """Replace the record by what ``change`` makes of it, whoever else writes it."""
        while True:
            if not self._is_held():
                raise Gone(f"batch {self.record.batch} is another's to drive")
            record = change(self.record)
            try:
                self._revision = await self._records.put(
                    record.batch, record, expect=self._revision, ttl_s=ttl_s
                )
                self.record = record
                return
            except JetStreamError as error:
                if error.code != _WRONG_REVISION:
                    raise
            entry = await self._records.get(record.batch)
            if entry.value is None:
                raise Gone(f"batch {record.batch} has no record any more")
            self.record, self._revision = entry.value, entry.revision


async def _parts(spool: IO[bytes]) -> AsyncIterator[bytes]:
    while part := spool.read(_READ_BYTES):
        yield part
