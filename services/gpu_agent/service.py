"""The agent as a process: bus, lease, heartbeat, and an orderly end."""

import asyncio
import logging
import os

from schemas import names
from services.bus import Bus, BusError, BusOptions, Lease, LeaseLost, declare
from services.gpu_agent.control import AgentControl
from services.settings import GpuSettings, Settings

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
LEASE_TTL_S = 3
SHUTDOWN_GRACE_S = 10.0


async def run(
    settings: Settings, gpu: GpuSettings, options: BusOptions, *, stop: asyncio.Event
) -> None:
    """Serve ``gpu`` until ``stop`` is set. Raises BusError where another agent has its name."""
    bus = await Bus.connect(options, service=f"agent-{gpu.name}")
    await declare(bus, settings.api.max_queued_per_model)
    lease = Lease(bus, names.agent_lease_key(gpu.name), os.urandom(6).hex(), LEASE_TTL_S)
    await _take(lease, gpu.name)
    control = AgentControl(bus, gpu, lease.holder)
    await control.reporter.clear_residency()
    await control.start()
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(_heartbeat(control, lease)),
                tasks.create_task(control.reporter.residency_writer.run()),
            ]
            await stop.wait()
            for task in running:
                task.cancel()
    finally:
        await control.stop(SHUTDOWN_GRACE_S)
        await lease.release()
        await bus.close()


async def _take(lease: Lease, gpu: str) -> None:
    """Wait for the lease: an agent that was killed holds it for a few seconds more."""
    for _ in range(4 * (LEASE_TTL_S + 2)):
        if await lease.try_acquire():
            return
        await asyncio.sleep(0.25)
    raise BusError(
        f"another agent serves GPU {gpu!r} already: give each GPU its own name in [[gpus]]"
    )


async def _heartbeat(control: AgentControl, lease: Lease) -> None:
    while True:
        try:
            await lease.renew()
        except LeaseLost:
            # It expired while the server or this machine was away; take it again if we can.
            if not await lease.try_acquire():
                log.error("the lease of GPU %s is held by another agent", control.gpu)
        except BusError as error:
            log.warning("lease not renewed: %s", error)
        await control.publish_status()
        await control.serving.keep_alive()
        await asyncio.sleep(HEARTBEAT_S)
