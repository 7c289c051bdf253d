"""The api as clients meet it: real processes, real HTTP, and an agent that answers everything."""

import contextlib
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgspec

from services.ops.nats_server import free_port
from services.settings import ApiSettings, ModelSettings, Settings, dump
from tests.conformance.willing_agent import BROKEN, CHAT, EMBEDS, HELD
from tests.integration.nats_process import NatsServer

START_S = 60.0
# A request that nobody answers is a finding, and ends soon.
MAX_QUEUED = 8  # per model
API = ApiSettings(request_timeout_s=10.0, max_body_bytes=100_000, max_queued_per_model=MAX_QUEUED)


@contextlib.contextmanager
def running_api(folder: Path, api: ApiSettings = API) -> Iterator[str]:
    """Yield the base URL of an api that is ready. ``folder``: for files and logs."""
    folder.mkdir(parents=True, exist_ok=True)
    nats = NatsServer(folder / "nats")
    nats.start()
    with contextlib.ExitStack() as stack:
        stack.callback(nats.stop)
        port = free_port(0)
        models = {name: ModelSettings(source="/none") for name in (CHAT, EMBEDS, HELD, BROKEN)}
        config = folder / "hotswap.toml"
        api = msgspec.structs.replace(api, port=port)
        config.write_text(dump(Settings(api=api, models=models, state_dir=str(folder / "state"))))
        files = nats.plan.credential_files
        agent = (str(files["admin"]), str(api.max_queued_per_model))
        stack.enter_context(_process(folder, "tests.conformance.willing_agent", *agent))
        scheduling = ("scheduler", "--config", str(config), "--creds", str(files["scheduler"]))
        stack.enter_context(_process(folder, "services.cli", *scheduling))
        words = ("api", "--config", str(config), "--creds", str(files["api"]))
        stack.enter_context(_process(folder, "services.cli", *words))
        url = f"http://127.0.0.1:{port}"
        try:
            _wait_ready(url)
        except TimeoutError as error:
            logs = "\n".join(log.read_text()[-3000:] for log in folder.glob("*.log"))
            raise AssertionError(f"{error}\n{logs}") from error
        yield url


@contextlib.contextmanager
def _process(folder: Path, module: str, *args: str) -> Iterator[None]:
    log_file = folder / f"{module}.{args[0] if module == 'services.cli' else ''}.log"
    with log_file.open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", module, *args], stdout=log, stderr=log)
    try:
        yield
        assert process.poll() is None, f"{module} died: {log_file.read_text()}"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_ready(url: str) -> None:
    give_up_at = time.monotonic() + START_S
    while time.monotonic() < give_up_at:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/v1/models") as answer:
            models = msgspec.json.decode(answer.read())["data"]
            if [one["hotswap"]["status"] for one in models] == ["failed"] + ["ready"] * 3:
                return
        time.sleep(0.05)
    raise TimeoutError(f"{url} was not ready within {START_S:g} s")
