"""Choosing the next token from logits.

Each token is drawn on the host, from its request's seed, its position in the answer and its own
logits only: not from the device, nor the other requests in the batch, nor how the tokens before it
came about. So a request goes on anywhere, from any token, as it would have gone on where it was.
(The logits themselves differ by rounding, about 1e-6, between batch shapes, as in any engine.)

What happens to a row's logits, in the order of transformers' ``generate`` (and of vLLM, but for
min_p, which vLLM applies before top_k):

    raw ─> bias ─> allowed ─> bad words ─> repetition ─> presence, frequency ─> grammar
     │       ─> hold back ends (min_tokens) ─> argmax, where greedy
     │       ─> temperature ─> top_k ─> top_p ─> min_p ─> draw
     `─> log_softmax: the log probabilities that are told, OpenAI's and vLLM's default

Rows with nothing but an argmax stay on the device; the others' logits travel in one transfer.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from schemas.requests import LOGIT_BIAS_RANGE, MAX_LOGPROBS, SAMPLING_RANGES, SamplingParams
from services.gpu_agent.engine.grammar import Constraint
from services.gpu_agent.engine.prompts import InvalidPrompt

# Below this, dividing by the temperature overflows long before it changes the choice.
GREEDY_BELOW: Final = 1e-5

# Told for tokens that are ruled out: JSON has no infinity, and OpenAI uses this number.
LEAST_LOGPROB: Final = -9999.0


class BadLogits(Exception):
    """The model gave no usable probabilities (NaN or all -inf) for this request."""


class GrammarFailed(BadLogits):
    """The request's grammar can not go on. The message is for the client."""


class InvalidSampling(InvalidPrompt):
    """Settings that this model cannot follow. The message is for the client."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A row's next token. ``logprob`` where asked for; ``top``: (id, logprob), likeliest first."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def check(params: SamplingParams, vocab_size: int) -> None:
    """Raise InvalidSampling where ``params`` ask for what cannot be done with this vocabulary."""
    for name, (low, high) in SAMPLING_RANGES.items():
        value = getattr(params, name)
        if value is not None and not low <= value <= high:  # also NaN
            raise InvalidSampling(f"{name} = {value} must be between {low} and {high}")
    low, high = LOGIT_BIAS_RANGE
    for token_id, bias in params.logit_bias.items():
        if not low <= bias <= high:
            raise InvalidSampling(
                f"logit_bias of token {token_id} = {bias} must be between {low} and {high}"
            )
    for name, ids in (
        ("logit_bias", params.logit_bias),
        ("stop_token_ids", params.stop_token_ids),
        ("allowed_token_ids", params.allowed_token_ids),
    ):
        wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
        if wrong is not None:
            raise InvalidSampling(
                f"{name} names token id {wrong}, which is outside this model's vocabulary: "
                f"its ids are 0 to {vocab_size - 1}"
            )


def check_prefix(token_ids: Sequence[int], vocab_size: int) -> None:
    """Raise InvalidSampling where an answer can not have begun with ``token_ids``."""
    wrong = next((i for i in token_ids if not 0 <= i < vocab_size), None)
    if wrong is not None:
        raise InvalidSampling(
            f"prefix_token_ids name token id {wrong}, which is outside this model's vocabulary: "
            f"its ids are 0 to {vocab_size - 1}"
        )


class Sampler:
    """One request's way to choose. Knows its tokens so far; `sample` tells it of each new one.

    ``end_ids`` and the request's own stop_token_ids are held back until ``min_tokens``. Where there
    is a grammar, and it allows nothing else, they come all the same; ``end_ids`` that are to be
    ignored come only then.
    """

    def __init__(
        self,
        params: SamplingParams,
        end_ids: Collection[int],
        prompt_ids: Sequence[int] = (),
        bad_words: Sequence[Sequence[int]] = (),
        constraint: Constraint | None = None,
    ) -> None:
        self.num_logprobs: Final = params.logprobs
        self.constraint: Final = constraint
        ignored = sorted(end_ids) if constraint and params.ignore_eos else []
        self._ignored: Any = SuppressTokensLogitsProcessor(ignored) if ignored else None
        self._num_chosen = 0
        ends = sorted({*end_ids, *params.stop_token_ids})
        self._min_tokens = params.min_tokens if ends else 0
        self._hold_back: Any = SuppressTokensLogitsProcessor(ends) if self._min_tokens else None
        self._seen: _Seen | None = None
        self._penalties: CountPenalties | None = None
        self._bad_words: BadWords | None = None
        self._processors: list[Any] = []
        if params.logit_bias:
            bias = {(token_id,): float(value) for token_id, value in params.logit_bias.items()}
            self._processors.append(SequenceBiasLogitsProcessor(bias))
        if params.allowed_token_ids:
            self._processors.append(AllowedTokens(params.allowed_token_ids))
        if bad_words:
            self._bad_words = BadWords(bad_words)
            self._processors.append(self._bad_words)
        if params.repetition_penalty != 1.0:
            self._seen = _Seen(prompt_ids)
            penalty = float(params.repetition_penalty)
            self._processors.append(RepetitionPenaltyLogitsProcessor(penalty))
        if params.presence_penalty or params.frequency_penalty:
            self._penalties = CountPenalties(params.presence_penalty, params.frequency_penalty)
            self._processors.append(self._penalties)
        self._generator: torch.Generator | None = None
        self._warpers: list[Any] = []
        self._seed = params.seed
        if params.temperature >= GREEDY_BELOW:
            self._generator = torch.Generator()
            self._warpers = _warpers(params)

    @property
    def is_plain_argmax(self) -> bool:
        """Nothing to apply to the logits: the largest one is the answer."""
        is_free = self.constraint is None and not self._processors and not self._holds_back
        return self._generator is None and is_free

    @property
    def is_over(self) -> bool:
        """The grammar is at its end: nothing may be added."""
        return self.constraint is not None and self.constraint.is_over

    @property
    def _holds_back(self) -> bool:
        return self._num_chosen < self._min_tokens

    def choose(self, logits: torch.Tensor) -> int:
        """The next token id, from ``logits`` (float32, host, shape (vocabulary,)).

        Raises BadLogits where the settings leave no token to choose.
        """
        # Only the repetition penalty reads the tokens, and of those only which there are.
        ids = self._seen.ids if self._seen else torch.empty((1, 0), dtype=torch.int64)
        scores = logits[None, :]
        for processor in self._processors:
            scores = processor(ids, scores)
        if self.constraint:
            scores = self._constrained(ids, scores)
        elif self._holds_back:
            scores = self._hold_back(ids, scores)
        best, best_id = scores.max(dim=-1)
        if not math.isfinite(best):
            raise BadLogits("the request's settings rule out every token that the model allows")
        if self._generator is None:
            return int(best_id)
        for warper in self._warpers:
            scores = warper(ids, scores)
        probabilities = torch.softmax(scores[0], dim=-1)
        self._generator.manual_seed(seed_at(self._seed, self._num_chosen))
        return int(torch.multinomial(probabilities, 1, generator=self._generator))

    def _constrained(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert self.constraint is not None
        scores = self.constraint.apply(scores)
        if self.constraint.error:
            raise GrammarFailed(f"the grammar can not go on: {self.constraint.error}")
        for processor in (self._ignored, self._hold_back if self._holds_back else None):
            held = processor(ids, scores) if processor else scores
            if held.max() > -math.inf:
                scores = held
        return scores

    def count(self, token_id: int) -> None:
        """``token_id`` was chosen."""
        self._num_chosen += 1
        if self.constraint:
            self.constraint.count(token_id)
        if self._seen:
            self._seen.add(token_id)
        if self._penalties:
            self._penalties.count(token_id)
        if self._bad_words:
            self._bad_words.count(token_id)


def seed_at(seed: int, position: int) -> int:
    """The seed of one draw: both numbers mixed by the finaliser of SplitMix64, since a generator
    uses few of a seed's bits, and seeds that are alike begin alike.
    """
    mixed = (seed + (position + 1) * 0x9E3779B97F4A7C15) % 2**64
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
    return mixed ^ mixed >> 31


def _warpers(params: SamplingParams) -> list[Any]:
    """What ``generate`` would apply, in its order, less what changes nothing."""
    warpers: list[Any] = []
    if params.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k > 0:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        warpers.append(TopPLogitsWarper(max(params.top_p, 0.0)))
    if params.min_p > 0.0:
        warpers.append(MinPLogitsWarper(params.min_p))
    return warpers


class CountPenalties:
    """OpenAI's presence and frequency penalties, which transformers has no processor for.

    score - frequency * count - presence * (count > 0), with counts of generated tokens only.
    """

    def __init__(self, presence: float, frequency: float) -> None:
        self._presence = presence
        self._frequency = frequency
        self._counts = torch.zeros(0)  # by token id, as far as any was met

    def count(self, token_id: int) -> None:
        self._reach(token_id + 1)
        self._counts[token_id] += 1

    def _reach(self, num_ids: int) -> None:
        short = num_ids - len(self._counts)
        if short > 0:
            self._counts = torch.nn.functional.pad(self._counts, (0, short))

    def __call__(self, _: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._reach(scores.shape[-1])
        counts = self._counts
        return scores - self._frequency * counts - self._presence * (counts > 0)


class AllowedTokens:
    """Nothing but these is chosen."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._ids = torch.tensor(sorted(set(token_ids)), dtype=torch.int64)

    def __call__(self, _: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        masked = torch.full_like(scores, -math.inf)
        masked[:, self._ids] = scores[:, self._ids]
        return masked


class BadWords:
    """The last token of each of ``words`` is not chosen where the others were just generated.

    transformers' processor for this reads the prompt, too; vLLM's and this one do not.
    """

    def __init__(self, words: Sequence[Sequence[int]]) -> None:
        self._words = [(list(word[:-1]), word[-1]) for word in words]
        self._longest = max(len(before) for before, _ in self._words)
        self._recent: list[int] = []  # generated tokens, as many as can matter

    def count(self, token_id: int) -> None:
        if self._longest:
            self._recent = [*self._recent, token_id][-self._longest :]

    def __call__(self, _: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        recent = self._recent
        last_ids = [
            last for before, last in self._words if not before or recent[-len(before) :] == before
        ]
        if not last_ids:
            return scores
        scores = scores.clone()
        scores[:, last_ids] = -math.inf
        return scores


class _Seen:
    """The distinct tokens of a growing sequence, as a processor takes them.

    The buffer doubles when it is full, so that a step costs no copy of all that came before.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        self._known = set(ids)
        self._buffer = torch.tensor(sorted(self._known), dtype=torch.int64)

    @property
    def ids(self) -> torch.Tensor:
        """Shape (1, distinct tokens)."""
        return self._buffer[None, : len(self._known)]

    def add(self, token_id: int) -> None:
        at = len(self._known)
        self._known.add(token_id)
        if len(self._known) == at:
            return
        if at == len(self._buffer):
            self._buffer = torch.cat([self._buffer, self._buffer.new_zeros(max(at, 64))])
        self._buffer[at] = token_id


def sample(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[Chosen | BadLogits]:
    """The next token of each row of ``logits`` (rows, vocabulary), or why that row has none."""
    best, best_ids = logits.max(dim=-1)
    for one in samplers:
        if one.constraint:
            one.constraint.prepare()  # a GPU is computing what is waited for next
    usable = torch.isfinite(best).tolist()
    greedy = best_ids.tolist()
    travels = [i for i, one in enumerate(samplers) if usable[i] and not one.is_plain_argmax]
    host: dict[int, torch.Tensor] = {}
    if travels:
        host = dict(zip(travels, _rows(logits, travels).to("cpu", torch.float32), strict=True))
    chosen: list[Chosen | BadLogits] = []
    for row, sampler in enumerate(samplers):
        if not usable[row]:
            chosen.append(BadLogits("the model's output is not finite (NaN or infinite logits)"))
            continue
        try:
            token_id = sampler.choose(host[row]) if row in host else greedy[row]
        except BadLogits as error:
            chosen.append(error)
            continue
        sampler.count(token_id)
        chosen.append(Chosen(token_id))
    _tell(logits, samplers, chosen)
    return chosen


def _tell(
    logits: torch.Tensor, samplers: Sequence[Sampler], chosen: list[Chosen | BadLogits]
) -> None:
    """Add log probabilities, natural and of the raw logits, to the rows of ``chosen`` that ask."""
    asked = {
        row: (one, samplers[row].num_logprobs or 0)
        for row, one in enumerate(chosen)
        if isinstance(one, Chosen) and samplers[row].num_logprobs is not None
    }
    if not asked:
        return
    table = torch.log_softmax(_rows(logits, list(asked)).float(), dim=-1)
    ids = torch.tensor([[one.token_id] for one, _ in asked.values()], device=table.device)
    own = table.gather(1, ids).clamp_min(LEAST_LOGPROB)[:, 0].tolist()
    # Always the same number, so that which of equally likely tokens are told does not depend on
    # what other rows ask for.
    num = min(MAX_LOGPROBS, table.shape[-1]) if any(n for _, n in asked.values()) else 0
    values, indices = table.topk(num, dim=-1)
    ranked = zip(indices.tolist(), values.clamp_min(LEAST_LOGPROB).tolist(), strict=True)
    for (row, (one, n)), logprob, (top_ids, top) in zip(asked.items(), own, ranked, strict=True):
        pairs = sorted(zip(top_ids, top, strict=True), key=lambda pair: (-pair[1], pair[0]))
        chosen[row] = replace(one, logprob=logprob, top=tuple(pairs[:n]))


def _rows(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """``rows`` of ``logits``; no copy where these are all of them."""
    return logits if len(rows) == len(logits) else logits[rows]
