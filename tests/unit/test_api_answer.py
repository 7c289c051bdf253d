"""Several runs of one request become one unbroken answer."""

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.stream import Finished, PromptTold, RequestTiming, TokenLogprob, TokenLogprobs, Tokens
from services.api.answer import Answer, Diverged, Piece

TEXTS = ["Once", " upon", "", " a", " ti", "me", ""]
IDS = tuple(range(10, 10 + len(TEXTS)))


def chunk(start: int, end: int, attempt: int = 1) -> Tokens:
    """Tokens ``start`` to ``end`` of the one true answer."""
    return Tokens("r", attempt, start, IDS[start:end], "".join(TEXTS[start:end]))


def finished(num_tokens: int, text: str = "") -> Finished:
    return Finished("r", 1, "stop", 3, num_tokens, RequestTiming(), text)


def test_a_second_run_adds_only_what_is_new() -> None:
    answer = Answer()
    assert answer.add(chunk(0, 2)) == Piece("Once upon", token_ids=IDS[:2])
    assert answer.add(chunk(0, 1)) is None
    assert answer.add(chunk(1, 2)) is None
    assert answer.add(chunk(2, 4)) == Piece(" a", token_ids=IDS[2:4])
    assert answer.token_ids == list(IDS[:4])


def test_a_chunk_that_straddles_is_split() -> None:
    answer = Answer()
    answer.add(chunk(0, 1))
    answer.add(chunk(1, 2))
    assert answer.add(chunk(0, 4)) == Piece(" a", token_ids=IDS[2:4])
    assert answer.add(chunk(3, 6)) is None  # begins inside a chunk: wait for the run's end
    assert answer.add(chunk(4, 6)) == Piece(" time", token_ids=IDS[4:6])


def test_log_probabilities_stay_with_their_tokens() -> None:
    told = [
        TokenLogprobs(TokenLogprob(token_id, -0.5, text), offset=i)
        for i, (token_id, text) in enumerate(zip(IDS, TEXTS, strict=True))
    ]

    def with_logprobs(start: int, end: int) -> Tokens:
        return msgspec.structs.replace(chunk(start, end), logprobs=tuple(told[start:end]))

    answer = Answer()
    assert answer.add(with_logprobs(0, 2)) == Piece("Once upon", tuple(told[:2]), IDS[:2])
    assert answer.add(with_logprobs(2, 3)) == Piece("", tuple(told[2:3]), IDS[2:3])
    assert answer.add(with_logprobs(0, 3)) is None
    assert answer.add(with_logprobs(0, 6)) == Piece(" a time", tuple(told[3:6]), IDS[3:6])


def test_what_is_told_of_the_prompt_comes_with_the_first_token_of_any_run() -> None:
    answer = Answer()
    answer.add(chunk(1, 2))  # the first one was lost
    assert answer.prompt is None
    answer.add(msgspec.structs.replace(chunk(0, 1, attempt=2), prompt=PromptTold(3, (7, 8, 9))))
    answer.add(chunk(1, 2, attempt=2))
    assert answer.prompt == PromptTold(3, (7, 8, 9))


def test_other_tokens_or_other_text_are_noticed() -> None:
    answer = Answer()
    answer.add(chunk(0, 3))
    with pytest.raises(Diverged, match="at token 0"):
        answer.add(Tokens("r", 2, 0, (99,), "Once"))
    with pytest.raises(Diverged):
        answer.add(Tokens("r", 2, 0, IDS[:1], "Twice"))


def test_a_run_goes_on_behind_what_is_known() -> None:
    answer = Answer()
    answer.add(chunk(0, 3))
    assert not answer.has_gap_before(chunk(3, 4))
    assert answer.add(chunk(3, 5, attempt=2)) == Piece(" a ti", (), IDS[3:5])
    assert answer.has_gap_before(chunk(6, 7))
    assert not answer.has_gap_before(chunk(0, 7))


def test_lost_chunks_are_counted_at_the_end() -> None:
    answer = Answer()
    answer.add(chunk(0, 2))
    assert answer.add(chunk(4, 6)) is None
    assert answer.missing(finished(6)) == 4
    answer.add(chunk(2, 6, attempt=2))
    assert answer.missing(finished(6)) == 0
    assert answer.finish(finished(6, "!")) == "!"


def test_older_attempts_are_stale() -> None:
    answer = Answer()
    assert answer.num_attempts("r") == 0
    assert not answer.is_stale("r", 1)
    assert not answer.is_stale("r", 2)
    assert answer.is_stale("r", 1)
    assert not answer.is_stale("r-r2", 1)
    assert (answer.num_attempts("r"), answer.num_attempts("r-r2")) == (2, 1)


@given(st.lists(st.lists(st.integers(1, 3), max_size=4), min_size=1, max_size=4))
def test_any_sequence_of_runs_gives_a_prefix_of_the_answer(runs: list[list[int]]) -> None:
    """Runs cut into chunks of any size, each run broken off anywhere, then a whole one."""
    answer = Answer()
    got: list[str] = []
    for sizes in [*runs, [1] * len(TEXTS)]:
        ends = [min(end, len(TEXTS)) for end in itertools.accumulate(sizes)]
        for start, end in itertools.pairwise([0, *ends]):
            if piece := answer.add(chunk(start, end)):
                got.append(piece.text)
            assert "".join(TEXTS).startswith("".join(got))
    assert "".join(got) == "".join(TEXTS)
    assert answer.token_ids == list(IDS)
