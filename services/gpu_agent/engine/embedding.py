"""A resident model that embeds: whatever waits, packed by length, one forward pass per step.

    submit ──> its inputs join the line ──(a step takes a window of it)──> vectors ──> Done
                      `──────────── cancel, deadline, failure ──────────────────────> Done | Broke

Inputs of many requests share a window (see line.py), and a long request takes several; its vectors
leave together with its end. Between two steps nothing is kept but token ids and vectors that are
ready: a model can be swapped out there at any time.
"""

import inspect
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch

from schemas.requests import EmbedRequest, TextPrompt, TokenPrompt
from schemas.stream import VECTORS_BYTES, ErrorCode, FinishReason
from services.gpu_agent.arrival import NotArrived
from services.gpu_agent.engine.line import Input, Job, Line
from services.gpu_agent.engine.pooling import pool, shorten
from services.gpu_agent.engine.prompts import InvalidPrompt, ModelText
from services.gpu_agent.ipc import Begun, Broke, Done, Embedded, FromWorker
from services.gpu_agent.runner import Pooling

logger = logging.getLogger(__name__)

STEP_TOKENS: Final = 4096  # of one forward, padding included; one longer input runs alone

_NON_FINITE: Final = "gave a vector with NaN or infinity in it: its weights or inputs are broken"


class Embedder:
    """All requests of one resident model that embeds: what `Batch` is for one that generates.

    ``module`` gives hidden states (rows, tokens, width) as the first part of its output. Every
    ``submit`` ends in exactly one Done or Broke, from the call itself, from a later ``step`` or
    ``cancel``, or from ``abort``. Nothing here raises for what a request or the model's forward
    pass does.
    """

    def __init__(
        self,
        module: Any,
        pooling: Pooling,
        text: ModelText,
        dimensions: int,
        max_model_len: int,
        device: torch.device,
        step_tokens: int = STEP_TOKENS,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._module = module
        self._pooling = pooling
        self._text = text
        self._dimensions = dimensions
        self._max_model_len = max_model_len
        self._device = device
        self._wall_clock = wall_clock
        self._jobs: dict[str, Job] = {}  # by request id, in order of arrival
        self._line = Line(step_tokens)
        # Any id of the vocabulary would do for most; Roberta counts positions by its own.
        self._padding_id = _padding_id(module, text)
        caches = "use_cache" in inspect.signature(module.forward).parameters
        self._options = {"use_cache": False} if caches else {}

    @property
    def is_busy(self) -> bool:
        """Whether `step` has anything to do."""
        return self.num_requests > 0

    @property
    def num_requests(self) -> int:
        return len(self._jobs)

    def has(self, request_id: str) -> bool:
        return request_id in self._jobs

    # -- the model comes and goes: nothing of it is kept, so there is little to do ------------

    def attach(self, pages: Sequence[int]) -> None:
        """The model is on its way to the device. ``pages``: of a KV reserve, so none."""
        assert not pages, "a model that embeds has no KV reserve"

    def arrived(self) -> None:
        """Its weights are there, and checked."""

    def suspend(self) -> int:
        """It leaves; what waits here goes on when it is back. Returns the bytes kept: none."""
        return 0

    def forget(self) -> None:
        """Nothing is kept between requests."""

    def give_back(self, num_pages: int) -> None:
        """Return borrowed pages to the pool: there are none."""

    # -- requests come and go --------------------------------------------------------------

    def submit(self, request: EmbedRequest) -> list[FromWorker]:
        """Take ``request`` in, or refuse it alone. A repeated id ends the earlier request."""
        out: list[FromWorker] = []
        if earlier := self._jobs.get(request.request_id):
            message = "the request was submitted again; this run of it ends here"
            out.append(self._break(earlier, "cancelled", message))
        try:
            ids = self._encode(request)
        except InvalidPrompt as error:
            return [*out, Broke(request.request_id, "invalid_prompt", str(error))]
        longest = max(range(len(ids)), key=lambda i: len(ids[i]))
        if len(ids[longest]) > self._max_model_len:
            message = (
                f"input {longest} has {len(ids[longest])} tokens; this model takes "
                f"{self._max_model_len}: shorten or split it"
            )
            return [*out, Broke(request.request_id, "context_length_exceeded", message)]
        job = self._jobs[request.request_id] = Job(request, sum(map(len, ids)), len(ids))
        for index, one in enumerate(ids):
            self._line.add(job, index, one)
        return out

    def _encode(self, request: EmbedRequest) -> list[list[int]]:
        """The inputs' token ids. Raises InvalidPrompt for what the model can not do."""
        if not request.inputs:
            raise InvalidPrompt("the request has no inputs")
        asked = request.dimensions
        if asked is not None and not 1 <= asked <= self._dimensions:
            raise InvalidPrompt(
                f"dimensions = {asked}: vectors of model {self._text.model!r} have "
                f"{self._dimensions}, and can only be cut to fewer"
            )
        ids: list[list[int]] = []
        for number, one in enumerate(request.inputs):
            try:
                prompt = TextPrompt(one) if isinstance(one, str) else TokenPrompt(one)
                ids.append(self._text.encode(prompt))
            except InvalidPrompt as error:
                raise InvalidPrompt(f"input {number}: {error}") from error
        return ids

    def cancel(self, request_id: str) -> list[FromWorker]:
        """End a request now. Nothing where it is not here (it may just have ended)."""
        job = self._jobs.get(request_id)
        if job is None:
            return []
        self._remove(job)
        return [_done(job, "cancelled")]

    def abort(self, code: ErrorCode, message: str) -> list[FromWorker]:
        """End all requests with the same error."""
        return [self._break(job, code, message) for job in [*self._jobs.values()]]

    # -- one step --------------------------------------------------------------------------

    def step(self) -> list[FromWorker]:
        """One forward pass, if there is anything to compute; what to tell about it."""
        out = self.expire()
        inputs = self._line.window()
        if not inputs:
            return out
        out += self._begin(inputs)
        try:
            vectors = self._forward([one.ids for one in inputs])
        except NotArrived:  # nothing was computed; the next step tries again
            return out
        except Exception as error:  # whatever a model does, only these requests may suffer
            logger.exception("model %s: forward pass failed", self._text.model)
            message = f"model {self._text.model!r} failed: {type(error).__name__}: {error}"
            jobs = dict.fromkeys(one.job for one in inputs)
            return [*out, *(self._break(job, "engine_failed", message) for job in jobs)]
        self._line.take(inputs)
        for one, vector in zip(inputs, vectors, strict=True):
            out += self._accept(one, vector)
        return out

    def expire(self) -> list[FromWorker]:
        """End requests whose deadline is over: nobody waits for their answer."""
        now = self._wall_clock()
        return [
            self._break(job, "deadline_exceeded", "the request's deadline passed before its end")
            for job in [*self._jobs.values()]
            if job.request.deadline_at < now
        ]

    @property
    def next_deadline(self) -> float:
        """The earliest, in unix seconds; infinite where there is no request."""
        return min((job.request.deadline_at for job in self._jobs.values()), default=math.inf)

    def _begin(self, inputs: list[Input]) -> list[FromWorker]:
        out: list[FromWorker] = []
        for job in dict.fromkeys(one.job for one in inputs):
            if not job.begun_at:
                job.begun_at = time.perf_counter()
                out.append(Begun(job.request.request_id, job.num_tokens, self._wall_clock()))
        return out

    def _forward(self, ids: list[list[int]]) -> torch.Tensor:
        """Vectors (rows, width) in host memory, float32.

        Padded on the right: positions begin at the first token, and causal attention never
        looks at what follows a row's last one.
        """
        longest = max(map(len, ids))
        padded = [one + [self._padding_id] * (longest - len(one)) for one in ids]
        lengths = torch.tensor([len(one) for one in ids], device=self._device)
        is_token = torch.arange(longest, device=self._device) < lengths[:, None]
        with torch.inference_mode():
            output = self._module(
                input_ids=torch.tensor(padded, device=self._device),
                attention_mask=is_token.long(),
                **self._options,
            )
            vectors = pool(output[0], lengths, self._pooling)
        return vectors.cpu()

    def _accept(self, one: Input, vector: torch.Tensor) -> list[FromWorker]:
        """Keep ``vector``; all of the request's, and its end, where this was the last."""
        job, request = one.job, one.job.request
        if self._jobs.get(request.request_id) is not job:
            return []  # it broke in this very step
        if not torch.isfinite(vector).all():
            return [self._break(job, "engine_failed", f"model {self._text.model!r} {_NON_FINITE}")]
        if job.vectors is None:
            job.vectors = torch.empty((len(request.inputs), len(vector)))
        job.vectors[one.index] = vector
        job.num_left -= 1
        if job.num_left:
            return []
        del self._jobs[request.request_id]
        vectors = job.vectors
        if request.dimensions is not None:
            vectors = shorten(vectors, request.dimensions, self._pooling)
        return [*_chunks(request.request_id, vectors), _done(job, "stop")]

    # -- bookkeeping -----------------------------------------------------------------------

    def _break(self, job: Job, code: ErrorCode, message: str) -> Broke:
        self._remove(job)
        return Broke(job.request.request_id, code, message)

    def _remove(self, job: Job) -> None:
        del self._jobs[job.request.request_id]
        self._line.remove(job)

    def validate(self) -> None:
        """Raise AssertionError where the books do not balance."""
        waiting = self._line.counts()
        assert waiting.keys() == {*self._jobs.values()}, "inputs of ended requests wait, or none"
        assert all(job.num_left == left for job, left in waiting.items()), "inputs are lost"
        self._line.validate()


def _padding_id(module: Any, text: ModelText) -> int:
    config = module.config.get_text_config()
    named = (getattr(config, "pad_token_id", None), text.tokenizer.pad_token_id)
    return next((i for i in named if i is not None and 0 <= i < text.vocab_size), 0)


def _chunks(request_id: str, vectors: torch.Tensor) -> Iterator[Embedded]:
    """``vectors`` (inputs, dimensions) in messages of VECTORS_BYTES at the most."""
    data = vectors.contiguous().numpy().astype("<f4", copy=False)
    num_vectors, dimensions = data.shape
    per_chunk = max(1, VECTORS_BYTES // (4 * dimensions))
    for index in range(0, num_vectors, per_chunk):
        some = data[index : index + per_chunk]
        yield Embedded(request_id, index, dimensions, some.tobytes())


def _done(job: Job, reason: FinishReason) -> Done:
    return Done(
        request_id=job.request.request_id,
        finish_reason=reason,
        prompt_tokens=job.num_tokens,
        completion_tokens=0,
        prefill_s=time.perf_counter() - job.begun_at if job.begun_at else 0.0,
        decode_s=0.0,
    )
