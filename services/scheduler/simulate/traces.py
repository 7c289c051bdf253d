"""Public traces, as their repositories have them, made into the files of the named workloads.

    azure      two CSV files, a row per request              azure_llm_2023.csv.gz
    gentd26    one CSV file, a row per image request         gentd26_models.csv.gz
    arena      a pickle of a list of requests                arena27.csv.gz
    servegen   rates and lengths of clients (tail.py)        servegen_tail.csv.gz

All but the token counts of gentd26, and what servegen draws, is as it was published. The same
source gives the same requests. Sources, licences, citations: docs/traces.md.
"""

import csv
import gzip
import io
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeAlias

import msgspec

from services.scheduler.simulate import workload
from services.scheduler.simulate.errors import SimulateError
from services.scheduler.simulate.workload import COLUMNS, Request

SEED = 7  # of all that is drawn
CONVERSATION = "conv"  # the model of azure_llm_2023 whose lengths gentd26 borrows

AZURE_FILES = {
    "code": "data/AzureLLMInferenceTrace_code.csv",
    CONVERSATION: "data/AzureLLMInferenceTrace_conv.csv",
}
GENTD26_FILE = "cluster-trace-v2026-GenAI/lora_request_trace.csv"
ARENA_FILE = "fair_bench/real_trace.pkl"

_Columns: TypeAlias = Mapping[str, Callable[[str], Any]]


def find(source: Path, name: str) -> Path:
    """``name`` in a clone of its repository, in the folder it lies in, or ``source`` itself.

    Raises SimulateError if it is in none of them.
    """
    if source.is_file():
        return source
    for path in (source / name, source / Path(name).name):
        if path.is_file():
            return path
    raise SimulateError(
        f"{source}: {name} is not there; give a clone of its repository, or the folder it is in"
    )


def write(requests: Iterable[Request], path: Path) -> None:
    """As `workload.read` takes it; ``path`` appears when it is whole. Raises OSError."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(COLUMNS)
    lines.writerows(request[: len(COLUMNS)] for request in requests)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))
    part.replace(path)


# -- a row per request -----------------------------------------------------------------------


def azure(source: Path) -> list[Request]:
    """Requests of two services, code and conversation, which are the models. Nothing is drawn."""
    columns: _Columns = {
        "TIMESTAMP": _seconds,
        "ContextTokens": workload.count,
        "GeneratedTokens": workload.count,
    }
    if source.is_file():
        raise SimulateError(f"{source}: give the folder, of {' and '.join(AZURE_FILES.values())}")
    requests = [
        Request(at_s, service, num_in, num_out)
        for service, name in AZURE_FILES.items()
        for at_s, num_in, num_out in _rows(find(source, name), columns)
    ]
    start_s = min(request.at_s for request in requests)
    return sorted(
        request._replace(at_s=round(round(request.at_s, 3) - round(start_s, 3), 3))
        for request in requests
    )


class _Image(NamedTuple):
    """A request of gentd26. The order of the fields is that of requests of the same second."""

    at_s: float
    model: str  # "" where the request named none; they count as one model
    exec_s: str
    num_lora: str


def gentd26(source: Path, lengths: Path) -> list[Request]:
    """Requests for images by base model. ``lengths``: the file that `azure` was written to.

    Images have no tokens: each request gets those of a random conversation.
    """
    import numpy as np

    path = find(source, GENTD26_FILE)
    columns: _Columns = {
        "gmt_create": _seconds,
        "checkpoint_model_version_id": str,
        "exec_time_seconds": str,
        "num_lora": str,
    }
    images = sorted(_Image(*row) for row in _rows(path, columns))
    pairs = [row[1:] for row in workload.rows_of(lengths, COLUMNS[1:]) if row[0] == CONVERSATION]
    if not pairs:
        raise SimulateError(f"{lengths}: no row has the model_id {CONVERSATION}")
    drawn = np.random.default_rng(SEED).integers(0, len(pairs), len(images)).tolist()
    return [
        Request(image.at_s - images[0].at_s, image.model, *pairs[index])
        for image, index in zip(images, drawn, strict=True)
    ]


def _rows(path: Path, columns: _Columns) -> Sequence[tuple[Any, ...]]:
    """At least one."""
    rows = list(workload.rows_of(path, tuple(columns), kinds=columns))
    if not rows:
        raise SimulateError(f"{path}: no line after the first; was it cut off?")
    return rows


def _seconds(text: str) -> float:
    """Of a date and time, as in 2023-11-16 18:17:03.9799600; which zone does not matter."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


# -- a pickle --------------------------------------------------------------------------------


class _ArenaRequest(msgspec.Struct, frozen=True):
    """What is used of a request in the pickle; its prompt is not."""

    adapter_dir: str
    prompt_len: Annotated[int, msgspec.Meta(ge=0)]
    output_len: Annotated[int, msgspec.Meta(ge=0)]
    req_time: Annotated[float, msgspec.Meta(ge=0, lt=1e9)]


def arena(source: Path) -> list[Request]:
    """Requests of a chat arena by model, A00 and so on in the order of the pickle's own list.

    Nothing is drawn here; its authors resampled it to ten minutes.
    """
    path = find(source, ARENA_FILE)
    match _unpickled(path):
        case [[*adapters], [_, *_] as records]:
            names = {str(adapter): f"A{number:02}" for number, adapter in enumerate(adapters)}
        case _:
            raise SimulateError(f"{path}: expected a list of adapters and a list of requests")
    requests = []
    for number, record in enumerate(records):
        try:
            one = msgspec.convert(getattr(record, "__dict__", record), _ArenaRequest)
            name = names[one.adapter_dir]
        except msgspec.ValidationError as error:
            raise SimulateError(f"{path}, request {number}: {error}") from error
        except KeyError as error:
            raise SimulateError(f"{path}, request {number}: no adapter {error}") from error
        requests.append(Request(one.req_time, name, one.prompt_len, one.output_len))
    requests.sort(key=attrgetter("at_s"))
    start_s = requests[0].at_s
    return [request._replace(at_s=round(request.at_s - start_s, 3)) for request in requests]


def _unpickled(path: Path) -> Any:
    """What the pickle holds: lists, texts, numbers and its requests, as bare objects.

    A pickle may name any function and have it called. This one may name `trace.Request`, for which
    an empty class stands in, and nothing else.
    """

    class Record:
        """Fresh for each file, so that a file can spoil its own alone."""

    class Restricted(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) != ("trace", "Request"):
                raise SimulateError(
                    f"{path}: refused, it names {module}.{name}, and a pickle can run what it "
                    "names; only trace.Request belongs in it"
                )
            return Record

    try:
        with path.open("rb") as file:
            return Restricted(file).load()
    except (SimulateError, OSError):
        raise
    except Exception as error:  # damaged bytes can raise nearly anything
        raise SimulateError(f"{path}: not a whole pickle: {error}") from error
