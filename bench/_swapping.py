"""Swap-in, swap-out and switches on the CPU device, against raw copies of the same bytes.

Two models share a pool that holds one and a half of them, through the very objects that the
engine worker uses. "Whole" swap-ins find nothing of the model on the device; "half" ones find its
first half, as a newcomer that needed the other half leaves it.
"""

import gc
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import psutil
import torch

from bench.harness import Bench, Samples
from schemas.state import ModelSpec, SwapTrace
from services.gpu_agent.device import MIB
from services.gpu_agent.hosted import HostedModel
from services.gpu_agent.pages import PagePool
from services.memcpy import RawCopy

IN_OF_MEMCPY_AT_MOST: Final = 1.10
OUT_OF_MEMCPY_AT_MOST: Final = 0.02
HALF_OF_WHOLE_AT_MOST: Final = 0.55
HOST_OF_WEIGHTS_AT_MOST: Final = 1.02
COLD_AT_LEAST: Final = 10.0
GROWTH_MB_AT_MOST: Final = 8.0

NUM_SWAPS: Final = 1000
WARM_SWAPS: Final = 100
PROMPT_TOKENS: Final = 16
START_PATIENCE_S: Final = 60.0


class Rig:
    """Two models on one pool. Every method first brings about what it needs, untimed."""

    def __init__(self, pool: PagePool, specs: list[ModelSpec]) -> None:
        self.pool = pool
        self.models = [HostedModel.inspect(spec, pool) for spec in specs]
        for model in self.models:
            model.load(_no_progress)

    def swap_in(self, model: HostedModel, kept: float = 0.0) -> SwapTrace:
        """With this share of its pages still on the device."""
        self.only_host()
        self._keep(model, kept)
        return model.swap_in()

    def swap_out(self, model: HostedModel) -> SwapTrace:
        self.only_resident(model)
        return model.swap_out()

    def switch(self, model: HostedModel) -> float:
        """Seconds until ``model`` has taken the other one's place, nothing of it being there."""
        (other,) = (held for held in self.models if held is not model)
        self.only_host()
        self._keep(model, 0.0)
        other.swap_in()
        began = time.perf_counter()
        other.swap_out()
        model.swap_in()
        return time.perf_counter() - began

    def load(self, model: HostedModel) -> float:
        """Seconds from files to host image."""
        self.only_host()
        model.unload()
        began = time.perf_counter()
        model.load(_no_progress)
        return time.perf_counter() - began

    def forward(self, model: HostedModel, *, after_swap: bool) -> float:
        """Seconds of one forward over a short prompt."""
        if after_swap:
            self.swap_in(model)
        else:
            self.only_resident(model)
            _forward(model)
        return _forward(model)

    def only_host(self) -> None:
        for model in self.models:
            if model.state == "resident":
                model.swap_out()

    def only_resident(self, model: HostedModel) -> None:
        if model.state != "resident":
            self.only_host()
            model.swap_in()

    def _keep(self, model: HostedModel, share: float) -> None:
        """Have the first ``share`` of a swapped-out model's pages on the device, no more."""
        free = self.pool.free
        if share:
            model.swap_in()
            model.swap_out()
        num_kept = int(share * self.pool.pages_for(model.layout.num_bytes))
        free.give(free.take(free.num_free - num_kept))  # its tail is taken last but for these


def _no_progress(_done: int, _total: int) -> None:
    pass


def _forward(model: HostedModel) -> float:
    ids = torch.arange(PROMPT_TOKENS)[None]
    began = time.perf_counter()
    with torch.inference_mode():
        model.module(input_ids=ids, use_cache=False)
    return time.perf_counter() - began


def worker_start() -> float:
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


def measure(bench: Bench, rig: Rig, model: HostedModel, start_s: float) -> None:
    """All figures of one model; ``start_s``: how long a worker takes to start."""
    name, num_bytes = model.spec.name, model.layout.num_bytes
    raw = RawCopy(num_bytes)
    variants: dict[str, Callable[[], float]] = {
        "swap-in": lambda: rig.swap_in(model).total_s,
        "swap-in, half there": lambda: rig.swap_in(model, kept=0.5).total_s,
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

    def promise(what: str, value: float, at_most: float) -> None:
        bench.target(f"{name}: {what}", value, at_most=at_most, unit="x")

    promise("swap-in of memcpy", ratio("swap-in", "memcpy"), IN_OF_MEMCPY_AT_MOST)
    promise("swap-out of memcpy", ratio("swap-out", "memcpy"), OUT_OF_MEMCPY_AT_MOST)
    half = ratio("swap-in, half there", "swap-in")
    promise("half-resident swap-in of whole", half, HALF_OF_WHOLE_AT_MOST)
    weights = sum(slot.weight.num_bytes for slot in model.layout)
    promise("host bytes of weights", num_bytes / weights, HOST_OF_WEIGHTS_AT_MOST)
    cold = start_s + took["load"].median + took["swap-in"].median
    switch = took["switch"].median
    bench.target(f"{name}: cold over switch", cold / switch, at_least=COLD_AT_LEAST, unit="x")

    bench.value(f"{name}: bytes moved", num_bytes / 1e6, "MB")
    bench.value(f"{name}: groups of layers", len(model.layout.groups))
    bench.value(f"{name}: swap-in", num_bytes / took["swap-in"].median / 1e9, "GB/s")
    bench.value(f"{name}: swap-in of torch copy", ratio("swap-in", "torch copy"), "x")
    bench.value(f"{name}: load", num_bytes / took["load"].median / 1e9, "GB/s")
    bench.value(f"{name}: load + swap-in over switch", (cold - start_s) / switch, "x")
    forward = ratio("forward after swap", "forward, warm")
    bench.value(f"{name}: forward after swap of warm", forward, "x")


def measure_growth(bench: Bench, rig: Rig) -> None:
    """Swap a thousand times, whole and in part, and see what has grown."""
    rig.only_host()
    for number in range(WARM_SWAPS):
        _swap(rig, number)
    before = _held()
    num_swaps = NUM_SWAPS // 10 if bench.quick else NUM_SWAPS
    for number in range(num_swaps):
        _swap(rig, number)
    after = _held()
    for what, at_most in (("MB", GROWTH_MB_AT_MOST), ("fds", 0.0), ("mappings", 0.0)):
        grown = after[what] - before[what]
        bench.target(f"{num_swaps} swaps: {what} grown", grown, at_most=at_most)


def _swap(rig: Rig, number: int) -> None:
    rig.swap_in(rig.models[number % 2], kept=(number % 5) / 4)
    rig.only_host()


def _held() -> dict[str, float]:
    gc.collect()
    process = psutil.Process()
    return {
        "MB": process.memory_info().rss / 1e6,
        "fds": process.num_fds(),
        "mappings": len(Path("/proc/self/maps").read_text().splitlines()),
    }


def starts(bench: Bench) -> Samples:
    """A few worker starts."""
    return Samples(tuple(worker_start() for _ in range(1 if bench.quick else 3)))
