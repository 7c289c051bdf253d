"""A replica's pulls on its model's queues: from swap-in until it is to be drained or preempted.

    interactive   as many as the batch has slots that no interactive request has
    batch         as many as it has free slots

So an interactive request is never kept waiting by those of class batch: where they have all the
slots, one of them gives way (`services.gpu_agent.serving`). A slot that becomes free is first
offered to the one queue and a moment later to the other.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from schemas.names import RequestClass
from services.bus import Bus, BusError, Delivery, Puller
from services.gpu_agent.replicas import Replica

log = logging.getLogger(__name__)

_RETRY_S = 0.5
_COURTESY_S = 0.02  # interactive requests that wait are here by then

OnDelivery = Callable[[Replica, Delivery], Awaitable[None]]


class Pull:
    """Asks for as many requests as ``replica`` has room for, from now until `stop`.

    Beginning takes round trips to the server, which may be away: a task of its own, so that
    whoever begins it (the reader of the worker's messages) never waits for the bus.
    """

    def __init__(self, bus: Bus, replica: Replica, on_delivery: OnDelivery) -> None:
        self._bus = bus
        self._replica = replica
        self._on_delivery = on_delivery
        self._pullers: dict[RequestClass, Puller] = {}
        self._stopped = False
        self._task = asyncio.create_task(self._begin())
        self._later: asyncio.Task[None] | None = None

    async def refresh(self) -> None:
        """The number of free slots changed."""
        await self._want("interactive")
        if self._replica.num_free("batch"):
            if self._later is None or self._later.done():
                self._later = asyncio.create_task(self._want_batch())
        else:
            await self._want("batch")  # no more than what is open

    async def _want_batch(self) -> None:
        await asyncio.sleep(_COURTESY_S)
        await self._want("batch")

    async def _want(self, klass: RequestClass) -> None:
        puller = self._pullers.get(klass)
        if puller is None or self._stopped:
            return
        try:
            await puller.want(self._replica.num_free(klass))
        except BusError as error:
            log.warning("can not pull for %s: %s", self._replica.spec.name, error)

    def stop(self) -> None:
        """Take no more; what comes after this goes back to the queue."""
        self._stopped = True  # a cancellation alone may get lost in asyncio.wait_for
        self._task.cancel()
        if self._later:
            self._later.cancel()
        for puller in self._pullers.values():
            puller.stop()

    async def _begin(self) -> None:
        await self._begin_one("interactive")
        await asyncio.sleep(_COURTESY_S)
        await self._begin_one("batch")

    async def _begin_one(self, klass: RequestClass) -> None:
        while not self._stopped:
            puller = Puller(self._bus, self._replica.spec.name, self._deliver, klass)
            self._pullers[klass] = puller
            try:
                await puller.start()
                await puller.want(self._replica.num_free(klass))
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
