"""KV blocks in host memory: a budget, what is held, and what goes first."""

import torch

from services.gpu_agent.engine.kv_host import HostKV


def test_past_the_budget_the_least_recently_used_goes() -> None:
    home = HostKV(3 * 64)
    blocks = home.open(64)
    for key in (b"a", b"b", b"c"):
        assert blocks.add(key) is not None
    assert blocks.find(b"a") is not None  # in use now
    assert blocks.add(b"d") is not None
    assert [blocks.has(key) for key in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    home.validate()


def test_what_is_held_stays_and_then_there_is_no_room() -> None:
    home = HostKV(2 * 64)
    blocks = home.open(64)
    for key in (b"a", b"b"):
        blocks.add(key)
        blocks.hold(key)
    assert blocks.add(b"c") is None
    assert blocks.holds == {b"a": 1, b"b": 1}
    blocks.unhold(b"a")
    assert blocks.add(b"c") is not None
    assert not blocks.has(b"a")
    blocks.unhold(b"b", drop=True)
    assert not blocks.has(b"b")
    assert home.used_bytes == 64
    home.validate()


def test_one_budget_for_all_models_each_with_names_of_its_own() -> None:
    home = HostKV(256)
    small, large = home.open(64), home.open(128)
    first = small.add(b"a")
    assert first is not None
    first.fill_(1)
    other = large.add(b"a")
    assert other is not None
    other.fill_(2)
    kept = small.find(b"a")
    assert kept is not None
    assert torch.equal(kept, torch.ones(64, dtype=torch.uint8))
    assert large.add(b"b") is not None, "64 + 128 + 128 is over the budget"
    assert not large.has(b"a"), "the one used longest ago"
    assert small.has(b"a")
    large.clear()
    assert home.used_bytes == 64
    home.validate()


def test_the_same_key_again_is_the_same_memory() -> None:
    blocks = HostKV(1024).open(64)
    one, two = blocks.add(b"a"), blocks.add(b"a")
    assert one is two


def test_a_block_larger_than_the_budget_is_not_kept() -> None:
    assert HostKV(63).open(64).add(b"a") is None
