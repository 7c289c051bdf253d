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
import time
from collections.abc import AsyncIterator, Callable
from typing import IO, Literal, TypeAlias

import msgspec

from schemas import names
from schemas.batches import BatchError, BatchRecord, BatchStatus
from services.api.batches import states
from services.api.batches.files import FileDamaged, Files
from services.api.batches.lines import Input, Line, split
from services.api.batches.queued import Queued
from services.api.batches.work import Admit, Work
from services.api.catalog import Catalog
from services.bus import Bucket, Bus, BusError, Entry, JetStreamError, blobs
from services.bus.topology import KEPT_S
from services.jobs import until_first_ends

log = logging.getLogger(__name__)

Ending: TypeAlias = Literal["completed", "expired", "cancelled"]

_REPORT_EVERY_S = 1.0
_AT_A_TIME = 200  # lines; the HTTP side of this process has its turns in between
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
        admit: Admit,
    ) -> None:
        assert entry.value is not None
        self.record = entry.value
        self._revision = entry.revision
        self._bus = bus
        self._catalog = catalog
        self._files = files
        self._records = records
        self._queued = queued
        self._is_held = is_held
        self._max_body_bytes = max_body_bytes
        self._admit = admit
        self._called_off = asyncio.Event()

    def note(self, entry: Entry[BatchRecord]) -> None:
        """Somebody wrote the record: it may be cancelled."""
        if entry.value is not None and entry.revision > self._revision:
            self.record, self._revision = entry.value, entry.revision
            if self.record.status not in _OPEN:
                self._called_off.set()

    async def run(self) -> None:
        """Until the batch has ended. Raises BusError, TimeoutError: begin anew; and Gone."""
        lines, problems = await self._read_input()
        if self.record.status == "validating":
            if problems:
                await self._move("failed", errors=problems)
                return
            with contextlib.suppress(states.InvalidMove):  # it is cancelled already
                await self._move("in_progress", num_requests=len(lines))
        elif problems and self.record.status == "in_progress":
            await self._move("failed", errors=problems)
            return
        what = (self._queued, self.record, lines)
        work = Work(self._bus, self._catalog, *what, self._admit)
        try:
            stop = await work.begin()
            try:
                if self.record.status in _OPEN and not work.is_whole:
                    await until_first_ends(
                        work.all_done.wait(),
                        self._until_called_off(),
                        work.feed(),
                        work.find_lost(),
                        self._report(work),
                    )
                await self._finish(work)
            finally:
                with contextlib.suppress(BusError):
                    await stop()
        finally:
            work.close()

    async def _read_input(self) -> tuple[dict[int, Line], tuple[BatchError, ...]]:
        """The lines by number, and what is wrong with them."""
        record = await self._files.get(self.record.input_file)
        if record is None:
            words = f"The input file {self.record.input_file} does not exist any more."
            return {}, (BatchError("file_not_found", words, param="input_file_id"),)
        found = Input(self.record.endpoint, self._max_body_bytes)
        try:
            async for number, text in split(self._files.read(record)):
                found.add(number, text)
                if found.is_full:
                    break
                if number % _AT_A_TIME == 0:
                    await asyncio.sleep(0)
        except FileDamaged as error:
            return {}, (BatchError("file_damaged", f"{error}.", param="input_file_id"),)
        return {line.number: line for line in found.lines}, found.end()

    async def _until_called_off(self) -> None:
        with contextlib.suppress(TimeoutError):
            left_s = self.record.expires_at - time.time()
            await asyncio.wait_for(self._called_off.wait(), max(0.0, left_s))

    async def _report(self, work: Work) -> None:
        """Say how far it is, for ever."""
        told = -1
        while True:
            if work.num_done != told:
                told = work.num_done
                await self._change(lambda now: msgspec.structs.replace(now, **work.counts))
            await asyncio.sleep(_REPORT_EVERY_S)

    async def _finish(self, work: Work) -> None:
        """Take back what was not answered, write the files, say that it has ended."""
        ending: Ending = "completed"
        if self.record.status == "cancelling":
            ending = "cancelled"
        elif not work.is_whole:
            ending = "expired"
        if not work.is_whole:
            await work.take_back("deadline" if ending == "expired" else "client_left")
        if self.record.status == "in_progress":
            try:
                await self._move("finalizing", **work.counts)
            except states.InvalidMove:  # it was cancelled in this very moment
                ending = "cancelled"
        output = await self._write(work.output, "output")
        error = await self._write(work.error, "error")
        files = {"output_file": output, "error_file": error}
        await self._move(ending, ttl_s=KEPT_S, **work.counts, **files)
        subject = names.result_subject(self.record.batch)
        await blobs.remove(self._bus, names.STREAM_RESULTS, subject)
        log.info("batch %s is %s", self.record.batch, ending)

    async def _write(self, spool: IO[bytes], kind: str) -> str:
        """A file of what is in ``spool``; empty where that is nothing."""
        size = spool.tell()
        if not size:
            return ""
        spool.seek(0)
        record = await self._files.add(
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
                if not error.is_wrong_revision:
                    raise
            entry = await self._records.get(record.batch)
            if entry.value is None:
                raise Gone(f"batch {record.batch} has no record any more")
            self.record, self._revision = entry.value, entry.revision


async def _parts(spool: IO[bytes]) -> AsyncIterator[bytes]:
    while part := spool.read(_READ_BYTES):
        yield part
