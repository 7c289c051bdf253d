"""Choosing tokens: the settings do what they say, and a seed fixes the outcome."""

from typing import Any

import pytest
import torch

from schemas.requests import SamplingParams
from services.gpu_agent.engine.sampling import BadLogits, Chosen, Sampler, sample

VOCABULARY = 50


def logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


def draw(count: int, like: torch.Tensor | None = None, **params: Any) -> list[int]:
    sampler = Sampler(SamplingParams(**{"seed": 1, **params}), ())
    row = (logits() if like is None else like)[None]
    return [token for _ in range(count) for token in ids(sample(row, [sampler]))]


def ids(chosen: list[Chosen | BadLogits]) -> list[int]:
    assert all(isinstance(one, Chosen) for one in chosen), chosen
    return [one.token_id for one in chosen if isinstance(one, Chosen)]


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.0}])
def test_settings_that_mean_greedy(params: dict[str, Any]) -> None:
    assert set(draw(20, **params)) == {int(logits().argmax())}


def test_top_k_and_top_p_cut_the_tail() -> None:
    ranked = logits().argsort(descending=True).tolist()
    assert set(draw(400, top_k=5)) == set(ranked[:5])
    cumulative = torch.softmax(logits(), -1).sort(descending=True).values.cumsum(0)
    kept = int((cumulative < 0.7).sum()) + 1
    assert set(draw(600, top_p=0.7)) <= set(ranked[:kept])


def test_draws_follow_the_probabilities() -> None:
    like = torch.tensor([0.0, 0.0, 1.0]).log()
    like[0], like[1] = 0.0, 1.0
    draws = draw(4000, like=like, temperature=2.0)
    expected = torch.softmax(like / 2.0, -1)
    for token in range(3):
        assert draws.count(token) / 4000 == pytest.approx(float(expected[token]), abs=0.03)


def test_a_seed_fixes_the_draws_whatever_else_is_in_the_batch() -> None:
    alone = draw(30, seed=9)
    assert draw(30, seed=9) == alone != draw(30, seed=10)
    one, other = (Sampler(SamplingParams(seed=s), ()) for s in (9, 10))
    greedy = Sampler(SamplingParams(seed=0, temperature=0.0), ())
    rows = torch.stack([logits(3), logits(), logits(4)])
    assert [ids(sample(rows, [other, one, greedy]))[1] for _ in range(30)] == alone


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 - 1])
def test_any_seed_is_taken(seed: int) -> None:
    assert len(draw(2, seed=seed)) == 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_end_of_sequence_is_held_back_until_min_tokens(temperature: float) -> None:
    row = torch.zeros(1, VOCABULARY)
    row[0, 7], row[0, 8], row[0, 9] = 60.0, 50.0, 40.0
    sampler = Sampler(SamplingParams(seed=0, temperature=temperature, min_tokens=3), {7, 8})
    assert [ids(sample(row, [sampler]))[0] for _ in range(5)] == [9, 9, 9, 7, 7]


def test_rows_without_probabilities_fail_alone() -> None:
    rows = torch.stack([logits(), torch.full((VOCABULARY,), torch.nan), logits()])
    rows[2, 4] = torch.inf
    chosen = sample(rows, [Sampler(SamplingParams(seed=0, temperature=0.0), ()) for _ in rows])
    assert chosen[0] == Chosen(int(logits().argmax()))
    assert isinstance(chosen[1], BadLogits)
    assert isinstance(chosen[2], BadLogits)
    masked = logits()
    masked[3] = -torch.inf  # some models rule tokens out this way
    sampler = Sampler(SamplingParams(seed=0), ())
    assert ids(sample(masked[None], [sampler])) != [3]
