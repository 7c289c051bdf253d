"""A model's files: where they are, what they hold, and whether they can be trusted to load.

Only safetensors, and of those only the headers (see headers.py). A model in an object store is a
folder here, too, one without its weights (see object_store.py). Everything wrong ends in
``BadCheckpoint``, with the file and the cause.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from schemas.state import ModelSpec
from services.gpu_agent import object_store
from services.gpu_agent.headers import BadCheckpoint, StoredTensor, read_header
from services.gpu_agent.object_store import Remote

__all__ = ["BadCheckpoint", "Checkpoint", "FileStamp", "StoredTensor", "find", "is_remote", "read"]

_INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"
# What a model needs beside its weights; weights come second, by name (see _download).
_SMALL_FILES: Final = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")


@dataclass(frozen=True)
class FileStamp:
    """Tells whether a file was changed after its header was read."""

    num_bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Checkpoint:
    """The files of one model and all their tensors, by name, in file order.

    ``remote``: the object store that holds the weights, where ``files`` are only their headers.
    """

    folder: Path
    tensors: dict[str, StoredTensor]
    files: dict[Path, FileStamp]
    remote: Remote | None = None

    def check_unchanged(self) -> None:
        """BadCheckpoint when a file is gone or was changed since its header was read.

        Of a model in an object store it asks the store.
        """
        if self.remote is not None:
            self.remote.check_unchanged()
        for file, stamp in self.files.items():
            if _stamp(file) != stamp:
                raise BadCheckpoint(
                    f"{file} was changed after the model was registered: restart the agent to "
                    "read it anew"
                )


def find(spec: ModelSpec) -> Path:
    """The folder with ``spec``'s files; a hub id is downloaded (or found in the hub's cache).

    Of ``s3://bucket/prefix`` everything but the weights is fetched. Raises BadCheckpoint.
    """
    if is_remote(spec.source):
        return object_store.fetch(spec.source, _small_files(spec))
    folder = Path(spec.source).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise BadCheckpoint(f"source {spec.source!r} is a file: give the folder that holds it")
    if spec.source.startswith((".", "/", "~")) or spec.source.count("/") > 1:
        raise BadCheckpoint(f"source {spec.source!r}: there is no such folder")
    return _download(spec)


def is_remote(source: str) -> bool:
    """Whether a model's source is a URI, and so neither a folder nor a hub id."""
    return "://" in source


def read(folder: Path) -> Checkpoint:
    """Find the safetensors files of ``folder`` and read their headers. Raises BadCheckpoint."""
    remote = object_store.recall(folder)
    if remote is None:
        return _read(folder, None)
    try:
        return _read(folder, remote)
    except BadCheckpoint as error:  # in terms of what the user knows, not of our cache
        raise BadCheckpoint(str(error).replace(str(folder), remote.uri)) from error


def _read(folder: Path, remote: Remote | None) -> Checkpoint:
    tensors: dict[str, StoredTensor] = {}
    files: dict[Path, FileStamp] = {}
    wanted = _shards(folder)
    for file in wanted:
        stamp = files[file] = _stamp(file)
        origin, size = str(file), stamp.num_bytes
        if remote is not None:
            origin, size = remote.uri_of(file.name), remote.objects[file.name].num_bytes
        for tensor in read_header(file, origin, size):
            if tensor.name in tensors:
                raise BadCheckpoint(
                    f"tensor {tensor.name!r} is in {tensors[tensor.name].file.name} and in "
                    f"{file.name} of {folder}"
                )
            tensors[tensor.name] = tensor
    for file, names in wanted.items():
        missing = [n for n in names if n not in tensors or tensors[n].file != file]
        if missing:
            raise BadCheckpoint(
                f"{folder / _INDEX} says that {file.name} holds {missing[0]!r} (and "
                f"{len(missing) - 1} more), but it does not"
            )
    return Checkpoint(folder, tensors, files, remote)


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


def _small_files(spec: ModelSpec) -> list[str]:
    """Patterns for what is fetched beside the weights."""
    return [*_SMALL_FILES, *(("*.py",) if spec.trust_remote_code else ())]


def _download(spec: ModelSpec) -> Path:
    """Fetch a hub repository: first what is small, then exactly the weights that are needed.

    Many repositories hold the same weights in several formats; a pattern would fetch them all.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        small = _small_files(spec)
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
