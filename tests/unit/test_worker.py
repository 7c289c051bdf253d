"""The engine worker as a real process, over a real socket pair."""

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from schemas.requests import TextPrompt
from schemas.state import ModelSpec
from services.gpu_agent import ipc, worker
from services.gpu_agent.background import Afterwards, Background
from tests.unit import swap_kit, tiny_models
from tests.unit.engine_kit import Answers, expected_greedy, request, save_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PAGE_BYTES = 2 * 2**20
PATIENCE_S = 60.0

MessageT = TypeVar("MessageT")


class Control:
    """The test's side of the socket, and the worker's process."""

    def __init__(self, budget_pages: int = 4, *options: str) -> None:
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(PATIENCE_S)
        command = [sys.executable, "-m", "services.gpu_agent.worker", "--fd", str(theirs.fileno())]
        command += ["--device", "cpu", "--budget-bytes", str(budget_pages * PAGE_BYTES)]
        command += ["--threads", "1", *options]
        with theirs:
            self.process = subprocess.Popen(command, cwd=ROOT, pass_fds=[theirs.fileno()])
        self._frames = ipc.FrameReader()
        self._inbox: list[ipc.FromWorker] = []
        self.ready = self.expect(ipc.Ready)

    def send(self, *messages: ipc.ToWorker) -> None:
        self.sock.sendall(b"".join(ipc.frame(message) for message in messages))

    def receive(self) -> ipc.FromWorker:
        while not self._inbox:
            data = self.sock.recv(1 << 16)
            if not data:
                raise EOFError("the worker closed its socket")
            self._inbox += [ipc.from_worker_decoder.decode(b) for b in self._frames.feed(data)]
        return self._inbox.pop(0)

    def expect(self, kind: type[MessageT]) -> MessageT:
        """The next message but progress, which must be a ``kind``."""
        message = self.receive()
        while isinstance(message, ipc.LoadProgress):
            message = self.receive()
        assert isinstance(message, kind), message
        return message

    def answers(self, count: int, answers: Answers | None = None) -> Answers:
        """Collect messages until ``count`` requests have ended."""
        answers = Answers() if answers is None else answers
        while sum(answer.end is not None for answer in answers.values()) < count:
            answers.take([self.receive()])
        return answers

    def add(self, spec: ModelSpec) -> None:
        self.send(ipc.Register(spec))
        self.expect(ipc.Registered)
        self.send(ipc.Load(spec.name))
        self.expect(ipc.Loaded)

    def swap_in(self, model: str) -> ipc.SwappedIn:
        self.send(ipc.SwapIn(model))
        self.expect(ipc.Arriving)
        return self.expect(ipc.SwappedIn)

    def close(self) -> None:
        self.sock.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture
def control() -> Iterator[Control]:
    control = Control()
    yield control
    control.close()


def spec_of(folder: Path, family: str) -> ModelSpec:
    path = tiny_models.write(folder / family, family)
    save_tokenizer(path)
    return ModelSpec(family, str(path), dtype="float32")


def test_a_whole_life(tmp_path: Path, control: Control) -> None:
    assert (control.ready.device, control.ready.budget_bytes) == ("cpu", 4 * PAGE_BYTES)
    for family in ("llama", "mistral"):
        control.add(spec_of(tmp_path, family))
    assert control.swap_in("llama").memory.device_bytes == 2 * PAGE_BYTES
    prompt = tiny_models.prompt(30).tolist()[0]
    control.send(
        ipc.Submit(request("ids", prompt, "llama")),
        ipc.Submit(request("text", TextPrompt("hello"), "llama")),
        ipc.Submit(request("away", prompt, "mistral")),
        ipc.Submit(request("long", [1] * 300, "llama")),
    )
    answers = control.answers(4)
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32).eval()
    assert answers["ids"].tokens == expected_greedy(module, prompt, 8)
    assert len(answers["text"].tokens) == 8
    codes = {n: e.code for n, a in answers.items() if isinstance(e := a.end, ipc.Broke)}
    assert codes == {"away": "model_unavailable", "long": "context_length_exceeded"}

    # The same tokens after the pages have served another model.
    control.send(ipc.SwapOut("llama"))
    out = control.expect(ipc.SwappedOut)
    assert (out.memory.device_bytes, out.memory.cached_bytes) == (0, {"llama": PAGE_BYTES})
    control.swap_in("mistral")
    control.send(ipc.Submit(request("other", prompt, "mistral")))
    control.answers(1)
    control.send(ipc.SwapOut("mistral"))
    control.expect(ipc.SwappedOut)
    assert control.swap_in("llama").trace.num_bytes == 0  # its page was in nobody's way
    control.send(ipc.Submit(request("again", prompt, "llama")))
    assert control.answers(1)["again"].tokens == answers["ids"].tokens

    control.send(ipc.Shutdown())
    assert control.process.wait(PATIENCE_S) == 0


def test_failures_are_answered_and_the_worker_goes_on(tmp_path: Path, control: Control) -> None:
    spec = spec_of(tmp_path, "llama")
    broken = tiny_models.write(tmp_path / "broken", "qwen2")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    control.send(
        ipc.Register(ModelSpec("missing", str(tmp_path / "nowhere"))),
        ipc.Register(ModelSpec("broken", str(broken))),
        ipc.Load("missing"),
        ipc.SwapIn("missing"),
        ipc.SwapOut("missing"),
    )
    failed = [control.expect(ipc.OpFailed) for _ in range(5)]
    assert {(f.model, f.op) for f in failed} == {
        ("missing", "register"),
        ("broken", "register"),
        ("missing", "load"),
        ("missing", "swap_in"),
        ("missing", "swap_out"),
    }
    assert all(f.reason for f in failed)
    control.add(spec)
    control.swap_in("llama")
    control.send(ipc.Submit(request("a", [1, 2], "llama", max_tokens=200)), ipc.SwapOut("llama"))
    answers = Answers()
    while not isinstance(message := control.receive(), ipc.OpFailed):
        answers.take([message])
    assert "1 requests" in message.reason
    control.send(ipc.Cancel("a"))
    end = control.answers(1, answers)["a"].end
    assert isinstance(end, ipc.Done)
    assert end.finish_reason == "cancelled"


def test_a_slow_arrival_is_called_off_long_before_its_end(tmp_path: Path) -> None:
    folder = swap_kit.write(tmp_path, swap_kit.DEEP)
    save_tokenizer(folder)
    num_bytes = (folder / "model.safetensors").stat().st_size
    copy_s = 4.0
    control = Control(10, "--link-gb-per-s", str(num_bytes / copy_s / 1e9))
    spec = ModelSpec("m", str(folder))
    control.add(spec)
    prompt = tiny_models.prompt(30).tolist()[0]
    cached = 0
    while not cached:  # at the first try, unless the machine is very busy
        control.send(ipc.SwapIn("m"))
        control.expect(ipc.Arriving)
        control.send(ipc.Submit(request("a", prompt, "m")))
        readable, _, _ = select.select([control.sock], [], [], copy_s * 0.4)
        assert readable == []  # its forward waits, and nothing is told
        began = time.monotonic()
        control.send(ipc.Cancel("a"))
        end = control.answers(1)["a"].end
        assert time.monotonic() - began < copy_s / 4
        assert isinstance(end, ipc.Done)
        assert (end.finish_reason, end.completion_tokens) == ("cancelled", 0)
        control.send(ipc.SwapOut("m"))
        trace = control.expect(ipc.SwapInCancelled).trace
        assert trace.num_bytes < 0.9 * num_bytes
        assert trace.copy_s < 0.9 * copy_s
        memory = control.expect(ipc.SwappedOut).memory
        assert memory.device_bytes == 0
        cached = memory.cached_bytes.get("m", 0)
    control.send(ipc.SwapIn("m"))
    control.expect(ipc.Arriving)
    control.send(ipc.Submit(request("b", prompt, "m")))
    trace = control.expect(ipc.SwappedIn).trace
    assert (trace.kept_bytes, trace.num_bytes > 0) == (cached, True)
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert control.answers(1)["b"].tokens == expected_greedy(module, prompt, 8)
    control.close()


def test_an_idle_model_leaves_while_a_forward_waits_for_weights(tmp_path: Path) -> None:
    folder = swap_kit.write(tmp_path, swap_kit.DEEP)
    save_tokenizer(folder)
    copy_s = 4.0
    num_bytes = (folder / "model.safetensors").stat().st_size
    control = Control(14, "--link-gb-per-s", str(num_bytes / copy_s / 1e9))
    control.add(ModelSpec("m", str(folder)))
    control.add(spec_of(tmp_path, "llama"))
    control.swap_in("llama")
    control.send(ipc.SwapIn("m"))
    control.expect(ipc.Arriving)
    control.send(ipc.Submit(request("a", [1, 2], "m", max_tokens=1)))
    readable, _, _ = select.select([control.sock], [], [], copy_s * 0.2)
    assert readable == []
    began = time.monotonic()
    control.send(ipc.SwapOut("llama"))
    assert control.expect(ipc.SwappedOut).model == "llama"
    assert time.monotonic() - began < copy_s / 4
    assert control.expect(ipc.SwappedIn).model == "m"
    assert len(control.answers(1)["a"].tokens) == 1
    control.close()


def test_shutdown_ends_running_requests(tmp_path: Path, control: Control) -> None:
    control.add(spec_of(tmp_path, "llama"))
    control.swap_in("llama")
    for name in ("a", "b"):
        control.send(ipc.Submit(request(name, [1, 2], "llama", max_tokens=200)))
    control.expect(ipc.Begun)
    control.process.send_signal(signal.SIGINT)  # is control's business, not the worker's
    control.send(ipc.Shutdown())
    ends = [answer.end for answer in control.answers(2).values()]
    assert all(isinstance(end, ipc.Broke) and end.code == "model_unavailable" for end in ends)
    assert control.process.wait(PATIENCE_S) == 0


def test_an_idle_worker_uses_no_processor_and_ends_with_its_socket(control: Control) -> None:
    process = psutil.Process(control.process.pid)
    before = process.cpu_times()
    readable, _, _ = select.select([control.sock], [], [], 0.5)
    after = process.cpu_times()
    assert readable == []
    assert after.user + after.system - before.user - before.system < 0.1
    control.sock.close()
    assert control.process.wait(PATIENCE_S) == 0


def test_the_worker_dies_with_a_killed_parent() -> None:
    parent = f"""
import socket, subprocess, sys, time
ours, theirs = socket.socketpair()
worker = subprocess.Popen([sys.executable, "-m", "services.gpu_agent.worker", "--fd",
    str(theirs.fileno()), "--device", "cpu", "--budget-bytes", "{PAGE_BYTES}"],
    pass_fds=[theirs.fileno()])
ours.recv(1)
print(worker.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen(
        [sys.executable, "-c", parent], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        watch = os.pidfd_open(int(process.stdout.readline()))
        process.kill()
        gone, _, _ = select.select([watch], [], [], PATIENCE_S)
        os.close(watch)
    assert gone, "the worker outlived its parent"


def test_default_budget_is_a_part_of_the_machine() -> None:
    budget = worker.default_budget_bytes("cpu", 0)
    assert 0 < budget <= min(psutil.virtual_memory().total // 4, 8 * 2**30)
    assert worker.default_budget_bytes("auto", 99) == budget


def test_background_jobs_come_back_in_order() -> None:
    def job(number: int) -> Callable[[], Afterwards]:
        return lambda: lambda: [ipc.LoadProgress("m", number, 3)]

    background = Background()
    for n in range(3):
        background.submit(job(n))
    seen: list[ipc.FromWorker] = []
    while len(seen) < 3:
        select.select([background], [], [])
        seen += background.collect()
    assert seen == [ipc.LoadProgress("m", n, 3) for n in range(3)]
