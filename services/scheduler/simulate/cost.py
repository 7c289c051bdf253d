"""What things take: the constants that turn tokens and bytes into seconds.

All of a model's cost is linear: a decode round of one model with n rows takes
``decode_fixed_s + n * decode_s_per_row``, a prompt of n tokens
``prefill_fixed_s + n * prefill_s_per_token``, a swap-in of n bytes
``swap_fixed_s + n / link_bytes_per_s``.

The defaults are an H100 with an 8B model in bfloat16 over PCIe 5.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from services.scheduler.simulate.errors import SimulateError

_NEVER_ZERO = (
    "link_bytes_per_s",
    "load_bytes_per_s",
    "prefill_fixed_s",
    "prefill_chunk_tokens",
    "decode_fixed_s",
)


class CostModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds and rates of one GPU. Raises SimulateError for a value that makes no sense."""

    link_bytes_per_s: float = 50e9  # host -> device
    swap_fixed_s: float = 0.05  # of every swap-in, on top of its bytes
    swap_out_s: float = 0.0005  # of a model without requests: unmapping, nothing is copied
    suspend_s: float = 0.01  # until requests of a preempted model are suspended
    prefill_fixed_s: float = 0.008  # of every prompt
    prefill_s_per_token: float = 36e-6
    prefill_chunk_tokens: int = 1_000_000  # between two decode rounds; so many: prompts go first
    prefill_tail: float = 1.0  # share of a prompt that is read after the last weights came, or more
    decode_fixed_s: float = 0.008  # of every round of a model
    decode_s_per_row: float = 0.00012
    kv_bytes_per_token: int = 0  # 0: KV limits nothing
    load_bytes_per_s: float = 2e9  # disk -> host image
    swaps_wait: bool = False  # the engine begins swaps between two steps, not beside one
    register_s: float = 0.1
    request_s: float = 0.0  # of every first token, on top: HTTP, queue, stream

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if math.isnan(value) or value < 0 or (value == 0 and name in _NEVER_ZERO):
                raise SimulateError(f"cost model: {name} = {value!r} makes no sense")
        if self.prefill_tail > 1:
            raise SimulateError(f"cost model: prefill_tail = {self.prefill_tail!r} is more than 1")

    def swap_in_s(self, num_bytes: int) -> float:
        """Seconds on the link to bring in ``num_bytes``."""
        return self.swap_fixed_s + num_bytes / self.link_bytes_per_s

    def chunk_s(self, num_tokens: int) -> float:
        """Seconds of a prompt of ``num_tokens`` between two decode rounds."""
        return self.prefill_fixed_s + self.prefill_s_per_token * min(
            self.prefill_chunk_tokens, num_tokens
        )

    def prefill_s(self, num_tokens: int) -> float:
        """Seconds of a whole prompt that has the GPU to itself."""
        return self.prefill_fixed_s + num_tokens * self.prefill_s_per_token

    def prefill_left_s(self, num_tokens: int, read_s: float) -> float:
        """The same, after ``read_s`` seconds of it while the last weights were still to come."""
        whole_s = self.prefill_s(num_tokens)
        return max(whole_s - read_s, whole_s * self.prefill_tail) if read_s else whole_s

    def decode_s(self, num_models: int, num_rows: int) -> float:
        """Seconds of one decode round of a GPU where ``num_models`` have rows."""
        return num_models * self.decode_fixed_s + num_rows * self.decode_s_per_row

    def infinite_link(self) -> "CostModel":
        """The same GPU where swapping costs nothing: what any policy can reach at best."""
        return msgspec.structs.replace(
            self, link_bytes_per_s=math.inf, swap_fixed_s=0.0, swap_out_s=0.0, suspend_s=0.0
        )


H100 = CostModel()
# The same with what a 8B model of today takes and does: KV of 8 heads of 128 in 32 layers, of whole
# answers from the start, and prompts read in pieces.
H100_KV = CostModel(prefill_chunk_tokens=512, kv_bytes_per_token=131072)
PRESETS = {"h100": H100, "h100-kv": H100_KV}


def changed(base: CostModel, changes: Mapping[str, float]) -> CostModel:
    """``base`` with other constants. Raises SimulateError for a name that is none."""
    unknown = [name for name in changes if name not in base.__struct_fields__]
    if unknown:
        raise SimulateError(
            f"no constant {', '.join(unknown)} in the cost model; "
            f"there are: {', '.join(base.__struct_fields__)}"
        )
    values = {
        name: int(value) if isinstance(getattr(base, name), int) else value
        for name, value in changes.items()
    }
    return msgspec.structs.replace(base, **values)


def named(text: str) -> CostModel:
    """A preset's name, or a JSON file of `bench.swap`."""
    if text in PRESETS:
        return PRESETS[text]
    path = Path(text)
    if path.suffix != ".json" and not path.exists():
        raise SimulateError(f"no cost model {text!r}: give {', '.join(PRESETS)} or a JSON file")
    return from_bench(path)


def from_bench(path: Path, base: CostModel = H100) -> CostModel:
    """Link rate and fixed cost from what ``python -m bench.swap --json FILE`` wrote.

    The medians of the whole swap-ins of two models of different size give both; where noise puts
    the fixed cost below zero, or there is one model only, it is 0 and the largest gives the rate.
    All else is of ``base``. Raises SimulateError for any other file, naming what is missing.
    """
    try:
        report = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise SimulateError(f"{path}: {error.strerror or error}") from error
    except msgspec.DecodeError as error:
        raise SimulateError(f"{path} is not JSON: {error}") from error
    points = sorted(_swap_ins(path, report))
    num_bytes, took_s = points[-1]
    rate, fixed_s = num_bytes / took_s, 0.0
    if points[0][0] < num_bytes and points[0][1] < took_s:
        slope = (num_bytes - points[0][0]) / (took_s - points[0][1])
        if took_s - num_bytes / slope >= 0:
            rate, fixed_s = slope, took_s - num_bytes / slope
    return msgspec.structs.replace(base, link_bytes_per_s=rate, swap_fixed_s=fixed_s)


def _swap_ins(path: Path, report: Any) -> list[tuple[float, float]]:
    """(bytes, seconds) of each model in the report."""
    if not isinstance(report, dict) or report.get("name") != "swap":
        raise SimulateError(
            f"{path} is no result of bench.swap (its name is not 'swap'); "
            "write one with: python -m bench.swap --json FILE"
        )
    points = []
    try:
        for group in report["groups"]:
            for variant, samples in group["variants"].items():
                model, _, what = variant.partition(": ")
                if what == "swap-in" and group["unit"] == "s":
                    values = sorted(samples["values"])
                    moved = report["values"][f"{model}: bytes moved"]["value"] * 1e6
                    points.append((moved, float(values[len(values) // 2])))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise SimulateError(f"{path}: {error} is missing in its groups or values") from error
    if not points or min(min(point) for point in points) <= 0:
        raise SimulateError(f"{path}: no group has a variant 'MODEL: swap-in' in seconds")
    return points
