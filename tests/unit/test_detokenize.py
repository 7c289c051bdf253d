"""Text in pieces: whole characters only, stop strings found, nothing lost."""

import random

import pytest

from services.gpu_agent.engine.detokenize import Detokenizer, StopFinder, TextStream
from tests.unit.engine_kit import byte_tokenizer

TOKENIZER = byte_tokenizer()


def ids_of(text: bytes) -> list[int]:
    # One token per byte; latin-1 text would be encoded as UTF-8 first, so go by the alphabet.
    table = {TOKENIZER.decode([i]): i for i in range(256)}
    return [table[chr(byte)] if byte < 128 else _HIGH[byte] for byte in text]


def _high_bytes() -> dict[int, int]:
    """Token id of every byte above 127, found by encoding characters that hold it."""
    found: dict[int, int] = {}
    for char in map(
        chr, [*range(0x80, 0x800), *range(0x800, 0xD800, 0x40), *range(0xE000, 0x110000, 0x1000)]
    ):
        found.update(zip(char.encode(), TOKENIZER.encode(char), strict=True))
    return found


_HIGH = _high_bytes()
TEXT = "Grüße, 世界! 🎉🎉 naïve €5 Ω done"


def test_pieces_are_whole_characters_and_add_up() -> None:
    detokenizer = Detokenizer(TOKENIZER, ids_of(b"prompt"))
    pieces = [detokenizer.push(i) for i in ids_of(TEXT.encode())]
    assert "".join(pieces) == TEXT
    assert all(len(piece) <= 1 for piece in pieces)
    assert detokenizer.flush() == ""


def test_flush_gives_half_a_character_as_replacement() -> None:
    detokenizer = Detokenizer(TOKENIZER, [])
    assert [detokenizer.push(i) for i in ids_of("a€".encode()[:3])] == ["a", "", ""]
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("lowest", [0, 128])
def test_garbage_bytes_are_given_out_in_time_and_in_full(lowest: int) -> None:
    rng = random.Random(4)
    known = [b for b in range(lowest, 256) if b < 128 or b in _HIGH]
    for _ in range(40):
        ids = ids_of(bytes(rng.choices(known, k=60)))
        detokenizer = Detokenizer(TOKENIZER, ids_of(b"prompt"))
        pieces = [detokenizer.push(i) for i in ids]
        assert "".join(pieces) + detokenizer.flush() == TOKENIZER.decode(ids)
        waits = "".join("x" if piece else "." for piece in pieces)
        assert "." * 12 not in waits


def feed(finder: StopFinder, text: str) -> tuple[list[str], bool]:
    pieces = []
    for char in text:
        piece, stopped = finder.push(char)
        pieces.append(piece)
        if stopped:
            return pieces, True
    return [*pieces, finder.flush()], False


@pytest.mark.parametrize(
    ("stops", "text", "given", "stopped"),
    [
        (("END",), "one END two", "one ", True),
        (("END",), "one EN two", "one EN two", False),
        (("END",), "one EN", "one EN", False),
        (("aab",), "aaaab", "aa", True),
        (("xyz", "y"), "axyz", "ax", True),
        (("\n\n",), "a\nb\n\nc", "a\nb", True),
        ((), "END", "END", False),
        (("",), "END", "END", False),
    ],
)
def test_stop_strings(stops: tuple[str, ...], text: str, given: str, stopped: bool) -> None:
    pieces, found = feed(StopFinder(stops), text)
    assert ("".join(pieces), found) == (given, stopped)
    whole, found = StopFinder(stops).push(text)
    assert found == stopped
    assert given.startswith(whole)


def test_a_possible_beginning_is_held_back_until_it_is_certain() -> None:
    finder = StopFinder(("END",))
    assert finder.push("abcE") == ("abc", False)
    assert finder.push("N") == ("", False)
    assert finder.push("E") == ("EN", False)
    assert finder.push("NDx") == ("", True)


def test_stop_strings_wait_for_min_tokens() -> None:
    finder = StopFinder(("b",))
    assert finder.push("abc", may_stop=False) == ("abc", False)
    assert finder.push("ab") == ("a", True)


def test_a_stop_string_across_tokens_with_wide_characters() -> None:
    stream = TextStream(TOKENIZER, [], ["界!"])
    out, stopped = "", False
    for i in ids_of(TEXT.encode()):
        piece, stopped = stream.push(i)
        out += piece
        if stopped:
            break
    assert stopped
    assert out == "Grüße, 世"


def test_the_end_gives_what_was_held_back() -> None:
    stream = TextStream(TOKENIZER, [], ["END"])
    pieces = [stream.push(i)[0] for i in ids_of(b"fine EN")]
    assert "".join(pieces) == "fine "
    assert stream.flush() == ("EN", False)


def test_places_count_whole_characters_also_those_that_are_held_back() -> None:
    stream, places = TextStream(TOKENIZER, [], ["xyz"]), []
    for token_id in ids_of("éxy€!".encode()):
        places.append(stream.num_chars)
        stream.push(token_id)
    assert places == [0, 0, 1, 2, 3, 3, 3, 4]
