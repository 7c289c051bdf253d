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
import importlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final

import msgspec

from services.gpu_agent.headers import MAX_HEADER_BYTES, BadCheckpoint

_VERSION: Final = 1  # of what a cache folder holds
_RECORD: Final = ".objects"
_HEADER_BYTES: Final = 2**20  # in the first read: enough for the headers of most files


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
        """Ask the store. BadCheckpoint when an object is gone or was changed."""
        found = Store(self.uri).versions()
        for name, known in self.objects.items():
            if found.get(name) != known:
                raise BadCheckpoint(
                    f"{self.uri_of(name)} was changed after the model was registered: restart the "
                    "agent to read it anew"
                )


def fetch(uri: str, patterns: Sequence[str]) -> Path:
    """The cache folder for what lies below ``uri`` now; fetched unless it is there already.

    It holds the objects whose names match ``patterns``, and the headers of all safetensors.
    Safe for several processes at once. Raises BadCheckpoint.
    """
    store = Store(uri)
    found = store.versions()
    small = [name for name in found if any(fnmatch(name, pattern) for pattern in patterns)]
    weights = [name for name in found if name.endswith(".safetensors")]
    remote = Remote(store.uri, {name: found[name] for name in sorted({*small, *weights})})
    if not remote.objects:
        raise BadCheckpoint(f"{store.uri} holds no model: check bucket and prefix")
    record = msgspec.json.encode(remote)
    identity = f"{_VERSION} {store.endpoint} ".encode() + record
    try:
        cache = _cache()
        folder = cache / hashlib.sha256(identity).hexdigest()[:32]
        if folder.is_dir():
            return folder
        place = Path(tempfile.mkdtemp(prefix="fetching-", dir=cache))
        try:
            for name in small:
                (place / name).write_bytes(store.get(name, found[name]))
            for name in weights:
                (place / name).write_bytes(store.get_header(name, found[name]))
            (place / _RECORD).write_bytes(record)
            place.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same bytes
                raise
        finally:
            shutil.rmtree(place, ignore_errors=True)
    except OSError as error:
        raise BadCheckpoint(f"{store.uri} can not be kept in the cache: {error}") from error
    return folder


def recall(folder: Path) -> Remote | None:
    """What ``folder`` was fetched from; None for any other folder."""
    try:
        return msgspec.json.decode((folder / _RECORD).read_bytes(), type=Remote)
    except (OSError, msgspec.DecodeError):
        return None


class Store:
    """The objects directly below one URI, by name. All methods raise BadCheckpoint."""

    def __init__(self, uri: str) -> None:
        match = re.fullmatch(r"s3://([^/]+)(?:/(.*?))?/*", uri)
        if match is None:
            raise BadCheckpoint(
                f"source {uri!r}: of object stores only S3 is read, as s3://bucket/prefix"
            )
        self._bucket, prefix = match[1], match[2] or ""
        self._prefix = f"{prefix}/" if prefix else ""
        self.uri = f"s3://{self._bucket}/{prefix}".rstrip("/")
        with explained(self.uri):
            self._client = _client()

    @property
    def endpoint(self) -> str:
        return str(self._client.meta.endpoint_url)

    def versions(self) -> dict[str, Object]:
        """All versions as they are now."""
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._prefix, Delimiter="/"
        )
        with explained(self.uri):
            return {
                entry["Key"].removeprefix(self._prefix): Object(entry["Size"], entry["ETag"])
                for page in pages
                for entry in page.get("Contents", ())
            }

    def get(self, name: str, version: Object, end: int | None = None) -> bytes:
        """The object's bytes, up to ``end``. It is an error if it is not ``version`` any more."""
        stop = version.num_bytes if end is None else min(end, version.num_bytes)
        if stop == 0:
            return b""  # a range can not be empty
        with explained(f"{self.uri}/{name}"):
            answer = self._client.get_object(
                Bucket=self._bucket,
                Key=self._prefix + name,
                IfMatch=version.etag,
                Range=f"bytes=0-{stop - 1}",
            )
            data: bytes = answer["Body"].read()
        if len(data) != stop:
            raise BadCheckpoint(f"{self.uri}/{name} is cut short: {len(data)} of {stop} bytes")
        return data

    def get_header(self, name: str, version: Object) -> bytes:
        """What a safetensors file begins with: as much as `headers.read_header` reads."""
        start = self.get(name, version, _HEADER_BYTES)
        end = 8 + int.from_bytes(start[:8], "little")
        if end > MAX_HEADER_BYTES or end > version.num_bytes:
            return start[:8]  # damaged; the reader of the header says how
        return start[:end] if end <= len(start) else self.get(name, version, end)


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """What boto3 raises becomes BadCheckpoint about ``uri``."""
    errors = needed("botocore.exceptions")
    try:
        yield
    except (errors.BotoCoreError, errors.ClientError, ValueError) as error:
        raise BadCheckpoint(
            f"{uri} can not be read: {error}. Check the name, and AWS_ENDPOINT_URL, AWS_REGION "
            "and the credentials of this process"
        ) from error


def _client() -> Any:
    settings: dict[str, Any] = {
        "connect_timeout": 10,
        "read_timeout": 60,
        "retries": {"total_max_attempts": 3},
    }
    if os.environ.get("RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING") == "0":
        settings["s3"] = {"addressing_style": "path"}
    if os.environ.get("RUNAI_STREAMER_S3_UNSIGNED") == "1":
        settings["signature_version"] = needed("botocore").UNSIGNED
    return session().client("s3", config=needed("botocore.config").Config(**settings))


def session() -> Any:
    """A boto3 session; AWS_REGION, which the streamer knows, is made known to it, too."""
    return needed("boto3").Session(region_name=os.environ.get("AWS_REGION"))


def needed(module: str) -> Any:
    """Import an optional dependency's ``module``. Raises BadCheckpoint."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: a native library lacks another
        raise BadCheckpoint(
            f"a model in an object store needs more packages ({error}): "
            "pip install 'hotswap[object-store]'"
        ) from error


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    folder = Path(base) / "hotswap" / "objects"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder.resolve()
