"""One request inside a batch: what is known of it between two steps."""

import time
from dataclasses import dataclass, field

from schemas.requests import GenerateRequest
from schemas.stream import FinishReason, TokenLogprob, TokenLogprobs
from services.gpu_agent.engine.detokenize import TextStream
from services.gpu_agent.engine.grammar import Constraint
from services.gpu_agent.engine.kv import Span
from services.gpu_agent.engine.kv_manager import RowKV
from services.gpu_agent.engine.pieces import Pieces
from services.gpu_agent.engine.prompts import ModelText
from services.gpu_agent.engine.sampling import Chosen, Sampler
from services.gpu_agent.ipc import Broke, Done, FromWorker, Produced


@dataclass(eq=False)  # a row is itself, whatever it holds
class Row:
    """A request, waiting or running.

        ids    p p p p p p p p o o o        p: prompt, o: chosen so far
               `---- num_cached ---'        KV of these is in the pages

    It is in prefill until all tokens that it had when it was admitted are cached; from then
    on each step adds one. Parked, it gives its blocks back and waits again; the next admission
    finds its K and V in host memory, or computes prompt and chosen tokens anew, and the sampler
    goes on where it was.
    Times are `time.perf_counter` seconds.
    """

    request: GenerateRequest
    ids: list[int]
    num_prompt: int
    max_new: int
    sampler: Sampler
    text: TextStream
    pieces: Pieces
    end_ids: frozenset[int]  # end-of-sequence, unless ignored, and the request's own
    kv: RowKV = field(default_factory=RowKV)
    is_alone: bool = False  # its prompt shares no forward pass with others
    prefill_end: int = 0  # tokens it had when it was admitted
    begun_at: float = 0.0
    first_token_at: float = 0.0
    ended: bool = False

    @classmethod
    def of(
        cls,
        request: GenerateRequest,
        ids: list[int],
        max_new: int,
        text: ModelText,
        constraint: Constraint | None = None,
    ) -> "Row":
        params = request.sampling
        return cls(
            request=request,
            ids=ids,
            num_prompt=len(ids),
            max_new=max_new,
            sampler=Sampler(params, text.eos_ids, ids, constraint),
            text=TextStream(text.tokenizer_for(request.prompt), ids, params.stop),
            pieces=text.pieces,
            end_ids=frozenset(params.stop_token_ids)
            | (frozenset() if params.ignore_eos else text.eos_ids),
        )

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def awaits_grammar(self) -> bool:
        """It cannot begin: another thread still reads its grammar."""
        constraint = self.sampler.constraint
        return constraint is not None and not constraint.has_begun

    @property
    def is_grammar_read(self) -> bool:
        """`begin_grammar` may be called."""
        constraint = self.sampler.constraint
        return constraint is not None and constraint.is_ready

    def begin_grammar(self) -> None:
        """It waits for its grammar no longer. Raises InvalidGrammar."""
        if self.sampler.constraint:
            self.sampler.constraint.begin()

    @property
    def num_new(self) -> int:
        """Tokens chosen so far."""
        return len(self.ids) - self.num_prompt

    @property
    def num_cached(self) -> int:
        return self.kv.num_cached

    @property
    def is_running(self) -> bool:
        """It has blocks; else it waits for some."""
        return self.kv.is_placed

    @property
    def in_prefill(self) -> bool:
        return self.num_cached < self.prefill_end

    @property
    def num_to_fill(self) -> int:
        return self.prefill_end - self.num_cached

    def span(self, most: int) -> Span:
        """What to compute next, ``most`` tokens at the most."""
        return self.kv.span(min(self.num_cached + most, len(self.ids)))

    def accept(self, chosen: Chosen) -> list[FromWorker]:
        """Add a chosen token; what to tell about it. Ends the row where this was the last."""
        token_id = chosen.token_id
        self.ids.append(token_id)
        if self.num_new == 1:
            self.first_token_at = time.perf_counter()
        may_stop = self.num_new >= self.request.sampling.min_tokens
        is_end = token_id in self.end_ids
        logprobs = self._logprobs(chosen)  # first: it tells where the text was before the token
        # A token that ends the completion is counted, but it is not text even where the
        # tokenizer would print it.
        text, stopped = ("", False) if is_end else self.text.push(token_id, may_stop)
        out: list[FromWorker] = [
            Produced(self.request_id, self.num_new - 1, (token_id,), text, logprobs),
        ]
        if stopped:
            out.append(self.finish("stop"))
        elif is_end or self.num_new >= self.max_new or self.sampler.is_over:
            rest, stopped = self.text.flush(may_stop)
            is_whole = is_end or stopped or self.sampler.is_over
            reason: FinishReason = "stop" if is_whole else "length"
            out.append(self.finish(reason, rest))
        return out

    def _logprobs(self, chosen: Chosen) -> tuple[TokenLogprobs, ...]:
        """What to tell of the chosen token's probability; nothing where nobody asked."""
        if chosen.logprob is None:
            return ()
        first, *top = (
            TokenLogprob(token_id, logprob, *self.pieces.of(token_id))
            for token_id, logprob in ((chosen.token_id, chosen.logprob), *chosen.top)
        )
        return (TokenLogprobs(first, self.text.num_chars, tuple(top)),)

    def finish(self, reason: FinishReason, text: str = "") -> Done:
        """The one terminal message of a row that ends well."""
        self.ended = True
        now = time.perf_counter()
        first = self.first_token_at or now
        return Done(
            request_id=self.request_id,
            finish_reason=reason,
            prompt_tokens=self.num_prompt,
            completion_tokens=self.num_new,
            prefill_s=first - self.begun_at if self.begun_at else 0.0,
            decode_s=now - first if self.first_token_at else 0.0,
            text=text,
        )

    def fail(self, error: Broke) -> Broke:
        """The one terminal message of a row that does not."""
        self.ended = True
        return error
