"""ServeGen's clients, made into a day of models with little traffic each.

A client becomes a model. How many requests it sends in each ten minutes is measured, and so are the
distributions of the gaps between them and of their lengths; gaps and lengths are drawn from those:

    window      |<------------------------- 600 s ------------------------->|
    arrivals       x  x        x     x xx               x           x
                 gaps drawn, one more than requests, then stretched so that they fill the window

ServeGen leaves out windows with less than ten requests: a model that is asked once an hour is rarer
here than in the world.
"""

import ast
import csv
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from services.scheduler.simulate import workload
from services.scheduler.simulate.errors import SimulateError
from services.scheduler.simulate.traces import SEED
from services.scheduler.simulate.workload import Request

if TYPE_CHECKING:
    import numpy as np

DAY_S, WINDOW_S = 86400, 600
MAX_RATE_PER_S = 0.2  # of a client over the day
# Their histograms were out of reach when the workload was made: the largest files of all.
LEFT_OUT = frozenset({("m-large", 73), ("m-mid", 87)})


class Pool(msgspec.Struct, frozen=True):
    """The clients of one model that ServeGen measured; ``day`` of its record, from 0."""

    name: str
    folder: str
    day: int


POOLS = (
    Pool("m-large", "data/language/m-large", 9),
    Pool("m-mid", "data/language/m-mid", 9),
    Pool("m-small", "data/language/m-small", 9),
    Pool("deepseek-r1", "data/reason/deepseek-r1", 0),
)


class Window(msgspec.Struct, frozen=True):
    """Ten minutes with requests; ``start_s`` since midnight."""

    start_s: int
    num_requests: int
    pattern: str
    shape: float


class Client(msgspec.Struct, frozen=True):
    """What one client sends in a day. ``pool``: which of `POOLS`."""

    pool: int
    number: int
    windows: list[Window]
    lengths_file: Path

    @property
    def num_requests(self) -> int:
        """In the day."""
        return sum(window.num_requests for window in self.windows)


def tail(source: Path, on_progress: Callable[[float], None] | None = None) -> list[Request]:
    """A day of the clients that send at most `MAX_RATE_PER_S`; S000 is the one that sends most.

    ``source``: a clone of ServeGen. Raises SimulateError for one that is not.
    """
    chosen = clients(source)
    requests: list[Request] = []
    for rank, client in enumerate(chosen):
        requests += _drawn(client, f"S{rank:03}")
        if on_progress:
            on_progress((rank + 1) / len(chosen))
    return sorted(requests)


def clients(source: Path) -> list[Client]:
    """Those with little traffic, the busiest first."""
    found = []
    for index, pool in enumerate(POOLS):
        folder = source / pool.folder
        if not (folder / "chunk-0-trace.csv").is_file():
            raise SimulateError(f"{folder}: no chunk-0-trace.csv; give a clone of ServeGen")
        for path in folder.glob("chunk-*-trace.csv"):
            number = int(path.name.split("-")[1])
            windows = list(_windows(path, pool.day * DAY_S))
            client = Client(index, number, windows, folder / f"chunk-{number}-dataset.json")
            is_little = 0 < client.num_requests <= MAX_RATE_PER_S * DAY_S
            if is_little and (pool.name, number) not in LEFT_OUT:
                found.append(client)
    return sorted(found, key=lambda client: (-client.num_requests, client.pool, client.number))


def _windows(path: Path, day_s: int) -> Iterator[Window]:
    """Those of the day that starts at ``day_s`` of the record."""
    num_windows = 0
    with path.open(newline="", errors="replace") as file:
        reader = csv.reader(file)
        for row in reader:
            try:
                at, rate, _cv, pattern, shape, _scale = row
                start_s = int(at) - day_s
                if not 0 <= start_s < DAY_S:
                    continue
                num_windows += 1
                num_requests = round(workload.number(rate) * WINDOW_S)
                if not num_requests:
                    continue
                if pattern not in ("Gamma", "Weibull") or not 0 < float(shape) < math.inf:
                    raise ValueError(f"gaps like {pattern!r} {shape}; known: Gamma and Weibull")
                yield Window(start_s, num_requests, pattern, float(shape))
            except ValueError as error:
                raise SimulateError(
                    f"{path}, line {reader.line_num}: {error}; a line has six columns: "
                    "second, rate, CV, pattern and its two parameters"
                ) from error
    if num_windows != DAY_S // WINDOW_S:
        raise SimulateError(
            f"{path}: {num_windows} windows of the day from second {day_s}, and not "
            f"{DAY_S // WINDOW_S}: was it cut off?"
        )


def _drawn(client: Client, model: str) -> Iterator[Request]:
    import numpy as np

    # A generator of its own: a client's requests do not change with what others do.
    rng = np.random.default_rng([SEED, client.pool, client.number])
    lengths = _Lengths(client.lengths_file)
    day_s = POOLS[client.pool].day * DAY_S
    for window in client.windows:
        num = window.num_requests
        draw = rng.standard_gamma if window.pattern == "Gamma" else rng.weibull
        gaps = draw(window.shape, num + 1)  # the scale does not matter, they are stretched
        hundredths = 100 * WINDOW_S * np.cumsum(gaps)[:-1] / np.sum(gaps)
        hundredths = np.minimum(np.floor(hundredths), 100 * WINDOW_S - 1)  # not in the next window
        at_s = window.start_s + hundredths / 100
        inputs, outputs = (one.drawn(rng, num) for one in lengths.nearest(day_s + window.start_s))
        for t_s, num_in, num_out in zip(at_s.tolist(), inputs, outputs, strict=True):
            yield Request(round(t_s, 2), model, num_in, num_out)


class _Histogram(msgspec.Struct, frozen=True):
    """Numbers of tokens, and the share of requests up to each."""

    tokens: "np.ndarray[Any, np.dtype[np.int64]]"
    cumulated: "np.ndarray[Any, np.dtype[np.float64]]"

    def drawn(self, rng: "np.random.Generator", num: int) -> list[int]:
        at = self.cumulated.searchsorted(rng.random(num) * self.cumulated[-1], side="right")
        drawn: list[int] = self.tokens[at.clip(max=len(self.tokens) - 1)].tolist()
        return drawn


class _Lengths:
    """The histograms of a client: input and output tokens for each six hours of the record.

    The file is JSON whose histograms are texts, each a Python dict of tokens and shares.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._parsed: dict[int, tuple[_Histogram, _Histogram]] = {}
        try:
            self._texts = {
                int(at): (str(fields["input_tokens"]), str(fields["output_tokens"]))
                for at, fields in json.loads(path.read_bytes()).items()
            }
        except OSError as error:
            reason = f"{path}: {error.strerror}; give a whole clone of ServeGen"
            raise SimulateError(reason) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._wrong(error) from error
        self._starts_s = [at for at, texts in self._texts.items() if "{}" not in texts]
        if not self._starts_s:
            raise SimulateError(f"{path}: all histograms are empty")

    def nearest(self, at_s: int) -> "tuple[_Histogram, _Histogram]":
        """Those that begin nearest to ``at_s``, before or after it."""
        start_s = min(self._starts_s, key=lambda start_s: abs(start_s - at_s))
        if start_s not in self._parsed:
            try:
                inputs, outputs = map(_histogram, self._texts[start_s])
            except (ValueError, SyntaxError, TypeError) as error:
                raise self._wrong(error, f", second {start_s}") from error
            self._parsed[start_s] = inputs, outputs
        return self._parsed[start_s]

    def _wrong(self, error: Exception, where: str = "") -> SimulateError:
        return SimulateError(
            f"{self.path}{where}: {error!r}; expected by second input_tokens and output_tokens, "
            "each a text like {12: 0.25, 40: 0.75}"
        )


def _histogram(text: str) -> _Histogram:
    import numpy as np

    shares = ast.literal_eval(text)  # a literal, never run
    tokens = np.array(sorted(workload.count(str(key)) for key in shares), dtype=np.int64)
    weights = [workload.number(str(shares[key])) for key in tokens.tolist()]
    if not sum(weights) > 0:
        raise ValueError("a histogram without any request")
    return _Histogram(tokens, np.cumsum(weights))
