"""Fixtures over real processes: a nats-server of its own for each test."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.integration.agent_kit import Agent, running_agent, use_fake_worker
from tests.integration.api_stack import Stack, running_stack
from tests.integration.nats_process import NatsServer


@pytest.fixture
def nats_server(tmp_path: Path) -> Iterator[NatsServer]:
    """A running nats-server: ``.plan`` (NatsPlan), ``.credentials``, ``kill()``, ``restart()``."""
    server = NatsServer(tmp_path / "nats")
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def stack(nats_server: NatsServer) -> AsyncIterator[Stack]:
    """A running api with a scripted scheduler and agent around it."""
    async with running_stack(nats_server, timeout_s=30) as stack:
        yield stack


@pytest.fixture
async def agent(nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Agent]:
    """An agent's control process with a scripted engine worker."""
    use_fake_worker(monkeypatch)
    async with running_agent(nats_server) as running:
        yield running
