"""What a key may use, by an injected clock."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.keys import KeyRecord
from services.api.errors import ApiError
from services.api.quotas import Quotas, TokenBucket, duration


def key(**limits: int) -> KeyRecord:
    return KeyRecord("id", "ada", "hash", **limits)  # type: ignore[arg-type]


def refused(call: Callable[[], None]) -> tuple[str, str]:
    """Code and Retry-After."""
    with pytest.raises(ApiError) as caught:
        call()
    assert caught.value.status == 429
    return str(caught.value.info.code), caught.value.headers["retry-after"]


def test_a_burst_of_a_minutes_worth_then_evenly() -> None:
    quotas, ada = Quotas(), key(requests_per_minute=6)
    for _ in range(6):
        quotas.enter(ada, 0.0)
    assert refused(lambda: quotas.enter(ada, 0.0)) == ("rate_limit_exceeded", "10")
    assert refused(lambda: quotas.enter(ada, 9.5)) == ("rate_limit_exceeded", "1")
    quotas.enter(ada, 10.0)
    assert refused(lambda: quotas.enter(ada, 10.0)) == ("rate_limit_exceeded", "10")
    for _ in range(6):  # never more than a minute's worth
        quotas.enter(ada, 1e6)
    assert refused(lambda: quotas.enter(ada, 1e6))[0] == "rate_limit_exceeded"


def test_tokens_are_charged_when_they_are_known_and_a_debt_comes_first() -> None:
    quotas, ada = Quotas(), key(tokens_per_minute=60)
    quotas.enter(ada, 0.0)
    quotas.enter(ada, 0.0)  # nothing is known of the first one yet
    quotas.charge("id", 100, 0.0)
    assert refused(lambda: quotas.enter(ada, 0.0)) == ("rate_limit_exceeded", "41")
    assert refused(lambda: quotas.enter(ada, 40.5))[1] == "1"
    quotas.enter(ada, 41.0)


def test_a_refused_request_costs_nothing() -> None:
    quotas, ada = Quotas(), key(requests_per_minute=2, max_concurrent=1)
    quotas.enter(ada, 0.0)
    for _ in range(5):
        assert refused(lambda: quotas.enter(ada, 0.0))[0] == "concurrency_limit_exceeded"
    quotas.leave("id")
    quotas.enter(ada, 0.0)
    quotas.leave("id")
    assert refused(lambda: quotas.enter(ada, 0.0))[0] == "rate_limit_exceeded"


def test_what_is_left_is_told_as_openai_does() -> None:
    quotas, ada = Quotas(), key(requests_per_minute=60, tokens_per_minute=600)
    quotas.enter(ada, 0.0)
    quotas.charge("id", 1000, 0.0)
    assert dict(quotas.headers(ada, 0.5)) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "500ms",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "1m40s",
    }
    assert dict(quotas.headers(KeyRecord("other", "eve", "h"), 0.0)) == {}


def test_another_limit_applies_at_once_and_what_was_used_stays_used() -> None:
    quotas = Quotas()
    for _ in range(3):
        quotas.enter(key(requests_per_minute=3), 0.0)
    assert refused(lambda: quotas.enter(key(requests_per_minute=3), 0.0))
    quotas.enter(key(requests_per_minute=4), 0.0)
    assert refused(lambda: quotas.enter(key(requests_per_minute=4), 0.0))
    quotas.enter(key(), 0.0)  # no limit any more


def test_accounts_do_not_stay_for_ever() -> None:
    quotas = Quotas()
    quotas.enter(key(), 0.0)
    quotas.leave("id")
    assert not quotas._accounts
    quotas.enter(key(requests_per_minute=1), 0.0)
    quotas.forget("id")  # withdrawn while one is under way
    quotas.charge("id", 10, 0.0)
    quotas.leave("id")
    quotas.leave("id")  # and what was never there
    assert not quotas._accounts


@given(
    st.integers(1, 1000),
    st.lists(st.tuples(st.floats(0, 30), st.integers(0, 500)), max_size=40),
)
def test_no_more_is_ever_taken_than_the_rate_allows(
    limit: int, uses: list[tuple[float, int]]
) -> None:
    now, taken = 0.0, 0.0
    bucket = TokenBucket(limit, now)
    for pause_s, amount in uses:
        now += pause_s
        assert bucket.level(now) <= limit
        if not bucket.wait_s(float(amount), now):
            bucket.charge(float(amount), now)
            taken += amount
        assert taken <= limit + now * limit / 60 + 1e-6
        assert bucket.wait_s(1.0, now + bucket.wait_s(1.0, now)) < 1e-6


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0ms"), (0.12, "120ms"), (1.5, "1.5s"), (59.99, "60s"), (360, "6m0s")],
)
def test_durations_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
