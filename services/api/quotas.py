r"""How much a key may ask for: requests and tokens per minute, and requests at once. Pure.

Rates are token buckets: a full minute's worth may come in a burst, and what was used comes back
evenly::

    level     limit |\    ,-'--     request: must find 1, takes 1
                    | \,-'          answer:  takes what it used, when it ends; the level may fall
                  0 |-----------    below 0 then, and nothing is admitted until it is above again

So no tokens are guessed in advance, and a key that uses more than its share pays for it after.
The counts are this process's: of several behind one balancer, each allows as much (decision 28).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from schemas.keys import KeyRecord
from services.api import refusals

MINUTE_S = 60.0


class TokenBucket:
    """``limit`` per minute, full at first. ``now``: monotonic seconds."""

    def __init__(self, limit: int, now: float) -> None:
        self.limit = limit
        self._level = float(limit)
        self._at = now

    def level(self, now: float) -> float:
        """What may be taken; below 0 where more was charged than there was."""
        refill = max(0.0, now - self._at) * self.limit / MINUTE_S
        return min(float(self.limit), self._level + refill)

    def charge(self, amount: float, now: float) -> None:
        """Take it, whether it is there or not."""
        self._level, self._at = self.level(now) - amount, max(now, self._at)

    def wait_s(self, amount: float, now: float) -> float:
        """How long until ``amount`` is there; 0: it is."""
        return max(0.0, amount - self.level(now)) * MINUTE_S / self.limit

    def reset_s(self, now: float) -> float:
        """How long until it is full again."""
        return self.wait_s(self.limit, now)

    def set_limit(self, limit: int, now: float) -> None:
        """From now on; what was used stays used."""
        used = self.limit - self.level(now)
        self.limit, self._level, self._at = limit, limit - used, now


@dataclass
class _Account:
    """What one key has used."""

    num_open: int = 0
    buckets: dict[str, TokenBucket] = field(default_factory=dict)  # requests, tokens


class Quotas:
    """The accounts of all keys that have limits."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}

    def enter(self, record: KeyRecord, now: float) -> None:
        """A request with this key begins. Raises ApiError (429): then it has not begun."""
        account = self._account(record, now)
        if record.max_concurrent is not None and account.num_open >= record.max_concurrent:
            raise refusals.too_many_concurrent(record, record.max_concurrent)
        for what, bucket in account.buckets.items():
            if wait_s := bucket.wait_s(1.0, now):
                raise refusals.rate_limited(record, what, bucket.limit, wait_s)
        if requests := account.buckets.get("requests"):
            requests.charge(1.0, now)
        account.num_open += 1

    def leave(self, key_id: str) -> None:
        """It has ended."""
        if account := self._accounts.get(key_id):
            account.num_open -= 1
            self._close_idle(key_id, account)

    def charge(self, key_id: str, num_tokens: int, now: float) -> None:
        """An answer for this key has ended, and took so many tokens, its prompt's among them."""
        account = self._accounts.get(key_id)
        if account and (tokens := account.buckets.get("tokens")):
            tokens.charge(num_tokens, now)

    def headers(self, record: KeyRecord, now: float) -> Iterator[tuple[str, str]]:
        """What is left, as OpenAI tells it; nothing where the key has no such limit."""
        for what, bucket in self._account(record, now).buckets.items():
            yield f"x-ratelimit-limit-{what}", str(bucket.limit)
            yield f"x-ratelimit-remaining-{what}", str(max(0, int(bucket.level(now))))
            yield f"x-ratelimit-reset-{what}", duration(bucket.reset_s(now))

    def forget(self, key_id: str) -> None:
        """The key is gone. What is under way with it goes on."""
        if account := self._accounts.get(key_id):
            account.buckets.clear()
            self._close_idle(key_id, account)

    def _close_idle(self, key_id: str, account: _Account) -> None:
        if not account.num_open and not account.buckets:
            del self._accounts[key_id]

    def _account(self, record: KeyRecord, now: float) -> _Account:
        account = self._accounts.setdefault(record.id, _Account())
        limits = {"requests": record.requests_per_minute, "tokens": record.tokens_per_minute}
        for what, limit in limits.items():
            bucket = account.buckets.get(what)
            if limit is None:
                account.buckets.pop(what, None)
            elif bucket is None:
                account.buckets[what] = TokenBucket(limit, now)
            elif bucket.limit != limit:
                bucket.set_limit(limit, now)
        return account


def duration(seconds: float) -> str:
    """As OpenAI writes it: 120ms, 1.5s, 6m0s."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    if seconds < MINUTE_S:
        return f"{seconds:.3g}s"
    minutes, rest = divmod(math.ceil(seconds), int(MINUTE_S))
    return f"{minutes}m{rest}s"
