"""Who leads: a scheduler's term of office, from standing by to stepping down.

    standing by --acquire--> leading --keep--> LeaseLost, or stopped --give_up--> the next term

`services.bus.Lease` says why two never lead at once. What is added here is patience: with a
server that does not answer while standing by, and with renewals that fail while the lease is
still ours.
"""

import asyncio
import logging
import os
import time

from schemas import names
from services.bus import Bus, BusError, Lease, LeaseLost

log = logging.getLogger(__name__)

_RETRY_S = 0.5  # where the server does not answer


class Leadership:
    """One term. Each has a holder name of its own, or a lease we lost would look like ours."""

    def __init__(self, bus: Bus, ttl_s: int) -> None:
        self.holder = os.urandom(6).hex()
        self._bus = bus
        self._lease = Lease(bus, names.LEADER_KEY, self.holder, ttl_s)

    @property
    def epoch(self) -> int:
        return self._lease.epoch

    @property
    def is_held(self) -> bool:
        """Nobody else can lead yet, by our own clock."""
        return self._lease.is_held

    async def acquire(self) -> None:
        """Stand by until we lead."""
        log.info("standing by")
        while True:
            try:
                await self._lease.acquire()
                if self._lease.is_held:  # else the answer came when it was over already
                    return
            except (BusError, TimeoutError) as error:
                log.warning("standing by: %s", error)
                await asyncio.sleep(_RETRY_S)

    async def keep(self) -> None:
        """Renew for ever. Raises LeaseLost as soon as somebody else may lead."""
        lease = self._lease
        while True:
            await asyncio.sleep(min(lease.ttl_s / 4, _left_s(lease)))
            try:
                await asyncio.wait_for(lease.renew(), _left_s(lease))
            except LeaseLost:
                raise
            except (BusError, TimeoutError) as error:
                if not lease.is_held:
                    raise LeaseLost(
                        f"lease {lease.key} could not be renewed for {lease.ttl_s} s"
                    ) from error
                log.warning("lease not renewed yet: %s", error)

    async def give_up(self) -> None:
        """Let a successor lead at once."""
        if self._bus.is_connected:
            await self._lease.release()


def _left_s(lease: Lease) -> float:
    return max(0.0, lease.valid_until - time.monotonic())
