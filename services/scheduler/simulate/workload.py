"""Which requests come when: read from CSV, or drawn by seed."""

import csv
import gzip
import heapq
import itertools
import math
import random
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import msgspec

from services.scheduler.simulate.errors import SimulateError

GB = 10**9
COLUMNS = ("t_s", "model_id", "input_tokens", "output_tokens")
TENANT_COLUMN = "tenant"  # may be left out

# Of azure_llm_2023: prompts have a median of 1046 tokens, answers of 90.
MEDIAN_INPUT_TOKENS = 1046
MEDIAN_OUTPUT_TOKENS = 90
SIGMA_INPUT = 0.9
SIGMA_OUTPUT = 1.1
MAX_TOKENS = 8192

Lengths: TypeAlias = Callable[[random.Random], tuple[int, int]]  # -> input, output tokens


class Request(NamedTuple):
    """``at_s``: seconds since the workload's start."""

    at_s: float
    model: str
    input_tokens: int
    output_tokens: int
    tenant: str = ""


class ModelSize(msgspec.Struct, frozen=True):
    """What a model takes on the device, and how many of its requests run together."""

    weight_bytes: int
    kv_bytes: int = 2 * GB  # reserve while resident
    max_batch: int = 1024


DEFAULT_SIZE = ModelSize(16 * GB)


class Workload(msgspec.Struct, frozen=True):
    """``requests`` in the order in which they come; each one's model is in ``models``."""

    name: str
    models: dict[str, ModelSize]
    requests: list[Request]

    @property
    def duration_s(self) -> float:
        """When the last request comes."""
        return self.requests[-1].at_s if self.requests else 0.0

    def shortened(self, duration_s: float) -> "Workload":
        """Only what comes before ``duration_s``; the models all stay."""
        kept = list(itertools.takewhile(lambda r: r.at_s < duration_s, self.requests))
        return Workload(self.name, self.models, kept)

    def compressed(self, factor: float) -> "Workload":
        """The same requests ``factor`` times as fast."""
        requests = [request._replace(at_s=request.at_s / factor) for request in self.requests]
        return Workload(self.name, self.models, requests)

    def tenants(self) -> tuple[str, ...]:
        """Of each request; empty if none has one."""
        tenants = tuple(request.tenant for request in self.requests)
        return tenants if any(tenants) else ()


def read(
    path: Path,
    *,
    name: str = "",
    speed: float = 1.0,
    duration_s: float = math.inf,
    without: Collection[str] = (),
    sizes: Mapping[str, ModelSize] | None = None,
    size: ModelSize = DEFAULT_SIZE,
) -> Workload:
    """The requests of a CSV file (plain or .gz) with the columns `COLUMNS`, in any order; a column
    `TENANT_COLUMN` says who they are for.

    ``speed``: by how much time is compressed; ``duration_s`` counts after that. ``without``:
    models to leave out. ``sizes``: of models by name, ``size`` of all others. Lines need not be
    sorted. Raises SimulateError for a file that is not there or not like that.
    """
    taken: list[Request] = []
    for t_s, model, *rest in rows_of(path, COLUMNS, optional=(TENANT_COLUMN,)):
        if t_s / speed < duration_s and model not in without:
            taken.append(Request(t_s / speed, model, *rest))
    if not taken:
        raise SimulateError(f"{path}: no request is left to simulate")
    taken.sort(key=lambda request: request.at_s)
    known = sizes or {}
    names = sorted({request.model for request in taken})
    models = {model: known.get(model, size) for model in names}
    return Workload(name or path.name.split(".")[0], models, taken)


def read_sizes(path: Path, base: ModelSize = DEFAULT_SIZE) -> dict[str, ModelSize]:
    """CSV with the columns model and weight_bytes -> sizes; all else of ``base``."""
    return {
        model: msgspec.structs.replace(base, weight_bytes=weight_bytes)
        for model, weight_bytes in rows_of(path, ("model", "weight_bytes"))
    }


def rows_of(
    path: Path,
    columns: Sequence[str],
    optional: Sequence[str] = (),
    kinds: Mapping[str, Callable[[str], Any]] | None = None,
) -> Iterator[tuple[Any, ...]]:
    """The named columns of each line of a CSV file, plain or .gz, as ``kinds`` has them.

    After them those ``optional`` ones that the file has.

    Raises SimulateError, naming file and line.
    """
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            reader = csv.reader(file)
            header = next(reader, [])
            if missing := [column for column in columns if column not in header]:
                raise SimulateError(
                    f"{path}: column {', '.join(missing)} is missing; "
                    f"the first line must name {', '.join(columns)}"
                )
            wanted = [*columns, *(column for column in optional if column in header)]
            parsers = [(kinds or _KINDS)[column] for column in wanted]
            at = [header.index(column) for column in wanted]
            for row in reader:
                try:
                    yield tuple([parse(row[i]) for parse, i in zip(parsers, at, strict=True)])
                except IndexError as error:
                    raise SimulateError(
                        f"{path}, line {reader.line_num}: {len(row)} of {len(header)} columns; "
                        f"{', '.join(columns)} are needed"
                    ) from error
                except ValueError as error:
                    raise SimulateError(f"{path}, line {reader.line_num}: {error}") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SimulateError(f"{path}: {reason}") from error


def number(text: str) -> float:
    """Finite, 0 or more. Raises ValueError."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError(f"{text} is not a finite number, 0 or more")
    return value


def count(text: str) -> int:
    """0 or more. Raises ValueError."""
    value = int(text)
    if value < 0:
        raise ValueError(f"{text} is less than 0")
    return value


_KINDS: dict[str, Callable[[str], Any]] = {
    "t_s": number,
    "model_id": sys.intern,
    "model": sys.intern,
    "tenant": sys.intern,
    "input_tokens": count,
    "output_tokens": count,
    "weight_bytes": count,
}


# -- drawn by seed -------------------------------------------------------------------------


def sampled_lengths(path: Path) -> Lengths:
    """Token counts of random rows of ``path`` (columns input_tokens and output_tokens)."""
    pairs = [(num_in, max(1, num_out)) for num_in, num_out in rows_of(path, COLUMNS[2:])]
    return lambda rng: pairs[int(rng.random() * len(pairs))]


def lognormal_lengths(rng: random.Random) -> tuple[int, int]:
    """Token counts with the medians of azure_llm_2023, where that file is not at hand."""
    num_in = rng.lognormvariate(math.log(MEDIAN_INPUT_TOKENS), SIGMA_INPUT)
    num_out = rng.lognormvariate(math.log(MEDIAN_OUTPUT_TOKENS), SIGMA_OUTPUT)
    return min(MAX_TOKENS, 1 + int(num_in)), min(MAX_TOKENS, 1 + int(num_out))


def poisson(
    models: Mapping[str, ModelSize],
    rate_per_s: float,
    duration_s: float,
    *,
    seed: int,
    zipf: float = 0.0,
    lengths: Lengths = lognormal_lengths,
    name: str = "poisson",
    tenant: str = "",
) -> Workload:
    """Independent Poisson arrivals, ``rate_per_s`` over all ``models`` together.

    The k-th model gets a share in proportion to k ** -zipf: 0 makes them equal.
    """
    if rate_per_s <= 0 or not models:
        raise SimulateError(f"{name}: needs models, and a rate above 0")
    rng = random.Random(seed)
    names = list(models)
    shares = list(itertools.accumulate((k + 1) ** -zipf for k in range(len(names))))
    requests: list[Request] = []
    at_s = rng.expovariate(rate_per_s)
    while at_s < duration_s:
        model = rng.choices(names, cum_weights=shares)[0]
        requests.append(Request(at_s, model, *lengths(rng), tenant))
        at_s += rng.expovariate(rate_per_s)
    return Workload(name, dict(models), requests)


def together(name: str, *workloads: Workload) -> Workload:
    """All of them at once."""
    models: dict[str, ModelSize] = {}
    for one in workloads:
        models |= one.models
    requests = heapq.merge(*(one.requests for one in workloads), key=lambda r: r.at_s)
    return Workload(name, models, list(requests))
