"""What a GPU run found: one JSON file, complete after every part, and a table at the end."""

import traceback
from pathlib import Path
from typing import Any, Literal

import msgspec
from rich.console import Console
from rich.table import Table

from bench._stats import Samples, show
from bench.harness import Target, Value, verdict

FILE = "gpu_swap.json"


class Part(msgspec.Struct):
    """One part's figures. ``details``: what is no single number, as JSON has it."""

    name: str
    is_dry: bool
    outcome: Literal["running", "done", "failed", "skipped"] = "running"
    took_s: float = 0.0
    why: str = ""  # the traceback of a failed part, the reason of a skipped one
    values: dict[str, Value] = {}
    targets: list[Target] = []
    samples: dict[str, Samples] = {}
    details: dict[str, Any] = {}

    def value(self, name: str, value: float, unit: str = "") -> None:
        """Record a figure that nothing is promised about."""
        self.values[name] = Value(value, unit)

    def taken(self, name: str, values: list[float], unit: str = "s") -> Samples:
        """Record what was measured several times, and its median as a value."""
        samples = self.samples[name] = Samples(tuple(values))
        self.value(name, samples.median, unit)
        return samples

    def holds(self, name: str, truth: bool) -> None:
        """Promise something that is so or not, on any device."""
        self.targets.append(Target(name, float(truth), "", 1.0, None))

    def speed(
        self,
        name: str,
        value: float,
        unit: str = "x",
        *,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """Promise something of a GPU; of a dry run it is only a value."""
        if self.is_dry:
            self.value(name, value, unit)
        else:
            self.targets.append(Target(name, value, unit, at_least, at_most))

    def fail(self, error: BaseException) -> None:
        self.outcome = "failed"
        self.why = "".join(traceback.format_exception(error))


class Report(msgspec.Struct):
    """What is written. A part that did not end well is a missed target of its own."""

    is_dry: bool
    environment: dict[str, Any]
    parts: list[Part] = []
    took_s: float = 0.0
    verdict: str = ""

    @property
    def targets(self) -> list[Target]:
        named: list[Target] = []
        for part in self.parts:
            named += [
                msgspec.structs.replace(target, name=f"{part.name}: {target.name}")
                for target in part.targets
            ]
            if part.outcome != "done":
                named.append(Target(f"{part.name} {part.outcome}", 0.0, "", 1.0, None))
        return named

    @property
    def is_met(self) -> bool:
        return all(target.met for target in self.targets)

    def write(self, folder: Path) -> None:
        """Replace the file in ``folder`` at once, so that it is whole at any time."""
        self.verdict = verdict(self.targets)
        beside = folder / f"{FILE}.new"
        beside.write_bytes(msgspec.json.format(msgspec.json.encode(self)) + b"\n")
        beside.replace(folder / FILE)

    def show(self) -> None:
        """Print all figures; the last line is the harness's."""
        console = Console(highlight=False)
        table = Table("part", "figure", "value")
        for part in self.parts:
            for name, figure in part.values.items():
                table.add_row(part.name, name, show(figure.value, figure.unit))
        console.print(table)
        table = Table("target", "value", "promised", "")
        for target in self.targets:
            mark = "ok" if target.met else "[bold red]short[/]"
            table.add_row(target.name, show(target.value, target.unit), target.bound, mark)
        console.print(table)
        for part in self.parts:
            console.print(f"{part.name}: {part.outcome}, {show(part.took_s, 's')}")
            if part.why:
                print(part.why, flush=True)
        print(verdict(self.targets), flush=True)
