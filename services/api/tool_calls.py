"""Calls of tools in what a model says, told apart from text as the text comes.

    text ──> ToolParser ──> Said, CallBegun, Arguments, Arguments, ..., Said

Models write calls as they were trained to (`schemas.state.ToolFormat` shows the forms). What may
become a marker or the head of a call is held back until it is one, or can no longer be; arguments
are passed on as they come. A call that breaks off or makes no sense stays text; once its name is
out, its arguments are whatever came.

Pure: text in, events out, the same events however the text is cut.
"""

import json
import re
import secrets
import string
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from schemas.state import ToolFormat

_ALPHABET: Final = string.ascii_letters + string.digits
_MARKER: Final[dict[ToolFormat, str]] = {
    "hermes": "<tool_call>",
    "mistral": "[TOOL_CALLS]",
    "mistral2": "[TOOL_CALLS]",
}
_HERMES_END: Final = "</tool_call>"
_PYTHON_TAG: Final = "<|python_tag|>"  # Llama's; it says nothing
_SPACE: Final = " \t\r\n"
_STRING: Final = r'"(?:[^"\\]|\\.)*"'
_HEAD: Final = re.compile(
    rf'\{{\s*"name"\s*:\s*({_STRING})\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{{)', re.DOTALL
)
_MISTRAL_HEAD: Final = re.compile(
    r"\s*([A-Za-z0-9_.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\])?\s*(?=\{)"
)
# What a head looks like while it is not whole.
_MISTRAL_PART: Final = re.compile(
    r"\s*[A-Za-z0-9_.-]*\s*(?:\[[A-Z_]*)?(?:\]\s*\w*\s*)?(?:\[[A-Z_]*\]?\s*)?"
)


@dataclass(frozen=True, slots=True)
class Said:
    """Text that belongs to no call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """``index``: which one of the answer's calls, from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


Event: TypeAlias = Said | CallBegun | Arguments


@dataclass
class _Balance:
    """Finds the end of a JSON object (or array) in text that comes in pieces."""

    depth: int = 0
    in_string: bool = False
    escaped: bool = False

    def feed(self, text: str) -> int:
        """How much of ``text`` belongs to it; -1: all, and it goes on."""
        for at, char in enumerate(text):
            if self.escaped:
                self.escaped = False
            elif self.in_string:
                self.escaped = char == "\\"
                self.in_string = char != '"'
            elif char == '"':
                self.in_string = True
            elif char in "{[":
                self.depth += 1
            elif char in "}]":
                self.depth -= 1
                if self.depth == 0:
                    return at + 1
        return -1


@dataclass
class ToolParser:
    """One answer's. ``names``: of the tools; ``most``: calls after these many are dropped."""

    format: ToolFormat
    names: Collection[str]
    most: int | None = None
    num_calls: int = 0
    _state: str = "text"  # text, head, arguments, tail
    _buffer: str = ""
    _undo: str = ""  # what stands before the buffer, should it be no call after all
    _space: str = ""  # at the end of the text so far: dropped before a call
    _brackets: int = 0  # open around the arguments, the call's own among them
    _is_array: bool = False
    _has_text: bool = False
    _balance: _Balance = field(default_factory=_Balance)
    _out: list[Event] = field(default_factory=list)

    def push(self, text: str) -> list[Event]:
        """What ``text`` makes certain."""
        self._buffer += text
        while self._buffer and self._advance():
            pass
        return self._take()

    def finish(self) -> list[Event]:
        """What was held back, now that nothing more comes."""
        if self._state in ("text", "head"):
            self._say(self._undo + self._buffer)
            if not self.num_calls:
                self._say_space()
        self._buffer = self._undo = ""
        return self._take()

    def _take(self) -> list[Event]:
        out, self._out = self._out, []
        return out

    # -- one step, False where more text is needed -------------------------------------------

    def _advance(self) -> bool:
        match self._state:
            case "text":
                return self._find_marker() if self.format in _MARKER else self._find_bracket()
            case "head":
                return self._read_head()
            case "arguments":
                return self._read_arguments()
            case _:
                return self._read_tail()

    def _find_marker(self) -> bool:
        marker = _MARKER[self.format]
        at = self._buffer.find(marker)
        if at < 0:
            keep = _overlap(self._buffer, marker)
            self._say(self._cut(len(self._buffer) - keep))
            return False
        self._say(self._cut(at))
        self._undo = self._cut(len(marker))
        self._state = "head"
        return True

    def _find_bracket(self) -> bool:
        """A call is all there is, from the first character on."""
        text = self._buffer.lstrip(_SPACE)
        if not self._has_text and not self.num_calls:
            if not text or _PYTHON_TAG.startswith(text):
                return False
            text = text.removeprefix(_PYTHON_TAG).lstrip(_SPACE)
            if not text:
                return False
            if text[0] in "{[":
                self._undo = self._buffer[: len(self._buffer) - len(text)]
                self._buffer, self._state = text, "head"
                return True
        self._say(self._cut(len(self._buffer)))
        return False

    def _read_head(self) -> bool:
        skipped = len(self._buffer) - len(self._buffer.lstrip(_SPACE))
        first = self._buffer[skipped : skipped + 1]
        if not first:
            return False
        if first == "[" and not self._is_array and self.format != "hermes":
            self._undo += self._cut(skipped + 1)
            self._is_array = True
            return True
        if first != "{":
            return self._read_mistral_head()
        if found := _HEAD.match(self._buffer, skipped):
            name = json.loads(found[1], strict=False)
            if self.format in _MARKER or name in self.names:
                return self._begin(name, found.end(), brackets=1)
            return self._is_text()
        end = _Balance().feed(self._buffer[skipped:])
        if end < 0:
            return False
        return self._read_whole(self._buffer[skipped : skipped + end], skipped + end)

    def _read_whole(self, text: str, end: int) -> bool:
        """A call whose parts are in another order."""
        try:
            call = json.loads(text)
        except ValueError:
            return self._is_text()
        name = call.get("name")
        arguments = call.get("arguments", call.get("parameters"))
        known = self.format in _MARKER or name in self.names
        if not isinstance(name, str) or not known:
            return self._is_text()
        if isinstance(arguments, str):  # JSON text, as in OpenAI's own form
            given = arguments
        elif isinstance(arguments, dict):
            given = json.dumps(arguments, ensure_ascii=False)
        else:
            return self._is_text()
        self._begin(name, end, brackets=0)
        self._tell(given)
        self._state = "tail"
        return True

    def _read_mistral_head(self) -> bool:
        if self.format not in ("mistral", "mistral2"):
            return self._is_text()
        if found := _MISTRAL_HEAD.match(self._buffer):
            return self._begin(found[1], found.end(), brackets=0)
        return False if _MISTRAL_PART.fullmatch(self._buffer) else self._is_text()

    def _begin(self, name: str, end: int, brackets: int) -> bool:
        self._cut(end)
        self._undo = self._space = ""
        self._brackets = brackets
        self._balance = _Balance()
        self._state = "arguments"
        if self.most is None or self.num_calls < self.most:
            self._out.append(CallBegun(self.num_calls, self._new_id(), name))
        self.num_calls += 1
        return True

    def _read_arguments(self) -> bool:
        end = self._balance.feed(self._buffer)
        self._tell(self._cut(len(self._buffer) if end < 0 else end))
        if end < 0:
            return False
        self._balance = _Balance(depth=self._brackets)
        self._state = "tail"
        return True

    def _read_tail(self) -> bool:
        """Out of the call, and to the next one where there is one."""
        if self._brackets:  # what else the call says (an id, say), and its last bracket
            end = self._balance.feed(self._buffer)
            self._cut(len(self._buffer) if end < 0 else end)
            self._brackets = 0 if end >= 0 else 1
            return end >= 0
        text = self._buffer.lstrip(_SPACE)
        if not text:
            return False
        separators = {"hermes": _HERMES_END, "llama": ";", "mistral2": ""}
        separator = "," if self._is_array else separators.get(self.format, "")
        if self._is_array and text[0] == "]":
            self._buffer, self._is_array, self._state = text[1:], False, "text"
        elif separator and text.startswith(separator):
            self._buffer = text[len(separator) :]
            self._state = "text" if self.format == "hermes" else "head"
        elif separator and separator.startswith(text):
            return False
        else:
            self._buffer, self._is_array, self._state = text, False, "text"
        return True

    # -- out -----------------------------------------------------------------------------------

    def _cut(self, size: int) -> str:
        """The first ``size`` characters of the buffer, taken out of it."""
        text, self._buffer = self._buffer[:size], self._buffer[size:]
        return text

    def _is_text(self) -> bool:
        """What looked like a call is none."""
        undo, self._undo = self._undo, ""
        self._state, self._is_array = "text", False
        if self.format not in _MARKER:
            self._buffer = undo + self._buffer
            self._has_text = True
        else:  # look for the marker from behind this one on
            self._say(undo)
        return True

    def _say(self, text: str) -> None:
        """Blanks wait for what comes after them: before a call they are not told."""
        words = text.rstrip(_SPACE)
        if words:
            if self.num_calls and not self._has_text:
                self._space, words = "", words.lstrip(_SPACE)
            self._has_text = True
            self._out.append(Said(self._space + words))
            self._space = ""
        self._space += text[len(text.rstrip(_SPACE)) :]

    def _say_space(self) -> None:
        if self._space:
            self._out.append(Said(self._space))
            self._space = ""

    def _tell(self, arguments: str) -> None:
        index = self.num_calls - 1
        if arguments and (self.most is None or index < self.most):
            self._out.append(Arguments(index, arguments))

    def _new_id(self) -> str:
        if self.format in ("mistral", "mistral2"):  # their templates take ids of 9 only
            return "".join(secrets.choice(_ALPHABET) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of ``text`` with which ``marker`` begins (not all of it)."""
    sizes = range(min(len(text), len(marker) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(marker[:size])), 0)
