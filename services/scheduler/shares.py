"""What each tenant has used lately, and who has had more than a fair share of it.

A *tenant* is who a request is for: the id of an API key, or "" for all who give none. Fair is an
equal part for everybody who was there lately::

    used_s        seconds of prefill and decode, half of it forgotten every `HALF_LIFE_S`
    fair_s        used_s of all tenants / how many they are + `ALLOWANCE_S`
    beyond        used_s > `TOLERANCE` x fair_s

A request is charged `CHARGE_S` when it comes, and what it really took when it ends: else a burst
would cost nothing until the first of its answers ended. All of it is forgotten at one rate, so who
is beyond is changed by requests, not by time, but for the allowance. Who is alone never is.
"""

from typing import TypeAlias

HALF_LIFE_S = 60.0
TOLERANCE = 1.25
ALLOWANCE_S = 5.0  # whoever has used no more than this is no matter how little the others use
FORGET_S = 0.01  # an account with less than this in it is closed
MOST_ACCOUNTS = 1024  # past it the one that was quiet for longest is closed
CHARGE_S = 1.0

Place: TypeAlias = tuple[str, str]  # GPU and model


class Account:
    """Seconds used, as of ``at`` (unix seconds)."""

    __slots__ = ("at", "used_s")

    def __init__(self, at: float) -> None:
        self.used_s = 0.0
        self.at = at

    def add(self, used_s: float, now: float) -> None:
        """Never less than nothing."""
        self.used_s = max(0.0, self.used_at(now) + used_s)
        self.at = now

    def used_at(self, now: float) -> float:
        """What of it is not forgotten."""
        passed_s = now - self.at
        return self.used_s * 0.5 ** (passed_s / HALF_LIFE_S) if passed_s > 0 else self.used_s


class Shares:
    """The accounts of all tenants, the one that was quiet for longest first."""

    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}
        self.total = Account(0.0)
        self._running: dict[Place, dict[str, int]] = {}  # tenant -> how many of its requests

    @property
    def are_compared(self) -> bool:
        """There was more than one tenant lately: else nobody can be beyond anything."""
        return len(self.accounts) > 1

    def charge(self, tenant: str, now: float) -> None:
        """A request came at ``now``."""
        self._add(tenant, CHARGE_S, now)

    def refund(self, tenant: str, now: float) -> None:
        """It left before it was served."""
        self._add(tenant, -CHARGE_S, now)

    def settle(self, tenant: str, took_s: float, now: float) -> None:
        """It ended: it took so long on a GPU."""
        self._add(tenant, took_s - CHARGE_S, now)

    def is_beyond(self, tenant: str) -> bool:
        """Whether ``tenant`` had used more than its fair share, and a little more than that, when
        anybody's account changed last.
        """
        account = self.accounts.get(tenant)
        if account is None or not self.are_compared:
            return False
        fair_s = self.total.used_s / len(self.accounts) + ALLOWANCE_S
        return account.used_at(self.total.at) > TOLERANCE * fair_s

    # -- who runs where --------------------------------------------------------------------

    def note_start(self, place: Place, tenant: str, *, is_first: bool) -> None:
        """A request started at ``place``; ``is_first``: nothing else runs there."""
        if is_first:
            self._running.pop(place, None)
        there = self._running.setdefault(place, {})
        there[tenant] = there.get(tenant, 0) + 1

    def note_end(self, place: Place, tenant: str, *, is_last: bool) -> None:
        """It ended; ``is_last``: nothing else runs there, whatever else was missed."""
        there = self._running.get(place)
        if there is None:
            return
        num = there.pop(tenant, 0)
        if num > 1:
            there[tenant] = num - 1
        if is_last or not there:
            del self._running[place]

    def all_beyond(self, place: Place) -> bool:
        """Whether all requests there, as far as they are known, are of tenants beyond theirs."""
        there = self._running.get(place)
        if not there:
            return False
        return all(self.is_beyond(tenant) for tenant in there)

    def faults(self) -> list[str]:
        """What is wrong, as text."""
        at = self.total.at
        sum_s = sum(account.used_at(at) for account in self.accounts.values())
        if abs(sum_s - self.total.used_s) > 1e-6 * (1.0 + sum_s):
            return [f"tenants have used {sum_s} s, and {self.total.used_s} s are on the books"]
        return []

    def _add(self, tenant: str, used_s: float, now: float) -> None:
        now = max(now, self.total.at)
        account = self.accounts.pop(tenant, None) or Account(now)
        before_s = account.used_at(now)
        account.add(used_s, now)
        self.accounts[tenant] = account  # the last one: it is not quiet
        self.total.add(account.used_s - before_s, now)
        if account.used_s < FORGET_S:
            self._close(tenant, now)
        while self.accounts:
            quiet, account = next(iter(self.accounts.items()))
            if account.used_at(now) >= FORGET_S and len(self.accounts) <= MOST_ACCOUNTS:
                return
            self._close(quiet, now)

    def _close(self, tenant: str, now: float) -> None:
        self.total.add(-self.accounts.pop(tenant).used_at(now), now)
