r"""Events of a stream that differ in their text alone, encoded once and filled in for each token.

b'data: {"id":"cmpl-1", ... "text":' + b'" time"' + b', ... }\n\n'
 `------------ once -------------'    `- each -'   `-- once --'
"""

from collections.abc import Callable

import msgspec

_encode = msgspec.json.Encoder().encode
_MARK = "\0text\0"  # nothing that stands in an event before or behind its text


class Frame:
    """``make`` gives the whole event for a text."""

    def __init__(self, make: Callable[[str], bytes]) -> None:
        event = make(_MARK)
        self._before, mark, self._behind = event.rpartition(_encode(_MARK))
        if not mark:
            raise ValueError(f"no place for a text in {event!r}")

    def fill(self, text: str) -> bytes:
        """The event with ``text``."""
        return self._before + _encode(text) + self._behind
