"""The benchmark harness: its arithmetic, its last line and its exit status."""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import __main__ as all_of_them
from bench import _machine
from bench._stats import Samples, percentile, show
from bench.harness import Bench, Target, options, verdict


class Clock:
    """A clock that only moves when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> Callable[[], None]:
        def variant() -> None:
            self.now += seconds

        return variant


def _ceiling(rounds: int) -> _machine.CopyCeiling:
    rates = Samples((10.0,) * rounds)
    return _machine.CopyCeiling(rates, rates, num_bytes=1 << 20)


def _bench(clock: Clock, *argv: str) -> Bench:
    return Bench("fake", "a fake", argv, clock=clock, ceiling=_ceiling)


def test_median_and_spread() -> None:
    samples = Samples((5.0, 1.0, 4.0, 2.0, 3.0))
    assert samples.median == 3.0
    assert samples.p10 == pytest.approx(1.4)
    assert samples.p90 == pytest.approx(4.6)
    assert percentile((7.0,), 90) == 7.0


def test_ratios_pair_figures_of_the_same_round() -> None:
    # The machine slows down threefold: each round's ratio stays 2.
    assert Samples((2.0, 4.0, 6.0)).over(Samples((1.0, 2.0, 3.0))).values == (2.0, 2.0, 2.0)
    assert Samples((1.0,)).over(Samples((0.0,))).median == math.inf


def test_ratios_of_different_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="2 against 1"):
        Samples((1.0, 2.0)).over(Samples((1.0,)))


def test_no_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one round"):
        Samples(())


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0012345, "s", "1.234 ms"),
        (2.5, "s", "2.5 s"),
        (3e-7, "s", "300 ns"),
        (0.0, "s", "0 s"),
        (3.456789, "x", "3.457x"),
        (19.0, "GB/s", "19 GB/s"),
        (4.0, "", "4"),
        (math.nan, "s", "nan s"),
    ],
)
def test_show(value: float, unit: str, text: str) -> None:
    assert show(value, unit) == text


def test_variants_take_turns_in_rotated_order() -> None:
    calls: list[str] = []

    def variant(name: str) -> Callable[[], None]:
        return lambda: calls.append(name)

    bench = _bench(Clock(), "--rounds", "3")
    bench.round_robin({name: variant(name) for name in "abc"}, warmup=1)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"


def test_a_variant_is_timed_or_reports_its_own_figure() -> None:
    clock = Clock()
    bench = _bench(clock, "--rounds", "2")
    took = bench.round_robin({"timed": clock.spend(0.25), "own": lambda: 7.0})
    assert took["timed"].values == (0.25, 0.25)
    assert took["own"].values == (7.0, 7.0)


def test_quick_stops_early_but_not_before_three_rounds() -> None:
    clock = Clock()
    slow = _bench(clock, "--quick").round_robin({"slow": clock.spend(30.0)})
    assert len(slow["slow"].values) == 3
    fast = _bench(clock, "--quick").round_robin({"fast": clock.spend(0.1)})
    assert len(fast["fast"].values) == 5
    assert len(_bench(clock).round_robin({"full": clock.spend(30.0)})["full"].values) == 20


def test_a_target_needs_exactly_one_bound() -> None:
    bench = _bench(Clock())
    with pytest.raises(ValueError, match="'speed' needs either"):
        bench.target("speed", 1.0)
    with pytest.raises(ValueError, match="'speed' needs either"):
        bench.target("speed", 1.0, at_least=1.0, at_most=2.0)
    assert bench.target("speed", 2.0, at_least=2.0)
    assert bench.target("time", 0.0, at_most=0.0)
    assert not bench.target("broken", math.nan, at_least=0.0)


def test_the_last_line() -> None:
    met = Target("a", 3.0, "x", at_least=2.0, at_most=None)
    slow = Target("b", 0.5, "s", at_least=None, at_most=0.25)
    low = Target("c", 0.5, "x", at_least=0.8, at_most=None)
    assert verdict([]) == "PASS 0/0"
    assert verdict([met]) == "PASS 1/1"
    assert verdict([met, slow, low]) == (
        "SHORT 1/3: b=500 ms (target <= 250 ms), c=0.5x (target >= 0.8x)"
    )


def test_finish_prints_the_verdict_last_and_writes_the_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, file = Clock(), tmp_path / "fake.json"
    bench = _bench(clock, "--rounds", "2", "--json", str(file))
    took = bench.round_robin({"a": clock.spend(1.0), "b": clock.spend(0.5)})
    bench.value("moved", 12.0, "B")
    bench.target("ratio", took["a"].over(took["b"]).median, at_least=1.5, unit="x")
    assert bench.finish() == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "PASS 1/1"
    assert "500 ms" in printed
    report = json.loads(file.read_text())
    assert report["groups"][0]["variants"]["b"]["values"] == [0.5, 0.5]
    assert report["targets"][0]["value"] == 2.0
    assert report["copy_ceiling"]["memcpy"]["values"][0] == 10.0
    assert report["environment"]["cores"] >= 1
    assert report["verdict"] == "PASS 1/1"

    bench.target("a target with a name that is far too long for one line", 1.0, at_least=2.0)
    assert bench.finish() == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("SHORT 1/2: a target with")


def test_rounds_below_one_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options(argparse.ArgumentParser()).parse_args(["--rounds", "0"])
    assert "0 is not at least 1" in capsys.readouterr().err


def test_the_copy_ceiling_is_measured() -> None:
    ceiling = _machine.copy_ceiling(rounds=2, num_bytes=1 << 20)
    assert len(ceiling.memcpy.values) == len(ceiling.torch_copy.values) == 2
    assert min(*ceiling.memcpy.values, *ceiling.torch_copy.values) > 0


def test_cpu_model() -> None:
    assert _machine.cpu_model("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n") == (
        "Some CPU @ 2 GHz"
    )
    assert _machine.cpu_model("BogoMIPS : 50\n")


# -- python -m bench ---------------------------------------------------------------------


def test_benchmarks_are_found_by_their_files(tmp_path: Path) -> None:
    for name in ("__init__", "_stats", "harness", "swap", "api"):
        (tmp_path / f"{name}.py").touch()
    assert list(all_of_them.benchmarks(tmp_path)) == ["api", "swap"]


def test_a_benchmark_that_breaks_is_short() -> None:
    read = all_of_them.outcome
    good = read("a", "PASS 2/2", 0)
    short = read("b", "SHORT 1/2: x=1 (target >= 2)", 1)
    crashed = read("c", "ValueError: no", 1)
    lying = read("d", "PASS 1/1", 139)
    assert [one.missed for one in (good, short, crashed, lying)] == [
        "",
        "x=1 (target >= 2)",
        "broke (exit status 1)",
        "broke (exit status 139)",
    ]
    assert all_of_them.summary([good]) == "PASS 2/2"
    assert all_of_them.summary([good, short, crashed]) == (
        "SHORT 3/5: b: x=1 (target >= 2); c: broke (exit status 1)"
    )
