"""Run every benchmark, one after the other, each in a process of its own.

The last line and the exit status follow `bench.harness`, over all targets of all of them.
A benchmark that ends without its last line counts as one missed target.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from bench.harness import options

ROOT = Path(__file__).parents[1]
NOT_BENCHMARKS = {"harness", "gpu_swap"}  # the latter needs a GPU and a folder

_LAST_LINE = re.compile(r"(?:PASS|SHORT) (?P<met>\d+)/(?P<total>\d+)(?:: (?P<missed>.*))?")


class Outcome(NamedTuple):
    """How one benchmark ended. ``missed`` is empty when all its targets are met."""

    name: str
    met: int
    total: int
    missed: str


def benchmarks(folder: Path) -> Iterator[str]:
    """The names of the benchmarks in ``folder``, in order."""
    for file in sorted(folder.glob("*.py")):
        if not file.stem.startswith("_") and file.stem not in NOT_BENCHMARKS:
            yield file.stem


def outcome(name: str, last_line: str, status: int) -> Outcome:
    """Read a benchmark's last line and exit status."""
    found = _LAST_LINE.fullmatch(last_line)
    if found is None or (status == 0) != (found["missed"] is None):
        return Outcome(name, 0, 1, f"broke (exit status {status})")
    return Outcome(name, int(found["met"]), int(found["total"]), found["missed"] or "")


def summary(outcomes: list[Outcome]) -> str:
    """The last line over all benchmarks."""
    met, total = sum(one.met for one in outcomes), sum(one.total for one in outcomes)
    missed = [f"{one.name}: {one.missed}" for one in outcomes if one.missed]
    return f"SHORT {met}/{total}: {'; '.join(missed)}" if missed else f"PASS {met}/{total}"


def _run(name: str, argv: list[str]) -> Outcome:
    print(f"\n== {name} ==", flush=True)
    command = [sys.executable, "-m", f"bench.{name}", *argv]
    last_line = ""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last_line = line.rstrip("\n") or last_line
    return outcome(name, last_line, process.returncode)


def main(argv: list[str]) -> int:
    """Run the benchmarks named in ``argv``, or all. Returns the exit status."""
    names = list(benchmarks(Path(__file__).parent))
    parser = options(argparse.ArgumentParser(prog="python -m bench", description=__doc__))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of: {', '.join(names)}")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.names if name not in names]:
        parser.error(f"no benchmark named {', '.join(unknown)}; there are: {', '.join(names)}")
    passed_on = ["--quick"] if args.quick else []
    if args.rounds:
        passed_on += ["--rounds", str(args.rounds)]

    outcomes: list[Outcome] = []
    reports: dict[str, msgspec.Raw] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.names or names:
            report = Path(folder) / f"{name}.json"
            outcomes.append(_run(name, [*passed_on, "--json", str(report)]))
            if report.exists():
                reports[name] = msgspec.Raw(report.read_bytes())
    if args.json:
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode(reports)) + b"\n")
    print()
    for one in outcomes:
        print(f"{one.name:<16} {one.met}/{one.total} {'SHORT' if one.missed else 'PASS'}")
    print(summary(outcomes), flush=True)
    return 1 if any(one.missed for one in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
