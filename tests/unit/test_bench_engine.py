"""The engine benchmark's own arithmetic: what it asks for, and what it calls equal."""

import itertools
import random
from pathlib import Path

import pytest

from bench import (
    _engine_books,
    _engine_exact,
    _engine_models,
    _engine_preempt,
    _engine_throughput,
)
from bench._engine_exact import Planned, is_equal
from bench._engine_latency import Step, interference
from bench._engine_rig import Answer, Job, Rig, prompt
from services.gpu_agent.ipc import Done


def _ended(tokens: list[int], reason: str = "length", times: int = 1) -> Answer:
    end = Done("x", reason, 1, len(tokens), 0.0, 0.0)  # type: ignore[arg-type]
    return Answer(tokens, [end] * times)


def test_a_plan_is_the_same_every_time_and_fits_the_context() -> None:
    planned = _engine_exact.plan(3, 200)
    assert planned == _engine_exact.plan(3, 200)
    assert planned != _engine_exact.plan(4, 200)
    assert any(one.cancel_after for one in planned)
    for one in planned:
        assert len(one.job.prompt) + one.job.num_tokens <= _engine_models.MAX_LEN
        assert one.cancel_after is None or 0 < one.cancel_after < one.job.num_tokens
    beginnings = [one.job.prompt[: _engine_exact.SHARED_TOKENS] for one in planned]
    assert max(map(beginnings.count, beginnings)) > 20


def test_equal_is_all_tokens_and_one_end() -> None:
    planned = Planned(Job((1,), 3), gap=0)
    assert is_equal(planned, _ended([7, 8, 9]), [7, 8, 9])
    assert not is_equal(planned, _ended([7, 8, 1]), [7, 8, 9])
    assert not is_equal(planned, _ended([7, 8]), [7, 8, 9])
    assert not is_equal(planned, _ended([7, 8, 9], times=2), [7, 8, 9])
    assert not is_equal(planned, _ended([7, 8, 9], times=0), [7, 8, 9])
    assert not is_equal(planned, _ended([7, 8, 9], "cancelled"), [7, 8, 9])


def test_a_cancelled_request_is_equal_as_far_as_it_got() -> None:
    planned = Planned(Job((1,), 4), gap=0, cancel_after=2)
    expected = [7, 8, 9, 10]
    assert is_equal(planned, _ended([7, 8], "cancelled"), expected)
    assert is_equal(planned, _ended([7, 8, 9], "cancelled"), expected)
    assert is_equal(planned, _ended(expected), expected)
    assert not is_equal(planned, _ended([7], "cancelled"), expected)
    assert not is_equal(planned, _ended([7, 9], "cancelled"), expected)
    assert not is_equal(planned, _ended([7, 8]), expected)


def test_requests_of_a_round_have_the_lengths_of_every_round_and_tokens_of_their_own() -> None:
    one, other = _engine_throughput.jobs(1, 24), _engine_throughput.jobs(2, 24)
    assert [(len(a.prompt), a.num_tokens) for a in one] == [
        (len(b.prompt), b.num_tokens) for b in other
    ]
    assert not {job.prompt for job in one} & {job.prompt for job in other}
    assert all(32 <= len(job.prompt) <= 256 and 16 <= job.num_tokens <= 128 for job in one)
    longest = max(len(job.prompt) + job.num_tokens for job in one)
    assert longest <= _engine_throughput.MAX_LEN
    assert _engine_throughput.useful_tokens(one) == sum(job.num_tokens for job in one)


def test_streams_begin_alike_every_time_and_fit_their_row() -> None:
    once = list(itertools.islice(_engine_preempt.stream("a"), 50))
    assert once == list(itertools.islice(_engine_preempt.stream("a"), 50))
    assert len({name for name, _ in once}) == 50
    assert {name for name, _ in once}.isdisjoint(
        name for name, _ in itertools.islice(_engine_preempt.stream("b"), 50)
    )
    assert all(len(job.prompt) + job.num_tokens < _engine_preempt.LONGEST for _, job in once)


def test_a_request_that_was_lost_is_not_equal() -> None:
    taken = _engine_preempt.Taken(tokens={"a0": [1, 2], "a1": [3]}, num_requests=3)
    share = _engine_preempt.share_equal(taken, {"a0": [1, 2], "a1": [4]})
    assert share == pytest.approx(1 / 3)


def test_a_gap_lasts_from_token_to_token() -> None:
    steps = [Step(4.0, False), Step(1.0, True), Step(5.0, False), Step(2.0, True), Step(1.0, True)]
    found = interference(steps)
    assert found.worst_gap == 7.0
    assert found.chunks == (4.0, 5.0)


def test_chunks_in_the_same_steps_as_streams_are_still_chunks() -> None:
    found = interference([Step(3.0, True), Step(2.0, True)])
    assert found.worst_gap == 3.0
    assert found.chunks == (3.0, 2.0)


def test_requests_without_exactly_one_end_are_counted() -> None:
    answers = {"a": _ended([1]), "b": _ended([1], times=0), "c": _ended([1], times=2)}
    assert _engine_books.num_wrong_ends(answers) == 2


def test_books_balance_after_random_requests(tmp_path: Path) -> None:
    place = _engine_models.write_tiny(tmp_path / "wide", _engine_models.WIDE_KV)
    rig = Rig(_engine_books.POOL_BYTES)
    try:
        rig.add(_engine_books.spec(place))
        rig.bring_in(_engine_books.MODEL)
        resident = rig.pool.used_bytes
        seen = _engine_books.play(rig, 80)
        assert seen["suspended"] > 0
        assert seen["cancelled"] > 0
        rig.validate()
        books = rig.books(_engine_books.MODEL)
        assert (books.num_used_blocks, books.num_borrowed_pages, books.num_requests) == (0, 0, 0)
        assert rig.pool.used_bytes == resident
        assert _engine_books.num_wrong_ends(rig.answers) == 0
        assert len(rig.answers) == 80
    finally:
        rig.pool.close()


def test_a_family_answers_as_generate_does(tmp_path: Path) -> None:
    family = "mistral, sliding"
    place = _engine_models.write_tiny(tmp_path / "model", _engine_models.FAMILIES[family]())
    planned = _engine_exact.plan(1, 5)
    reference = _engine_models.reference(place)
    rig = Rig(_engine_exact.POOL_BYTES)
    try:
        rig.add(_engine_models.spec(_engine_exact.MODEL, place))
        rig.bring_in(_engine_exact.MODEL)
        _engine_exact.play(rig, planned, seed=1)
        for number, one in enumerate(planned):
            expected = _engine_models.greedy(reference, one.job.prompt, one.job.num_tokens)
            assert is_equal(one, rig.answers[str(number)], expected)
    finally:
        rig.pool.close()


def test_prompts_hold_no_special_ids() -> None:
    ids = prompt(random.Random(0), 500, 16)
    assert len(ids) == 500
    assert min(ids) >= 4
    assert max(ids) < 16
