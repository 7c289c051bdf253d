"""Tokens per second at eight concurrent requests, and what a decode step spends beside the model.

The requests: prompts of 32 to 256 tokens, answers of 16 to 128, the same for everyone; all are
there from the beginning, eight at a time. Each round has tokens of its own, so that nobody can
remember anything.

bfloat16 for everyone: with AVX512-BF16 it reads half the bytes of float32 and multiplies faster;
how much faster is measured in the same run. Without such instructions the ratios still compare
like with like.
"""

import functools
import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import torch

from bench import _engine_models
from bench._engine_rig import Job, Rig, prompt
from bench._engine_rivals import ROWS, VLLM, Continuous, Static
from bench.harness import Bench, Samples
from services.demo.models import VOCAB_SIZE

OF_STATIC_AT_LEAST: Final = 1.4
OF_CONTINUOUS_AT_LEAST: Final = 1.0
BESIDE_FORWARD_AT_MOST: Final = 0.15

DTYPE: Final = torch.bfloat16
MAX_LEN: Final = 512
QUICK_LAYERS: Final = 4
HOW_TO_GET_VLLM: Final = (
    "no figure for vLLM: pass --vllm-env ENV, made as told on top of bench/engine.py"
)

Run = Callable[[Sequence[Job]], float]


def jobs(seed: int, num: int, shrink: int = 1) -> list[Job]:
    """``num`` requests. Lengths are the same for every ``seed``, tokens are not.

    Those of a --quick run are shorter: ``shrink`` times.
    """
    lengths, tokens = random.Random(5), random.Random(seed)
    made = []
    for _ in range(num):
        length = lengths.randrange(32, 257) // shrink
        answer = lengths.randrange(16, 129) // shrink
        made.append(Job(prompt(tokens, length, VOCAB_SIZE), answer))
    return made


def alike(seed: int, length: int, num_tokens: int) -> list[Job]:
    """As many requests as rows, all of the same lengths."""
    rng = random.Random(seed)
    return [Job(prompt(rng, length, VOCAB_SIZE), num_tokens) for _ in range(ROWS)]


def useful_tokens(wanted: Sequence[Job]) -> int:
    return sum(job.num_tokens for job in wanted)


def measure(bench: Bench, folder: Path, vllm_env: Path | None) -> None:
    """Record the targets."""
    layers = QUICK_LAYERS if bench.quick else _engine_models.SERVING_LAYERS
    place = _engine_models.write_serving(folder / "serving", DTYPE, layers)
    rig = Rig(_POOL_BYTES)
    rig.add(_engine_models.spec("serving", place, "bfloat16", max_batch=ROWS, kv_tokens=_KV_TOKENS))
    rig.bring_in("serving")
    static = Static(place, DTYPE)
    with ExitStack() as stack:
        continuous = Continuous(place, DTYPE, MAX_LEN)
        stack.callback(continuous.close)
        runs: dict[str, Run] = {
            "ours": functools.partial(rig.run, "serving"),
            "static": static,
            "continuous": continuous,
        }
        if vllm_env and not bench.quick:
            runs["vLLM"] = stack.enter_context(VLLM(vllm_env, place, MAX_LEN))
        else:
            print(HOW_TO_GET_VLLM if not bench.quick else "no figure for vLLM: --quick")
        _compare(bench, runs)
        _take_apart(bench, runs)
    _decode_steps(bench, rig, static)
    if not bench.quick:
        _float32(bench, folder, static)


_POOL_BYTES: Final = 1200 * 2**20
_KV_TOKENS: Final = ROWS * MAX_LEN


def _compare(bench: Bench, runs: dict[str, Run]) -> None:
    num, shrink = 24, 3 if bench.quick else 1

    def variant(run: Run) -> Callable[[], float]:
        seeds = iter(range(1000))

        def once() -> float:
            wanted = jobs(next(seeds), num, shrink)
            return useful_tokens(wanted) / run(wanted)

        return once

    for run in runs.values():
        run(alike(0, 32, 4))
    rounds = 1 if bench.quick else 2  # minutes each
    variants = {f"{name}, {num} requests": variant(run) for name, run in runs.items()}
    taken = bench.round_robin(variants, unit="tokens/s", warmup=0, rounds=rounds)
    took = dict(zip(runs, taken.values(), strict=True))

    def ratio(name: str) -> float:
        return took["ours"].over(took[name]).median

    bench.target("ours over static batches", ratio("static"), at_least=OF_STATIC_AT_LEAST, unit="x")
    bench.target(
        "ours over transformers' continuous batching",
        ratio("continuous"),
        at_least=OF_CONTINUOUS_AT_LEAST,
        unit="x",
    )
    if "vLLM" in runs:
        bench.value("ours over vLLM", ratio("vLLM"), "x")


def _take_apart(bench: Bench, runs: dict[str, Run]) -> None:
    """Prefill and decode rates alone: one token each, and what more tokens cost beyond that."""
    length, more = (64, 8) if bench.quick else (128, 16)

    def prefill(run: Run) -> Callable[[], float]:
        seeds = iter(range(1000, 2000))
        return lambda: ROWS * length / run(alike(next(seeds), length, 1))

    def decode(run: Run) -> Callable[[], float]:
        seeds = iter(range(2000, 3000))

        def once() -> float:
            one = run(alike(next(seeds), 32, 1))
            return ROWS * more / (run(alike(next(seeds), 32, 1 + more)) - one)

        return once

    rounds = 1 if bench.quick else 2
    for what, make in (("prefill", prefill), ("decode", decode)):
        variants = {f"{name}, {what}": make(run) for name, run in runs.items()}
        taken = bench.round_robin(variants, unit="tokens/s", warmup=0, rounds=rounds)
        took = dict(zip(runs, taken.values(), strict=True))
        for name in ("static", "continuous", "vLLM"):
            if name in took:
                ratio = took["ours"].over(took[name]).median
                bench.value(f"{what}: ours over {name}", ratio, "x")


class _Inside:
    """Seconds spent in ``module``'s forward, added up while it is entered."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._real = module.forward
        self.seconds = 0.0
        self.calls = 0

    def __enter__(self) -> "_Inside":
        @functools.wraps(self._real)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return self._real(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began
                self.calls += 1

        self._module.forward = timed
        return self

    def __exit__(self, *_: object) -> None:
        self._module.forward = self._real


def _decode_steps(bench: Bench, rig: Rig, static: Static) -> None:
    """One step of each in turns, over rows of the same lengths."""
    num_steps = 16 if bench.quick else 64
    wanted = [Job(job.prompt, num_steps + 8) for job in jobs(4000, ROWS, 4 if bench.quick else 1)]
    for number, job in enumerate(wanted):
        rig.submit(f"step {number}", "serving", job)
    while len(rig.producers) < ROWS:
        rig.step()
    theirs = static.decoding([job.prompt for job in wanted])
    steps, insides, alone = [], [], []
    with _Inside(rig.engine.registered("serving").module) as inside:
        for _ in range(num_steps):
            inside.seconds, inside.calls = 0.0, 0
            steps.append(rig.step())
            if inside.calls != 1:
                raise RuntimeError(f"a decode step of {inside.calls} forwards")
            insides.append(inside.seconds)
            alone.append(theirs())
    rig.finish()
    ours, within, plain = (Samples(tuple(taken)) for taken in (steps, insides, alone))
    beside = Samples(tuple(s - i for s, i in zip(steps, insides, strict=True))).over(within)
    bench.value("decode step", ours.median, "s")
    bench.value("of it in the model's forward", within.median, "s")
    bench.value("forward of transformers alone", plain.median, "s")
    bench.value("decode step over it", ours.over(plain).median, "x")
    bench.target(
        "decode step: outside the model's forward over inside",
        beside.median,
        at_most=BESIDE_FORWARD_AT_MOST,
    )


def _float32(bench: Bench, folder: Path, static: Static) -> None:
    """Why bfloat16: what the other would cost."""
    wide = Static(folder / "serving", torch.float32)
    prompts = [job.prompt for job in alike(5000, 64, 1)]
    steps = {"float32": wide.decoding(prompts), "bfloat16": static.decoding(prompts)}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(8):
        for name, step in steps.items():
            taken[name].append(step())
    narrow, wider = (Samples(tuple(taken[name])) for name in ("bfloat16", "float32"))
    bench.value("forward of transformers: float32 over bfloat16", wider.over(narrow).median, "x")
