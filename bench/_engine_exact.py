"""Greedy tokens against `generate` of transformers, request by request, whatever else happens.

Requests of random lengths arrive between steps, some share the beginning of their prompt, some
are cancelled in the middle, and the model is swapped out and in again many times while they run;
in between all its pages are overwritten. A request that was cancelled must have got the first
tokens of what `generate` gives.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import _engine_models
from bench._engine_rig import Answer, Job, Rig, prompt
from bench.harness import Bench

MODEL: Final = "model"
POOL_BYTES: Final = 64 * 2**20
MAX_BATCH: Final = 6
SHARED_TOKENS: Final = 40  # of the prompts that begin alike: more than two blocks

NUM_REQUESTS: Final = 24
QUICK_REQUESTS: Final = 8


@dataclass(frozen=True)
class Planned:
    """One request: it arrives ``gap`` steps after the one before."""

    job: Job
    gap: int
    cancel_after: int | None = None  # tokens; None: it is not cancelled


def plan(seed: int, num: int) -> list[Planned]:
    """``num`` requests for a model of few tokens and little context."""
    rng = random.Random(seed)
    shared = prompt(rng, SHARED_TOKENS, _engine_models.VOCABULARY)
    planned = []
    for _ in range(num):
        own = prompt(rng, rng.randrange(1, 97), _engine_models.VOCABULARY)
        job = Job((shared if rng.random() < 0.3 else ()) + own, rng.randrange(4, 49))
        cancel = rng.randrange(1, job.num_tokens) if rng.random() < 0.15 else None
        planned.append(Planned(job, rng.choice((0, 0, 1, 2, 5, 9)), cancel))
    return planned


def is_equal(planned: Planned, answer: Answer, expected: Sequence[int]) -> bool:
    """Whether ``answer`` is what it should be: all of ``expected``, or its cancelled beginning."""
    if planned.cancel_after is None or len(answer.tokens) == planned.job.num_tokens:
        return answer.is_whole and answer.tokens == list(expected)
    return (
        answer.was_cancelled
        and len(answer.tokens) >= planned.cancel_after
        and answer.tokens == list(expected[: len(answer.tokens)])
    )


def play(rig: Rig, planned: Sequence[Planned], seed: int) -> int:
    """Serve ``planned``, swapping every dozen steps. Returns how often requests were suspended."""
    rng = random.Random(seed)
    waiting = list(enumerate(planned))
    gap, num_suspensions = 0, 0
    while waiting or rig.live:
        while waiting and gap >= waiting[0][1].gap:
            number, one = waiting.pop(0)
            rig.submit(str(number), MODEL, one.job)
            gap = 0
        gap += 1
        rig.step()
        for name in list(rig.live):
            after = planned[int(name)].cancel_after
            if after is not None and len(rig.answers[name].tokens) >= after:
                rig.cancel(name)
        if rig.live and rng.random() < 1 / 12:
            num_suspensions += rig.take_out(MODEL, preempt=True).num_suspended
            if rng.random() < 0.5:
                rig.scribble()
            rig.bring_in(MODEL)
    return num_suspensions


def measure(bench: Bench, folder: Path, _: Path | None) -> None:
    """Record the targets."""
    num = QUICK_REQUESTS if bench.quick else NUM_REQUESTS
    num_tokens = num_suspensions = num_cancelled = 0
    for number, (family, make_config) in enumerate(_engine_models.FAMILIES.items()):
        place = _engine_models.write_tiny(folder / str(number), make_config())
        planned = plan(number, num)
        reference = _engine_models.reference(place)
        expected = [
            _engine_models.greedy(reference, one.job.prompt, one.job.num_tokens) for one in planned
        ]
        rig = Rig(POOL_BYTES)
        rig.add(_engine_models.spec(MODEL, place, max_batch=MAX_BATCH))
        rig.bring_in(MODEL)
        num_suspensions += play(rig, planned, number)
        answers = [rig.answers[str(index)] for index in range(num)]
        equal = sum(map(is_equal, planned, answers, expected))
        bench.target(f"{family}: requests equal to generate", equal / num, at_least=1.0)
        num_tokens += sum(len(answer.tokens) for answer in answers)
        num_cancelled += sum(answer.was_cancelled for answer in answers)
        rig.pool.close()
    bench.value("exact: tokens compared", num_tokens)
    bench.value("exact: suspensions of requests", num_suspensions)
    bench.value("exact: requests cancelled", num_cancelled)
