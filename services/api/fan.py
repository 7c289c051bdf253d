"""Several calls that make one answer: ``n`` choices for each prompt, each a request of its own.

    prompt 0 ──> choice 0, choice 1      ids    ID-c0  ID-c1  ID-c2  ID-c3   (ID, where it is one)
    prompt 1 ──> choice 2, choice 3      seeds  S      S+1    S      S+1

The seed goes with the place among the choices of one prompt, so a prompt is answered the same
alone or among others; where the client gave none, every choice has one of its own. Choices run
on the queue like other requests, and share what the engine caches of their prompt.

All of them end together: where one fails, or the client leaves, the others are taken back.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeAlias

import msgspec

from schemas.requests import Prompt, SamplingParams
from schemas.stream import Finished
from services.api.answer import Piece
from services.api.call import Call
from services.api.errors import ApiError, invalid
from services.api.parsing import SEED_BITS, Parsed
from services.api.relay import Relay

# What comes of one choice, by its index: pieces, then its end.
Told: TypeAlias = tuple[int, Piece | Finished]
# Queues one request, under the id given.
OpenOne: TypeAlias = Callable[[str, Prompt, SamplingParams], Awaitable[Call]]


async def open_fan(parsed: Parsed, request_id: str, relay: Relay, open_one: OpenOne) -> "Fan":
    """Queue all that ``parsed`` asks for. Raises ApiError, after which nothing is queued."""
    num = parsed.form.n * len(parsed.prompts)
    if num > relay.max_queued:
        words = f"{num} choices are asked for (n times prompts); a queue of this server holds "
        raise invalid("n", f"{words}{relay.max_queued} requests.")
    if num == 1:
        call = await open_one(request_id, parsed.prompts[0], parsed.sampling)
        return Fan(parsed, relay, request_id, [call])
    opening = [
        asyncio.ensure_future(open_one(f"{request_id}-c{index}", prompt, sampling))
        for index, (prompt, sampling) in enumerate(_choices(parsed))
    ]
    try:
        await asyncio.gather(*opening, return_exceptions=True)
    except asyncio.CancelledError:
        # Those still on their way were cancelled, too, and took themselves back.
        for one in opening:
            if not one.cancelled() and not one.exception():
                relay.client_left(one.result())
        raise
    failures = [error for one in opening if (error := one.exception())]
    if failures:
        for one in opening:
            if not one.exception():
                relay.choice_failed(one.result())
        raise failures[0]
    return Fan(parsed, relay, request_id, [one.result() for one in opening])


def _choices(parsed: Parsed) -> Iterator[tuple[Prompt, SamplingParams]]:
    """Prompt after prompt, all choices of each."""
    for prompt in parsed.prompts:
        for place in range(parsed.form.n):
            seed = (parsed.sampling.seed + place) & SEED_BITS
            if not parsed.is_seeded:
                seed = secrets.randbits(63)
            yield prompt, msgspec.structs.replace(parsed.sampling, seed=seed)


class Choices:
    """The calls of one answer, by choice."""

    def __init__(self, parsed: Parsed, request_id: str, calls: list[Call]) -> None:
        self.calls = calls
        self.num_prompts = len(parsed.prompts)
        self.request_id = request_id
        self._n = parsed.form.n

    @property
    def lead(self) -> Call:
        """The one that tells how all were served: the first that began."""
        return next((call for call in self.calls if call.started), self.calls[0])

    def choices_of(self, prompt: int) -> list[Call]:
        """The calls of one prompt."""
        return self.calls[prompt * self._n : (prompt + 1) * self._n]

    def prompt_of(self, index: int) -> int:
        """Which prompt a choice answers."""
        return index // self._n


class Fan(Choices):
    """One answer, as the HTTP side reads it while it comes."""

    def __init__(self, parsed: Parsed, relay: Relay, request_id: str, calls: list[Call]) -> None:
        super().__init__(parsed, request_id, calls)
        self._relay = relay
        self._open = dict(enumerate(calls))  # not read to their end
        self._news = asyncio.Event()
        for call in calls:
            call.news = self._news

    @property
    def is_complete(self) -> bool:
        """All has been read."""
        return not self._open

    async def has_news(self, within_s: float) -> bool:
        """Whether `read` has something to say at once, now or ``within_s`` seconds from now."""
        if self._open and not any(call.has_news for call in self._open.values()):
            self._news.clear()
            try:
                async with asyncio.timeout(within_s):
                    await self._news.wait()
            except TimeoutError:
                return False
        return True

    async def read(self) -> list[Told]:
        """What came since the last call, each choice's in order; [] once all are complete.

        Waits until there is something. Raises ApiError or ClientLeft where one of them ended so.
        """
        while self._open:
            self._news.clear()
            told: list[Told] = []
            ended: list[int] = []
            failure: ApiError | None = None
            for index, call in self._open.items():
                try:
                    pieces = call.take()
                except ApiError as error:
                    failure = failure or error
                    continue
                told += [(index, piece) for piece in pieces]
                if call.finished:
                    told.append((index, call.finished))
                    ended.append(index)
            for index in ended:
                del self._open[index]
            if told:
                return told  # a failure is there next time, too
            if failure:
                raise failure
            await self._news.wait()
        return []

    def close(self) -> None:
        """Nobody reads on: take back what has not ended."""
        has_failed = any(call.has_failed for call in self.calls)
        for call in self.calls:
            if has_failed:
                self._relay.choice_failed(call)
            else:
                self._relay.client_left(call)
