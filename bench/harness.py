"""The one harness that every benchmark uses.

    bench = Bench("swap", "swap-in against a raw copy", argv)
    took = bench.round_robin({"swap-in": swap_in, "memcpy": memcpy})
    bench.value("bytes moved", 2e8, "B")
    bench.target("of memcpy", took["memcpy"].over(took["swap-in"]).median, at_least=0.8, unit="x")
    sys.exit(bench.finish())

Figures from one machine say little on another, so what counts is a ratio inside one run:
variants take turns, each round runs all of them in a rotated order, and a ratio pairs
figures of the same round. The machine's raw copy rate and load are recorded with them.

`finish` prints the tables and, as its last line, one of

    PASS k/n
    SHORT k/n: name=value (target ...), ...

where k of n targets are met, and returns the exit status: 0 or 1.
"""

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import msgspec
from rich.console import Console
from rich.table import Table

from bench import _machine
from bench._stats import Samples, show

__all__ = ["Bench", "Samples", "options", "verdict"]

Variant: TypeAlias = Callable[[], float | None]

QUICK_BUDGET_S = 40.0  # no further round starts after this: --quick promises under a minute
MIN_ROUNDS = 3  # unless --rounds asks for fewer


class Group(msgspec.Struct, frozen=True):
    """The outcome of one `Bench.round_robin`."""

    unit: str
    variants: dict[str, Samples]


class Value(msgspec.Struct, frozen=True):
    value: float
    unit: str


class Target(msgspec.Struct, frozen=True):
    """One promise. Exactly one bound is set; nan never meets it."""

    name: str
    value: float
    unit: str
    at_least: float | None
    at_most: float | None

    @property
    def met(self) -> bool:
        if self.at_least is not None:
            return self.value >= self.at_least
        return self.at_most is not None and self.value <= self.at_most

    @property
    def bound(self) -> str:
        if self.at_least is not None:
            return f">= {show(self.at_least, self.unit)}"
        return f"<= {show(self.at_most or 0.0, self.unit)}"


class Report(msgspec.Struct, frozen=True):
    """What ``--json`` writes."""

    name: str
    quick: bool
    environment: _machine.Environment
    copy_ceiling: _machine.CopyCeiling
    load_before: float
    load_after: float
    took_s: float
    groups: list[Group]
    values: dict[str, Value]
    targets: list[Target]
    verdict: str


def options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the options that every benchmark has."""
    parser.add_argument("--quick", action="store_true", help="fewer rounds, under a minute")
    parser.add_argument("--rounds", type=_positive, help="rounds of every comparison")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def verdict(targets: Sequence[Target]) -> str:
    """The last line: how many targets are met, and which are not."""
    short = [target for target in targets if not target.met]
    count = f"{len(targets) - len(short)}/{len(targets)}"
    if not short:
        return f"PASS {count}"
    missed = ", ".join(f"{t.name}={show(t.value, t.unit)} (target {t.bound})" for t in short)
    return f"SHORT {count}: {missed}"


class Bench:
    """One run of one benchmark. ``clock`` and ``ceiling`` are there for tests."""

    def __init__(
        self,
        name: str,
        about: str,
        argv: Sequence[str],
        *,
        rounds: int = 20,
        quick_rounds: int = 5,
        clock: Callable[[], float] = time.perf_counter,
        ceiling: Callable[[int], _machine.CopyCeiling] = _machine.copy_ceiling,
    ) -> None:
        parser = options(argparse.ArgumentParser(prog=f"python -m bench.{name}", description=about))
        args = parser.parse_args(argv)
        self.name = name
        self.quick: bool = args.quick
        self.rounds: int = args.rounds or (quick_rounds if args.quick else rounds)
        self.ceiling = ceiling(5 if args.quick else 15)
        self._json: Path | None = args.json
        self._clock = clock
        self._console = Console(highlight=False)
        self._load_before = _machine.load_average()
        self._started = clock()
        self._groups: list[Group] = []
        self._values: dict[str, Value] = {}
        self._targets: list[Target] = []
        self._console.print(f"[bold]{name}[/]: {about}")

    def round_robin(
        self,
        variants: Mapping[str, Variant],
        *,
        unit: str = "s",
        warmup: int = 1,
        rounds: int | None = None,
    ) -> dict[str, Samples]:
        """Run the variants in turns, and return the samples of each.

        A variant that returns a number reports that figure, in ``unit``; one that returns
        None is timed from outside, in seconds. Each runs ``warmup`` times unrecorded first.
        ``rounds``: of this comparison, where its variants take long.
        """
        for variant in variants.values():
            for _ in range(warmup):
                variant()
        taken: dict[str, list[float]] = {name: [] for name in variants}
        order = list(variants)
        for done in range(min(rounds or self.rounds, self.rounds)):
            if self.quick and done >= MIN_ROUNDS and self._elapsed_s() > QUICK_BUDGET_S:
                self._console.print(f"--quick: stopped after {done} of {self.rounds} rounds")
                break
            for name in order:
                started = self._clock()
                figure = variants[name]()
                taken[name].append(self._clock() - started if figure is None else figure)
            order.append(order.pop(0))  # whoever goes first pays for cold caches: take turns
        samples = {name: Samples(tuple(values)) for name, values in taken.items()}
        self._groups.append(Group(unit, samples))
        return samples

    def value(self, name: str, value: float, unit: str = "") -> None:
        """Record a figure that nothing is promised about."""
        self._values[name] = Value(value, unit)

    def target(
        self,
        name: str,
        value: float,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        unit: str = "",
    ) -> bool:
        """Record a figure and what is promised of it. Returns whether it is met."""
        if (at_least is None) == (at_most is None):
            raise ValueError(f"target {name!r} needs either at_least or at_most")
        target = Target(name, value, unit, at_least, at_most)
        self._targets.append(target)
        return target.met

    def finish(self) -> int:
        """Print everything, write ``--json``, and return the exit status."""
        report = self._report()
        for group in report.groups:
            self._console.print(_group_table(group))
        if report.values:
            table = Table("figure", "value")
            for name, figure in report.values.items():
                table.add_row(name, show(figure.value, figure.unit))
            self._console.print(table)
        if report.targets:
            table = Table("target", "value", "promised", "")
            for target in report.targets:
                mark = "ok" if target.met else "[bold red]short[/]"
                table.add_row(target.name, show(target.value, target.unit), target.bound, mark)
            self._console.print(table)
        self._print_machine(report)
        if self._json:
            self._json.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
        print(report.verdict, flush=True)  # not through rich: a wrapped line is not one line
        return 0 if all(target.met for target in report.targets) else 1

    def _elapsed_s(self) -> float:
        return self._clock() - self._started

    def _report(self) -> Report:
        return Report(
            name=self.name,
            quick=self.quick,
            environment=_machine.environment(),
            copy_ceiling=self.ceiling,
            load_before=self._load_before,
            load_after=_machine.load_average(),
            took_s=self._elapsed_s(),
            groups=self._groups,
            values=self._values,
            targets=self._targets,
            verdict=verdict(self._targets),
        )

    def _print_machine(self, report: Report) -> None:
        env, copy = report.environment, report.copy_ceiling
        self._console.print(
            f"{env.cores} cores, {env.cpu}; Python {env.python}, torch {env.torch}\n"
            f"raw copy of {copy.num_bytes >> 20} MiB: memcpy {show(copy.memcpy.median, 'GB/s')} "
            f"(one thread), torch {show(copy.torch_copy.median, 'GB/s')}; "
            f"load {report.load_before:.2f} -> {report.load_after:.2f}; "
            f"took {show(report.took_s, 's')}"
        )


def _group_table(group: Group) -> Table:
    table = Table("variant", "median", "p10", "p90", "rounds", "of the first")
    first = next(iter(group.variants.values()), None)
    for name, samples in group.variants.items():
        figures = [show(x, group.unit) for x in (samples.median, samples.p10, samples.p90)]
        ratio = samples.over(first).median if first else math.nan
        table.add_row(name, *figures, str(len(samples.values)), show(ratio, "x"))
    return table
