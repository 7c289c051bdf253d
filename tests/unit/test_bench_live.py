"""From measurements to constants, from constants to a comparison: the arithmetic of bench.live."""

import random
from typing import NamedTuple

import pytest

from bench import live
from bench._live_cost import Line, Samples, Switch, Warm, cost_model, line, reaction_s
from bench._live_noise import CpuClock, loudest, quietest, share_of_others
from bench._live_rig import MAX_OUTPUT, MAX_PROMPT


def test_a_line_goes_through_the_median_of_each_x() -> None:
    points = [(10.0, 3.0), (10.0, 3.0), (10.0, 90.0), (20.0, 5.0), (30.0, 7.0)]
    assert line(points) == pytest.approx(Line(1.0, 0.2))


def test_no_part_of_a_line_is_below_zero() -> None:
    assert line([(1.0, 4.0), (3.0, 2.0)]) == Line(3.0, 0.0)
    steep = line([(1.0, 0.0), (3.0, 8.0)])
    assert steep == Line(0.0, 2.0)


def test_one_x_alone_gives_a_line_through_the_origin() -> None:
    assert line([(4.0, 2.0), (4.0, 2.0)]) == Line(0.0, 0.5)


def test_no_points_are_no_line() -> None:
    with pytest.raises(ValueError, match="needs points"):
        line([])


def _switch(num_tokens: int, num_bytes: int) -> Switch:
    """Of a link of 1 GB/s behind 20 ms, and a prompt of which a tenth is left at the end."""
    return Switch(
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        swap_out_s=0.003,
        reaction_s=0.001,
        swap_in_s=0.02 + num_bytes / 1e9,
        tail_s=(0.01 + 0.001 * num_tokens) / 10,
        ttft_s=1.0,
    )


SAMPLES = Samples(
    warm=[Warm(n, 0.01 + 0.001 * n, 0.01 + 0.001 * n + 0.005) for n in (10, 100, 400)],
    rounds=[(1, 0.009), (4, 0.012)],
    switches=[_switch(10, 60_000_000), _switch(100, 30_000_000), _switch(400, 60_000_000)],
)


def test_the_constants_are_those_that_the_samples_were_made_with() -> None:
    cost = cost_model(SAMPLES, suspend_s=0.02, chunk_tokens=512)
    assert cost.link_bytes_per_s == pytest.approx(1e9)
    assert cost.swap_fixed_s == pytest.approx(0.02)
    assert cost.swap_out_s == pytest.approx(0.003)
    assert cost.suspend_s == 0.02
    assert cost.prefill_fixed_s == pytest.approx(0.01)
    assert cost.prefill_s_per_token == pytest.approx(0.001)
    assert cost.prefill_chunk_tokens == 512
    assert cost.prefill_tail == pytest.approx(0.1)
    assert cost.decode_fixed_s == pytest.approx(0.008)
    assert cost.decode_s_per_row == pytest.approx(0.001)
    assert cost.request_s == pytest.approx(0.005)
    assert cost.swaps_wait
    assert reaction_s(SAMPLES) == pytest.approx(0.001)


def test_samples_of_two_calibrations_count_together() -> None:
    slower = Samples(
        warm=[Warm(one.num_tokens, 3 * one.prefill_s, 1.0) for one in SAMPLES.warm],
        rounds=[(1, 0.027), (4, 0.036)],
        switches=SAMPLES.switches,
    )
    cost = cost_model(SAMPLES + slower, suspend_s=0.02, chunk_tokens=512)
    assert cost.prefill_s_per_token == pytest.approx(0.002)  # between the two
    assert cost.decode_fixed_s == pytest.approx(0.016)
    assert len((SAMPLES + slower).switches) == 6


def test_what_no_part_of_a_switch_accounts_for() -> None:
    switch = Switch(10, 1, 0.1, 0.01, 0.5, 0.05, 0.7)
    assert switch.unexplained_s == pytest.approx(0.04)


def test_how_far_a_percentile_is_off_counts_either_way() -> None:
    simulated = [0.1, 0.2, 0.3]
    assert live.off([0.1, 0.25, 0.3], simulated, 50) == pytest.approx(0.25)
    assert live.off([0.1, 0.15, 0.3], simulated, 50) == pytest.approx(0.25)
    assert live.off(simulated, simulated, 90) == 0


def test_seeds_are_pooled() -> None:
    one, two = live.Outcome([0.1], 0, 3, 1, 50), live.Outcome([0.3, 0.2], 1, 4, 0, 60)
    assert live.pooled([one, two]) == live.Outcome([0.1, 0.3, 0.2], 1, 7, 1, 110)


def test_lengths_are_drawn_by_seed_and_fit() -> None:
    def drawn(seed: int) -> list[tuple[int, int]]:
        rng = random.Random(seed)
        return [live.lengths(rng) for _ in range(500)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert {num_in for num_in, _ in drawn(1)} <= set(range(8, MAX_PROMPT + 1))
    assert {num_out for _, num_out in drawn(1)} <= set(range(2, MAX_OUTPUT + 1))


class Run(NamedTuple):
    seed: int
    others: float
    name: str


def test_of_each_seed_the_quietest_run_counts() -> None:
    runs = [Run(2, 0.4, "a"), Run(1, 0.5, "b"), Run(2, 0.1, "c"), Run(1, 0.6, "d")]
    assert [run.name for run in quietest(runs).values()] == ["b", "c"]
    assert loudest(runs).name == "b"


def test_others_are_all_but_us() -> None:
    before, after = CpuClock(10.0, 100.0, 40.0), CpuClock(20.0, 116.0, 50.0)
    assert share_of_others(before, after, num_cores=2) == pytest.approx(0.3)
    assert share_of_others(before, CpuClock(20.0, 109.0, 50.0), num_cores=2) == 0.0
