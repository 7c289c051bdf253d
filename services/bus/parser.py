"""nats-py's parser of the wire, with a short way for what `Bus.listen` hears.

    data -> | whole messages for a listener | anything else, line by line and body by body |
              called at once                  nats-py's own parser, as ever

Most of what a busy service reads is many small messages for one subscription. For those, finding
the lines and calling the listener is all there is to do. Nothing is kept here between two reads;
what is cut off is given to nats-py, which keeps it.
"""

import logging
from collections.abc import Callable
from typing import TypeAlias

from nats.aio.client import Client
from nats.protocol.parser import AWAITING_MSG_PAYLOAD, CRLF_SIZE, Parser

log = logging.getLogger(__name__)

Listener: TypeAlias = Callable[[str, bytes, bytes, str], None]
"""Subject, body, header block as it came (may be empty), reply subject (may be empty)."""


class ListeningParser(Parser):
    """Of one connection. ``listeners``: by subscription, may change at any time."""

    def __init__(self, client: Client) -> None:
        self._num_resets = 0
        super().__init__(client)
        self.listeners: dict[bytes, Listener] = {}

    def reset(self) -> None:
        """A new connection: nothing of the old one is left."""
        self._num_resets += 1
        super().reset()

    async def parse(self, data: bytes = b"") -> None:
        """Take what was read."""
        at, num_resets = 0, self._num_resets
        while at < len(data) and num_resets == self._num_resets:
            if self.state == AWAITING_MSG_PAYLOAD:
                end = at + self.needed + CRLF_SIZE - len(self.buf)
            else:
                if not self.buf:  # else nats-py has the beginning of a line
                    at = self._hear(data, at)
                end = data.find(b"\n", at) + 1 or len(data)
            await super().parse(data[at:end])
            at = end

    def _hear(self, data: bytes, at: int) -> int:
        """Call listeners with the whole messages that begin at ``at``; returns where they end."""
        listeners, find = self.listeners, data.find
        while (line_end := find(b"\r\n", at)) > 0:
            words = data[at:line_end].split()
            if words[0] == b"MSG":  # subject sid [reply] size
                num_words = len(words)
            elif words[0] == b"HMSG":  # subject sid [reply] header-size size
                num_words = len(words) - 1
            else:
                break
            listener = listeners.get(words[2])
            begin = line_end + CRLF_SIZE
            end = begin + int(words[-1])
            if listener is None or end + CRLF_SIZE > len(data):
                break
            headers = b""
            if num_words < len(words):
                body = begin + int(words[-2])
                headers, begin = data[begin:body], body
            reply = words[3].decode() if num_words == 5 else ""
            try:
                listener(words[1].decode(), data[begin:end], headers, reply)
            except Exception:
                log.exception("listener failed on %s", words[1].decode())
            at = end + CRLF_SIZE
        return at
