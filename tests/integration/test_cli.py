"""The command line as a process: its help, its errors, its exit statuses, its end."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from schemas import names
from schemas.decisions import Candidate, Victim
from schemas.events import DecisionMade, kind_of
from schemas.state import DeploymentRecord, ModelSpec
from services.bus import Bucket, declare
from services.cli import cli
from services.ops.nats_server import free_port
from tests.integration.agent_kit import connected
from tests.integration.nats_process import NatsServer
from tests.integration.scripted_gpu import GPU, ScriptedGpu

PATIENCE_S = 30.0
MODEL = '[models.m]\nsource = "/nowhere/m"\n'


class Hotswap:
    """`hotswap` in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "hotswap.toml"

    def write(self, text: str = MODEL, port: int | None = None) -> None:
        ports = f"port = {free_port(0)}\nhttp_port = {free_port(0)}\n"
        cpu = '[[gpus]]\nname = "cpu0"\ndevice = "cpu"\nmemory = "16MiB"\n'
        api = f"[api]\nport = {port or free_port(0)}\n"
        self.config.write_text(f"{api}[nats]\n{ports}{cpu}{text}")

    def command(self, *arguments: str) -> list[str]:
        command, *rest = arguments
        return [sys.executable, "-m", "services.cli", command, "--config", str(self.config), *rest]

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Exit status, output, errors; nothing may be left running."""
        done = subprocess.run(
            self.command(*arguments), capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert self.processes() == []
        return done.returncode, done.stdout, done.stderr

    def fails(self, *arguments: str) -> str:
        """The one line that an error is."""
        status, out, errors = self.run(*arguments)
        assert (status, out) == (1, "")
        assert "Traceback" not in errors
        said = [line for line in errors.splitlines() if line.startswith("hotswap: ")]
        assert len(said) == 1, errors
        assert errors.splitlines()[-1] == said[0]
        return said[0]

    def processes(self) -> list[psutil.Process]:
        """Whatever runs with a file of this folder on its command line, or below such a one."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            words = " ".join(process.info["cmdline"] or ())
            if str(self.folder) in words and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found


@pytest.fixture
def hotswap(tmp_path: Path) -> Hotswap:
    (tmp_path / "hotswap").mkdir()
    return Hotswap(tmp_path / "hotswap")


# -- help ----------------------------------------------------------------------------------


def test_help() -> None:
    answer = CliRunner().invoke(cli, ["--help"])
    assert answer.exit_code == 0
    for command in cli.commands:
        assert f"  {command}" in answer.output
    assert "Exit status" in answer.output


@pytest.mark.parametrize("command", list(cli.commands))
def test_help_of_a_command(command: str) -> None:
    answer = CliRunner().invoke(cli, [command, "--help"])
    assert answer.exit_code == 0
    assert f"Usage: cli {command}" in answer.output
    assert len(answer.output.splitlines()) > 4


# -- errors --------------------------------------------------------------------------------


def test_up_without_a_configuration(hotswap: Hotswap) -> None:
    assert "hotswap.toml does not exist" in hotswap.fails("up")


def test_up_with_an_unknown_key(hotswap: Hotswap) -> None:
    hotswap.write("[scheduler]\nlease_ttl = 3\n" + MODEL)
    said = hotswap.fails("up")
    assert "unknown key scheduler.lease_ttl = 3; did you mean 'lease_ttl_s'?" in said


def test_up_with_a_port_in_use(hotswap: Hotswap) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        hotswap.write(port=port)
        said = hotswap.fails("up")
    assert f"api.port = {port}" in said
    assert "in use" in said


def test_up_with_credentials_that_can_not_be_read(hotswap: Hotswap) -> None:
    hotswap.write()
    said = hotswap.fails("up", "--nats", "nats://127.0.0.1:1", "--creds", "/nowhere/creds.json")
    assert "can not read NATS credentials from /nowhere/creds.json" in said


def test_up_with_a_state_folder_that_is_none(hotswap: Hotswap) -> None:
    (hotswap.folder / "state").write_text("a file")
    hotswap.write()
    hotswap.config.write_text('state_dir = "state"\n' + hotswap.config.read_text())
    assert "state_dir" in hotswap.fails("up")


def test_up_with_a_server_that_does_not_answer(hotswap: Hotswap) -> None:
    hotswap.write()
    creds = hotswap.folder / "creds.json"
    creds.write_text("{}")
    url = f"nats://127.0.0.1:{free_port(0)}"
    said = hotswap.fails("up", "--nats", url, "--creds", str(creds))
    assert f"no NATS connection to {url}" in said


def test_a_service_with_the_wrong_gpu(hotswap: Hotswap) -> None:
    hotswap.write()
    assert "--gpu must name one of: cpu0" in hotswap.fails("agent", "--gpu", "gpu7")


def test_wrong_usage_is_status_2(hotswap: Hotswap) -> None:
    status, _, errors = hotswap.run("up", "--colour", "blue")
    assert status == 2
    assert "No such option" in errors


# -- up and down ---------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_up_is_stopped_while_it_starts(hotswap: Hotswap, number: signal.Signals) -> None:
    """Twice in a row, too; a model whose folder is missing keeps nothing from starting."""
    hotswap.write()
    log = hotswap.folder / "up.log"
    with log.open("w") as out:
        process = subprocess.Popen(hotswap.command("up"), stdout=out, stderr=out)
    give_up_at = time.monotonic() + PATIENCE_S
    while len(hotswap.processes()) < 5:  # up, nats-server, scheduler, agent, api
        assert time.monotonic() < give_up_at, log.read_text()
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    process.send_signal(number)
    assert process.wait(PATIENCE_S) == 0, log.read_text()
    assert "models.m: source = '/nowhere/m' does not exist" in log.read_text()
    assert "Traceback" not in log.read_text()
    _, alive = psutil.wait_procs(family, timeout=2)
    assert not alive, log.read_text()
    assert hotswap.processes() == []


async def test_explain(hotswap: Hotswap, nats_server: NatsServer) -> None:
    hotswap.write()
    creds = str(nats_server.plan.credential_files["admin"])
    async with connected(nats_server, "scheduler", "agent") as buses:
        scheduler = buses["scheduler"]
        await declare(scheduler)
        models = Bucket(scheduler, names.BUCKET_MODELS, DeploymentRecord)
        for model in ("a.b", "m", "new"):
            record = DeploymentRecord(ModelSpec(name=model, source="/nowhere/m"), "ready")
            await models.put(names.escape(model), record)
        for number in range(3):
            decision = DecisionMade(
                "m",
                GPU,
                "evict",
                time.time(),
                f"reason {number}",
                victims=(Victim("a.b", "idle", idle_s=3.0),) if number else (),
                candidates=(Candidate(GPU, "evict", 3, 0.5, 2**20, ("a.b",)),),
                num_candidates=1,
            )
            await scheduler.publish(names.event_subject(kind_of(decision), GPU, "m"), decision)
        await scheduler.flush()
        gpu = ScriptedGpu(buses["agent"])
        await gpu.start()

        async def explained(*arguments: str) -> str:
            done = await asyncio.to_thread(hotswap.run, "explain", "--creds", creds, *arguments)
            status, out, errors = done
            assert status == 0, errors
            return out

        found = json.loads(await explained("m", "--json", "--last", "2"))
        text = await explained("a.b")
        nothing = await explained("new")
        status, out, errors = await asyncio.to_thread(
            hotswap.run, "explain", "--creds", creds, "other"
        )
        await gpu.stop()
    assert [one["reason"] for one in found["decisions"]] == ["reason 1", "reason 2"]
    assert found["decisions"][0]["victims"] == [
        {"model": "a.b", "how": "idle", "idle_s": 3.0, "slack_s": None}
    ]
    assert (found["deployment"]["status"], found["replicas"], found["waits"]) == ("ready", {}, None)
    lines = text.splitlines()
    assert lines[0] == "a.b  ready"
    assert [line[14:] for line in lines[4:]] == [
        f"had to leave {GPU} for m (idle for 3.0 s); m: reason {number}" for number in (1, 2)
    ]
    assert "no decision about it yet" in nothing
    assert (status, out) == (1, "")
    assert "there is no model 'other'; there are: a.b, m, new" in errors


def test_explain_without_a_server(hotswap: Hotswap) -> None:
    hotswap.write()
    assert "Is `hotswap up` running" in hotswap.fails("explain", "m")
    creds = hotswap.folder / "creds.json"
    creds.write_text("{}")
    url = f"nats://127.0.0.1:{free_port(0)}"
    said = hotswap.fails("explain", "m", "--nats", url, "--creds", str(creds))
    assert f"no NATS connection to {url}" in said


async def test_status_as_json(hotswap: Hotswap, nats_server: NatsServer) -> None:
    hotswap.write()
    creds = str(nats_server.plan.credential_files["admin"])
    async with connected(nats_server, "scheduler", "agent") as buses:
        await declare(buses["scheduler"])
        record = DeploymentRecord(ModelSpec(name="m", source="/nowhere/m"), "pending", "no agent")
        await Bucket(buses["scheduler"], names.BUCKET_MODELS, DeploymentRecord).put("m", record)
        gpu = ScriptedGpu(buses["agent"])
        await gpu.start()
        status, out, errors = await asyncio.to_thread(
            hotswap.run, "status", "--creds", creds, "--json"
        )
        await gpu.stop()
    assert status == 0, errors
    found = json.loads(out)
    assert found["agents"][GPU]["device_name"] == "scripted"
    assert found["deployments"]["m"]["reason"] == "no agent"
