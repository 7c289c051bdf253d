"""What it costs to bring a model back into device memory, on the CPU device.

Two models share a pool that holds one and a half of them, through the very objects that the
engine worker uses. The files were just written, so a load comes from the page cache: a real
disk only widens the gap.

    cold start = worker process start + load + swap-in        switch = swap-out + swap-in
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the engine worker has it

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench import _models
from bench.harness import Bench, Samples
from schemas.state import ModelSpec, SwapTrace
from services.gpu_agent.device import MIB, open_pool
from services.gpu_agent.hosted import HostedModel
from services.gpu_agent.pages import PagePool
from services.memcpy import RawCopy

PROMPT_TOKENS = 16
BUDGET_MODELS = 1.5
START_PATIENCE_S = 60.0

OF_RAW_AT_LEAST = 0.8
SWAP_OUT_AT_MOST = 0.05
COLD_AT_LEAST = 10.0


class Rig:
    """Two models on one pool. Every method first brings about what it needs, untimed."""

    def __init__(self, pool: PagePool, specs: list[ModelSpec]) -> None:
        self.models = [HostedModel.inspect(spec, pool) for spec in specs]
        for model in self.models:
            model.load(_no_progress)

    def swap_in(self, model: HostedModel) -> SwapTrace:
        self._only_host()
        return model.swap_in()

    def swap_out(self, model: HostedModel) -> SwapTrace:
        self._only_resident(model)
        return model.swap_out()

    def switch(self, model: HostedModel) -> float:
        """Seconds until ``model`` has taken the other one's place."""
        (other,) = (held for held in self.models if held is not model)
        self._only_resident(other)
        began = time.perf_counter()
        other.swap_out()
        model.swap_in()
        return time.perf_counter() - began

    def load(self, model: HostedModel) -> float:
        """Seconds from files to host image."""
        self._only_host()
        model.unload()
        began = time.perf_counter()
        model.load(_no_progress)
        return time.perf_counter() - began

    def forward(self, model: HostedModel, *, after_swap: bool) -> float:
        """Seconds of one forward over a short prompt."""
        if after_swap:
            self.swap_in(model)
        else:
            self._only_resident(model)
            _forward(model)
        return _forward(model)

    def _only_host(self) -> None:
        for model in self.models:
            if model.state == "resident":
                model.swap_out()

    def _only_resident(self, model: HostedModel) -> None:
        if model.state != "resident":
            self._only_host()
            model.swap_in()


def _no_progress(_done: int, _total: int) -> None:
    pass


def _forward(model: HostedModel) -> float:
    ids = torch.arange(PROMPT_TOKENS)[None]
    began = time.perf_counter()
    with torch.inference_mode():
        model.module(input_ids=ids, use_cache=False)
    return time.perf_counter() - began


def _budget_bytes(specs: list[ModelSpec]) -> int:
    sizes = [(Path(spec.source) / "model.safetensors").stat().st_size for spec in specs]
    return int(BUDGET_MODELS * max(sizes))


def _worker_start() -> float:
    """Seconds from spawning an engine worker to its first word. Ends the worker again."""
    ours, theirs = socket.socketpair()
    ours.settimeout(START_PATIENCE_S)
    command = [sys.executable, "-m", "services.gpu_agent.worker", "--fd", str(theirs.fileno())]
    command += ["--device", "cpu", "--budget-bytes", str(256 * MIB)]
    began = time.perf_counter()
    with ours, theirs, subprocess.Popen(command, pass_fds=[theirs.fileno()]) as worker:
        theirs.close()
        try:
            if not ours.recv(1):
                raise RuntimeError("the engine worker ended before it was ready")
            return time.perf_counter() - began
        finally:
            worker.kill()


def _measure(bench: Bench, rig: Rig, model: HostedModel, start_s: float) -> None:
    """All figures of one model; ``start_s``: how long a worker takes to start."""
    name, num_bytes = model.spec.name, model.layout.num_bytes
    raw = RawCopy(num_bytes)
    variants: dict[str, Callable[[], float]] = {
        "swap-in": lambda: rig.swap_in(model).total_s,
        "memcpy": lambda: num_bytes / raw.once().memcpy / 1e9,
        "torch copy": lambda: num_bytes / raw.once().torch_copy / 1e9,
        "map alone": lambda: rig.swap_in(model).map_s,
        "swap-out": lambda: rig.swap_out(model).total_s,
        "switch": lambda: rig.switch(model),
        "load": lambda: rig.load(model),
        "forward after swap": lambda: rig.forward(model, after_swap=True),
        "forward, warm": lambda: rig.forward(model, after_swap=False),
    }
    taken = bench.round_robin({f"{name}: {what}": call for what, call in variants.items()})
    took = {what: taken[f"{name}: {what}"] for what in variants}

    def ratio(over: str, under: str) -> float:
        return took[over].over(took[under]).median

    # One thread's copy is the usual yardstick, but the swap-in uses more than one thread, and
    # so does torch: whichever is faster on this machine is the ceiling.
    of_memcpy, of_torch = ratio("memcpy", "swap-in"), ratio("torch copy", "swap-in")
    share = min(of_memcpy, of_torch)
    cold = start_s + took["load"].median + took["swap-in"].median
    switch = took["switch"].median
    bench.target(f"{name}: swap-in of raw copy", share, at_least=OF_RAW_AT_LEAST, unit="x")
    out = ratio("swap-out", "swap-in")
    bench.target(f"{name}: swap-out of swap-in", out, at_most=SWAP_OUT_AT_MOST, unit="x")
    bench.target(f"{name}: cold over switch", cold / switch, at_least=COLD_AT_LEAST, unit="x")

    bench.value(f"{name}: bytes moved", num_bytes / 1e6, "MB")
    bench.value(f"{name}: groups of layers", len(model.layout.groups))
    bench.value(f"{name}: swap-in", num_bytes / took["swap-in"].median / 1e9, "GB/s")
    bench.value(f"{name}: swap-in of memcpy, one thread", of_memcpy, "x")
    bench.value(f"{name}: swap-in of torch copy", of_torch, "x")
    bench.value(f"{name}: load", num_bytes / took["load"].median / 1e9, "GB/s")
    bench.value(f"{name}: load + swap-in over switch", (cold - start_s) / switch, "x")
    forward = ratio("forward after swap", "forward, warm")
    bench.value(f"{name}: forward after swap of warm", forward, "x")


def main(argv: list[str]) -> int:
    """Run the benchmark. Returns its exit status."""
    bench = Bench("swap", "swapping models through a pool that holds one and a half", argv)
    starts = Samples(tuple(_worker_start() for _ in range(1 if bench.quick else 3)))
    bench.value("worker start", starts.median, "s")
    with tempfile.TemporaryDirectory(prefix="hotswap-bench-") as folder:
        specs = [
            _models.write(model, Path(folder)) for model in (_models.layered(), _models.wide())
        ]
        pool = open_pool("cpu", _budget_bytes(specs))
        bench.value("pool", pool.budget_bytes / 1e6, "MB")
        rig = Rig(pool, specs)
        for model in rig.models:
            _measure(bench, rig, model, starts.median)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
