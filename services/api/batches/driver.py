"""Which api drives the batches: the one that holds the lease ``batches.leader``.

The others stand by. Whoever gets the lease begins every open batch anew
(`services.api.batches.run`), which finds what was asked and answered before.
"""

import asyncio
import contextlib
import logging
import os
import time
from contextlib import AbstractAsyncContextManager

from schemas import names
from schemas.batches import BatchRecord
from services.api.batches import states
from services.api.batches.files import Files
from services.api.batches.queued import Queued
from services.api.batches.run import BatchRun, Gone
from services.api.batches.work import Admit, anybody
from services.api.catalog import Catalog
from services.bus import Bucket, Bus, BusError, Entry, Lease, LeaseLost
from services.jobs import until_first_ends

log = logging.getLogger(__name__)

LEASE_TTL_S = 3
MOST_AT_ONCE = 4  # batches; the next ones wait in "validating"
_RETRY_S = 0.5


class Driver:
    def __init__(
        self,
        bus: Bus,
        catalog: Catalog,
        files: Files,
        records: Bucket[BatchRecord],
        max_body_bytes: int,
        admit: Admit = anybody,
    ) -> None:
        self._bus = bus
        self._catalog = catalog
        self._files = files
        self._records = records
        self._max_body_bytes = max_body_bytes
        self._admit = admit

    async def run(self) -> None:
        """Stand by, drive, stand by again; for ever."""
        while True:
            lease = Lease(self._bus, names.BATCHES_KEY, os.urandom(6).hex(), LEASE_TTL_S)
            try:
                await lease.acquire()
                log.info("this api drives the batches")
                await until_first_ends(_keep(lease), self._drive(lease))
            except (BusError, TimeoutError) as error:  # LeaseLost is one
                log.warning("batches: %s; trying again", error)
                await asyncio.sleep(_RETRY_S)
            except Exception:
                log.exception("driving batches failed; trying again")
                await asyncio.sleep(10 * _RETRY_S)
            finally:
                if lease.is_held and self._bus.is_connected:
                    await lease.release()

    async def _drive(self, lease: Lease) -> None:
        """Every batch that has not ended, and those that come."""
        queued = Queued(self._bus)
        slots = asyncio.Semaphore(MOST_AT_ONCE)
        running: dict[str, BatchRun | None] = {}
        tasks: set[asyncio.Task[None]] = set()

        async def drive_one(batch: str, turn: AbstractAsyncContextManager[None]) -> None:
            async with turn:
                if running.get(batch):
                    return  # cancelled while it waited for its turn
                while True:
                    try:
                        entry = await self._records.get(batch)
                        if entry.value is None or states.has_ended(entry.value):
                            return
                        run = running[batch] = BatchRun(
                            self._bus,
                            self._catalog,
                            self._files,
                            self._records,
                            queued,
                            entry,
                            lambda: lease.is_held,
                            self._max_body_bytes,
                            self._admit,
                        )
                        await run.run()
                        return
                    except Gone as error:
                        log.info("%s", error)
                        return
                    except (BusError, TimeoutError) as error:
                        log.warning("batch %s: %s; it begins anew", batch, error)
                    except Exception:
                        log.exception("batch %s failed; it begins anew", batch)
                        await asyncio.sleep(10 * _RETRY_S)
                    await asyncio.sleep(_RETRY_S)

        async def on_entry(entry: Entry[BatchRecord]) -> None:
            if run := running.get(entry.key):
                run.note(entry)
            if entry.value is None or states.has_ended(entry.value):
                return
            turn: AbstractAsyncContextManager[None] = slots
            if entry.key in running:
                if running[entry.key] or entry.value.status != "cancelling":
                    return
                turn = contextlib.nullcontext()  # it waits for its turn: it need not any more
            running[entry.key] = None
            task = asyncio.create_task(drive_one(entry.key, turn))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            task.add_done_callback(lambda _: running.pop(entry.key, None))

        stop = await self._records.watch(on_entry)
        try:
            await asyncio.Event().wait()  # until we are cancelled
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            with contextlib.suppress(BusError):
                await stop()


async def _keep(lease: Lease) -> None:
    """Renew for ever. Raises LeaseLost as soon as somebody else may have it."""
    while True:
        left_s = max(0.0, lease.valid_until - time.monotonic())
        await asyncio.sleep(min(lease.ttl_s / 4, left_s))
        left_s = max(0.0, lease.valid_until - time.monotonic())
        try:
            await asyncio.wait_for(lease.renew(), left_s)
        except LeaseLost:
            raise
        except (BusError, TimeoutError) as error:
            if not lease.is_held:
                raise LeaseLost(f"lease {lease.key} could not be renewed") from error
