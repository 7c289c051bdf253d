"""What others do to a stream, and what is not computed twice.

A long prompt arrives while eight streams decode. It is computed in chunks, one between two tokens
of the streams, so their worst gap should be one chunk and one decode step.

    streams   t t t t |chunk| t |chunk| t ... |chunk| t t t
                       `--- gap ---'

A second prompt with the same beginning finds it computed: on the device, or after a swap in host
memory. In between all pages are overwritten.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import _engine_models
from bench._engine_rig import Job, Rig, prompt
from bench.harness import Bench, Samples

GAP_OF_CHUNK_AT_MOST: Final = 2.0
SHARED_OF_FIRST_AT_MOST: Final = 0.15
SHARED_AFTER_SWAP_AT_MOST: Final = 0.30

MODEL: Final = "turning"
NUM_STREAMS: Final = 8
LONG_PROMPT: Final = 4096
PREFIX_TOKENS: Final = 1500
SUFFIX_TOKENS: Final = 12
KV_TOKENS: Final = 2 * LONG_PROMPT
POOL_BYTES: Final = 400 * 2**20


@dataclass(frozen=True)
class Step:
    """``has_stream``: whether streams got tokens. ``took``: seconds."""

    took: float
    has_stream: bool


@dataclass(frozen=True)
class Interference:
    """Seconds: the longest time that streams went without a token, and steps with chunks."""

    worst_gap: float
    chunks: tuple[float, ...]


def interference(steps: list[Step]) -> Interference:
    """From the steps during a prompt. Without steps for the prompt alone, all are its chunks."""
    gaps, gap = [], 0.0
    for step in steps:
        gap += step.took
        if step.has_stream:
            gaps.append(gap)
            gap = 0.0
    chunks = [step.took for step in steps if not step.has_stream] or [s.took for s in steps]
    return Interference(max([*gaps, gap]), tuple(chunks))


def measure(bench: Bench, folder: Path, _: Path | None) -> None:
    """Record the targets."""
    place = _engine_models.write_tiny(folder / MODEL, _engine_models.turning())
    rig = Rig(POOL_BYTES)
    rig.add(
        _engine_models.spec(
            MODEL,
            place,
            max_batch=NUM_STREAMS + 1,
            max_model_len=LONG_PROMPT + 64,
            kv_tokens=KV_TOKENS,
        )
    )
    rig.bring_in(MODEL)
    rounds = min(bench.rounds, 3 if bench.quick else 7)
    _gaps(bench, [_beside_streams(rig, seed) for seed in range(rounds)])
    _prefixes(bench, rig, rounds)
    rig.pool.close()


def _beside_streams(rig: Rig, seed: int) -> Interference:
    rng = random.Random(seed)
    streams = {f"stream {number}" for number in range(NUM_STREAMS)}
    for name in sorted(streams):
        rig.submit(name, MODEL, Job(prompt(rng, 32, _engine_models.VOCABULARY), 256))
    while rig.producers != streams:
        rig.step()
    rig.submit("long", MODEL, Job(prompt(rng, LONG_PROMPT, _engine_models.VOCABULARY), 1))
    steps: list[Step] = []
    while "long" in rig.live:
        took = rig.step()
        steps.append(Step(took, bool(rig.producers & streams)))
    while rig.producers != streams:  # the gap that the last chunk made ends here
        took = rig.step()
        steps.append(Step(took, rig.producers == streams))
    for name in streams:
        rig.cancel(name)
    rig.finish()
    return interference(steps)


def _gaps(bench: Bench, found: list[Interference]) -> None:
    ratios = Samples(tuple(one.worst_gap / max(one.chunks) for one in found))
    bench.target(
        f"{NUM_STREAMS} streams beside a prompt of {LONG_PROMPT}: worst gap of a chunk",
        ratios.median,
        at_most=GAP_OF_CHUNK_AT_MOST,
        unit="x",
    )
    bench.value("latency: worst gap", Samples(tuple(one.worst_gap for one in found)).median, "s")
    chunks = Samples(tuple(chunk for one in found for chunk in one.chunks))
    bench.value("latency: largest chunk", max(chunks.values), "s")
    bench.value("latency: chunk", chunks.median, "s")


def _prefixes(bench: Bench, rig: Rig, rounds: int) -> None:
    taken: dict[str, list[float]] = {"first": [], "second": [], "after a swap": []}
    rng = random.Random(9)
    for _ in range(rounds):
        prefix = prompt(rng, PREFIX_TOKENS, _engine_models.VOCABULARY)
        for what, seconds in taken.items():
            if what == "after a swap":
                rig.take_out(MODEL)
                rig.scribble()
                rig.bring_in(MODEL)
            own = prompt(rng, SUFFIX_TOKENS, _engine_models.VOCABULARY)
            seconds.append(rig.first_token(MODEL, prefix + own))
    first, second, after = (Samples(tuple(seconds)) for seconds in taken.values())
    what = f"of first, {PREFIX_TOKENS} tokens shared"
    at_most = SHARED_OF_FIRST_AT_MOST
    bench.target(f"second prompt {what}", second.over(first).median, at_most=at_most, unit="x")
    at_most = SHARED_AFTER_SWAP_AT_MOST
    bench.target(f"prompt after a swap {what}", after.over(first).median, at_most=at_most, unit="x")
    bench.value("latency: first prompt", first.median, "s")
    bench.value("latency: second prompt", second.median, "s")
    bench.value("latency: prompt after a swap", after.median, "s")
