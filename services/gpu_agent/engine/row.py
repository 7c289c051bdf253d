"""One request inside a batch: what is known of it between two steps."""

import time
from dataclasses import dataclass, field

from schemas.requests import GenerateRequest
from schemas.stream import FinishReason, PromptTold, TokenLogprob, TokenLogprobs
from services.gpu_agent.engine.detokenize import TextStream
from services.gpu_agent.engine.grammar import Constraint
from services.gpu_agent.engine.kv import Span
from services.gpu_agent.engine.kv_manager import RowKV
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
    With a prefix it begins with the tokens that an earlier run chose, as if it had chosen them
    itself and had been parked: they are prefilled with the prompt, and count everywhere.
    Times are `time.perf_counter` seconds.
    """

    request: GenerateRequest
    ids: list[int]
    num_prompt: int
    max_new: int
    sampler: Sampler
    text: TextStream
    model_text: ModelText
    end_ids: frozenset[int]  # end-of-sequence, unless ignored, and the request's own
    kv: RowKV = field(default_factory=RowKV)
    is_alone: bool = False  # its prompt shares no forward pass with others
    prefill_end: int = 0  # tokens it had when it was admitted
    num_reused: int = 0  # tokens of the prompt whose KV was there when it was first admitted
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
        """Raises InvalidPrompt where its words to avoid have no tokens."""
        params = request.sampling
        bad_words = text.bad_words(params.bad_words)
        return cls(
            request=request,
            ids=ids,
            num_prompt=len(ids),
            max_new=max_new,
            sampler=Sampler(params, text.eos_ids, ids, bad_words, constraint),
            text=TextStream(
                text.tokenizer_for(request.prompt),
                ids,
                params.stop,
                params.include_stop,
                params.skip_special_tokens,
            ),
            model_text=text,
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

    def take_prefix(self) -> Done | None:
        """Take the tokens that an earlier run chose, before anything is computed. Done where the
        last one ended the answer, and only its end is still to be told.
        """
        for token_id in self.request.prefix_token_ids:
            self.sampler.count(token_id)
            _, ending = self._append(token_id)
            if ending:
                return self.finish(*ending)
        return None

    def span(self, most: int) -> Span:
        """What to compute next, ``most`` tokens at the most."""
        return self.kv.span(min(self.num_cached + most, len(self.ids)))

    def accept(self, chosen: Chosen) -> list[FromWorker]:
        """Add a chosen token; what to tell about it. Ends the row where this was the last."""
        token_id = chosen.token_id
        self.first_token_at = self.first_token_at or time.perf_counter()
        logprobs = self._logprobs(chosen)  # first: it tells where the text was before the token
        text, ending = self._append(token_id)
        prompt = self._told() if self.num_new == 1 else None
        out: list[FromWorker] = [
            Produced(self.request_id, self.num_new - 1, (token_id,), text, logprobs, prompt),
        ]
        if ending:
            out.append(self.finish(*ending))
        return out

    def _told(self) -> PromptTold:
        """What to tell of the prompt, with the first token."""
        params, ids = self.request.sampling, self.ids[: self.num_prompt]
        text = ""
        if params.tell_prompt_text:
            text = self.model_text.decode(ids, params.skip_special_tokens)
        return PromptTold(len(ids), tuple(ids) if params.tell_prompt_ids else (), text)

    def _append(self, token_id: int) -> tuple[str, tuple[FinishReason, str] | None]:
        """The text that the token adds; where it is the last one, also why and the rest of it."""
        self.ids.append(token_id)
        may_stop = self.num_new >= self.request.sampling.min_tokens
        is_end = token_id in self.end_ids
        # A token that ends the completion is counted, but it is not text even where the
        # tokenizer would print it, unless the request wants to see it.
        is_text = not is_end or self.request.sampling.include_stop
        text, stopped = self.text.push(token_id, may_stop) if is_text else ("", False)
        if stopped:
            return text, ("stop", "")
        if is_end or self.num_new >= self.max_new or self.sampler.is_over:
            rest, stopped = self.text.flush(may_stop)
            is_whole = is_end or stopped or self.sampler.is_over
            return text, ("stop" if is_whole else "length", rest)
        return text, None

    def _logprobs(self, chosen: Chosen) -> tuple[TokenLogprobs, ...]:
        """What to tell of the chosen token's probability; nothing where nobody asked."""
        if chosen.logprob is None:
            return ()
        first, *top = (
            TokenLogprob(token_id, logprob, *self.model_text.pieces.of(token_id))
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
            cached_tokens=self.num_reused,
        )

    def fail(self, error: Broke) -> Broke:
        """The one terminal message of a row that does not."""
        self.ended = True
        return error
