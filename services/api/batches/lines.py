"""The input of a batch: JSON lines, checked as a whole before any of them is run.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": ...}}

What is wrong with a line itself fails the batch, with its number. What is wrong with a ``body`` is
found when the line is run, and is that line's own error.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import msgspec

from schemas.batches import BatchEndpoint, BatchError
from services.api.fields import show

MAX_LINES = 50_000  # as OpenAI
MAX_CUSTOM_ID = 512  # characters
MAX_ERRORS = 100  # that are told
MAX_LINE_BYTES = 64 * 2**20


class _Wire(msgspec.Struct):
    custom_id: str
    body: msgspec.Raw
    method: str = ""
    url: str = ""


_decoder = msgspec.json.Decoder(_Wire)


@dataclass(frozen=True)
class Line:
    """One request. ``number``: from 1, blank lines not counted as requests but in the count.

    ``model``: of its body; empty where there is none, which is that line's own error.
    """

    number: int
    custom_id: str
    model: str
    body: bytes


class _Model(msgspec.Struct):
    model: str = ""


async def split(chunks: AsyncIterator[bytes]) -> AsyncIterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1."""
    number = 0
    rest = b""
    async for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            number += 1
            if line.strip():
                yield number, line
        if len(rest) > MAX_LINE_BYTES:
            break  # it is no request, whatever follows
    if rest.strip():
        yield number + 1, rest


def parse(number: int, text: bytes, endpoint: BatchEndpoint, max_bytes: int) -> Line | BatchError:
    """One line of the file. ``max_bytes``: of its body."""
    if number == 1:
        text = text.removeprefix(b"\xef\xbb\xbf")  # some editors begin files so
    try:
        wire = _decoder.decode(text)
    except msgspec.ValidationError as error:
        words, _, where = str(error).partition(" - at `$.")
        param = where.removesuffix("`") or None
        if missing := words.partition("missing required field `")[2]:
            param = missing.removesuffix("`")
        return BatchError("invalid_request", f"This line is not a request: {error}.", number, param)
    except (msgspec.DecodeError, UnicodeDecodeError):
        words = "This line is not parseable as valid JSON."
        return BatchError("invalid_json_line", words, number)
    if not 1 <= len(wire.custom_id) <= MAX_CUSTOM_ID:
        words = f"custom_id must have 1 to {MAX_CUSTOM_ID} characters."
        return BatchError("invalid_custom_id", words, number, "custom_id")
    if wire.method != "POST":
        words = f"method = {show(wire.method)} must be 'POST'."
        return BatchError("invalid_method", words, number, "method")
    if wire.url != endpoint:
        words = f"url = {show(wire.url)} must be the endpoint of the batch, {endpoint!r}."
        return BatchError("invalid_url", words, number, "url")
    body = bytes(wire.body)
    if len(body) > max_bytes:
        words = f"The body has {len(body)} bytes; {max_bytes} are the limit of this server."
        return BatchError("request_too_large", words, number, "body")
    try:
        model = msgspec.json.decode(body, type=_Model).model
    except msgspec.DecodeError:
        model = ""
    return Line(number, wire.custom_id, model, body)


class Input:
    """The lines of a file as they are read, and what is wrong with them."""

    def __init__(self, endpoint: BatchEndpoint, max_bytes: int) -> None:
        self.lines: list[Line] = []
        self.errors: list[BatchError] = []
        self._endpoint = endpoint
        self._max_bytes = max_bytes
        self._numbers: dict[str, int] = {}  # custom id -> line

    @property
    def is_full(self) -> bool:
        """No need to read on."""
        return len(self.errors) >= MAX_ERRORS

    def add(self, number: int, text: bytes) -> None:
        found = parse(number, text, self._endpoint, self._max_bytes)
        if isinstance(found, BatchError):
            self.errors.append(found)
            return
        first = self._numbers.setdefault(found.custom_id, number)
        if first != number:
            words = f"custom_id = {show(found.custom_id)} is that of line {first}, too."
            self.errors.append(BatchError("duplicate_custom_id", words, number, "custom_id"))
        elif len(self.lines) == MAX_LINES:
            words = f"The file has more than {MAX_LINES} requests."
            self.errors = [BatchError("too_many_requests", words)] * MAX_ERRORS
        else:
            self.lines.append(found)

    def end(self) -> tuple[BatchError, ...]:
        """All that is wrong, once the whole file was added."""
        if not self.lines and not self.errors:
            words = "The input file is empty: it must hold at least one request."
            self.errors.append(BatchError("empty_file", words))
        return tuple(dict.fromkeys(self.errors[:MAX_ERRORS]))
