"""What can go wrong with weights, on a whole running system: each ends in a named event, and the
others are served all the while.
"""

import asyncio
import http.client
import json
import re
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from safetensors.torch import load_file, save_file

from schemas import names
from schemas.events import (
    CommandFailed,
    CommandRejected,
    DeploymentFailed,
    Event,
    FirstTokenSent,
    ModelUnloaded,
    ModelVerified,
    SwapInCancelled,
    SwapInCompleted,
    SwapOutCompleted,
    VerificationFailed,
    WorkerDied,
)
from services.bus import Bus, Message
from tests.integration.system_kit import MIB, System, write_models

E = TypeVar("E")

LINK_GB_PER_S = 0.05  # a model of 37 MB takes most of a second
CONFIG = f"""
[[gpus]]
name = "cpu0"
device = "cpu"
memory = "{56 * MIB}B"
host_memory = "{80 * MIB}B"
verify = "all"
link_gb_per_s = {LINK_GB_PER_S}
[scheduler]
retry_failed_s = 0.5
"""


class Ears:
    """All events of a running system, heard in a thread of its own."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._events: list[Any] = []
        self._news = threading.Condition()
        self._is_listening = threading.Event()
        self._stop = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._run()))

    def __enter__(self) -> "Ears":
        self._thread.start()
        assert self._is_listening.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    async def _run(self) -> None:
        bus = await Bus.connect(self._system.admin, service="ears")

        async def on_event(message: Message[Event]) -> None:
            with self._news:
                self._events.append(message.body)
                self._news.notify_all()

        await bus.subscribe(f"{names.PREFIX}.events.>", Event, on_event)
        await bus.flush()
        self._is_listening.set()
        await self._stop.wait()
        await bus.close()

    def all(self, kind: type[E], model: str = "") -> list[E]:
        with self._news:
            return [
                event
                for event in self._events
                if isinstance(event, kind) and model in ("", getattr(event, "model", ""))
            ]

    def wait(self, kind: type[E], model: str = "", count: int = 1) -> E:
        with self._news:
            heard = self._news.wait_for(lambda: len(self.all(kind, model)) >= count, 60)
            assert heard, f"no {kind.__name__} of {model!r}; there were {self._events}"
        return self.all(kind, model)[count - 1]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = tmp_path_factory.mktemp("faults")
    models = write_models(folder / "models")
    for name, damage in (("cut", cut_short), ("misshapen", reshape)):
        models[name] = folder / "models" / name
        shutil.copytree(models["llama"], models[name])
        damage(models[name] / "model.safetensors")
    tables = "".join(
        f'[models.{name}]\nsource = "{path}"\npreload = false\n' for name, path in models.items()
    )
    wide = f'[models.wide]\nsource = "{models["llama"]}"\nkv_tokens = 200000\npreload = false\n'
    with System(folder, CONFIG + tables + wide) as running:
        yield running


@pytest.fixture
def ears(system: System) -> Iterator[Ears]:
    with Ears(system) as ears:
        yield ears


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def reshape(file: Path) -> None:
    tensors = load_file(file)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, file)


def flip_a_bit(system: System, model: str) -> int:
    """In every copy of a stretch of ``model``'s weights in the worker's memory; how many."""
    file = system.folder / "models" / model / "model.safetensors"
    content = file.read_bytes()
    (header,) = struct.unpack("<Q", content[:8])
    at = 8 + header + (len(content) - 8 - header) // 2
    wanted = content[at : at + 64]
    pid, found = system.service("worker").pid, 0
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            match = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw.p \S+ \S+ 0 *$", line)
            if not match:
                continue
            start, end = (int(number, 16) for number in match.groups())
            memory.seek(start)
            area = memory.read(end - start)
            place = area.find(wanted)
            while place >= 0:
                found += 1
                memory.seek(start + place + 17)
                memory.write(bytes([wanted[17] ^ 0x10]))
                place = area.find(wanted, place + 1)
    return found


def in_background(job: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(job()))
    thread.start()
    return thread, answers


def serves(system: System, *models: str) -> None:
    for model in models or ("llama", "mistral", "falcon"):
        status, answer = system.complete(model)
        assert status == 200, answer


def test_files_that_can_not_be_used_and_a_device_too_small(system: System, ears: Ears) -> None:
    serves(system)
    for model, words in (
        ("cut", "is cut short"),
        ("misshapen", "the two do not belong together"),
        ("wide", "largest device budget"),
    ):
        status, answer = system.complete(model)
        assert (status, words in answer["error"]["message"]) == (503, True), answer
    for model in ("cut", "misshapen"):  # tried again every now and then, and told each time
        assert ears.wait(CommandFailed, model).command == "register"
        assert ears.wait(DeploymentFailed, model).reason
    serves(system)


def test_a_flipped_bit_in_a_host_image(system: System, ears: Ears) -> None:
    serves(system, "llama")
    expected = system.complete("llama")[1]["choices"]
    serves(system, "mistral")  # takes llama's place
    assert flip_a_bit(system, "llama") >= 1
    status, answer = system.complete("llama")
    assert (status, answer["choices"]) == (200, expected)  # from the files, loaded again
    damage = ears.wait(VerificationFailed, "llama")
    assert damage.check == "page"
    assert "at load it was" in damage.reason
    assert ears.wait(CommandRejected, "llama").command == "swap_in"
    serves(system)


def test_the_pages_can_be_checked_on_demand(system: System, ears: Ears) -> None:
    def verify(model: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "services.cli", "verify", "--config", system.config_file, model],
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout + done.stderr

    serves(system, "mistral")
    status, said = verify("mistral")
    assert (status, "pages are what was loaded" in said) == (0, True), said
    assert ears.wait(ModelVerified, "mistral").num_pages > 1
    assert flip_a_bit(system, "mistral") >= 1  # on the device as well
    status, said = verify("mistral")
    assert (status, "verification_failed" in said) == (1, True), said
    status, said = verify("nobody")
    assert (status, "there is no model 'nobody'" in said) == (1, True), said
    serves(system)


def test_more_models_than_host_memory(system: System, ears: Ears) -> None:
    serves(system, "llama", "mistral", "falcon", "llama", "mistral", "falcon")
    assert ears.wait(ModelUnloaded).num_bytes > 0
    held = system.status()
    assert 0 < held.host_used_bytes <= held.host_budget_bytes == 80 * MIB


def test_a_worker_killed_while_weights_arrive(system: System, ears: Ears) -> None:
    serves(system, "mistral")
    thread, answers = in_background(lambda: system.complete("llama"))
    system.wait(lambda: state_of(system, "llama") == "swapping_in", "the swap-in")
    system.kill("worker")
    ears.wait(WorkerDied)
    thread.join(60)
    assert [status for status, _ in answers] == [200]
    serves(system)


def test_a_client_that_leaves_calls_its_swap_in_off(system: System, ears: Ears) -> None:
    serves(system, "mistral", "llama", "mistral")
    done = len(ears.all(SwapInCompleted, "llama"))
    client = http.client.HTTPConnection("127.0.0.1", system.port, timeout=60)
    body = {"model": "llama", "prompt": "hello", "max_tokens": 4, "stream": True}
    client.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    system.wait(lambda: state_of(system, "llama") == "swapping_in", "the swap-in")
    client.close()
    off = ears.wait(SwapInCancelled, "llama")
    out = ears.wait(SwapOutCompleted, "llama", len(ears.all(SwapOutCompleted, "llama")) or 1)
    assert off.generation <= out.generation
    assert off.trace.num_bytes + off.trace.kept_bytes < weights_of(system, "llama")
    assert len(ears.all(SwapInCompleted, "llama")) == done
    # What had arrived need not come again.
    serves(system, "llama")
    trace = ears.wait(SwapInCompleted, "llama", done + 1).trace
    assert trace.kept_bytes > 0
    assert trace.num_bytes + trace.kept_bytes == weights_of(system, "llama")


def test_the_trace_of_a_switch(system: System, ears: Ears) -> None:
    serves(system, "mistral", "falcon", "llama")
    first = ears.wait(FirstTokenSent, "llama")
    trace = ears.wait(SwapInCompleted, "llama").trace
    assert trace.num_bytes > 0
    assert trace.decision_s >= 0
    assert trace.drain_s >= 0
    assert 0 < trace.first_layer_s < trace.total_s
    assert 0 < trace.gb_per_s <= LINK_GB_PER_S * 1.05
    assert 0 < trace.share_of_ceiling < 1
    assert trace.verify_s > 0
    assert first.first_token_s >= first.swap_s * 0.9


def state_of(system: System, model: str) -> str:
    return str(system.models()[model]["state"])


def weights_of(system: System, model: str) -> int:
    file = system.folder / "models" / model / "model.safetensors"
    sizes = [tensor.nbytes for tensor in load_file(file).values()]
    return sum(-(-size // 256) * 256 for size in sizes)
