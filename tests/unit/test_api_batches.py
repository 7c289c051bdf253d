"""The pure parts of batches: the life of one, its input, and the lines that come out."""

import itertools
import json
from typing import Any, get_args

import msgspec
import pytest

from schemas.batches import BatchEndpoint, BatchError, BatchRecord, BatchStatus
from schemas.stream import Failed, Finished, RequestTiming, Started, Tokens, Vectors
from services.api.batches import answers, states, wire
from services.api.batches.lines import MAX_ERRORS, Input, Line, parse, split
from services.api.batches.queued import Run
from services.api.embeddings import ParsedEmbeddings
from services.api.errors import ApiError
from services.api.parsing import Parsed

CHAT: BatchEndpoint = "/v1/chat/completions"
RECORD = BatchRecord("batch_1", CHAT, "file-1", "24h", 100, 200, "validating")
BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def text(custom_id: str = "a", **changes: Any) -> bytes:
    line = {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": BODY} | changes
    return json.dumps({key: value for key, value in line.items() if value is not None}).encode()


# -- states --------------------------------------------------------------------------------


def test_every_status_has_a_row_and_each_ends_somewhere() -> None:
    assert set(states.NEXT) == set(get_args(BatchStatus))
    for status in states.NEXT:
        seen = {status}
        while more := {n for s in seen for n in states.NEXT[s]} - seen:
            seen |= more
        assert any(not states.NEXT[s] for s in seen)


@pytest.mark.parametrize(("one", "other"), list(itertools.product(states.NEXT, repeat=2)), ids=str)
def test_moves_are_those_of_the_table(one: BatchStatus, other: BatchStatus) -> None:
    record = msgspec.structs.replace(RECORD, status=one)
    if other in states.NEXT[one]:
        moved = states.moved(record, other, 150.5)
        assert (moved.status, moved.reached) == (other, {other: 150})
    else:
        with pytest.raises(states.InvalidMove, match=f"from {one} to {other}"):
            states.moved(record, other, 150.5)


def test_a_record_shows_when_it_came_where() -> None:
    record = states.moved(states.moved(RECORD, "in_progress", 101), "cancelling", 102)
    shown = wire.batch_object(states.moved(record, "cancelled", 103))
    assert (shown.in_progress_at, shown.cancelling_at, shown.cancelled_at) == (101, 102, 103)
    assert (shown.completed_at, shown.errors, shown.output_file_id) == (None, None, None)
    assert states.has_ended(states.moved(record, "cancelled", 103))


@pytest.mark.parametrize(("words", "seconds"), [("24h", 86400), ("90m", 5400), ("2d", 172800)])
def test_windows(words: str, seconds: int) -> None:
    assert wire.window_s(words) == seconds


@pytest.mark.parametrize("words", ["", "24", "h", "0h", "24H", "15d", "-1h", "1.5h", "30s"])
def test_windows_that_are_none(words: str) -> None:
    with pytest.raises(ApiError, match="completion_window"):
        wire.window_s(words)


# -- input ---------------------------------------------------------------------------------


async def test_files_are_split_wherever_their_chunks_begin() -> None:
    data = b'{"a": 1}\r\n\n  \n{"b": 2}\n{"c": 3}'

    for size in range(1, len(data) + 1):
        found = [one async for one in split(_chunks(data, size))]
        assert [(n, json.loads(t)) for n, t in found] == [
            (1, {"a": 1}),
            (4, {"b": 2}),
            (5, {"c": 3}),
        ]


async def _chunks(data: bytes, size: int) -> Any:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def test_a_good_line() -> None:
    line = parse(7, text("x"), CHAT, 1000)
    assert isinstance(line, Line)
    assert (line.number, line.custom_id, line.model) == (7, "x", "m")
    assert json.loads(line.body) == BODY
    assert isinstance(parse(1, b"\xef\xbb\xbf" + text(), CHAT, 1000), Line)
    assert parse(1, text(body={"model": 7}), CHAT, 1000) == Line(
        1, "a", "", b'{"model":7}'.replace(b":", b": ")
    )


@pytest.mark.parametrize(
    ("line", "code", "param"),
    [
        (b"{", "invalid_json_line", None),
        (b"\xff", "invalid_json_line", None),
        (b"[]", "invalid_request", None),
        (text(custom_id=None), "invalid_request", "custom_id"),  # type: ignore[arg-type]
        (text(custom_id=7), "invalid_request", "custom_id"),  # type: ignore[arg-type]
        (text(body=None), "invalid_request", "body"),
        (text(custom_id=""), "invalid_custom_id", "custom_id"),
        (text(method="GET"), "invalid_method", "method"),
        (text(url="/v1/completions"), "invalid_url", "url"),
        (text(body=BODY | {"user": "x" * 1000}), "request_too_large", "body"),
    ],
)
def test_lines_that_are_wrong(line: bytes, code: str, param: str | None) -> None:
    error = parse(3, line, CHAT, 500)
    assert isinstance(error, BatchError)
    assert (error.code, error.line, error.param) == (code, 3, param)


def test_an_input_tells_all_that_is_wrong_but_not_without_end() -> None:
    found = Input(CHAT, 1000)
    for number in range(1, 500):
        found.add(number, b"{" if number % 2 else text("same"))
    assert found.is_full
    errors = found.end()
    assert len(errors) == MAX_ERRORS
    assert [error.code for error in errors[:4]] == [
        "invalid_json_line",
        "invalid_json_line",
        "duplicate_custom_id",
        "invalid_json_line",
    ]
    assert [error.code for error in Input(CHAT, 1000).end()] == ["empty_file"]


# -- answers -------------------------------------------------------------------------------


def line(body: dict[str, Any] = BODY, number: int = 4) -> Line:
    return Line(number, "mine", "m", json.dumps(body).encode())


def asked(**more: Any) -> Parsed:
    ask = answers.parse(CHAT, line(BODY | more), "batch_1")
    assert isinstance(ask, Parsed)
    return ask


def run(ask: answers.Ask) -> answers.RunAnswer:
    return answers.RunAnswer(ask, answers.request_of(ask, "m", "batch_1-4-1", "r", 1.0, 2.0, "t"))


def finished(num: int, attempt: int = 1, reason: Any = "stop") -> Finished:
    return Finished("batch_1-4-1", attempt, reason, 3, num, RequestTiming())


def test_ids_of_runs_can_be_read_again() -> None:
    assert Run.parse("batch_1-4-2", 9) == Run("batch_1", 4, 2, 9)
    assert Run.parse(Run("batch_1", 4, 2).request_id) == Run("batch_1", 4, 2)
    assert Run.parse("0c78948f45b149fdaa6e5a868a8ce792") is None
    assert Run.parse("a-b-c") is None


def test_a_line_without_a_seed_has_always_the_same() -> None:
    assert asked().sampling == asked().sampling
    assert asked(seed=5).sampling.seed == 5
    other = answers.parse(CHAT, line(number=5), "batch_1")
    assert isinstance(other, Parsed)
    assert other.sampling.seed != asked().sampling.seed


def test_lines_can_not_stream() -> None:
    with pytest.raises(ApiError, match="stream"):
        asked(stream=True)


def test_an_answer_of_two_attempts_is_that_of_the_second() -> None:
    answer = run(asked())
    assert answer.add(Started("batch_1-4-1", "gpu0", 1, "warm")) is None
    assert answer.add(Tokens("batch_1-4-1", 1, 0, (1, 2), "ab")) is None
    assert answer.add(Tokens("batch_1-4-1", 2, 0, (1, 2, 3), "abc")) is None
    assert answer.add(finished(2)) is None  # the first one, late
    body = answer.add(finished(3, attempt=2))
    assert isinstance(body, bytes)
    assert json.loads(body)["choices"][0]["message"]["content"] == "abc"
    told = json.loads(answers.answered(line(), "batch_1-4-1", 200, body))
    assert told["id"] == "batch_req_batch_1-4-1"
    assert (told["custom_id"], told["error"]) == ("mine", None)
    assert told["response"]["status_code"] == 200
    assert told["response"]["body"] == json.loads(body)


def test_what_is_nobodys_fault_is_run_again() -> None:
    gaps = run(asked())
    gaps.add(Tokens("batch_1-4-1", 1, 0, (1,), "a"))
    assert isinstance(gaps.add(finished(3)), answers.Again)
    assert isinstance(run(asked()).add(finished(0, reason="cancelled")), answers.Again)
    gone = Failed("batch_1-4-1", 1, "cancelled", "the agent goes away")
    assert run(asked()).add(gone) == answers.Again("the agent goes away")


def test_failures_have_the_status_that_they_have_over_http() -> None:
    error = run(asked()).add(Failed("batch_1-4-1", 1, "context_length_exceeded", "too long"))
    assert isinstance(error, ApiError)
    assert (error.status, error.info.param) == (400, "messages")


def test_vectors_are_answers_too() -> None:
    body = {"model": "m", "input": ["a", "b"]}
    ask = answers.parse("/v1/embeddings", line(body), "batch_1")
    assert isinstance(ask, ParsedEmbeddings)
    answer = run(ask)
    answer.add(Vectors("batch_1-4-1", 1, 0, 1, b"\0\0\x80?\0\0\0@"))
    told = answer.add(finished(0))
    assert isinstance(told, bytes)
    assert [one["embedding"] for one in json.loads(told)["data"]] == [[1.0], [2.0]]


@pytest.mark.parametrize("code", [answers.CANCELLED, answers.EXPIRED])
def test_lines_that_were_not_run_say_why(code: str) -> None:
    told = json.loads(answers.not_run(line(), "batch_1-4-1", code))
    assert told["response"] is None
    assert told["error"]["code"] == code
    assert told["error"]["message"]
