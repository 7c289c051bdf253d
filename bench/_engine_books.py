"""After thousands of requests everything is back: KV blocks, borrowed pages, the pool, the rows.

The model's KV is wide and its reserve small, so that pages are borrowed and rows give way to
each other all the time.
"""

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import _engine_models
from bench._engine_rig import Answer, Job, Rig, prompt
from bench.harness import Bench
from schemas.state import ModelSpec

MODEL: Final = "wide"
POOL_BYTES: Final = 26 * 2**20
KV_TOKENS: Final = 128
MAX_MODEL_LEN: Final = 96
MAX_BATCH: Final = 8
MOST_LIVE: Final = 12  # some wait while the others run
NUM_REQUESTS: Final = 2000
QUICK_REQUESTS: Final = 200
SWAP_EVERY: Final = 60  # steps, about
VALIDATE_EVERY: Final = 50  # steps


@dataclass(frozen=True)
class Whim:
    """One request, and after how many tokens its user loses interest (None: never)."""

    job: Job
    cancel_after: int | None


def spec(place: Path) -> ModelSpec:
    """How to deploy the model in ``place``: a reserve of little more than one row."""
    return _engine_models.spec(
        MODEL, place, max_batch=MAX_BATCH, max_model_len=MAX_MODEL_LEN, kv_tokens=KV_TOKENS
    )


def whim(rng: random.Random, shared: tuple[int, ...]) -> Whim:
    """A random request; one in four begins with ``shared``."""
    own = prompt(rng, rng.randrange(1, 41), _engine_models.VOCABULARY)
    ids = (shared if rng.random() < 0.25 else ()) + own
    return Whim(Job(ids, rng.randrange(1, 13)), rng.randrange(6) if rng.random() < 0.2 else None)


def num_wrong_ends(answers: Mapping[str, Answer]) -> int:
    """Requests without exactly one terminal message."""
    return sum(len(answer.ends) != 1 for answer in answers.values())


def play(rig: Rig, num: int) -> Counter[str]:
    """Serve ``num`` random requests. Returns what happened, by how often."""
    rng, seen = random.Random(8), Counter[str]()
    shared = prompt(rng, 36, _engine_models.VOCABULARY)
    cancels: dict[str, int] = {}
    num_submitted = num_steps = 0
    while num_submitted < num or rig.live:
        while num_submitted < num and len(rig.live) < MOST_LIVE and rng.random() < 0.7:
            made, name = whim(rng, shared), str(num_submitted)
            rig.submit(name, MODEL, made.job)
            if made.cancel_after is not None:
                cancels[name] = made.cancel_after
            num_submitted += 1
        rig.step()
        num_steps += 1
        for name in [name for name in rig.live if name in cancels]:
            if len(rig.answers[name].tokens) >= cancels[name]:
                rig.cancel(name)
                seen["cancelled"] += 1
        books = rig.books(MODEL)
        seen["most pages borrowed"] = max(seen["most pages borrowed"], books.num_borrowed_pages)
        if num_steps % VALIDATE_EVERY == 0:
            rig.validate()
        if rig.live and rng.random() < 1 / SWAP_EVERY:
            seen["suspended"] += rig.take_out(MODEL, preempt=True).num_suspended
            rig.validate()
            rig.bring_in(MODEL)
    seen["steps"] = num_steps
    return seen


def measure(bench: Bench, folder: Path, _: Path | None) -> None:
    """Record the targets."""
    num = QUICK_REQUESTS if bench.quick else NUM_REQUESTS
    place = _engine_models.write_tiny(folder / MODEL, _engine_models.WIDE_KV)
    rig = Rig(POOL_BYTES)
    rig.add(spec(place))
    before = rig.pool.used_bytes
    rig.bring_in(MODEL)
    resident = rig.pool.used_bytes
    seen = play(rig, num)
    rig.validate()
    books = rig.books(MODEL)
    bench.target("books: KV blocks still used", books.num_used_blocks, at_most=0.0)
    bench.target("books: pages still borrowed", books.num_borrowed_pages, at_most=0.0)
    bench.target("books: rows still there", books.num_requests, at_most=0.0)
    bench.target("books: bytes more than at swap-in", rig.pool.used_bytes - resident, at_most=0.0)
    rig.take_out(MODEL)
    bench.target("books: bytes more than at start", rig.pool.used_bytes - before, at_most=0.0)
    wrong = num_wrong_ends(rig.answers)
    bench.target(f"books: of {num} requests, without exactly one end", wrong, at_most=0.0)
    for what in ("steps", "cancelled", "suspended", "most pages borrowed"):
        bench.value(f"books: {what}", seen[what])
    bench.value("books: rows that gave way", books.num_parked)
    rig.pool.close()
