"""Models in an object store: ``s3://bucket/prefix`` instead of a folder.

    s3://bucket/prefix/                      cache folder, one for each version of the objects
      config.json, tokenizer.json ... ------->  config.json, tokenizer.json ...
      model.safetensors |header|data.| ------>  model.safetensors |header|
                                  |             .objects: URI, sizes, ETags
                                  `-------->  host image, straight to each tensor's place

What is small is fetched with boto3. The weights never touch the disk: runai-model-streamer reads
ranges of many objects at once to absolute addresses. Both are optional (``hotswap[object-store]``)
and are imported at first use.

Credentials and region are found the way boto3 finds them: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, AWS_PROFILE and the files in ~/.aws.
AWS_ENDPOINT_URL names another server than Amazon's. RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING=0
is for servers that want the bucket in the path, RUNAI_STREAMER_S3_UNSIGNED=1 for public buckets.
"""

import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final

import msgspec
import torch

_VERSION: Final = 1  # of what a cache folder holds
_RECORD: Final = ".objects"
_HEADER_BYTES: Final = 2**20  # in the first read: enough for the headers of most files
_MAX_HEADER_BYTES: Final = 100 * 2**20  # the format's own limit
_MAX_IN_FLIGHT: Final = 2  # submissions: one arrives while the next is on its way already
_PROGRESS_S: Final = 0.1
_STALLED_S: Final = 120.0


class ObjectStoreError(Exception):
    """Objects can not be used. The message names URI, cause and remedy."""


class Object(msgspec.Struct, frozen=True):
    """One version of an object."""

    num_bytes: int
    etag: str


class Remote(msgspec.Struct, frozen=True):
    """What a cache folder stands for: ``objects`` (name -> version) directly below ``uri``."""

    uri: str
    objects: dict[str, Object]

    def uri_of(self, name: str) -> str:
        return f"{self.uri}/{name}"

    def check_unchanged(self) -> None:
        """Ask the store. ObjectStoreError when an object is gone or was changed."""
        found = _Store(self.uri).list()
        for name, known in self.objects.items():
            if found.get(name) != known:
                raise ObjectStoreError(
                    f"{self.uri_of(name)} was changed after the model was registered: restart the "
                    "agent to read it anew"
                )


def fetch(uri: str, patterns: Sequence[str]) -> Path:
    """The cache folder for what lies below ``uri`` now; fetched unless it is there already.

    It holds the objects whose names match ``patterns``, and the headers of all safetensors.
    Safe for several processes at once. Raises ObjectStoreError.
    """
    store = _Store(uri)
    found = store.list()
    small = [name for name in found if any(fnmatch(name, pattern) for pattern in patterns)]
    weights = [name for name in found if name.endswith(".safetensors")]
    remote = Remote(store.uri, {name: found[name] for name in sorted({*small, *weights})})
    if not remote.objects:
        raise ObjectStoreError(f"{store.uri} holds no model: check bucket and prefix")
    record = msgspec.json.encode(remote)
    identity = f"{_VERSION} {store.endpoint} ".encode() + record
    try:
        cache = _cache()
        folder = cache / hashlib.sha256(identity).hexdigest()[:32]
        if folder.is_dir():
            return folder
        with tempfile.TemporaryDirectory(prefix="fetching-", dir=cache) as place:
            for name in small:
                (Path(place) / name).write_bytes(store.get(name, found[name]))
            for name in weights:
                (Path(place) / name).write_bytes(store.get_header(name, found[name]))
            (Path(place) / _RECORD).write_bytes(record)
            with suppress(FileExistsError):  # another process was first, with the same bytes
                _move(Path(place), folder)
    except OSError as error:
        raise ObjectStoreError(f"{store.uri} can not be kept in the cache: {error}") from error
    return folder


def recall(folder: Path) -> Remote | None:
    """What ``folder`` was fetched from; None for any other folder."""
    try:
        return msgspec.json.decode((folder / _RECORD).read_bytes(), type=Remote)
    except (OSError, msgspec.DecodeError):
        return None


@dataclass(frozen=True)
class Range:
    """Bytes of ``uri``, from ``start`` on, and where they go: ``target`` is uint8, 1-D.

    ``arrived`` is called once they are there.
    """

    uri: str
    start: int
    target: torch.Tensor
    arrived: Callable[[], None]


def stream(batches: Iterable[Sequence[Range]], on_progress: Callable[[], None]) -> None:
    """Read all ranges. A batch's targets are needed, and so may be made, only when it is its turn.

    ``on_progress`` is called several times a second, and like ``arrived`` in this thread. Raises
    ObjectStoreError, and what the callbacks raise; no target is written to after that.
    """
    native = _native()
    streamer = native.runai_start()
    in_flight: dict[int, list[Range]] = {}
    left: dict[int, int] = {}
    told_at = moved_at = time.monotonic()
    waiting = iter(batches)
    has_more = True
    try:
        _authorise(native, streamer)
        while has_more or in_flight:
            if has_more and len(in_flight) < _MAX_IN_FLIGHT:
                batch = next(waiting, None)
                has_more = batch is not None
                if batch:
                    ranges = sorted(batch, key=lambda r: (r.uri, r.start))
                    number = _submit(native, streamer, ranges)
                    in_flight[number], left[number] = ranges, len(ranges)
                continue
            with suppress(TimeoutError):
                arrived = _next_arrival(native, streamer, in_flight)
                moved_at = time.monotonic()
                ...
            if time.monotonic() - told_at >= _PROGRESS_S:
                told_at = time.monotonic()
                on_progress()
    finally:
        native.runai_end(streamer)  # waits for reads under way: they know only addresses
