"""What it costs to register a model of 8B parameters, before any of its weights is read.

    config -> build -> examine -> plan_layout -> reserve -> make_buffers_real -> bind

All of it in memory: shapes and addresses only, so the pool may be far smaller than the model.
"""

import time
from itertools import pairwise

from transformers import LlamaConfig

from bench.harness import Bench
from schemas.state import ModelSpec
from services.gpu_agent import probe, skeleton
from services.gpu_agent.host_image import plan_layout
from services.gpu_agent.pages import PagePool

REGISTER_MS_AT_MOST = 50.0

_MS = 1e3
_SPEC = ModelSpec("8b", "nowhere", dtype="bfloat16")


def measure(bench: Bench, pool: PagePool) -> None:
    """Register the model over and over on ``pool``, and record the target and its steps.

    The first registration imports the modelling code; it is recorded by itself.
    """
    bench.value("register an 8B config, first", _register(pool), "ms")
    last: dict[str, float] = {}
    taken = bench.round_robin(
        {"register an 8B config": lambda: _register(pool, last)}, unit="ms", warmup=2
    )
    median = taken["register an 8B config"].median
    bench.target("register an 8B config", median, at_most=REGISTER_MS_AT_MOST, unit="ms")
    for step, took in last.items():
        bench.value(f"register an 8B config: {step}, last", took, "ms")


def _register(pool: PagePool, steps: dict[str, float] | None = None) -> float:
    """Register once and drop it again, untimed. Returns milliseconds; ``steps`` gets each one."""
    stamps = {"start": time.perf_counter()}

    def done(step: str) -> None:
        stamps[step] = time.perf_counter()

    config = _config()
    dtype = skeleton.choose_dtype(config, _SPEC, iter(()))
    done("config")
    module = skeleton.build(config, _SPEC, dtype)
    done("build")
    examined = probe.examine(module, config, _SPEC)
    done("examine")
    layout = plan_layout(examined.weights)
    region = pool.reserve(layout.num_bytes)
    try:
        done("layout and reserve")
        skeleton.make_buffers_real(module, pool.torch_device, _SPEC)
        done("buffers")
        skeleton.bind(module, layout, region.tensor)
        done("bind")
    finally:
        del module
        region.release()
    names = list(stamps)
    if steps is not None:
        for before, step in pairwise(names):
            steps[step] = (stamps[step] - stamps[before]) * _MS
    return (stamps[names[-1]] - stamps[names[0]]) * _MS


def _config() -> LlamaConfig:
    """The shape of Llama 3.1 8B."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
