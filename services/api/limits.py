"""What is open at once, and how long a body may take. Everything past it is refused, not kept.

| what                                 | bound                                    | then |
| connections                          | max_connections, in `connection`         | 503  |
| a request's head                     | 64 KiB, read_timeout_s, in `connection`  | 431, 408 |
| requests at once                     | max_open_requests                        | 503  |
| requests at once, requests and tokens per minute, of one key | in `quotas`      | 429  |
| a body                               | max_body_bytes                           | 413  |
| all bodies of open requests          | max_open_body_bytes                      | 503  |
| how slowly a body comes              | read_timeout_s, then `MIN_BYTES_PER_S`   | 408  |
| a prompt                             | max_prompt_chars, in `admission`         | 400  |
| what waits for one model             | max_queued_per_model, in the queue       | 429  |
| tokens that a client has not read    | MAX_BUFFERED_TOKENS, in `call`           | it ends |
| bytes that a client does not take    | 64 KiB, write_timeout_s, in `connection` | cut off |
"""

import asyncio
import contextlib
from collections.abc import Iterator

from litestar.types import Receive
from litestar.types.asgi_types import ReceiveMessage

from services.api import refusals

MIN_BYTES_PER_S = 16 * 1024  # a body that comes more slowly is given up


class OpenRequests:
    """Those of this process that may wait for models, and the bytes of their bodies."""

    def __init__(self, max_requests: int, max_bytes: int, read_timeout_s: float) -> None:
        self.num = 0
        self.num_bytes = 0
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._read_timeout_s = read_timeout_s

    @contextlib.contextmanager
    def enter(self) -> Iterator["Body"]:
        """One more, while it lasts. Raises ApiError (503)."""
        if self.num >= self._max_requests:
            what = f"{self.num} requests open, as many as it takes"
            raise refusals.overloaded(what, "api.max_open_requests")
        body = Body(self)
        self.num += 1
        try:
            yield body
        finally:
            self.num -= 1
            self.num_bytes -= body.num_bytes

    def add(self, num_bytes: int) -> None:
        """More of a body has come. Raises ApiError (503)."""
        self.num_bytes += num_bytes
        if self.num_bytes > self._max_bytes:
            what = f"{self.num_bytes} bytes of open requests, more than it takes"
            raise refusals.overloaded(what, "api.max_open_body_bytes")

    def time_for(self, num_bytes: int) -> float:
        """Seconds within which a body has to have more than its first ``num_bytes``."""
        return self._read_timeout_s + num_bytes / MIN_BYTES_PER_S


class Body:
    """One request's body, counted and timed while it comes."""

    def __init__(self, all_open: OpenRequests) -> None:
        self._all = all_open
        self.num_bytes = 0

    def watched(self, receive: Receive) -> Receive:
        """``receive``, which raises ApiError (408, 503) where the body takes too long or too much.

        Once all of it is here, it is ``receive`` itself: it then waits for the client to leave.
        """
        loop = asyncio.get_running_loop()
        began_at = loop.time()
        complete = False

        async def watched_receive() -> ReceiveMessage:
            nonlocal complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(began_at + self._all.time_for(self.num_bytes)):
                    message = await receive()
            except TimeoutError:
                raise refusals.body_timeout(self.num_bytes) from None
            if message["type"] == "http.request":
                num_bytes = len(message.get("body", b""))
                complete = not message.get("more_body", False)
                self.num_bytes += num_bytes
                self._all.add(num_bytes)
            return message

        return watched_receive
