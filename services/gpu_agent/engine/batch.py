"""The running batch of one resident model: continuous batching, one forward pass per step.

    submit ──> waiting ──(blocks, a place)──> prefill ──> decoding ──> Done
                  │ ^────────── parked: out of blocks ────────┘
                  `──────────── cancel, deadline, failure ──────────> Done | Broke

A step is: schedule, forward, sample, emit. It does one of two things:

1. a chunk of the oldest unfinished prompt, if there is one and the last step was not one;
2. else one token for every row that decodes.

So a long prompt and running streams take turns, and neither waits for the other's whole.
Blocks are taken as a row grows. When they run out, the row admitted last is parked; the
first one can always go on, so all of them end.
Requests join at the end of a step and leave at any; rows never depend on each other.
"""

import inspect
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

from schemas.requests import GenerateRequest
from schemas.stream import ErrorCode
from services.gpu_agent.arrival import NotArrived
from services.gpu_agent.engine.kv import KVStore, OutOfBlocks
from services.gpu_agent.engine.prompts import InvalidPrompt, ModelText
from services.gpu_agent.engine.row import Row
from services.gpu_agent.engine.sampling import BadLogits, sample
from services.gpu_agent.ipc import Begun, Broke, Done, FromWorker

logger = logging.getLogger(__name__)

DEFAULT_CHUNK_TOKENS: Final = 512


class Batch:
    """All requests of one resident model. Made at swap-in, dropped at swap-out.

    ``module`` is a transformers causal language model, ``kv`` its KV reserve. Every
    ``submit`` ends in exactly one Done or Broke, from the call itself, from a later
    ``step`` or ``cancel``, or from ``abort``. Nothing here raises for what a request or
    the model's forward pass does.
    """

    def __init__(
        self,
        module: Any,
        kv: KVStore,
        text: ModelText,
        max_model_len: int,
        max_batch: int,
        chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._module = module
        self._kv = kv
        self._text = text
        self._max_batch = max_batch
        self._max_model_len = max_model_len
        self._limit = min(max_model_len, kv.num_tokens)  # tokens of the longest possible row
        self.chunk_tokens = chunk_tokens  # of a prompt, in one forward pass
        self._wall_clock = wall_clock
        self._waiting: deque[Row] = deque()
        self._running: dict[str, Row] = {}  # in order of admission
        self._last_was_prefill = False
        self.num_parked = 0  # how often a row had to give way, over the batch's life
        self._accepted = frozenset(inspect.signature(module.forward).parameters)

    @property
    def num_requests(self) -> int:
        return len(self._waiting) + len(self._running)

    def has(self, request_id: str) -> bool:
        return self._find(request_id) is not None

    # -- requests come and go --------------------------------------------------------------

    def submit(self, request: GenerateRequest) -> list[FromWorker]:
        """Take ``request`` in, or refuse it alone. A repeated id ends the earlier request."""
        out: list[FromWorker] = []
        if earlier := self._find(request.request_id):
            message = "the request was submitted again; this run of it ends here"
            out.append(self._break(earlier, "cancelled", message))
        try:
            ids = self._text.encode(request.prompt)
        except InvalidPrompt as error:
            return [*out, Broke(request.request_id, "invalid_prompt", str(error))]
        if len(ids) >= self._limit:
            message = self._too_long(len(ids))
            return [*out, Broke(request.request_id, "context_length_exceeded", message)]
        asked = request.sampling.max_tokens
        room = self._limit - len(ids)
        row = Row.of(request, ids, room if asked is None else min(asked, room), self._text)
        if row.max_new < 1:
            return [*out, row.finish("length")]
        self._waiting.append(row)
        return out

    def cancel(self, request_id: str) -> list[FromWorker]:
        """End a request now. Nothing where it is not here (it may just have ended)."""
        row = self._find(request_id)
        if row is None:
            return []
        done: Done = row.finish("cancelled")
        self._remove(row)
        return [done]

    def abort(self, code: ErrorCode, message: str) -> list[FromWorker]:
        """End all requests with the same error."""
        return [
            self._break(row, code, message) for row in [*self._running.values(), *self._waiting]
        ]

    def _too_long(self, num_prompt: int) -> str:
        if self._limit < self._max_model_len:
            return (
                f"prompt has {num_prompt} tokens; this model's KV reserve holds {self._limit} "
                f"tokens of its context of {self._max_model_len}, prompt and completion together: "
                "shorten the prompt or raise kv_tokens for this model"
            )
        return (
            f"prompt has {num_prompt} tokens; this model's context is {self._limit} tokens, prompt "
            "and completion together: shorten the prompt"
        )

    # -- one step --------------------------------------------------------------------------

    def step(self) -> list[FromWorker]:
        """One forward pass, if there is anything to compute; what to tell about it."""
        out = [*self._expire(), *self._admit()]
        rows = self._schedule()
        if not rows:
            return out
        try:
            logits = self._forward(rows)
            if rows[0].in_prefill:  # a chunk, and not the prompt's last one
                return out
            chosen = sample(logits, [row.sampler for row in rows])
        except NotArrived:  # nothing was computed; the next step tries again
            return out
        except Exception as error:  # whatever a model does, only its own rows may suffer
            logger.exception("model %s: forward pass failed", self._text.model)
            message = f"model {self._text.model!r} failed: {type(error).__name__}: {error}"
            return [*out, *(self._break(row, "engine_failed", message) for row in rows)]
        for row, token in zip(rows, chosen, strict=True):
            if isinstance(token, BadLogits):
                message = f"model {self._text.model!r}: {token}"
                out.append(self._break(row, "engine_failed", message))
                continue
            out += row.accept(token)
            if row.ended:
                self._remove(row)
        return out

    def _expire(self) -> list[FromWorker]:
        """End requests whose deadline is over: nobody waits for their answer."""
        now = self._wall_clock()
        rows = [*self._waiting, *self._running.values()]
        return [
            self._break(row, "deadline_exceeded", "the request's deadline passed before its end")
            for row in rows
            if row.request.deadline_at < now
        ]

    def _admit(self) -> list[FromWorker]:
        """First come, first served, where there are blocks for all its tokens and one more."""
        out: list[FromWorker] = []
        while self._waiting and len(self._running) < self._max_batch:
            row = self._waiting[0]
            if not self._kv.can_take(len(row.ids) + 1):
                break
            self._waiting.popleft()
            row.blocks = self._kv.take(len(row.ids) + 1)
            row.prefill_end = len(row.ids)
            self._running[row.request_id] = row
            if not row.begun_at:
                row.begun_at = time.perf_counter()
                out.append(Begun(row.request_id, row.num_prompt, self._wall_clock()))
        return out

    def _grow(self, rows: list[Row]) -> list[Row]:
        """Those of ``rows`` that have room for their next token, after parking others for it."""
        for row in rows:
            while row.blocks is not None and row.blocks.num_tokens < len(row.ids):
                try:
                    row.blocks = self._kv.extend(row.blocks, len(row.ids))
                except OutOfBlocks:
                    self._park(next(reversed(self._running.values())))  # perhaps row itself
        return [row for row in rows if row.blocks is not None]

    def _park(self, row: Row) -> None:
        """Give its blocks to those before it; it is first in line to come back."""
        assert row.blocks is not None
        del self._running[row.request_id]
        self._kv.give(row.blocks)
        row.blocks, row.num_cached = None, 0
        self._waiting.appendleft(row)
        self.num_parked += 1

    def _schedule(self) -> list[Row]:
        """The rows of this step's forward pass: one in prefill, or all that decode."""
        filling = next((row for row in self._running.values() if row.in_prefill), None)
        decoding = [row for row in self._running.values() if not row.in_prefill]
        self._last_was_prefill = filling is not None and not (decoding and self._last_was_prefill)
        if self._last_was_prefill and filling is not None:
            return [filling]
        return self._grow(decoding)

    def _forward(self, rows: Sequence[Row]) -> torch.Tensor:
        """Compute each row's next tokens: logits (rows, vocabulary) at the last of them."""
        most = self.chunk_tokens if rows[0].in_prefill else 1
        spans = [row.span(most) for row in rows]
        view = self._kv.view(spans)
        new_ids = [row.ids[span.start : span.end] for row, span in zip(rows, spans, strict=True)]
        arguments = {
            "attention_mask": view.attention_mask,
            "position_ids": view.position_ids,
            "past_key_values": view,
            "use_cache": True,
            "logits_to_keep": 1,
            "return_dict": True,
        }
        with torch.inference_mode():
            result = self._module(
                input_ids=torch.tensor(new_ids, device=self._kv.device),
                **{name: value for name, value in arguments.items() if name in self._accepted},
            )
        for row, span in zip(rows, spans, strict=True):
            row.num_cached = span.end
        logits: torch.Tensor = result.logits[:, -1]
        return logits

    # -- bookkeeping -----------------------------------------------------------------------

    def _find(self, request_id: str) -> Row | None:
        if row := self._running.get(request_id):
            return row
        return next((row for row in self._waiting if row.request_id == request_id), None)

    def _break(self, row: Row, code: ErrorCode, message: str) -> Broke:
        self._remove(row)
        return row.fail(Broke(row.request_id, code, message))

    def _remove(self, row: Row) -> None:
        if row.blocks is None:
            self._waiting.remove(row)
            return
        del self._running[row.request_id]
        self._kv.give(row.blocks)
        row.blocks = None

    def validate(self) -> None:
        """Raise AssertionError where the batch's books do not balance."""
        owned = sum(row.blocks.num_tokens for row in self._running.values() if row.blocks)
        assert owned + self._kv.num_free_tokens == self._kv.num_tokens, "KV blocks leak"
        assert len(self._running) <= self._max_batch, "more rows than max_batch"
        assert all(row.blocks is None for row in self._waiting), "a waiting row owns blocks"
        rows = [*self._running.values(), *self._waiting]
        assert not any(row.ended for row in rows), "an ended row is still here"
