"""`hotswap model ...` against a real scheduler, nats-server and a scripted GPU."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from schemas import names
from schemas.admin import AdminAnswer, SwapOutDeployment
from services.bus import NoResponder, declare
from services.cli import cli
from services.ops.deployments import parse_settings
from services.scheduler import service
from services.settings import Settings
from tests.integration.agent_kit import connected, eventually
from tests.integration.nats_process import NatsServer
from tests.integration.scripted_gpu import ScriptedGpu


class Model:
    """`hotswap model`, run with the admin's credentials."""

    def __init__(self, nats: NatsServer, folder: Path) -> None:
        self._creds = nats.plan.credential_files["admin"]
        self._config = folder / "hotswap.toml"
        self._config.write_text("")

    async def __call__(self, *arguments: str, fails: bool = False) -> str:
        """What it prints."""
        options = ["--config", str(self._config), "--creds", str(self._creds)]
        result = await asyncio.to_thread(
            CliRunner().invoke, cli, ["model", *options, *arguments], catch_exceptions=False
        )
        assert (result.exit_code != 0) == fails, result.output
        return result.output


@pytest.fixture
async def model(nats_server: NatsServer, tmp_path: Path) -> AsyncIterator[Model]:
    async with connected(nats_server, "admin", "agent") as buses:
        await declare(buses["admin"])
        gpu = ScriptedGpu(buses["agent"])
        await gpu.start()
        stop = asyncio.Event()
        running = asyncio.create_task(
            service.run(Settings(), nats_server.credentials["scheduler"], stop=stop)
        )
        model = Model(nats_server, tmp_path)

        async def is_led() -> bool:
            with contextlib.suppress(NoResponder):
                ask = SwapOutDeployment("nobody")
                subject = names.admin_subject("swap_out", "nobody")
                await buses["admin"].request(subject, ask, AdminAnswer)
                return True
            return False

        await eventually(is_led, "a leader")
        yield model
        stop.set()
        await asyncio.wait_for(running, 15)
        await gpu.stop()


async def test_a_deployment_from_the_command_line(model: Model, tmp_path: Path) -> None:
    assert "deployed, version" in await model("deploy", "a/b", "org/model", "--set", "max_batch=4")
    assert "is at version" in await model("set", "a/b", "priority=3", 'aliases=["x"]')
    await model("pin", "a/b")
    await model("set", "a/b", "max_batch=default")
    [info] = json.loads(await model("list", "--json"))
    wanted = {"source": "org/model", "priority": 3, "aliases": ["x"], "max_batch": 8}
    assert info["settings"].items() >= (wanted | {"pinned": True}).items()
    assert info["origin"] == "api"
    assert "pinned, alias x" in await model("list")
    said = await model("swap-out", "a/b", fails=True)
    assert "unpin it first" in said
    assert "did you mean 'priority'" in await model("set", "a/b", "priorty=3", fails=True)
    assert "there is no deployment 'b'" in await model("set", "b", "priority=3", fails=True)
    assert "a/b is removed" in await model("undeploy", "a/b")
    assert "no deployments" in await model("list")


async def test_without_a_scheduler_it_says_so(nats_server: NatsServer, tmp_path: Path) -> None:
    async with connected(nats_server, "admin") as buses:
        await declare(buses["admin"])
        said = await Model(nats_server, tmp_path)("deploy", "a", "org/model", fails=True)
    assert "no scheduler leads" in said


def test_values_are_as_in_toml_or_text() -> None:
    pairs = ("a=1", "b=true", 'c=["x"]', "d={ top_p = 0.5 }", "e=org/model", "f=default")
    assert parse_settings(pairs) == {
        "a": 1,
        "b": True,
        "c": ["x"],
        "d": {"top_p": 0.5},
        "e": "org/model",
        "f": None,
    }
