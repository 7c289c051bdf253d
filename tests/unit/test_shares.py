"""Fair shares: what tenants have used, whose turn that makes it, and who gives way."""

import msgspec
import pytest

from schemas.commands import Command, SwapIn, SwapOut
from schemas.events import RequestStarted
from services.scheduler.inputs import Demand, DeploymentAdded, Input, QueueDepths
from services.scheduler.shares import (
    ALLOWANCE_S,
    CHARGE_S,
    FORGET_S,
    HALF_LIFE_S,
    MOST_ACCOUNTS,
    TOLERANCE,
    Shares,
)
from services.scheduler.simulate.policies import config_with
from services.scheduler.simulate.report import summarize
from services.scheduler.simulate.run import Gpus, Options, Result, simulate
from services.scheduler.simulate.workload import DEFAULT_SIZE, Workload, poisson, together
from services.scheduler.state import PolicyConfig
from tests.unit.decide_story import EPOCH, GPU, Story, on, running, spec

AT = 1000.0
A = ("gpu0", "a")


def used(**seconds: float) -> Shares:
    shares = Shares()
    for tenant, took_s in seconds.items():
        shares.charge(tenant, AT)
        shares.settle(tenant, took_s, AT)
    assert shares.faults() == []
    return shares


# -- the books -----------------------------------------------------------------------------


def test_a_request_is_charged_when_it_comes_and_settled_when_it_ends() -> None:
    shares = Shares()
    shares.charge("t", AT)
    assert shares.accounts["t"].used_s == shares.total.used_s == CHARGE_S
    shares.settle("t", 3.0, AT)
    assert shares.accounts["t"].used_s == shares.total.used_s == 3.0


def test_who_leaves_before_being_served_has_used_nothing() -> None:
    shares = used(other=5.0)
    shares.charge("t", AT)
    shares.refund("t", AT)
    assert list(shares.accounts) == ["other"]
    assert shares.total.used_s == pytest.approx(5.0)


def test_half_is_forgotten_in_each_half_life_and_the_rest_in_the_end() -> None:
    shares = used(t=8.0, other=8.0)
    assert shares.accounts["t"].used_at(AT + 2 * HALF_LIFE_S) == 2.0
    shares.charge("other", AT + 20 * HALF_LIFE_S)
    assert list(shares.accounts) == ["other"]
    assert shares.faults() == []


def test_accounts_are_few_however_many_tenants_come() -> None:
    shares = Shares()
    for number in range(MOST_ACCOUNTS + 10):
        shares.charge(f"t{number}", AT)
    assert len(shares.accounts) == MOST_ACCOUNTS
    assert next(iter(shares.accounts)) == "t10"
    assert shares.faults() == []


def test_a_clock_that_goes_back_spoils_no_books() -> None:
    shares = used(t=8.0)
    shares.charge("other", AT - 30.0)
    shares.charge("t", AT + 1.0)
    assert shares.faults() == []


def test_beyond_is_more_than_an_equal_part() -> None:
    shares = used(greedy=100.0, modest=1.0)
    assert [shares.is_beyond(tenant) for tenant in ("greedy", "modest", "new")] == [
        True, False, False
    ]  # fmt: skip
    alike = used(one=100.0, other=90.0)
    assert not alike.is_beyond("one")


def test_who_is_alone_is_never_beyond() -> None:
    assert not used(t=1e6).is_beyond("t")


def test_little_use_is_never_too_much() -> None:
    assert not used(t=ALLOWANCE_S, other=2 * FORGET_S).is_beyond("t")
    assert used(t=10 * ALLOWANCE_S, other=2 * FORGET_S).is_beyond("t")


def test_a_burst_is_beyond_before_the_first_of_it_ends() -> None:
    shares = used(modest=1.0)
    beyond = []
    for _ in range(40):
        beyond.append(shares.is_beyond("greedy"))
        shares.charge("greedy", AT)
    first = beyond.index(True)
    assert all(beyond[first:])
    assert first <= 2 * TOLERANCE * (ALLOWANCE_S + 40.0 / 2)


def test_where_only_they_run_all_are_beyond() -> None:
    shares = used(greedy=100.0, modest=1.0)
    assert not shares.all_beyond(A)
    shares.note_start(A, "greedy", is_first=True)
    assert shares.all_beyond(A)
    shares.note_start(A, "modest", is_first=False)
    assert not shares.all_beyond(A)
    shares.note_end(A, "modest", is_last=False)
    assert shares.all_beyond(A)
    shares.note_end(A, "greedy", is_last=True)
    assert not shares.all_beyond(A)


def test_starts_whose_end_was_missed_are_forgotten_with_the_next_first_one() -> None:
    shares = used(greedy=100.0, modest=1.0)
    shares.note_start(A, "modest", is_first=True)
    shares.note_start(A, "greedy", is_first=True)  # the agent died in between
    assert shares.all_beyond(A)


# -- turns ---------------------------------------------------------------------------------


def contended(**seconds: float) -> Story:
    """``a`` is busy for longer than anybody waits; ``b`` and ``c`` do not fit beside it."""
    story = running(on("a", "resident", 60, in_flight=1), on("b", "host", 60), on("c", "host", 60))
    story.replica("a").resident_since = story.now + 100.0
    story.state.shares = Shares()
    for tenant, took_s in seconds.items():
        story.state.shares.settle(tenant, took_s + CHARGE_S, story.now)
    return story


def next_is(model: str, request_id: str, story: Story) -> bool:
    commands = story.ended("r0", "a")
    assert commands == [SwapOut(GPU, "a", EPOCH, 2, request_id)]
    return story.swapped_out("a", 2) == [SwapIn(GPU, model, EPOCH, 2, request_id)]


def test_who_had_more_than_a_fair_share_waits_behind_others() -> None:
    story = contended(greedy=100.0, modest=1.0)
    story.demand("r1", "b", tenant="greedy")
    story.now += 1.0
    story.demand("r2", "c", tenant="modest")
    assert next_is("c", "r2", story)


def test_also_behind_those_that_are_late() -> None:
    story = contended(greedy=100.0, modest=1.0)
    story.demand("r2", "c", tenant="modest")
    story.now += 2.5
    story.demand("r1", "b", tenant="greedy")
    assert next_is("c", "r2", story)


def test_but_not_for_ever() -> None:
    story = contended(greedy=100.0, modest=1.0)
    config = story.state.config
    story.demand("r1", "b", tenant="greedy")
    story.now += config.starvation_s + config.put_back_s + 0.5
    story.demand("r2", "c", tenant="modest")
    assert next_is("b", "r1", story)


def test_those_of_equal_use_keep_their_order() -> None:
    story = contended(one=100.0, other=95.0)
    story.demand("r1", "b", tenant="one")
    story.now += 1.0
    story.demand("r2", "c", tenant="other")
    assert next_is("b", "r1", story)


def test_clients_without_a_key_are_one_tenant() -> None:
    story = contended(**{"": 100.0, "modest": 1.0})
    story.demand("r1", "b")
    story.demand("r2", "c", tenant="modest")
    assert next_is("c", "r2", story)


def test_a_model_that_others_wait_for_too_is_not_put_back() -> None:
    story = contended(greedy=100.0, modest=1.0)
    story.demand("r1", "b", tenant="greedy")
    story.demand("r2", "b", tenant="modest")
    story.now += 0.5
    story.demand("r3", "c", tenant="modest")
    assert next_is("b", "r2", story)


def test_what_the_queue_does_not_hold_any_more_is_the_oldest_whoever_asked() -> None:
    story = contended(greedy=100.0, modest=1.0)
    story.demand("r1", "b", tenant="greedy")
    story.now += 1.0
    story.demand("r2", "b", tenant="modest")
    assert [waiter.request_id for waiter in story.state.waiting["b"]] == ["r2", "r1"]
    story.tell(QueueDepths({"a": 1, "b": 1}, at=story.now + 0.1))  # a start was missed
    assert [waiter.request_id for waiter in story.state.waiting["b"]] == ["r2"]


def test_a_higher_priority_goes_first_also_beyond_its_share() -> None:
    story = contended(greedy=100.0, modest=1.0)
    story.tell(DeploymentAdded(msgspec.structs.replace(spec("b"), priority=1)))
    story.demand("r1", "b", tenant="greedy")
    story.demand("r2", "c", tenant="modest")
    assert next_is("b", "r1", story)


def test_without_fair_shares_nobody_asks_who_it_is_for() -> None:
    story = contended(greedy=100.0, modest=1.0)
    story.state.config = PolicyConfig(fair_shares=False)
    story.demand("r1", "b", tenant="greedy")
    story.now += 1.0
    story.demand("r2", "c", tenant="modest")
    assert next_is("b", "r1", story)
    assert story.state.shares.accounts["greedy"].used_s == 100.0


def test_the_ends_of_requests_are_what_counts() -> None:
    story = running(on("a", "resident", 60), on("b", "host", 20))
    for request_id, tenant, took_s in (("r1", "greedy", 80.0), ("r2", "modest", 1.0)):
        story.demand(request_id, "a", tenant=tenant)
        story.started(request_id, "a", tenant)
        story.ended(request_id, "a", tenant=tenant, took_s=took_s)
    assert story.state.shares.is_beyond("greedy")
    story.demand("r3", "b", tenant="modest")
    before_s = story.state.shares.total.used_s
    story.withdrawn("r3", "b")
    assert story.state.shares.total.used_s == pytest.approx(before_s - CHARGE_S)


# -- who gives way -------------------------------------------------------------------------


def served(*tenants: str) -> Story:
    """``a`` runs a request of each, none of which is ahead of its target; ``b`` does not fit."""
    story = running(on("a", "resident", 60), on("b", "host", 60))
    story.state.tempo("a").token_s = story.state.config.token_target_s
    story.state.shares.settle("greedy", 100.0, story.now)
    story.state.shares.settle("modest", 2.0, story.now)
    for tenant in tenants:
        story.demand(tenant, "a", tenant=tenant)
        story.started(tenant, "a", tenant)
    return story


def test_a_model_that_serves_only_them_gives_way_after_its_quantum() -> None:
    story = served("greedy")
    story.demand("r1", "b", tenant="modest")
    assert story.tick(0.5) == []
    assert story.tick(0.7) == [SwapOut(GPU, "a", EPOCH, 2, "r1", preempt=True)]
    story.swapped_out("a", 2, num_suspended=1)
    (turn,) = story.state.line.of("a")
    assert turn.put_back_s == story.state.config.put_back_s


def test_one_that_serves_others_too_does_not() -> None:
    story = served("greedy", "modest")
    story.demand("r1", "b", tenant="modest")
    assert story.tick(0.5) == []
    assert story.tick(0.7) == []


def test_nor_does_it_for_one_of_their_own() -> None:
    story = served("greedy")
    story.demand("r1", "b", tenant="greedy")
    assert story.tick(0.5) == []
    assert story.tick(0.7) == []


def test_nor_where_others_wait_for_it() -> None:
    story = served("greedy")
    story.demand("r2", "a", tenant="modest")
    story.demand("r1", "b", tenant="modest")
    assert story.tick(1.2) == []


def test_nor_for_a_batch_request_that_has_time() -> None:
    story = served("greedy")
    story.tell(Demand("r1", "b", "batch", story.now, "modest"))
    assert story.tick(1.2) == []


def test_the_state_knows_who_started_what() -> None:
    story = running(on("a", "resident", 60))
    story.tell(RequestStarted(GPU, "a", "r1", story.now, 1, 0.0, "t"))
    story.state.shares.settle("t", 50.0, story.now)
    story.state.shares.settle("other", 2.0, story.now)
    assert story.state.yields(story.replica("a"))
    story.ended("r1", "a", tenant="t")
    assert not story.state.yields(story.replica("a"))


# -- over minutes --------------------------------------------------------------------------


def traffic(prefix: str, num_models: int, rate: float, seed: int) -> Workload:
    models = {f"{prefix}{number}": DEFAULT_SIZE for number in range(num_models)}
    return poisson(models, rate, 90.0, seed=seed, tenant=prefix)


def commands_of(workload: Workload, config: PolicyConfig) -> list[Command]:
    told: list[Command] = []

    def note(_event: Input, _now: float, commands: list[Command]) -> None:
        told.extend(commands)

    simulate(workload, Gpus(1), config=config, listen=note)
    return told


def test_of_one_tenant_alone_nothing_is_changed() -> None:
    workload = traffic("t", 12, 1.5, seed=3)
    with_shares = commands_of(workload, PolicyConfig())
    assert len(with_shares) > 100
    assert with_shares == commands_of(workload, config_with(fair_shares=False))


def share_in_time(result: Result, tenant: str) -> float:
    return summarize(result, "").tenants[tenant].share_ttft_2s


def test_a_flood_does_not_drown_who_asks_for_little() -> None:
    polite = traffic("polite", 8, 0.5, seed=1)
    both = together("both", polite, traffic("flood", 24, 4.0, seed=2))
    alone = share_in_time(simulate(polite, Gpus(1)), "polite")
    checked = Options(validate_every=50)
    fair = simulate(both, Gpus(2), options=checked)
    unfair = simulate(both, Gpus(2), config=config_with(fair_shares=False))
    assert fair.num_failed == 0
    assert share_in_time(fair, "polite") > 0.9 * alone
    assert share_in_time(unfair, "polite") < 0.6 * alone
