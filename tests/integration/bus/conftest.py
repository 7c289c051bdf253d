"""Connections to a real nats-server, as the services have them."""

from collections.abc import AsyncIterator

import pytest

from schemas import names
from services.bus import Bus, WorkQueue, declare
from services.bus.connection import RawMessage
from tests.integration.bus.kit import Box, Parties, tap
from tests.integration.nats_process import NatsServer

PULLS = f"$JS.API.CONSUMER.MSG.NEXT.{names.STREAM_REQUESTS}.*"
MAX_QUEUED = 300


@pytest.fixture
async def party(nats_server: NatsServer) -> AsyncIterator[Parties]:
    parties = Parties(nats_server)
    yield parties
    await parties.close()


@pytest.fixture
async def api(party: Parties) -> Bus:
    bus = await party("api")
    await declare(bus, MAX_QUEUED)
    return bus


@pytest.fixture
async def agent(party: Parties) -> Bus:
    return await party("agent")


@pytest.fixture
async def counting(party: Parties) -> WorkQueue:
    return WorkQueue(await party("scheduler"))


@pytest.fixture
async def pulls(party: Parties, api: Bus) -> Box[RawMessage]:
    """Every pull request that reaches the server."""
    return await tap(await party("admin"), PULLS)
