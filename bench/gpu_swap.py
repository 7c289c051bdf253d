"""Everything that needs a GPU, in one call of under eight minutes.

    python -m bench.gpu_swap OUT_DIR [--dry-run] [--only PART,...] [--budget-s 420]

Models of published shapes with random weights are swapped through a page pool that holds one of
a pair. Parts run in order of worth; each is on its own: one that fails is recorded and the next
goes on, and OUT_DIR/gpu_swap.json is whole after each of them. No part starts after the budget.

Seconds that a part may take on an H100 with a PCIe 5 link (55 GB/s: Llama is copied in 0.3 s):

    start          15   context, imports            switch-falcon   25   2 models x 2 lengths x 6
    swap           45   images of two models: 30    decode-falcon   25
    switch         25   2 models x 2 lengths x 6    partial         15   keeping takes a swap each
    graph          60   100 rounds of two swaps     call-off        10
    decode         25   7 batches of 64 steps       pages           20   a pool per size: 3
    arrival        25   30 random swaps             read-only       15
    swap-falcon    35   image: 20

``--dry-run`` does the same on the CPU with tiny shapes in seconds: what holds on any device is
promised there too, rates are only shown.
"""

import argparse
import faulthandler
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias

import msgspec

from bench import _gpu_copying, _gpu_exact, _gpu_serving, _machine
from bench._gpu_environment import describe_gpu
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
    "swap": _with(_gpu_copying.rates, _NEAR),
    "switch": _with(_gpu_serving.switches, _NEAR),
    "graph": _with(_gpu_exact.graphs, _NEAR),
    "decode": _with(_gpu_serving.decoding, _NEAR),
    "arrival": _with(_gpu_exact.arrivals, _NEAR),
    "partial": _with(_gpu_copying.partial, _NEAR),
    "call-off": _with(_gpu_copying.call_off, _NEAR),
    "read-only": _with(_gpu_copying.read_only, _NEAR),
    "swap-falcon": _with(_gpu_copying.rates, _FAR[::-1]),
    "switch-falcon": _with(_gpu_serving.switches, _FAR[::-1]),
    "decode-falcon": _with(_gpu_serving.decoding, _FAR[::-1]),
    "pages": _with(_gpu_copying.pages, _NEAR[:1]),
}
