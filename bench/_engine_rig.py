"""An engine, everything that it told, and what a benchmark does to it."""

import math
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import torch

from schemas.requests import GenerateRequest, SamplingParams, TokenPrompt
from schemas.state import ModelFacts, ModelSpec
from services.gpu_agent.device import open_pool
from services.gpu_agent.engine.batch import Batch
from services.gpu_agent.engine.native import NativeEngine
from services.gpu_agent.hosted import HostedModel
from services.gpu_agent.ipc import (
    Arriving,
    Broke,
    Done,
    FromWorker,
    OpFailed,
    Produced,
    Registered,
    SwappedIn,
    SwappedOut,
)

THREADS: Final = len(os.sched_getaffinity(0))  # of every engine that is compared


@dataclass(frozen=True)
class Job:
    """A request without a name: greedy, and it ends after ``num_tokens`` and no earlier."""

    prompt: tuple[int, ...]
    num_tokens: int


@dataclass
class Answer:
    """What came out for one request."""

    tokens: list[int] = field(default_factory=list)
    ends: list[Done | Broke] = field(default_factory=list)  # one, unless the engine is wrong

    @property
    def is_whole(self) -> bool:
        """It ended once, and because it was complete."""
        return len(self.ends) == 1 and isinstance(self.ends[0], Done) and self._reason == "length"

    @property
    def was_cancelled(self) -> bool:
        return len(self.ends) == 1 and isinstance(self.ends[0], Done) and self._reason != "length"

    @property
    def _reason(self) -> str:
        end = self.ends[0]
        return end.finish_reason if isinstance(end, Done) else end.code


@dataclass(frozen=True)
class Books:
    """What one model's requests hold now; ``num_parked``: rows that gave way, over its life."""

    num_used_blocks: int
    num_borrowed_pages: int
    num_requests: int
    num_parked: int


class Unexpected(Exception):
    """The engine refused what it should have done; the message is its reason."""


class Rig:
    """One engine over a pool of its own. Raises Unexpected where an operation is refused."""

    def __init__(self, pool_bytes: int) -> None:
        self.pool = open_pool("cpu", pool_bytes)
        self.engine = NativeEngine(self.pool)
        self.answers: dict[str, Answer] = {}
        self.live: dict[str, None] = {}  # requests without an end, in order
        self.emitted: list[FromWorker] = []  # by the latest step

    def facts(self, spec: ModelSpec) -> ModelFacts:
        """Register it only."""
        if not isinstance(answer := self.engine.register(spec), Registered):
            raise Unexpected(answer.reason)
        return answer.facts

    def add(self, spec: ModelSpec) -> HostedModel:
        """Register and load it."""
        self.facts(spec)
        if isinstance(job := self.engine.load(spec.name), OpFailed):
            raise Unexpected(job.reason)
        if isinstance(ended := self.engine.end_load(job.run(lambda *_: None)), OpFailed):
            raise Unexpected(ended.reason)
        return self.engine.registered(spec.name)

    # -- swapping --------------------------------------------------------------------------

    def bring_in(self, model: str) -> None:
        """Begin the swap-in and wait for its end."""
        if not isinstance(answer := self.engine.swap_in(model), Arriving):
            raise Unexpected(answer.reason)
        told = self.engine.end_swap_in(model)
        self._take(told)
        if not any(isinstance(message, SwappedIn) for message in told):
            raise Unexpected(str(told))

    def take_out(self, model: str, *, preempt: bool = False) -> SwappedOut:
        """Swap out; with ``preempt`` running requests are suspended."""
        told = self.engine.swap_out(model, preempt) if preempt else self.engine.swap_out(model)
        self._take(told)
        for message in told:
            if isinstance(message, SwappedOut):
                return message
        raise Unexpected(str(told))

    def scribble(self) -> None:
        """Overwrite every free page, as a model that had them in between would have done.

        Nothing may be resident. NaN, so that whatever is read unwritten shows.
        """
        free = self.pool.free
        pages = free.take(free.num_free)
        elements = self.pool.page_bytes // 4
        words = self.pool.identity(torch.float32)
        for page in pages:
            words[page * elements : (page + 1) * elements] = math.nan
        free.give(pages)

    # -- requests --------------------------------------------------------------------------

    def submit(self, name: str, model: str, job: Job) -> None:
        """Hand the engine a request called ``name``."""
        self.answers[name] = Answer()
        self.live[name] = None
        sampling = SamplingParams(
            seed=0, temperature=0.0, max_tokens=job.num_tokens, ignore_eos=True
        )
        request = GenerateRequest(
            request_id=name,
            model=model,
            klass="interactive",
            prompt=TokenPrompt(job.prompt),
            sampling=sampling,
            reply_to="",
            created_at=0.0,
            deadline_at=math.inf,
        )
        self._take(self.engine.submit(request))

    def cancel(self, name: str) -> None:
        """End a request, if it has not ended."""
        self._take(self.engine.cancel(name))

    def step(self) -> float:
        """One step of the engine. Returns its seconds; `emitted` is what it told."""
        began = time.perf_counter()
        self.emitted = self.engine.step()
        took = time.perf_counter() - began
        self._take(self.emitted)
        return took

    def finish(self) -> None:
        """Step until every request has ended. Raises Unexpected where that never happens."""
        idle = 0
        while self.live:
            self.step()
            idle = 0 if self.emitted else idle + 1
            if idle > 10_000:
                raise Unexpected(f"requests that never end: {list(self.live)[:5]}")

    def run(self, model: str, jobs: Sequence[Job]) -> float:
        """Seconds for all ``jobs``, submitted at once. Raises Unexpected unless all are whole."""
        self.answers.clear()
        began = time.perf_counter()
        for number, job in enumerate(jobs):
            self.submit(str(number), model, job)
        self.finish()
        took = time.perf_counter() - began
        for number, job in enumerate(jobs):
            answer = self.answers[str(number)]
            if not answer.is_whole or len(answer.tokens) != job.num_tokens:
                raise Unexpected(f"request {number} ended as {answer.ends}")
        return took

    def first_token(self, model: str, prompt: tuple[int, ...]) -> float:
        """Seconds until the only token of a request that is alone."""
        return self.run(model, [Job(prompt, 1)])

    def _take(self, messages: Sequence[FromWorker]) -> None:
        for message in messages:
            match message:
                case Produced(name, index, token_ids):
                    answer = self.answers[name]
                    if index != len(answer.tokens):
                        raise Unexpected(f"{message} after {len(answer.tokens)} tokens")
                    answer.tokens += token_ids
                case Done(name) | Broke(name):
                    self.answers[name].ends.append(message)
                    self.live.pop(name, None)
                case _:
                    pass

    def validate(self) -> None:
        """Raise AssertionError where the books of any model do not balance."""
        self.engine.validate()

    def books(self, model: str) -> Books:
        """Of a model that is, or was, on the device."""
        batch = self.engine._batches[model]
        assert isinstance(batch, Batch)
        return Books(
            batch.kv.blocks.num_used,
            batch.kv.blocks.num_borrowed_pages,
            batch.num_requests,
            batch.num_parked,
        )

    @property
    def producers(self) -> set[str]:
        """Requests to which the latest step gave a token."""
        return {message.request_id for message in self.emitted if isinstance(message, Produced)}


def prompt(rng: random.Random, length: int, vocabulary: int) -> tuple[int, ...]:
    """Random token ids, none of them one of the first few, which may be special."""
    return tuple(rng.randrange(4, vocabulary) for _ in range(length))
