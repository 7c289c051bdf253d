"""Everything that needs a GPU, in one call of under eight minutes.

    python -m bench.gpu_swap OUT_DIR [--dry-run] [--only PART,...] [--budget-s 420]

Models of published shapes with random weights are swapped through a page pool that holds one of
a pair. Parts run in order of worth; each is on its own: one that fails is recorded and the next
goes on, and OUT_DIR/gpu_swap.json is whole after each of them. No part starts after the budget.

Seconds that a part may take on an H100 with a PCIe 5 link (55 GB/s: Llama is copied in 0.3 s):

    start          15   context, imports            swap-falcon     35   image: 20
    driver          5   bare calls                  switch-falcon   25   2 models x 2 lengths x 6
    swap           45   images of two models: 30    decode-falcon   25
    switch         25   2 models x 2 lengths x 6    partial         15   keeping takes a swap each
    graph          60   100 rounds of two swaps     call-off        10
    decode         25   7 batches of 64 steps       pages           20   a pool per size: 3
    floor          45   28 batches of 64 steps      read-only       15
    arrival        25   30 random swaps

``--dry-run`` does the same on the CPU with tiny shapes in seconds: what holds on any device is
promised there too, rates are only shown.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the engine worker has it

import argparse
import faulthandler
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import msgspec

from bench import (
    _gpu_copying,
    _gpu_decoding,
    _gpu_driver,
    _gpu_environment,
    _gpu_exact,
    _gpu_serving,
    _machine,
)
from bench._gpu_report import Part, Report
from bench._gpu_stage import DRY, OpenPool, Sizes, Stage
from services.gpu_agent.device import open_pool, why_no_cuda
from services.gpu_agent.pages import PagePool

Work: TypeAlias = Callable[[Stage, Part], None]

BUDGET_S: Final = 420.0
GRACE_S: Final = 55.0  # after the budget whoever hangs is ended, with a traceback of all threads

_NEAR: Final = ("llama", "mistral")
_FAR: Final = ("llama", "falcon")


def _with(call: Callable[..., None], names: Sequence[str]) -> Work:
    return lambda stage, part: call(stage, part, *names)


PARTS: Final[dict[str, Work]] = {
    "driver": lambda _, part: _gpu_driver.ask(part),
    "swap": _with(_gpu_copying.rates, _NEAR),
    "switch": _with(_gpu_serving.switches, _NEAR),
    "graph": _with(_gpu_exact.graphs, _NEAR),
    "decode": _with(_gpu_serving.decoding, _NEAR),
    "floor": _with(_gpu_decoding.floors, _NEAR),
    "arrival": _with(_gpu_exact.arrivals, _NEAR),
    "partial": _with(_gpu_copying.partial, _NEAR),
    "call-off": _with(_gpu_copying.call_off, _NEAR),
    "read-only": _with(_gpu_copying.read_only, _NEAR),
    "swap-falcon": _with(_gpu_copying.rates, _FAR[::-1]),
    "switch-falcon": _with(_gpu_serving.switches, _FAR[::-1]),
    "decode-falcon": _with(_gpu_serving.decoding, _FAR[::-1]),
    "pages": _with(_gpu_copying.pages, _NEAR[:1]),
}


class Run:
    """One run of some parts. ``clock`` is there for tests."""

    def __init__(
        self,
        folder: Path,
        open_pool: OpenPool,
        sizes: Sizes,
        *,
        is_dry: bool,
        environment: dict[str, Any],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._folder = folder
        self._clock = clock
        self._began = clock()
        self._open_pool = open_pool
        self._sizes = sizes
        self._stage: Stage | None = None
        self.report = Report(is_dry, environment)

    def run(self, parts: dict[str, Work], budget_s: float) -> Report:
        """All of ``parts``; those that would begin after ``budget_s`` are named as skipped."""
        for name, work in parts.items():
            part = Part(name, self.report.is_dry)
            self.report.parts.append(part)
            elapsed = self._clock() - self._began
            if elapsed > budget_s:
                part.outcome = "skipped"
                part.why = f"{elapsed:.0f} s of {budget_s:.0f} s were used before it"
            else:
                self._write()
                print(f"{elapsed:6.1f} s  {name}", flush=True)
                self._try(work, part)
            self._write()
        if self._stage is not None:
            try:
                self._stage.close()
            except Exception:  # all is written; a driver in disarray must not hide it
                traceback.print_exc()
        return self.report

    def _try(self, work: Work, part: Part) -> None:
        began = self._clock()
        try:
            if self._stage is None:
                self._stage = Stage(self._open_pool, self._sizes, tiny=self.report.is_dry)
            work(self._stage, part)
            part.outcome = "done"
        except Exception as error:  # the next part may do better
            part.fail(error)
            print(part.why, flush=True)
            if self._stage is not None:
                self._stage.reset()
        part.took_s = self._clock() - began

    def _write(self) -> None:
        self.report.took_s = self._clock() - self._began
        self.report.write(self._folder)


def main(argv: list[str]) -> int:
    """Run it. Returns the exit status: 0 where all targets are met, 1, or 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_swap", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="gpu_swap.json is written there")
    parser.add_argument("--dry-run", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--only", metavar="PART,...", help=f"some of: {', '.join(PARTS)}")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S)
    args = parser.parse_args(argv)
    names = args.only.split(",") if args.only else list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"no part named {', '.join(unknown)}; there are: {', '.join(PARTS)}")
    obstacle = "" if args.dry_run else why_no_cuda(0)
    if obstacle:
        print(f"this needs a GPU, but {obstacle}; --dry-run runs on the CPU", flush=True)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.dry_run:
        faulthandler.dump_traceback_later(args.budget_s + GRACE_S, exit=True)
    run = Run(
        args.out,
        open_cpu if args.dry_run else open_gpu,
        DRY if args.dry_run else Sizes(),
        is_dry=args.dry_run,
        environment=_gpu_environment.describe(0, on_gpu=not args.dry_run)
        | {"machine": msgspec.to_builtins(_machine.environment())},
    )
    report = run.run({name: PARTS[name] for name in names}, args.budget_s)
    faulthandler.cancel_dump_traceback_later()
    report.show()
    return 0 if report.is_met else 1


def open_cpu(num_pages: int, page_bytes: int) -> PagePool:
    return open_pool("cpu", num_pages * page_bytes, page_bytes)


def open_gpu(num_pages: int, page_bytes: int) -> PagePool:
    return open_pool("cuda", num_pages * page_bytes, page_bytes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
