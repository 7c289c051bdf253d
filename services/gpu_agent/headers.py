"""The safetensors format: a header of JSON, then raw tensors; nothing in it is executed.

[8 bytes: header length n, little endian][n bytes: JSON][data ...............]
^ data offsets count from here
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

MAX_HEADER_BYTES: Final = 100 * 2**20  # the format's own limit
_DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class BadCheckpoint(Exception):
    """A model's files can not be used. The message names file, cause and remedy."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file. ``start``: absolute byte offset; ``num_bytes`` as stored.

    ``origin``: where its bytes are, ``file`` itself or the URI of an object that begins with it.
    """

    name: str
    file: Path
    origin: str
    start: int
    num_bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def read_header(file: Path, origin: str, size: int) -> list[StoredTensor]:
    """The tensors of ``origin``, by offset. Raises BadCheckpoint.

    ``file`` holds its header at least, ``size`` is how many bytes all of it has.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
                raise BadCheckpoint(
                    f"{file} is no safetensors file, or cut short: it has {size} bytes and claims "
                    f"a header of {length}"
                )
            header = json.loads(stream.read(length))
    except OSError as error:
        raise BadCheckpoint(f"{file} can not be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{file} has a corrupt safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise BadCheckpoint(f"{file} has a corrupt safetensors header: it is not an object")
    header.pop("__metadata__", None)
    tensors = [_entry(file, origin, name, entry, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.num_bytes))
    end = 8 + length
    for tensor in tensors:
        if tensor.start != end:
            raise BadCheckpoint(f"{file}: tensor {tensor.name!r} overlaps another or leaves a gap")
        end += tensor.num_bytes
    if end != size:
        problem = "cut short" if size < end else "longer than its header says"
        raise BadCheckpoint(f"{file} is {problem}: {size} bytes, expected {end}")
    return tensors


def _entry(file: Path, origin: str, name: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        shape = tuple(int(n) for n in entry["shape"])
        begin, end = (int(n) for n in entry["data_offsets"])
        code = str(entry["dtype"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadCheckpoint(f"{file}: the header entry of {name!r} is corrupt: {entry}") from error
    if code not in _DTYPES:
        raise BadCheckpoint(
            f"{file}: tensor {name!r} has dtype {code}, which is not supported; "
            f"supported: {', '.join(_DTYPES)}"
        )
    dtype = _DTYPES[code]
    if begin < 0 or min(shape, default=0) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise BadCheckpoint(
            f"{file}: tensor {name!r} of shape {shape} and dtype {code} can not take bytes "
            f"{begin} to {end}"
        )
    return StoredTensor(name, file, origin, data_start + begin, end - begin, shape, dtype)
