"""The requests of one model: continuous batching, one forward pass per step.

    submit ──> waiting ──> prefill ──> decoding ──> Done
                  `──────── cancel, deadline, failure ────> Done | Broke

A step is: schedule, forward, sample, emit. Who computes next is for schedule.py to say. Requests
join at the end of a step and leave at any; rows never depend on each other.

A batch stays when its model leaves the device: `suspend` parks all rows where they are, and they
go on after the next `attach`.
"""

import inspect
import logging
import math
import time
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Final

import torch

from schemas.requests import ChatPrompt, GenerateRequest, SamplingParams
from schemas.stream import ErrorCode
from services.gpu_agent.arrival import NotArrived
from services.gpu_agent.engine.decode_graph import DecodeGraphs
from services.gpu_agent.engine.grammar import Constraint, Grammars, InvalidGrammar
from services.gpu_agent.engine.kv import CacheView, Span
from services.gpu_agent.engine.kv_manager import KVManager
from services.gpu_agent.engine.packed import PackedView, can_pack
from services.gpu_agent.engine.prompts import InvalidPrompt, ModelText
from services.gpu_agent.engine.row import Row
from services.gpu_agent.engine.sampling import (
    BadLogits,
    GrammarFailed,
    check,
    check_prefix,
    sample,
)
from services.gpu_agent.engine.schedule import DEFAULT_CHUNK_TOKENS, Schedule
from services.gpu_agent.hosted import nothing
from services.gpu_agent.ipc import Begun, Broke, Done, FromWorker

logger = logging.getLogger(__name__)

# While a model arrives its first layer is there long before its last: a prompt in several chunks
# would send each of them, but for the first, through layers that have long been waiting.
ARRIVING_CHUNK_TOKENS: Final = 4096
# Of full blocks, to host memory, per step. More than decoding fills, little beside a forward.
WRITE_BEHIND_BYTES: Final = 16 * 2**20


class Batch:
    """All requests of one model. Made at its first swap-in.

    ``module`` is a transformers causal language model, ``kv`` its cache, ``graphs`` its recorded
    decode steps where the device has such. ``on_ready()`` is called in another thread when a
    request's grammar has been read, for which it waited. Every ``submit`` ends in exactly one Done
    or Broke, from the call itself, from a later ``step``, ``expire`` or ``cancel``, or from
    ``abort``. Nothing here raises for what a request or the model's forward pass does.
    """

    def __init__(
        self,
        module: Any,
        kv: KVManager,
        text: ModelText,
        max_model_len: int,
        max_batch: int,
        chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
        wall_clock: Callable[[], float] = time.time,
        graphs: DecodeGraphs | None = None,
        on_ready: Callable[[], None] = nothing,
    ) -> None:
        self.module = module
        self._grammars = Grammars(text.tokenizer, text.eos_ids, text.vocab_size, text.tool_format)
        self._on_ready = on_ready
        self.kv: Final = kv
        self._text = text
        self._max_model_len = max_model_len
        # Tokens of the longest possible row.
        self._limit = min(max_model_len, kv.num_reserve_tokens)
        self._chunk_tokens = chunk_tokens
        self._wall_clock = wall_clock
        self._graphs = graphs
        self._rows = Schedule(kv, max_batch, chunk_tokens, can_pack(module, kv.store))
        self._accepted = frozenset(inspect.signature(module.forward).parameters)

    @property
    def num_requests(self) -> int:
        return len(self._rows)

    @property
    def is_busy(self) -> bool:
        """Whether `step` has anything to do: some request waits for no grammar."""
        return any(not row.awaits_grammar or row.is_grammar_read for row in self._rows)

    @property
    def num_parked(self) -> int:
        """How often a row had to give way, over the batch's life."""
        return self._rows.num_parked

    def has(self, request_id: str) -> bool:
        return self._rows.find(request_id) is not None

    # -- the model comes and goes ----------------------------------------------------------

    def attach(self, pages: Sequence[int]) -> None:
        """The model is on its way to the device. ``pages``: its KV reserve."""
        self.kv.attach(pages)
        self.kv.is_trusted = False
        self._rows.chunk_tokens = max(self._chunk_tokens, ARRIVING_CHUNK_TOKENS)

    def arrived(self) -> None:
        """Its weights are there, and checked."""
        self.kv.is_trusted = True
        self._rows.chunk_tokens = self._chunk_tokens

    def suspend(self) -> int:
        """Park all rows and let go of the pages; bytes that had to be copied to host memory now.

        On CUDA they are on their way: the pages are free for copies that are ordered after what
        the compute stream was given.
        """
        before = self.kv.copied_bytes
        self._rows.park_all()
        self.kv.detach()
        return self.kv.copied_bytes - before

    def forget(self) -> None:
        """Nothing that was computed is wanted any more. It is suspended, and no request is left."""
        self.kv.forget()

    def give_back(self, num_pages: int) -> None:
        """Return borrowed pages to the pool, ``num_pages`` or all there are."""
        self._rows.give_back(num_pages)

    # -- requests come and go --------------------------------------------------------------

    def submit(self, request: GenerateRequest) -> list[FromWorker]:
        """Take ``request`` in, or refuse it alone. A repeated id ends the earlier request."""
        out: list[FromWorker] = []
        if earlier := self._rows.find(request.request_id):
            message = "the request was submitted again; this run of it ends here"
            out.append(self._break(earlier, "cancelled", message))
        try:
            ids = self._truncated(self._text.encode(request.prompt), request.sampling)
            check(request.sampling, self._text.vocab_size)
            check_prefix(request.prefix_token_ids, self._text.vocab_size)
            if len(ids) >= self._limit:
                message = self._too_long(len(ids))
                return [*out, Broke(request.request_id, "context_length_exceeded", message)]
            asked = request.sampling.max_tokens
            room = self._limit - len(ids)
            max_new = room if asked is None else min(asked, room)
            row = Row.of(request, ids, max_new, self._text, self._constraint(request))
        except InvalidPrompt as error:
            return [*out, Broke(request.request_id, error.code, str(error))]
        if row.max_new < 1:
            return [*out, row.finish("length")]
        if done := row.take_prefix():
            return [*out, done]
        self._rows.add(row)
        return out

    def _truncated(self, ids: list[int], params: SamplingParams) -> list[int]:
        """``ids``, less what the request wants to have cut off."""
        most = params.truncate_prompt_tokens
        if most is None:
            return ids
        if most < 0:  # whatever fits, with all the tokens that are to come
            most = max(1, self._limit - (params.max_tokens or 1))
        return ids[-most:] if params.truncation_side == "left" else ids[:most]

    def _constraint(self, request: GenerateRequest) -> Constraint | None:
        grammar, prompt = request.sampling.grammar, request.prompt
        if grammar is None:
            return None
        tools = prompt.tools if isinstance(prompt, ChatPrompt) else ()
        return self._grammars.open(grammar, tools, self._on_ready)

    def cancel(self, request_id: str) -> list[FromWorker]:
        """End a request now. Nothing where it is not here (it may just have ended)."""
        row = self._rows.find(request_id)
        if row is None:
            return []
        done: Done = row.finish("cancelled")
        self._rows.remove(row)
        return [done]

    def abort(self, code: ErrorCode, message: str) -> list[FromWorker]:
        """End all requests with the same error."""
        return [self._break(row, code, message) for row in self._rows]

    def expire(self) -> list[FromWorker]:
        """End requests whose deadline is over: nobody waits for their answer."""
        now = self._wall_clock()
        message = "the request's deadline passed before its end"
        return [
            self._break(row, "deadline_exceeded", message)
            for row in self._rows
            if row.request.deadline_at < now
        ]

    @property
    def next_deadline(self) -> float:
        """Unix seconds; infinite where no request has one."""
        return min((row.request.deadline_at for row in self._rows), default=math.inf)

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
        out = [*self.expire(), *self._begin_grammars(), *self._admit()]
        rows = self._rows.next()
        if not rows:
            return out
        try:
            logits = self._forward(rows)
            if rows[0].in_prefill:  # a chunk, and not the prompt's last one: it came alone
                return out
            chosen = sample(logits, [row.sampler for row in rows])
        except NotArrived:  # nothing was computed; the next step tries again
            return out
        except Exception as error:  # whatever a model does, only its own rows may suffer
            if len(rows) > 1 and rows[0].in_prefill:  # nothing is lost: each by itself will tell
                for row in rows:
                    row.is_alone = True
                return out
            logger.exception("model %s: forward pass failed", self._text.model)
            message = f"model {self._text.model!r} failed: {type(error).__name__}: {error}"
            return [*out, *(self._break(row, "engine_failed", message) for row in rows)]
        for row, one in zip(rows, chosen, strict=True):
            if isinstance(one, GrammarFailed):
                out.append(self._break(row, "invalid_grammar", str(one)))
                continue
            if isinstance(one, BadLogits):
                message = f"model {self._text.model!r}: {one}"
                out.append(self._break(row, "engine_failed", message))
                continue
            out += row.accept(one)
            if row.ended:
                self._rows.remove(row)
        return out

    def _begin_grammars(self) -> list[FromWorker]:
        """End the requests whose grammar is none; what the others' needs in this thread."""
        out: list[FromWorker] = []
        for row in self._rows:
            if row.awaits_grammar and row.is_grammar_read:
                try:
                    row.begin_grammar()
                    if row.num_new and row.sampler.is_over:  # all that an earlier run left was this
                        out.append(row.finish("stop"))
                        self._rows.remove(row)
                except InvalidGrammar as error:
                    out.append(self._break(row, error.code, str(error)))
        return out

    def _admit(self) -> list[FromWorker]:
        out: list[FromWorker] = []
        for row in self._rows.admit():
            if not row.begun_at:
                row.begun_at = time.perf_counter()
                row.num_reused = row.num_cached
                out.append(Begun(row.request_id, row.num_prompt, self._wall_clock()))
        return out

    def _forward(self, rows: Sequence[Row]) -> torch.Tensor:
        """Compute each row's next tokens: logits (rows, vocabulary) at the last of them."""
        decodes = not rows[0].in_prefill
        spans = [row.span(1 if decodes else self._rows.chunk_tokens) for row in rows]
        new_ids = [row.ids[span.start : span.end] for row, span in zip(rows, spans, strict=True)]
        with torch.inference_mode():
            if self._graphs and decodes and self.kv.is_trusted:
                logits = self._graphs.step(
                    spans, [ids[0] for ids in new_ids], lambda: self._compute(spans, new_ids)
                )
            else:
                logits = self._compute(spans, new_ids)
            if len(rows) > 1 and not decodes and not logits.amax(-1).isfinite().all():
                # One row's NaN reaches all that are packed with it: zero times NaN is NaN.
                raise BadLogits("a row packed with others is not finite")
            for row, span in zip(rows, spans, strict=True):
                self.kv.computed(row.kv, row.ids, span.end)
            self.kv.write_behind(WRITE_BEHIND_BYTES)
        return logits

    def _compute(self, spans: Sequence[Span], new_ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """One token of each row, or prompts: one alone, or several packed."""
        if len(spans) > 1 and any(span.end - span.start > 1 or not span.start for span in spans):
            packed = PackedView(self.kv.store, spans)
            logits = self._call([list(chain(*new_ids))], packed, packed.last)
            return logits[0, packed.last] if logits.shape[1] > len(spans) else logits[0]
        # By index: torch copies the whole head for a slice of several tokens (its way around
        # strides), which takes as long as the rest of a short prompt.
        num_new = len(new_ids[0])
        keep = 1 if num_new == 1 else torch.tensor([num_new - 1], device=self.kv.store.device)
        return self._call(new_ids, self.kv.store.view(spans), keep)[:, -1]

    def _call(
        self, ids: Sequence[Sequence[int]], view: CacheView | PackedView, keep: int | torch.Tensor
    ) -> torch.Tensor:
        """Logits (rows, tokens to keep, vocabulary); of all tokens from models that can not."""
        arguments = {
            "attention_mask": view.attention_mask,
            "position_ids": view.position_ids,
            "past_key_values": view,
            "use_cache": True,
            "logits_to_keep": keep,
            "return_dict": True,
        }
        result = self.module(
            input_ids=torch.tensor(ids, device=self.kv.store.device),
            **{name: value for name, value in arguments.items() if name in self._accepted},
        )
        logits: torch.Tensor = result.logits
        return logits

    # -- bookkeeping -----------------------------------------------------------------------

    def _break(self, row: Row, code: ErrorCode, message: str) -> Broke:
        self._rows.remove(row)
        return row.fail(Broke(row.request_id, code, message))

    def validate(self) -> None:
        """Raise AssertionError where the batch's books do not balance."""
        self._rows.validate()
