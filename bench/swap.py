"""What it costs to have a model ready: registered, loaded, swapped in and out, on the CPU device.

    registering      config -> module bound to its addresses         _registering.py
    loading          files -> host image                             _loading.py
    swapping         host image -> device and back                   _swapping.py
    overlap          first token while weights arrive                _overlap.py

Files were just written, so a load comes from the page cache unless it is dropped.

    cold start = worker process start + load + swap-in        switch = swap-out + swap-in
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the engine worker has it

import sys
import tempfile
from pathlib import Path

from bench import _loading, _models, _overlap, _registering, _swapping
from bench._machine import restart_with_tuned_memory
from bench.harness import Bench
from schemas.state import ModelSpec
from services.gpu_agent import device_cpu
from services.gpu_agent.device import open_pool
from services.gpu_agent.worker import freeze_imports

BUDGET_MODELS = 1.5


def main(argv: list[str]) -> int:
    """Run the benchmark. Returns its exit status."""
    restart_with_tuned_memory("bench.swap", argv)
    freeze_imports()
    bench = Bench("swap", "registering, loading and swapping models", argv)
    starts = _swapping.starts(bench)
    bench.value("worker start", starts.median, "s")
    with tempfile.TemporaryDirectory(prefix="hotswap-bench-") as folder:
        models = (_models.layered(), _models.wide())
        specs = [_models.write(model, Path(folder)) for model in models]
        # Before anything else has used and freed memory: fresh pages then cost what they cost in
        # a worker that has just started.
        _loading.measure(bench, specs[0], device_cpu.PAGE_BYTES)
        pool = open_pool("cpu", _budget_bytes(specs))
        bench.value("pool", pool.budget_bytes / 1e6, "MB")
        _registering.measure(bench, pool)
        rig = _swapping.Rig(pool, specs)
        for model in rig.models:
            _swapping.measure(bench, rig, model, starts.median)
        _swapping.measure_growth(bench, rig)
        _overlap.measure(bench, Path(folder) / "overlap")
    return bench.finish()


def _budget_bytes(specs: list[ModelSpec]) -> int:
    sizes = [(Path(spec.source) / "model.safetensors").stat().st_size for spec in specs]
    return int(BUDGET_MODELS * max(sizes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
