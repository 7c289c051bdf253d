"""Choosing the next token from logits.

Each request draws from its own generator on the host, so what it draws depends on its seed
and its own logits only: not on the device, nor on the other requests in the batch. (The
logits themselves differ by rounding, about 1e-6, between batch shapes, as in any engine.)
"""

from collections.abc import Collection, Sequence
from typing import Any, Final

import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from schemas.requests import SamplingParams

# Below this, dividing by the temperature overflows long before it changes the choice.
GREEDY_BELOW: Final = 1e-5


class BadLogits(Exception):
    """The model gave no usable probabilities (NaN or all -inf) for this request."""


class Sampler:
    """One request's way to choose. ``eos_ids`` are held back until ``min_tokens``."""

    def __init__(self, params: SamplingParams, eos_ids: Collection[int]) -> None:
        self._num_chosen = 0
        self._min_tokens = params.min_tokens if eos_ids else 0
        self._processors: Any = LogitsProcessorList()
        self._generator: torch.Generator | None = None
        if self._min_tokens:
            self._processors.append(
                MinNewTokensLengthLogitsProcessor(0, self._min_tokens, sorted(eos_ids))
            )
        if params.temperature >= GREEDY_BELOW:
            self._generator = torch.Generator().manual_seed(params.seed % 2**63)
            self._processors.extend(_warpers(params))

    @property
    def is_plain_argmax(self) -> bool:
        """Nothing to apply to the logits: the largest one is the answer."""
        return self._generator is None and self._num_chosen >= self._min_tokens

    def choose(self, logits: torch.Tensor) -> int:
        """The next token id, from ``logits`` (float32, host, shape (vocabulary,))."""
        # The processors read nothing of the tokens so far but how many there are.
        so_far = torch.empty((1, self._num_chosen), dtype=torch.int64)
        scores = self._processors(so_far, logits[None, :])
        if self._generator is None:
            return int(scores.argmax())
        probabilities = torch.softmax(scores[0], dim=-1)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))

    def count(self) -> None:
        """One more token was chosen."""
        self._num_chosen += 1


def _warpers(params: SamplingParams) -> list[Any]:
    """What ``generate`` would apply, in its order, less what changes nothing."""
    warpers: list[Any] = []
    if params.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k > 0:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        warpers.append(TopPLogitsWarper(max(params.top_p, 0.0)))
    return warpers


def sample(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int | BadLogits]:
    """One token id per row of ``logits`` (rows, vocabulary), or why that row has none.

    Plain greedy rows are decided on the device; only the others' logits travel to the host.
    """
    best, best_ids = logits.max(dim=-1)
    usable = torch.isfinite(best).tolist()
    greedy = best_ids.tolist()
    chosen: list[int | BadLogits] = []
    for row, sampler in enumerate(samplers):
        if not usable[row]:
            chosen.append(BadLogits("the model's output is not finite (NaN or infinite logits)"))
            continue
        if sampler.is_plain_argmax:
            chosen.append(greedy[row])
        else:
            chosen.append(sampler.choose(logits[row].to("cpu", torch.float32)))
        sampler.count()
    return chosen
