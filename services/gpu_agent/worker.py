"""The engine process: one end of a Unix socket, one loop, one engine.

    python -m services.gpu_agent.worker --fd 3 --device auto --budget-bytes 2147483648

The loop, for ever:

1. wait for messages; not at all while a model has something to compute
2. handle every message that is there, and what other threads have finished
3. send what came of it: a step may take long, and others wait for these answers
4. one step of one busy model, and send what came of that

A step of a model that is still arriving may wait for its weights. Messages are received, but not
handled, meanwhile; one that may make the step pointless (a cancellation, a swap-out), or that is
for a model which need not wait, gives it up.

Everything happens in the loop's thread but slow file work (loading a host image, fetching
a model from the hub), which a background thread does one job after the other, and texts that are
only to be tokenized, for which there is another one. The process
ends when it is told to, or at once when the socket closes: nobody is left to serve then.
"""

import os

# OpenMP reads this once, when torch is loaded. By default its threads spin while they wait
# for each other; beside other busy processes (control, the api, a build) a spinning thread
# takes the very core that the one it waits for needs, and a step takes up to 8 times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one prompt at a time is too little

import argparse
import ctypes
import gc
import logging
import math
import select
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal, NoReturn

import psutil
import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.utils.tqdm import disable_progress_bars

from schemas.state import ModelSpec
from schemas.tokenize import TokenizeFailed
from services.gpu_agent import ceiling, device, ipc
from services.gpu_agent.background import Afterwards, Background, Outbox
from services.gpu_agent.device_cpu import available_bytes
from services.gpu_agent.engine.decode_graph import record_cuda
from services.gpu_agent.engine.library import EngineOptions, OnProgress, not_registered
from services.gpu_agent.engine.native import NativeEngine
from services.gpu_agent.engine.tokenizing import TokenizerDesk
from services.gpu_agent.pages import PagePool
from services.gpu_agent.shared_images import ImageExchange

logger = logging.getLogger(__name__)

PROGRESS_EVERY_S: Final = 0.1
MAX_CPU_BUDGET_BYTES: Final = 8 * 2**30
HOST_SHARE: Final = 0.7  # of what is free at start, for host images
HOST_KV_SHARE: Final = 0.1  # the same, for KV


class Worker:
    """See the module's text. ``sock``: this end of the pair, blocking."""

    def __init__(
        self, sock: socket.socket, pool: PagePool, options: EngineOptions, ready: ipc.Ready
    ) -> None:
        self._sock = sock
        self._frames = ipc.FrameReader()
        self._inbox: list[ipc.ToWorker] = []  # received, not handled yet
        self._background = Background()
        self._texts, self._desk = Background("tokenizers"), TokenizerDesk()
        self._engine = NativeEngine(
            pool,
            options,
            interrupted=self._is_interrupted,
            on_swap_in_over=lambda: self._background.post(self._engine.poll),
            on_ready=lambda: self._background.post(list),  # wakes the loop up, for a step
        )
        self._is_open = True
        self._send([ready])

    def run(self) -> None:
        """Serve until told to stop. Raises ConnectionError when the other end is gone."""
        while self._is_open:
            timeout = 0 if self._engine.is_busy or self._inbox else self._longest_wait_s()
            others = (self._background, self._texts)
            inputs = [self._sock.fileno(), *(other.fileno() for other in others)]
            readable, _, _ = select.select(inputs, [], [], timeout)
            out: Outbox = []
            if self._sock.fileno() in readable:
                self._receive()
            inbox, self._inbox = self._inbox, []
            for message in inbox:
                out += self._handle(message)
            for other in others:
                if other.fileno() in readable:
                    out += other.collect()
            self._send(out)
            if self._is_open:
                self._send(self._engine.step())

    def _longest_wait_s(self) -> float | None:
        """Until a suspended request's deadline; None, for ever, where there is none."""
        deadline = self._engine.next_deadline
        return None if math.isinf(deadline) else max(0.0, deadline - time.time())

    def _receive(self) -> None:
        """Take all messages that are there now. Raises ConnectionError where nobody sends."""
        while True:
            try:
                data = self._sock.recv(1 << 18, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            if not data:
                raise ConnectionResetError("control closed the socket")
            for body in self._frames.feed(data):
                self._inbox.append(ipc.to_worker_decoder.decode(body))

    def _is_interrupted(self) -> bool:
        """Whether a forward that waits for weights should be given up for what has come."""
        try:
            self._receive()
        except ConnectionError:
            return True  # the loop's own reading will find the same, and end
        return any(self._has_precedence(message) for message in self._inbox)

    def _has_precedence(self, message: ipc.ToWorker) -> bool:
        match message:
            case ipc.Submit(request):
                return self._engine.is_resident(request.model)
            case _:
                return isinstance(message, ipc.Cancel | ipc.SwapOut | ipc.Shutdown)

    def _send(self, out: Outbox) -> None:
        if out:
            self._sock.sendall(b"".join(ipc.frame(message) for message in out))

    # -- messages --------------------------------------------------------------------------

    def _handle(self, message: ipc.ToWorker) -> Outbox:
        match message:
            case ipc.Register(spec):
                return self._register(spec)
            case ipc.Load(model):
                return self._load(model)
            case ipc.SwapIn(model):
                return [self._engine.swap_in(model)]
            case ipc.SwapOut(model, preempt):
                return self._engine.swap_out(model, preempt)
            case ipc.Forget(model):
                return [self._engine.forget(model)]
            case ipc.Verify(model):
                return self._engine.verify(model)
            case ipc.Tokenize():
                return self._tokenize(message)
            case ipc.Submit(request):
                return self._engine.submit(request)
            case ipc.Cancel(request_id):
                return self._engine.cancel(request_id)
            case ipc.Shutdown():
                self._is_open = False
                return self._engine.abort("model_unavailable", "the engine is shutting down")

    def _register(self, spec: ModelSpec) -> Outbox:
        if not self._engine.needs_files(spec):
            return [self._engine.register(spec)]

        def job() -> Afterwards:
            found = self._engine.find_files(spec)
            if isinstance(found, ipc.OpFailed):
                return lambda: [found]
            return lambda: [self._engine.register(spec, found)]

        self._background.submit(job)
        return []

    def _tokenize(self, message: ipc.Tokenize) -> Outbox:
        ticket, ask = message.ticket, message.ask
        try:
            hosted = self._engine.registered(ask.model)
        except KeyError:
            failure = TokenizeFailed("model_unavailable", not_registered(ask.model))
            return [ipc.TokenizeAnswered(ticket, failure)]

        def job() -> Afterwards:
            answer = self._desk.answer(hosted, ask)
            return lambda: [ipc.TokenizeAnswered(ticket, answer)]

        self._texts.submit(job)
        return []

    def _load(self, model: str) -> Outbox:
        load = self._engine.load(model)
        if isinstance(load, ipc.OpFailed):
            return [load]

        def job() -> Afterwards:
            result = load.run(self._progress_of(model))
            return lambda: [self._engine.end_load(result)]

        self._background.submit(job)
        return [*load.first]

    def _progress_of(self, model: str) -> OnProgress:
        """Report progress of a load, but not more often than a person can see."""
        last_at = 0.0

        def on_progress(done: int, total: int) -> None:
            nonlocal last_at
            now = time.monotonic()
            if now - last_at >= PROGRESS_EVERY_S:
                last_at = now
                self._background.post(lambda: [ipc.LoadProgress(model, done, total)])

        return on_progress


# -- the process -------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the worker; ends the process with status 0 when told to or orphaned, else 1."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    _tie_to_parent()
    _quieten_libraries()
    freeze_imports()
    _set_threads(options.threads)
    status = 0
    try:
        sock = socket.socket(fileno=options.fd)
        pool = _open_pool(options)
        pool.ceiling_gb_per_s = ceiling.measure(pool)
        engine_options = _engine_options(options, pool)
        ready = ipc.Ready(
            pool.kind,
            pool.device_name,
            pool.page_bytes,
            pool.budget_bytes,
            engine_options.host_budget_bytes,
            pool.ceiling_gb_per_s,
        )
        Worker(sock, pool, engine_options, ready).run()
    except ConnectionError:
        pass  # control is gone; so are we
    except Exception:
        logger.exception("the engine worker failed")
        status = 1
    logging.shutdown()
    # Not sys.exit: a background load would be waited for, and destroying models costs time.
    os._exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="services.gpu_agent.worker", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="inherited end of a socket pair")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--index", type=int, default=0, help="which CUDA device")
    parser.add_argument("--budget-bytes", type=int, help="device memory to use; else a default")
    parser.add_argument("--page-bytes", type=int, help="size of a page; else the device's default")
    parser.add_argument("--threads", type=int, help="compute threads; else all cores")
    parser.add_argument("--host-bytes", type=int, help="for host images; else 70 %% of free memory")
    parser.add_argument("--host-kv-bytes", type=int, help="for KV; else 10 %% of free memory")
    parser.add_argument("--share-images", type=Path, help="folder to share host images by")
    parser.add_argument("--verify", choices=("sampled", "all", "off"), default="sampled")
    parser.add_argument("--no-graphs", action="store_true", help="CUDA: launch every kernel anew")
    parser.add_argument("--link-gb-per-s", type=float, default=0.0, help="CPU: swap in no faster")
    return parser


def _open_pool(options: argparse.Namespace) -> PagePool:
    budget = options.budget_bytes
    if budget is None:
        budget = default_budget_bytes(options.device, options.index)
    pool = device.open_pool(options.device, budget, options.page_bytes, options.index)
    pool.link_bytes_per_s = options.link_gb_per_s * 1e9
    return pool


def _engine_options(options: argparse.Namespace, pool: PagePool) -> EngineOptions:
    """After the pool was opened: on CPU it takes from the same memory."""
    free_bytes = available_bytes()
    host_bytes, kv_bytes = options.host_bytes, options.host_kv_bytes
    return EngineOptions(
        host_budget_bytes=int(HOST_SHARE * free_bytes) if host_bytes is None else host_bytes,
        host_kv_bytes=int(HOST_KV_SHARE * free_bytes) if kv_bytes is None else kv_bytes,
        verify=options.verify,
        exchange=ImageExchange(options.share_images) if options.share_images else None,
        recorder=record_cuda if pool.kind == "cuda" and not options.no_graphs else None,
    )


def default_budget_bytes(kind: Literal["auto", "cpu", "cuda"], index: int) -> int:
    """90 % of a GPU's memory (less where others use it); on CPU a quarter of RAM, 8 GiB at most."""
    if kind != "cpu" and not device.why_no_cuda(index):
        free, total = torch.cuda.mem_get_info(index)
        return int(min(0.9 * total, 0.95 * free))
    return min(psutil.virtual_memory().total // 4, MAX_CPU_BUDGET_BYTES)


def _tie_to_parent() -> None:
    """Die with control, even when it is killed; and leave Ctrl-C to it, which drains first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)


def freeze_imports() -> None:
    """Keep the collector off what the imports made: a full round over it takes a quarter of a
    second, at any time.
    """
    gc.collect()
    gc.freeze()


def _quieten_libraries() -> None:
    """No progress bars, no advice for notebook users, no telemetry: this is a server."""
    constants.HF_HUB_DISABLE_TELEMETRY = True
    disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _set_threads(asked: int | None) -> None:
    if asked:
        torch.set_num_threads(asked)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)))


if __name__ == "__main__":
    main()
