"""What the scheduler's policy is worth, on simulated GPUs: the very `decide`, real traffic.

    tail115       a day of 115 models with little traffic each, on 6 GPUs
    poisson100    an hour of 100 equal models, on 6
    market87      models as popular as in a market, on 4
    arena27       ten minutes of a chat arena, on 2
    mixed         models of 8 to 64 GB, on 8
    knee          tail115 on 5: the share of LRU's loss that is gained back
    fairness      a tenant that floods two GPUs, beside a polite one
    sensitivity   fixed cost, link, sizes, load and quantum, each against LRU

tail115, market87, arena27 and knee need ``--traces DIR``, and are left out without it. ``--part``
runs some only. ``--quick``: the first ten minutes of everything.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench import _simulate_parts as parts
from bench.harness import Bench

PARTS: dict[str, Callable[[parts.Lab], None]] = {
    "tail115": parts.tail,
    **{name: partial(parts.share, name=name) for name in parts.SHARES},
    "knee": parts.knee,
    "fairness": parts.fairness,
    "sensitivity": parts.sensitivity,
}
NEED_TRACES = ("tail115", "market87", "arena27", "knee")


def main(argv: list[str]) -> int:
    """Run the benchmark. Returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.simulate", add_help=False)
    parser.add_argument("--traces", type=Path, metavar="DIR")
    parser.add_argument("--part", action="append", choices=PARTS)
    args, others = parser.parse_known_args(argv)
    if "-h" in others or "--help" in others:
        print(__doc__)
    bench = Bench("simulate", "the policy on simulated GPUs", others)
    lab = parts.Lab(bench, args.traces)
    for name, run in PARTS.items():
        if args.part and name not in args.part:
            continue
        if name in NEED_TRACES and args.traces is None:
            print(f"{name} is left out: it needs --traces DIR", flush=True)
            continue
        run(lab)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
