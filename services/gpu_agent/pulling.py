"""A replica's pull on its model's queue: from swap-in until it is to be drained or preempted."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from services.bus import Bus, BusError, Delivery, Puller
from services.gpu_agent.replicas import Replica

log = logging.getLogger(__name__)

_RETRY_S = 0.5

OnDelivery = Callable[[Replica, Delivery], Awaitable[None]]


class Pull:
    """Asks for as many requests as ``replica`` has free slots, from now until `stop`.

    Beginning takes round trips to the server, which may be away: a task of its own, so that
    whoever begins it (the reader of the worker's messages) never waits for the bus.
    """

    def __init__(self, bus: Bus, replica: Replica, on_delivery: OnDelivery) -> None:
        self._bus = bus
        self._replica = replica
        self._on_delivery = on_delivery
        self._puller: Puller | None = None
        self._stopped = False
        self._task = asyncio.create_task(self._begin())

    async def refresh(self) -> None:
        """The number of free slots changed."""
        if self._puller:
            try:
                await self._puller.want(self._replica.num_free)
            except BusError as error:
                log.warning("can not pull for %s: %s", self._replica.spec.name, error)

    def stop(self) -> None:
        """Take no more; what comes after this goes back to the queue."""
        self._stopped = True  # a cancellation alone may get lost in asyncio.wait_for
        self._task.cancel()
        if self._puller:
            self._puller.stop()

    async def _begin(self) -> None:
        while not self._stopped:
            puller = self._puller = Puller(self._bus, self._replica.spec.name, self._deliver)
            try:
                await puller.start()
                await puller.want(self._replica.num_free)
                return
            except (BusError, TimeoutError) as error:
                log.warning("can not pull for %s yet: %s", self._replica.spec.name, error)
                puller.stop()
                await asyncio.sleep(_RETRY_S)

    async def _deliver(self, delivery: Delivery) -> None:
        await self._on_delivery(self._replica, delivery)
        # Asks for nothing by itself, but lowers what a pull that expires or is re-armed after
        # a reconnect would ask for: the slot is taken.
        await self.refresh()
