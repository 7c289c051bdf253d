"""Two models take turns on a pool that holds one of them, in the middle of generations.

    A  |in| step step |out|                    |in| step step step |out| ...
    B                      |in| step step |out|

Each out suspends all requests of the model, each in lets them go on; streams that end are followed
by new ones. Their tokens are compared with those of a run that nothing disturbs.

"preserve" copies KV to host memory while it decodes, so a swap-out has little left to copy: it
should be no longer than one decode step and a swap-out without requests. The latter is measured
in the same turns, by a third model that serves nobody.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from bench import _engine_models
from bench._engine_rig import Job, Rig, prompt
from bench.harness import Bench, Samples
from schemas.state import ModelSpec, Preemption

WAIT_OF_STEP_AND_UNMAP_AT_MOST: Final = 1.0

MODELS: Final = ("a", "b")
IDLE: Final = "idle"
ROWS: Final = 4
LONGEST: Final = 384  # tokens of a row
NUM_CYCLES: Final = 500
QUICK_CYCLES: Final = 30
IDLE_EVERY: Final = 10  # cycles


@dataclass
class Taken:
    """What one run with swaps came to; times are seconds."""

    tokens: dict[str, list[int]] = field(default_factory=dict)  # of requests that ended well
    num_requests: int = 0
    num_suspended: int = 0
    waits: list[float] = field(default_factory=list)
    suspends: list[float] = field(default_factory=list)
    kv_bytes: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    idle_waits: list[float] = field(default_factory=list)


def stream(model: str) -> Iterator[tuple[str, Job]]:
    """Named requests of ``model`` without end, the same every time."""
    rng = random.Random(model)
    for number in itertools.count():
        length = rng.randrange(16, 193)
        ids = prompt(rng, length, _engine_models.VOCABULARY)
        yield f"{model}{number}", Job(ids, rng.randrange(64, LONGEST - 192))


def share_equal(taken: Taken, undisturbed: dict[str, list[int]]) -> float:
    """Of all requests, those that ended with the tokens of the undisturbed run."""
    equal = sum(undisturbed[name] == tokens for name, tokens in taken.tokens.items())
    return equal / taken.num_requests


class Turns:
    """The models on their pool."""

    def __init__(self, specs: list[ModelSpec]) -> None:
        self.rig = Rig(_footprint_bytes(specs[0]))
        self._streams = {model: stream(model) for model in MODELS}
        self._mine: dict[str, set[str]] = {model: set() for model in MODELS}
        self._taken = Taken()
        for spec in specs:
            self.rig.add(spec)

    def cycles(self, num: int) -> Taken:
        """Swap out in the middle of generations ``num`` times, and let all of them end."""
        rng = random.Random(6)
        for number in range(num):
            self._turn(MODELS[number % 2], rng.randrange(2, 7))
            if number % IDLE_EVERY == 0:
                self.rig.bring_in(IDLE)
                self._taken.idle_waits.append(self.rig.take_out(IDLE).trace.total_s)
        for model in MODELS:
            self.rig.bring_in(model)
            while self.rig.engine.is_busy:
                self.rig.step()
            self.rig.take_out(model)
        answers = self.rig.answers
        self._taken.tokens = {name: one.tokens for name, one in answers.items() if one.is_whole}
        self._taken.num_requests = len(answers)
        return self._taken

    def _turn(self, model: str, num_steps: int) -> None:
        taken, rig = self._taken, self.rig
        rig.bring_in(model)
        for number in range(num_steps):
            live = self._top_up(model)
            took = rig.step()
            # The first one also brings KV back; a prompt's is no decode step.
            if number and rig.producers == live:
                taken.steps.append(took)
        self._top_up(model)
        ended = rig.take_out(model, preempt=True)
        taken.num_suspended += ended.num_suspended
        taken.waits.append(ended.trace.total_s)
        taken.suspends.append(ended.trace.suspend_s)
        taken.kv_bytes.append(ended.trace.kv_bytes)

    def _top_up(self, model: str) -> set[str]:
        live = self._mine[model] = {name for name in self._mine[model] if name in self.rig.live}
        while len(live) < ROWS:
            name, job = next(self._streams[model])
            self.rig.submit(name, model, job)
            live.add(name)
        return live


def undisturbed(specs: list[ModelSpec], wanted: set[str]) -> dict[str, list[int]]:
    """Tokens of the requests called ``wanted``, each model alone and never swapped out."""
    tokens: dict[str, list[int]] = {}
    for spec in specs:
        rig = Rig(_footprint_bytes(spec))
        rig.add(spec)
        rig.bring_in(spec.name)
        mine = {name for name in wanted if name.startswith(spec.name)}
        for name, job in itertools.islice(stream(spec.name), len(mine)):
            rig.submit(name, spec.name, job)
        rig.finish()
        tokens |= {name: answer.tokens for name, answer in rig.answers.items()}
        rig.pool.close()
    return tokens


def measure(bench: Bench, folder: Path, _: Path | None) -> None:
    """Record the targets."""
    num = QUICK_CYCLES if bench.quick else NUM_CYCLES
    for seed, name in enumerate((*MODELS, IDLE)):
        _engine_models.write_tiny(folder / name, _engine_models.turning(), seed=seed)

    def specs(preemption: Preemption) -> list[ModelSpec]:
        return [
            _engine_models.spec(
                name,
                folder / name,
                max_batch=ROWS,
                max_model_len=LONGEST,
                kv_tokens=ROWS * LONGEST,
                preemption=preemption,
            )
            for name in (*MODELS, IDLE)
        ]

    taken: dict[Preemption, Taken] = {}
    modes: tuple[Preemption, ...] = ("preserve", "recompute")
    for mode in modes:
        turns = Turns(specs(mode))
        taken[mode] = turns.cycles(num)
        turns.rig.pool.close()
    names = {name for one in taken.values() for name in one.tokens}
    expected = undisturbed(specs("preserve")[:2], names)
    for mode, one in taken.items():
        bench.target(
            f"{mode}: requests equal after {num} preemptions",
            share_equal(one, expected),
            at_least=1.0,
        )
        bench.value(f"{mode}: suspensions of requests", one.num_suspended)
    _waits(bench, taken["preserve"])


def _waits(bench: Bench, taken: Taken) -> None:
    waits = Samples(tuple(taken.waits))
    step, idle = Samples(tuple(taken.steps)), Samples(tuple(taken.idle_waits))
    allowed = step.median + idle.median
    bench.target(
        "preserve: swap-out of a decode step and an idle swap-out",
        waits.median / allowed,
        at_most=WAIT_OF_STEP_AND_UNMAP_AT_MOST,
        unit="x",
    )
    bench.value("preserve: swap-out of the same, p90", waits.p90 / allowed, "x")
    bench.value("preserve: swap-out with requests", waits.median, "s")
    bench.value("preserve: of it until KV was kept", Samples(tuple(taken.suspends)).median, "s")
    bench.value("preserve: KV copied by it", Samples(tuple(taken.kv_bytes)).median / 1e6, "MB")
    bench.value("preserve: decode step", step.median, "s")
    bench.value("preserve: idle swap-out", idle.median, "s")


def _footprint_bytes(spec: ModelSpec) -> int:
    """Device bytes of one such model: no other fits beside it."""
    rig = Rig(2 * 2**20)
    try:
        return rig.facts(spec).footprint_bytes
    finally:
        rig.pool.close()
