"""An engine worker without an engine: the protocol of `services.gpu_agent.ipc`, by script.

    python fake_worker.py FD

What a model does follows from its source, what a request does from its prompt:

    source  "broken"     can not be registered
            "too-large"  can not be swapped in
            "slow"       arrives until SIGUSR1 (then it is there) or SwapOut (called off); what
                         is submitted meanwhile is answered after that
            "damaged"    arrives, and is found to be corrupt
            "dropped"    is unloaded just before a swap-in
            "shrunk"     can not be swapped in while requests of it are suspended
            "crowded"    is unloaded, with what is suspended there, as it is to be verified
    prompt  "hold"       gives one token, then waits for SIGUSR1 (go on) or Cancel; two in all with
                         those of its prefix
            /a/file      like "hold", unless that file exists: then one token, and done
            "die"        kills the process
            N            gives N tokens and ends

Texts have the tokens 1 and 2; what is to be a text again is never answered.

A SwapOut that preempts suspends what holds or waits for an arrival, until the next SwapIn.

FAKE_LINGER_S: how long it takes to end once its socket is closed. FAKE_DIARY: a file that
gets "PID begins" and "PID ends".
"""

import os
import select
import signal
import socket
import struct
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from schemas.requests import EmbedRequest, GenerateRequest, TextPrompt
from schemas.state import ModelFacts, ModelSpec, SwapTrace
from schemas.tokenize import DetokenizeRequest, Tokenized
from services.gpu_agent import ipc

PAGE_BYTES = 4096
BUDGET_BYTES = 100 * PAGE_BYTES
HOST_BYTES = 1000 * PAGE_BYTES
HELD_TOKENS = 2


class FakeWorker:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._specs: dict[str, ModelSpec] = {}
        self._resident: set[str] = set()
        self._held: list[GenerateRequest] = []
        self._arriving: dict[str, list[GenerateRequest]] = {}
        self._suspended: dict[str, list[GenerateRequest]] = {}  # model -> what held
        self._unbegun: dict[str, list[GenerateRequest]] = {}  # model -> what waited for it

    def run(self) -> None:
        wake_read, wake_write = os.pipe()
        for end in (wake_read, wake_write):
            os.set_blocking(end, False)
        signal.signal(signal.SIGUSR1, lambda *_: None)
        signal.set_wakeup_fd(wake_write)
        self._say(ipc.Ready("cpu", "fake", PAGE_BYTES, BUDGET_BYTES, HOST_BYTES, 10.0))
        frames = ipc.FrameReader()
        while True:
            readable, _, _ = select.select([self._sock.fileno(), wake_read], [], [])
            if wake_read in readable:
                os.read(wake_read, 100)
                self._release()
            if self._sock.fileno() in readable:
                data = self._sock.recv(1 << 16)
                if not data:
                    return
                for body in frames.feed(data):
                    message = ipc.to_worker_decoder.decode(body)
                    if isinstance(message, ipc.Shutdown):
                        return
                    self._handle(message)

    def _say(self, *messages: ipc.FromWorker) -> None:
        self._sock.sendall(b"".join(map(ipc.frame, messages)))

    @property
    def _memory(self) -> ipc.Memory:
        return ipc.Memory(2 * PAGE_BYTES * len(self._resident), PAGE_BYTES, {})

    def _handle(self, message: ipc.ToWorker) -> None:
        trace = SwapTrace(started_at=time.time(), total_s=0.001, copy_s=0.001, num_bytes=PAGE_BYTES)
        match message:
            case ipc.Register(spec) if spec.source == "broken":
                self._say(ipc.OpFailed(spec.name, "register", "no safetensors file"))
            case ipc.Register(spec):
                self._specs[spec.name] = spec
                facts = ModelFacts(
                    "Fake", "float32", 1, PAGE_BYTES, PAGE_BYTES, 512, spec.max_batch
                )
                self._say(ipc.Registered(spec.name, facts))
            case ipc.Load(model):
                loaded = ipc.Loaded(model, PAGE_BYTES, 0.01, self._memory)
                self._say(ipc.LoadProgress(model, 1, 2), loaded)
            case ipc.SwapIn(model) if self._specs[model].source == "too-large":
                self._say(ipc.OpFailed(model, "swap_in", "OutOfPages: 3 needed, 2 free"))
            case ipc.SwapIn(model) if self._specs[model].source == "shrunk" and (
                self._suspended.get(model)
            ):
                self._say(ipc.OpFailed(model, "swap_in", "OutOfPages: 3 needed, 2 free"))
            case ipc.SwapIn(model) if self._specs[model].source == "slow":
                self._arriving[model] = self._unbegun.pop(model, [])
                self._say(ipc.Arriving(model))
            case ipc.SwapIn(model) if self._specs[model].source == "damaged":
                reason = "page 3 has another checksum"
                self._say(
                    ipc.Arriving(model),
                    ipc.Corrupted(model, "page", reason, self._memory),
                    ipc.OpFailed(model, "swap_in", reason),
                )
            case ipc.SwapIn(model) if self._specs[model].source == "dropped":
                self._say(
                    ipc.Unloaded(model, PAGE_BYTES),
                    ipc.OpFailed(model, "swap_in", "is not loaded yet"),
                )
            case ipc.SwapIn(model):
                self._resident.add(model)
                self._say(ipc.Arriving(model), ipc.SwappedIn(model, trace, self._memory))
                self._held += self._suspended.pop(model, [])
            case ipc.SwapOut(model, preempt) if model in self._arriving:
                unbegun = self._unbegun[model] = self._arriving.pop(model)
                assert preempt or not unbegun
                cancelled = ipc.SwapInCancelled(model, trace)
                self._say(cancelled, ipc.SwappedOut(model, trace, self._memory, len(unbegun)))
            case ipc.Verify(model) if self._specs[model].source == "crowded":
                self._say(ipc.Unloaded(model, PAGE_BYTES))
            case ipc.Verify(model) if self._specs[model].source == "rotten":
                self._resident.discard(model)
                self._say(ipc.Corrupted(model, "page", "page 1 is rotten", self._memory))
            case ipc.Verify(model):
                self._say(ipc.Verified(model, 7, PAGE_BYTES, 0.001))
            case ipc.SwapOut(model, preempt):
                running = [request for request in self._held if request.model == model]
                assert preempt or not running
                self._resident.discard(model)
                self._held = [request for request in self._held if request.model != model]
                self._suspended[model] = running
                self._say(ipc.SwappedOut(model, trace, self._memory, len(running)))
            case ipc.Tokenize(_, DetokenizeRequest()):
                pass  # is never answered
            case ipc.Tokenize(ticket, ask):
                self._say(ipc.TokenizeAnswered(ticket, Tokenized((1, 2), 512, (ask.model,))))
            case ipc.Submit(EmbedRequest() as asked):
                self._embed(asked)
            case ipc.Submit(GenerateRequest() as request):
                self._submit(request)
            case ipc.Cancel(request_id):
                waiting = (self._arriving, self._suspended, self._unbegun)
                for line in (self._held, *(line for part in waiting for line in part.values())):
                    if request_id not in [request.request_id for request in line]:
                        continue
                    line[:] = [request for request in line if request.request_id != request_id]
                    self._say(ipc.Broke(request_id, "cancelled", "cancelled"))
            case ipc.Forget(model):
                assert not self._suspended.pop(model, [])
                self._specs.pop(model, None)
                self._say(ipc.Forgotten(model, PAGE_BYTES, self._memory))
            case ipc.Shutdown():
                pass

    def _embed(self, request: EmbedRequest) -> None:
        """A vector of two dimensions for each input, each in a message of its own."""
        name = request.request_id
        self._say(ipc.Begun(name, 5, time.time()))
        for i in range(len(request.inputs)):
            self._say(ipc.Embedded(name, i, 2, struct.pack("<2f", i, 0.5)))
        self._say(ipc.Done(name, "stop", 5, 0, prefill_s=0.001, decode_s=0.0))

    def _submit(self, request: GenerateRequest) -> None:
        name = request.request_id
        if request.model in self._arriving:
            self._arriving[request.model].append(request)
            return
        if request.model not in self._resident:
            self._say(ipc.Broke(name, "model_unavailable", f"{request.model} is not resident"))
            return
        assert isinstance(request.prompt, TextPrompt)
        self._say(ipc.Begun(name, 3, time.time()))
        match request.prompt.text:
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case text if text == "hold" or (text[0] == "/" and not Path(text).exists()):
                first = len(request.prefix_token_ids)
                if first < HELD_TOKENS:
                    self._say(ipc.Produced(name, first, (100 + first,), f"t{first} "))
                self._held.append(request)
            case text:
                first = len(request.prefix_token_ids)
                self._answer(request, first, int(text) if text.isdigit() else 1)

    def _release(self) -> None:
        while self._arriving:
            model, waiting = self._arriving.popitem()
            self._resident.add(model)
            trace = SwapTrace(started_at=time.time(), total_s=0.001, num_bytes=PAGE_BYTES)
            self._say(ipc.SwappedIn(model, trace, self._memory))
            for request in waiting:
                self._submit(request)
            self._held += self._suspended.pop(model, [])
        for request in self._held:
            self._answer(request, len(request.prefix_token_ids) + 1, HELD_TOKENS)
        self._held.clear()

    def _answer(self, request: GenerateRequest, first: int, count: int) -> None:
        name = request.request_id
        for i in range(first, count):
            self._say(ipc.Produced(name, i, (100 + i,), f"t{i} "))
        self._say(ipc.Done(name, "length", 3, count, prefill_s=0.001, decode_s=0.001))


def note(what: str) -> None:
    if diary := os.environ.get("FAKE_DIARY"):
        with Path(diary).open("a") as out:
            out.write(f"{os.getpid()} {what}\n")


if __name__ == "__main__":
    note("begins")
    FakeWorker(socket.socket(fileno=int(sys.argv[1]))).run()
    time.sleep(float(os.environ.get("FAKE_LINGER_S", "0")))
    note("ends")
