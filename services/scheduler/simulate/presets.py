"""The named workloads: real traffic of a day, and drawn traffic, each with its number of GPUs.

The traces are not part of this project, their licences differ. ``--traces`` names the folder
that holds them; `hotswap traffic` makes them from where they were published.
"""

import math
from collections.abc import Callable
from pathlib import Path

import msgspec

from services.scheduler.simulate.errors import SimulateError
from services.scheduler.simulate.workload import (
    DEFAULT_SIZE,
    GB,
    Lengths,
    ModelSize,
    Workload,
    lognormal_lengths,
    poisson,
    read,
    sampled_lengths,
)

TAIL_FILE = "servegen_tail.csv.gz"
MARKET_FILE = "gentd26_models.csv.gz"
ARENA_FILE = "arena27.csv.gz"
LENGTHS_FILE = "azure_llm_2023.csv.gz"
MADE = " (`hotswap traffic` makes it)"

# Each bursts beyond what a GPU of its own could serve: not what is to be compared here.
TAIL_BURSTS = ("S004", "S029", "S034", "S041", "S045", "S054", "S065", "S107", "S110")
NUM_TAIL_MODELS = 115
MARKET_SPEED = 100.0

POISSON_RATE_PER_S = 4.92  # chosen so that 5 of 6 first tokens come within 2 s under LRU
MIXED_RATE_PER_S = 10.4  # chosen so that 9 of 10 first tokens come within 2 s under LRU
MIXED_ZIPF = 0.8
DRAWN_S = 3600.0
# Sizes by popularity, over and over: half are the smallest, of twenty models one is the largest.
MIXED_GB = (8, 8, 16, 8, 16, 8, 8, 32, 8, 16, 8, 16, 8, 32, 8, 16, 8, 16, 32, 64)
NUM_MIXED = 80


class Preset(msgspec.Struct, frozen=True):
    """``make(folder, seed, duration_s)``: folder is None where the user gave none."""

    name: str
    about: str
    num_gpus: int
    needs_traces: bool
    make: Callable[[Path | None, int, float], Workload]


def _file(folder: Path | None, name: str) -> Path:
    if folder is None:
        raise SimulateError(f"{name} is needed: say where it is with --traces DIR{MADE}")
    path = folder / name
    if not path.exists():
        raise SimulateError(f"{name} is not in {folder}: give its folder with --traces DIR{MADE}")
    return path


def lengths(folder: Path | None) -> Lengths:
    """Of real requests where the folder has them."""
    if folder is None or not (folder / LENGTHS_FILE).exists():
        return lognormal_lengths
    return sampled_lengths(folder / LENGTHS_FILE)


def tail115(folder: Path | None, _seed: int = 0, duration_s: float = math.inf) -> Workload:
    """A day of 115 models that each get little traffic."""
    path = _file(folder, TAIL_FILE)
    workload = read(path, name="tail115", without=TAIL_BURSTS)
    if len(workload.models) != NUM_TAIL_MODELS:
        raise SimulateError(
            f"{path}: {len(workload.models)} models besides those that burst, and not "
            f"{NUM_TAIL_MODELS}: another file?"
        )
    return workload.shortened(duration_s)


def market87(folder: Path | None, _seed: int = 0, duration_s: float = math.inf) -> Workload:
    """87 models as popular as in a market: few have nearly all; three weeks in 5.5 hours."""
    trace = _file(folder, MARKET_FILE)
    return read(trace, name="market87", speed=MARKET_SPEED, duration_s=duration_s)


def arena27(folder: Path | None, _seed: int = 0, duration_s: float = math.inf) -> Workload:
    """Ten minutes of a chat arena."""
    return read(_file(folder, ARENA_FILE), name="arena27", duration_s=duration_s)


def poisson100(folder: Path | None, seed: int = 0, duration_s: float = math.inf) -> Workload:
    """An hour of 100 models that are all equally likely: nothing to learn from the past."""
    models = {f"P{number:03}": DEFAULT_SIZE for number in range(100)}
    return poisson(
        models,
        POISSON_RATE_PER_S,
        min(duration_s, DRAWN_S),
        seed=seed,
        lengths=lengths(folder),
        name="poisson100",
    )


def mixed(folder: Path | None, seed: int = 0, duration_s: float = math.inf) -> Workload:
    """An hour of models of 8 to 64 GB, some more popular than others."""
    sizes = [MIXED_GB[number % len(MIXED_GB)] for number in range(NUM_MIXED)]
    models = {f"X{i:02}-{size}GB": ModelSize(size * GB) for i, size in enumerate(sizes)}
    return poisson(
        models,
        MIXED_RATE_PER_S,
        min(duration_s, DRAWN_S),
        seed=seed,
        zipf=MIXED_ZIPF,
        lengths=lengths(folder),
        name="mixed",
    )


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("tail115", "24 h, 115 models with little traffic each", 6, True, tail115),
        Preset("poisson100", "1 h, 100 equal models at random", 6, False, poisson100),
        Preset("market87", "5.5 h, 87 models, few have most", 4, True, market87),
        Preset("arena27", "10 min, 27 chat models", 2, True, arena27),
        Preset("mixed", "1 h, models of 8 to 64 GB", 8, False, mixed),
    )
}


def preset(name: str) -> Preset:
    """Raises SimulateError for a name that is none."""
    if name not in PRESETS:
        raise SimulateError(f"no workload {name!r}; there are: {', '.join(PRESETS)}")
    return PRESETS[name]
