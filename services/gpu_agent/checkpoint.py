"""A model's files: where they are, what they hold, and whether they can be trusted to load.

Only safetensors: a header of JSON, then raw tensors; nothing in it is executed.

    [8 bytes: header length n, little endian][n bytes: JSON][data ...............]
                                             ^ data offsets count from here

Reads headers only. Everything wrong ends in ``BadCheckpoint``, with the file and the cause.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from schemas.state import ModelSpec

_INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"
_MAX_HEADER_BYTES: Final = 100 * 2**20  # the format's own limit
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
# What a model needs beside its weights; weights come second, by name (see _download).
_SMALL_FILES: Final = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")


class BadCheckpoint(Exception):
    """A model's files can not be used. The message names file, cause and remedy."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file. ``start``: absolute byte offset; ``num_bytes`` as stored."""

    name: str
    file: Path
    start: int
    num_bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class FileStamp:
    """Tells whether a file was changed after its header was read."""

    num_bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Checkpoint:
    """The files of one model and all their tensors, by name, in file order."""

    folder: Path
    tensors: dict[str, StoredTensor]
    files: dict[Path, FileStamp]

    def check_unchanged(self) -> None:
        """BadCheckpoint when a file is gone or was changed since its header was read."""
        for file, stamp in self.files.items():
            if _stamp(file) != stamp:
                raise BadCheckpoint(
                    f"{file} was changed after the model was registered: restart the agent to "
                    "read it anew"
                )


def find(spec: ModelSpec) -> Path:
    """The folder with ``spec``'s files; a hub id is downloaded (or found in the hub's cache).

    Raises BadCheckpoint.
    """
    folder = Path(spec.source).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise BadCheckpoint(f"source {spec.source!r} is a file: give the folder that holds it")
    if spec.source.startswith((".", "/", "~")) or spec.source.count("/") > 1:
        raise BadCheckpoint(f"source {spec.source!r}: there is no such folder")
    return _download(spec)


def read(folder: Path) -> Checkpoint:
    """Find the safetensors files of ``folder`` and read their headers. Raises BadCheckpoint."""
    tensors: dict[str, StoredTensor] = {}
    files: dict[Path, FileStamp] = {}
    wanted = _shards(folder)
    for file in wanted:
        for tensor in read_header(file):
            if tensor.name in tensors:
                raise BadCheckpoint(
                    f"tensor {tensor.name!r} is in {tensors[tensor.name].file.name} and in "
                    f"{file.name} of {folder}"
                )
            tensors[tensor.name] = tensor
        files[file] = _stamp(file)
    for file, names in wanted.items():
        missing = [n for n in names if n not in tensors or tensors[n].file != file]
        if missing:
            raise BadCheckpoint(
                f"{folder / _INDEX} says that {file.name} holds {missing[0]!r} (and "
                f"{len(missing) - 1} more), but it does not"
            )
    return Checkpoint(folder, tensors, files)


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, by offset. Raises BadCheckpoint."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or not 0 < length <= min(_MAX_HEADER_BYTES, size - 8):
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
    tensors = [_entry(file, name, entry, 8 + length) for name, entry in header.items()]
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


def _entry(file: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
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
    return StoredTensor(name, file, data_start + begin, end - begin, shape, dtype)


def _shards(folder: Path) -> dict[Path, list[str]]:
    """The files to read, each with the tensor names that an index promises (else none)."""
    index = folder / _INDEX
    if index.is_file():
        return _read_index(index)
    if (folder / _SINGLE).is_file():
        return {folder / _SINGLE: []}
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return {found[0]: []}
    if found:
        raise BadCheckpoint(
            f"{folder} holds {len(found)} safetensors files and no {_INDEX}: which belong together?"
        )
    others = sorted(
        p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".gguf"}
    )
    if others:
        raise BadCheckpoint(
            f"{folder} holds only {others[0]}: only safetensors are loaded (other formats can run "
            "code); convert it with `save_pretrained(..., safe_serialization=True)`"
        )
    raise BadCheckpoint(f"{folder} holds no {_SINGLE} and no {_INDEX}")


def _read_index(index: Path) -> dict[Path, list[str]]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        named = {str(name): str(shard) for name, shard in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadCheckpoint(f"{index} is corrupt: {error!r}") from error
    shards: dict[Path, list[str]] = {}
    for name, shard in named.items():
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise BadCheckpoint(f"{index} names {shard!r}, which is no safetensors file beside it")
        shards.setdefault(index.parent / shard, []).append(name)
    missing = [file.name for file in shards if not file.is_file()]
    if missing:
        raise BadCheckpoint(f"{index} names {missing[0]}, but there is no such file beside it")
    return dict(sorted(shards.items()))


def _stamp(file: Path) -> FileStamp:
    try:
        status = file.stat()
    except OSError as error:
        raise BadCheckpoint(f"{file} can not be read: {error.strerror}") from error
    return FileStamp(status.st_size, status.st_mtime_ns)


def _download(spec: ModelSpec) -> Path:
    """Fetch a hub repository: first what is small, then exactly the weights that are needed.

    Many repositories hold the same weights in several formats; a pattern would fetch them all.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    code = ("*.py",) if spec.trust_remote_code else ()
    try:
        small = [*_SMALL_FILES, *code]
        folder = Path(huggingface_hub.snapshot_download(spec.source, allow_patterns=small))
        index = folder / _INDEX
        if index.is_file():
            weights = [json.loads(index.read_bytes())["weight_map"].values()]
            patterns = sorted({str(shard) for shards in weights for shard in shards})
        else:
            patterns = [_SINGLE]
        return Path(huggingface_hub.snapshot_download(spec.source, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        raise BadCheckpoint(
            f"source {spec.source!r} is no local folder, is not in the hub's cache "
            f"({os.environ.get('HF_HOME', '~/.cache/huggingface')}), and the hub can not be "
            "reached: check the network, or give a local folder"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise BadCheckpoint(
            f"source {spec.source!r} is no local folder, and the hub refused it: {error}. Check "
            "the name; a gated model needs its licence accepted and `hf auth login`"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadCheckpoint(f"source {spec.source!r} can not be downloaded: {error!r}") from error
