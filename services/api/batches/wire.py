"""Files and batches in OpenAI's wire form."""

import re
from typing import Any, ClassVar, Literal

import msgspec

from schemas.batches import BatchEndpoint, BatchRecord, FilePurpose, FileRecord
from services.api.errors import invalid
from services.api.fields import show

MAX_METADATA = 16
_MAX_KEY, _MAX_VALUE = 64, 512
_WINDOW = re.compile(r"([1-9][0-9]{0,6})(m|h|d)")
_SECONDS = {"m": 60, "h": 3600, "d": 24 * 3600}
MIN_WINDOW_S, MAX_WINDOW_S = 60, 14 * 24 * 3600


class ListQuery(msgspec.Struct):
    """The query of a list. ``limit``: how many; ``after``: the last one of the page before."""

    usual: ClassVar[int] = 20

    limit: int | None = None
    after: str | None = None


class FileQuery(ListQuery):
    usual: ClassVar[int] = 10_000

    purpose: str | None = None
    order: Literal["asc", "desc"] = "desc"


class FileObject(msgspec.Struct):
    """What is known about a file."""

    id: str
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: FilePurpose
    object: Literal["file"] = "file"
    status: Literal["processed"] = "processed"


class FileList(msgspec.Struct):
    """``GET /v1/files``."""

    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


class FileDeleted(msgspec.Struct):
    """``DELETE /v1/files/{file_id}``."""

    id: str
    deleted: bool = True
    object: Literal["file"] = "file"


class BatchRequest(msgspec.Struct, forbid_unknown_fields=True):
    """``POST /v1/batches``. ``completion_window``: like 24h, 90m or 2d."""

    input_file_id: str
    endpoint: BatchEndpoint
    completion_window: str = "24h"
    metadata: dict[str, str] | None = None


class RequestCounts(msgspec.Struct):
    total: int
    completed: int
    failed: int


class BatchProblem(msgspec.Struct):
    code: str
    message: str
    line: int | None
    param: str | None


class BatchProblems(msgspec.Struct):
    data: list[BatchProblem]
    object: Literal["list"] = "list"


class BatchObject(msgspec.Struct):
    """A batch. Times are unix seconds."""

    id: str
    endpoint: BatchEndpoint
    errors: BatchProblems | None
    input_file_id: str
    completion_window: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None
    object: Literal["batch"] = "batch"


class BatchList(msgspec.Struct):
    """``GET /v1/batches``."""

    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


def file_object(record: FileRecord) -> FileObject:
    return FileObject(
        id=record.file,
        bytes=record.num_bytes,
        created_at=record.created_at,
        expires_at=record.expires_at,
        filename=record.filename,
        purpose=record.purpose,
    )


def batch_object(record: BatchRecord) -> BatchObject:
    at = record.reached.get
    problems = [BatchProblem(e.code, e.message, e.line, e.param) for e in record.errors]
    return BatchObject(
        id=record.batch,
        endpoint=record.endpoint,
        errors=BatchProblems(problems) if problems else None,
        input_file_id=record.input_file,
        completion_window=record.completion_window,
        status=record.status,
        output_file_id=record.output_file or None,
        error_file_id=record.error_file or None,
        created_at=record.created_at,
        in_progress_at=at("in_progress"),
        expires_at=record.expires_at,
        finalizing_at=at("finalizing"),
        completed_at=at("completed"),
        failed_at=at("failed"),
        expired_at=at("expired"),
        cancelling_at=at("cancelling"),
        cancelled_at=at("cancelled"),
        request_counts=RequestCounts(record.num_requests, record.num_completed, record.num_failed),
        metadata=record.metadata,
    )


def window_s(text: str) -> int:
    """``24h`` as seconds. Raises ApiError (400)."""
    match = _WINDOW.fullmatch(text)
    seconds = int(match[1]) * _SECONDS[match[2]] if match else 0
    if not MIN_WINDOW_S <= seconds <= MAX_WINDOW_S:
        words = f"completion_window = {show(text)} must be a time from 1m to 14d, like '24h'."
        raise invalid("completion_window", words)
    return seconds


def check_metadata(metadata: dict[str, str] | None) -> None:
    """Raises ApiError (400)."""
    if len(metadata or ()) > MAX_METADATA:
        words = f"metadata has {len(metadata or ())} keys; at most {MAX_METADATA} are allowed."
        raise invalid("metadata", words)
    for key, value in (metadata or {}).items():
        if len(key) > _MAX_KEY or len(value) > _MAX_VALUE:
            words = f"metadata: keys have at most {_MAX_KEY} characters, values {_MAX_VALUE}; "
            raise invalid("metadata", f"{words}those of {show(key)} have more.")


def page_of(found: list[Any], query: "ListQuery") -> tuple[list[Any], bool]:
    """What of ``found`` (each with an ``id``) is asked for, and whether more comes after it.

    Raises ApiError (400) where it is to come after one that is not there.
    """
    start, limit = 0, query.limit or query.usual
    if query.after is not None:
        ids = [one.id for one in found]
        if query.after not in ids:
            words = f"after = {show(query.after)}: there is no such id in this list."
            raise invalid("after", words)
        start = ids.index(query.after) + 1
    return found[start : start + limit], start + limit < len(found)
