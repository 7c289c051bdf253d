"""Penalties, biases, min_p and log probabilities: as transformers' generate, OpenAI and vLLM."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessorList

from schemas.requests import SamplingParams
from services.gpu_agent.engine.sampling import (
    LEAST_LOGPROB,
    BadLogits,
    Chosen,
    InvalidSampling,
    Sampler,
    check,
    sample,
    seed_at,
)
from tests.unit import tiny_models

PROMPT = [5, 17, 200, 17, 44, 3]
NUM_NEW = 24
VOCABULARY = tiny_models.VOCABULARY


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tiny_models.write(tmp_path_factory.mktemp("settings"), "llama")
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def params(**settings: Any) -> SamplingParams:
    return SamplingParams(**{"seed": 7, "temperature": 0.0, **settings})


def row(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 40, generator=torch.Generator().manual_seed(seed)) * 2


def one(logits: torch.Tensor, sampler: Sampler) -> Chosen:
    [chosen] = sample(logits, [sampler])
    assert isinstance(chosen, Chosen), chosen
    return chosen


def ours(model: Any, sampling: SamplingParams, end_ids: tuple[int, ...] = ()) -> list[int]:
    """Token by token through `sample`, every logit computed anew."""
    ids, sampler = list(PROMPT), Sampler(sampling, end_ids, PROMPT)
    with torch.inference_mode():
        for _ in range(NUM_NEW):
            logits = model(input_ids=torch.tensor([ids])).logits[:, -1]
            ids.append(one(logits, sampler).token_id)
    return ids[len(PROMPT) :]


class SeededByPosition:
    """Has ``generate`` draw each token from seed and position, as ours does."""

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(seed_at(7, ids.shape[1] - len(PROMPT)))
        return scores


def theirs(model: Any, **settings: Any) -> list[int]:
    ids = torch.tensor([PROMPT])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NUM_NEW,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([SeededByPosition()]),
        **{"eos_token_id": None, "do_sample": False, **settings},
    )
    return [int(i) for i in out[0, len(PROMPT) :]]


@pytest.mark.parametrize("penalty", [0.7, 1.3, 2.0])
def test_repetition_penalty_is_that_of_generate(model: Any, penalty: float) -> None:
    wanted = theirs(model, repetition_penalty=penalty)
    assert ours(model, params(repetition_penalty=penalty)) == wanted
    assert wanted != theirs(model)


def test_logit_bias_is_the_sequence_bias_of_generate(model: Any) -> None:
    plain = theirs(model)
    bias = {plain[0]: -100.0, plain[1]: -3.5, 9: 2.0, 0: 1.0}
    wanted = theirs(model, sequence_bias={(token,): value for token, value in bias.items()})
    assert ours(model, params(logit_bias=bias)) == wanted
    assert plain[0] not in wanted


@pytest.mark.parametrize(
    "settings",
    [
        {"min_p": 0.3},
        {"temperature": 1.7, "min_p": 0.05},
        {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 1.2, "repetition_penalty": 1.4, "top_p": 0.8},
    ],
)
def test_draws_are_those_of_generate(model: Any, settings: dict[str, float]) -> None:
    """The same filters in the same order: with one seed, the very same tokens."""
    wanted = theirs(model, do_sample=True, **{"top_k": 0, "temperature": 1.0, **settings})
    assert ours(model, params(**{"temperature": 1.0, **settings})) == wanted


def test_min_p_keeps_what_is_likely_enough() -> None:
    probabilities = torch.softmax(row()[0], -1)
    kept = {int(i) for i in (probabilities >= 0.2 * probabilities.max()).nonzero()}
    sampler = Sampler(params(temperature=1.0, min_p=0.2), ())
    assert {one(row(), sampler).token_id for _ in range(400)} == kept


def test_presence_and_frequency_count_generated_tokens() -> None:
    """Against OpenAI's formula, written out. The prompt's tokens are not counted."""
    presence, frequency = 0.9, 0.4
    first = int(row().argmax())
    sampler = Sampler(
        params(presence_penalty=presence, frequency_penalty=frequency), (), [first] * 9
    )
    counts: Counter[int] = Counter()
    for _ in range(30):
        scores = row()[0].clone()
        for token, count in counts.items():
            scores[token] -= frequency * count + presence
        chosen = one(row(), sampler).token_id
        assert chosen == int(scores.argmax())
        counts[chosen] += 1
    assert counts[first] > 1
    assert len(counts) > 3


def test_negative_penalties_repeat() -> None:
    even = torch.zeros(1, 6)
    even[0, 2] = 0.01
    nearly = torch.zeros(1, 6)
    nearly[0, 4] = 0.5
    sampler = Sampler(params(presence_penalty=-1.0), ())
    assert [one(logits, sampler).token_id for logits in (even, nearly, nearly)] == [2, 2, 2]


def test_stop_token_ids_are_held_back_like_the_ends() -> None:
    logits = torch.zeros(1, 10)
    logits[0, 7], logits[0, 8], logits[0, 9] = 60.0, 50.0, 40.0
    sampler = Sampler(params(min_tokens=2, stop_token_ids=(8,)), {7})
    assert [one(logits, sampler).token_id for _ in range(3)] == [9, 9, 7]
    sampler = Sampler(params(min_tokens=2, stop_token_ids=(7,), logit_bias={7: 100}), ())
    assert [one(logits, sampler).token_id for _ in range(3)] == [8, 8, 7]


def test_settings_that_leave_no_token_fail_their_row_alone() -> None:
    only_end = torch.full((2, 5), -torch.inf)
    only_end[:, 3] = 1.0
    held = Sampler(params(temperature=1.0, min_tokens=1), {3})
    bad, good = sample(only_end, [held, Sampler(params(), ())])
    assert isinstance(bad, BadLogits)
    assert good == Chosen(3)


# -- log probabilities -----------------------------------------------------------------------


def test_logprobs_are_those_of_the_raw_logits() -> None:
    """Whatever the settings do to the choice."""
    table = torch.log_softmax(row()[0], -1)
    top = table.topk(3)
    banned = int(table.argmax())
    settings = {"temperature": 1.4, "top_k": 4, "logit_bias": {banned: -100.0}}
    sampler = Sampler(params(**settings, logprobs=3), ())
    for _ in range(20):
        chosen = one(row(), sampler)
        assert chosen.token_id != banned
        assert chosen.logprob == pytest.approx(float(table[chosen.token_id]))
        assert [token for token, _ in chosen.top] == top.indices.tolist()
        assert [value for _, value in chosen.top] == pytest.approx(top.values.tolist())


def test_only_rows_that_ask_get_logprobs_and_nobody_draws_otherwise() -> None:
    rows = torch.cat([row(1), row(2), row(3)])

    def draw(*num_logprobs: int | None) -> list[Chosen | BadLogits]:
        return sample(
            rows,
            [Sampler(params(temperature=t, logprobs=n), ()) for t, n in enumerate(num_logprobs)],
        )

    without, told = draw(None, None, None), draw(0, None, 20)
    for before, after in zip(without, told, strict=True):
        assert isinstance(before, Chosen)
        assert isinstance(after, Chosen)
        assert before == Chosen(after.token_id)
    zero, none, many = told
    assert isinstance(zero, Chosen)
    assert isinstance(many, Chosen)
    assert zero.logprob is not None
    assert zero.top == ()
    assert none == without[1]
    assert len(many.top) == 20


def test_equal_logits_are_told_in_the_order_of_their_ids() -> None:
    chosen = one(torch.zeros(1, 6), Sampler(params(logprobs=6), ()))
    assert [token for token, _ in chosen.top] == list(range(6))
    assert chosen.logprob == pytest.approx(-math.log(6))


def test_no_logprob_is_infinite() -> None:
    masked = torch.full((1, 4), -torch.inf)
    masked[0, 2] = 3.0
    chosen = one(masked, Sampler(params(logprobs=20), ()))
    assert chosen.top[0] == (2, 0.0)
    assert [value for _, value in chosen.top[1:]] == [LEAST_LOGPROB] * 3


# -- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"logit_bias": {VOCABULARY: 1.0}}, "logit_bias names token id 256, .* 0 to 255"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias names token id -1"),
        ({"logit_bias": {3: 100.5}}, "logit_bias of token 3 = 100.5"),
        ({"logit_bias": {3: math.nan}}, "logit_bias of token 3"),
        ({"stop_token_ids": (3, 900)}, "stop_token_ids names token id 900"),
        ({"min_p": 1.5}, "min_p = 1.5 must be between 0 and 1"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0"),
        ({"presence_penalty": 2.5}, "presence_penalty = 2.5"),
        ({"logprobs": 21}, "logprobs = 21 must be between 0 and 20"),
    ],
)
def test_settings_that_cannot_be_followed(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidSampling, match=words):
        check(params(**settings), VOCABULARY)


def test_the_limits_themselves_are_fine() -> None:
    settings = {"logit_bias": {0: -100, 255: 100}, "stop_token_ids": (0, 255), "logprobs": 20}
    check(params(**settings, min_p=1.0, presence_penalty=-2.0, temperature=2.0), VOCABULARY)
