"""The agent as a process: lock, worker, bus, lease, heartbeat, and an orderly end.

At the start, as much as possible at once:

    device lock --> engine worker started (seconds until its page pool exists)
    bus ----------> lease taken --> commands accepted, heartbeats sent

and at the end: no more pulls, requests end or go back to the queue (heartbeats go on
meanwhile), the worker ends, AgentStopped, the lease is given back.
"""

import asyncio
import logging
import os
import time

from schemas import names
from services.bus import Bus, BusError, BusOptions, Lease, LeaseLost, declare
from services.gpu_agent.control import AgentControl
from services.gpu_agent.device_lock import DeviceLock
from services.jobs import unless_set, until_first_ends
from services.settings import GpuSettings, Settings

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
LEASE_TTL_S = 3
SHUTDOWN_GRACE_S = 10.0
_TAKE_PATIENCE_S = LEASE_TTL_S + 3.0  # an agent that was killed holds the lease for its TTL


async def run(
    settings: Settings, gpu: GpuSettings, options: BusOptions, *, stop: asyncio.Event
) -> None:
    """Serve ``gpu`` until ``stop`` is set.

    Raises BusError where another agent has its name, LeaseLost where one took it over.
    """
    bus = await unless_set(stop, Bus.connect(options, service=f"agent-{gpu.name}"))
    if bus is None:
        return
    lock = DeviceLock(settings.state_path / "locks", gpu.name)
    tenure = Tenure(bus, gpu.name)
    control = AgentControl(
        bus,
        gpu,
        tenure.holder,
        lock_fd=lock.fd,
        images=settings.state_path / "images" if gpu.share_images else None,
        may_speak=lambda: tenure.is_held,
    )
    try:
        begun = await unless_set(stop, _begin(bus, settings, lock, tenure, control))
        if begun:
            await until_first_ends(
                _drain_on(stop, control),
                tenure.keep(),
                _heartbeat(control),
                control.reporter.residency_writer.run(),
            )
    finally:
        await control.stop()
        await tenure.end()
        await bus.close()
        lock.close()


async def _begin(
    bus: Bus, settings: Settings, lock: DeviceLock, tenure: "Tenure", control: AgentControl
) -> bool:
    if not await lock.take(_TAKE_PATIENCE_S):
        raise BusError(
            f"another agent of this machine serves GPU {control.gpu!r} already, or its engine "
            f"worker is still ending ({lock.path} is locked)"
        )
    control.start_worker()
    await declare(bus, settings.api.max_queued_per_model)
    await tenure.begin()
    try:
        await control.reporter.clear_residency()
    except TimeoutError as error:
        raise BusError("the NATS server did not answer in time; trying again") from error
    await control.open()
    return True


async def _drain_on(stop: asyncio.Event, control: AgentControl) -> None:
    await stop.wait()
    await control.drain(SHUTDOWN_GRACE_S)


async def _heartbeat(control: AgentControl) -> None:
    while True:
        await control.publish_status()
        await control.serving.keep_alive()
        await asyncio.sleep(HEARTBEAT_S)


class Tenure:
    """The lease that makes us the one agent of ``gpu``.

    ``is_held`` goes by the time of the last renewal: while the server is away it runs out by
    itself, so that no heartbeat of ours waits in memory to contradict a successor.
    """

    def __init__(self, bus: Bus, gpu: str) -> None:
        self.holder = os.urandom(6).hex()
        self._gpu = gpu
        self._bus = bus
        self._lease = Lease(bus, names.agent_lease_key(gpu), self.holder, LEASE_TTL_S)

    @property
    def is_held(self) -> bool:
        return self._lease.is_held

    async def begin(self) -> None:
        """Wait for the lease. Raises BusError where somebody else keeps it."""
        give_up_at = time.monotonic() + _TAKE_PATIENCE_S
        while True:
            try:
                if await self._lease.try_acquire():
                    return
                why = f"another agent serves GPU {self._gpu!r} already: give each GPU its own name"
            except BusError as error:
                why = f"no lease for GPU {self._gpu!r}: {error}"
            if time.monotonic() > give_up_at:
                raise BusError(why)
            await asyncio.sleep(0.25)

    async def keep(self) -> None:
        """Renew for ever. Raises LeaseLost where another agent has it."""
        while True:
            await asyncio.sleep(LEASE_TTL_S / 3)
            try:
                await self._renew()
            except LeaseLost:
                raise
            except BusError as error:
                log.warning("lease of GPU %s not renewed: %s", self._gpu, error)

    async def _renew(self) -> None:
        try:
            await self._lease.renew()
        except LeaseLost as error:
            # It expired while the server or this machine was away. If it is free it is ours
            # again: our replicas are what they were.
            if not await self._lease.try_acquire():
                raise LeaseLost(
                    f"GPU {self._gpu!r} was taken over by another agent while this one was cut "
                    "off from the bus; this one ends"
                ) from error

    async def end(self) -> None:
        """Give it back, so that a successor need not wait."""
        if self.is_held and self._bus.is_connected:
            await self._lease.release()
