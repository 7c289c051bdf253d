"""``/v1/files`` and ``/v1/batches``.

What is stored with an API key is seen with that key only, and what is stored without one by all who
give none: the key's hash is the tenant (`services.api.tenants`).
"""

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec
from litestar import Response, delete, get, post
from litestar.datastructures import State, UploadFile
from litestar.exceptions import ClientException, InternalServerException
from litestar.params import Parameter
from litestar.response import Stream

from schemas import names
from schemas.batches import BatchRecord, FileRecord
from services.api import errors
from services.api.batches import states, wire
from services.api.batches.files import Files
from services.api.errors import ApiError, invalid
from services.api.exchange import HttpRequest, json_answer, read_body
from services.api.fields import show
from services.api.parsing import convert, json_object
from services.api.tenants import tenant_of
from services.bus import Bucket, BusError, JetStreamError, blobs

FileId = Annotated[str, Parameter(description="As the upload gave it.")]
BatchId = Annotated[str, Parameter(description="As its creation gave it.")]
Q = TypeVar("Q", bound=wire.ListQuery)

_READ_BYTES = 256 * 1024
_FORM_BYTES = 64 * 1024  # what a form has around its file
_MAX_NAME = 255


@dataclass(frozen=True)
class Store:
    """What the routes work on."""

    files: Files
    batches: Bucket[BatchRecord]
    max_file_bytes: int

    @property
    def max_body_bytes(self) -> int:
        """Of an upload: what a form has around its file is small."""
        return self.max_file_bytes + _FORM_BYTES


# -- files ---------------------------------------------------------------------------------


@post("/v1/files", status_code=200)
async def create_file(request: HttpRequest, state: State) -> Response[bytes]:
    """Upload a file of requests."""
    store: Store = state.store
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > store.max_body_bytes:
        raise _too_large(store)
    form = await _form(request, store)
    upload, purpose = form.get("file"), form.get("purpose")
    if not isinstance(upload, UploadFile):
        raise invalid("file", "file is required: the file itself, with a filename.")
    try:
        if purpose != "batch":
            raise invalid("purpose", f"purpose = {show(purpose)} must be 'batch'.")
        if len(upload.filename) > _MAX_NAME:
            raise invalid("file", f"The filename must have at most {_MAX_NAME} characters.")
        tenant = tenant_of(request.headers.get("authorization"))
        try:
            record = await store.files.add(
                upload.filename, "batch", _parts(upload, store), tenant=tenant
            )
        except blobs.NoRoom as error:
            words = "This server has no room for the file: delete others, or try again later."
            raise ApiError(507, "no_room", words) from error
        except BusError as error:
            raise errors.bus_unavailable() from error
    finally:
        await upload.close()
    return json_answer(wire.file_object(record))


@get("/v1/files")
async def list_files(request: HttpRequest, state: State) -> Response[bytes]:
    """The files, the newest first."""
    store: Store = state.store
    query = _query(request, wire.FileQuery, most=10_000)
    tenant = tenant_of(request.headers.get("authorization"))
    found = [one for one in await _asked(store.files.all()) if one.tenant == tenant]
    found.sort(key=lambda one: (one.created_at, one.file), reverse=query.order == "desc")
    objects = [wire.file_object(one) for one in found if query.purpose in (None, one.purpose)]
    page, has_more = wire.page_of(objects, query)
    return json_answer(wire.FileList(page, *_ends(page), has_more))


@get("/v1/files/{file_id:str}")
async def get_file(request: HttpRequest, state: State, file_id: FileId) -> Response[bytes]:
    """What is known about a file."""
    return json_answer(wire.file_object(await _file(request, state.store, file_id)))


@get("/v1/files/{file_id:str}/content")
async def get_file_content(request: HttpRequest, state: State, file_id: FileId) -> Stream:
    """The file itself."""
    store: Store = state.store
    record = await _file(request, store, file_id)
    return Stream(
        store.files.read(record),
        media_type="application/octet-stream",
        headers={"content-length": str(record.num_bytes)},
    )


@delete("/v1/files/{file_id:str}", status_code=200)
async def delete_file(request: HttpRequest, state: State, file_id: FileId) -> Response[bytes]:
    """Delete a file, unless a batch that has not ended reads it."""
    store: Store = state.store
    record = await _file(request, store, file_id)
    for batch in (await _asked(store.batches.items())).values():
        if batch.input_file == record.file and not states.has_ended(batch):
            words = f"{record.file} is the input of {batch.batch}, which is {batch.status}: "
            raise ApiError(409, "file_in_use", f"{words}cancel that first.", param="file_id")
    await _asked(store.files.remove(record.file))
    return json_answer(wire.FileDeleted(record.file))


# -- batches -------------------------------------------------------------------------------


@post("/v1/batches", status_code=200)
async def create_batch(request: HttpRequest, state: State) -> Response[bytes]:
    """Run a file of requests, by the end of its window."""
    store: Store = state.store
    asked = convert(json_object(await read_body(request)), wire.BatchRequest)
    wire.check_metadata(asked.metadata)
    window_s = wire.window_s(asked.completion_window)
    file = await _file(request, store, asked.input_file_id, "input_file_id")
    if file.purpose != "batch":
        words = f"{file.file} has purpose {file.purpose!r}; the input of a batch must have 'batch'."
        raise invalid("input_file_id", words)
    now = int(time.time())
    record = BatchRecord(
        batch=f"batch_{uuid.uuid4().hex}",
        endpoint=asked.endpoint,
        input_file=file.file,
        completion_window=asked.completion_window,
        created_at=now,
        expires_at=now + window_s,
        status="validating",
        metadata=asked.metadata,
        tenant=file.tenant,
    )
    await _asked(store.batches.put(record.batch, record, expect=0))
    return json_answer(wire.batch_object(record))


@get("/v1/batches")
async def list_batches(request: HttpRequest, state: State) -> Response[bytes]:
    """The batches, the newest first."""
    store: Store = state.store
    query = _query(request, wire.ListQuery, most=100)
    tenant = tenant_of(request.headers.get("authorization"))
    records = (await _asked(store.batches.items())).values()
    found = [one for one in records if one.tenant == tenant]
    found.sort(key=lambda one: (one.created_at, one.batch), reverse=True)
    page, has_more = wire.page_of([wire.batch_object(one) for one in found], query)
    return json_answer(wire.BatchList(page, *_ends(page), has_more))


@get("/v1/batches/{batch_id:str}")
async def get_batch(request: HttpRequest, state: State, batch_id: BatchId) -> Response[bytes]:
    """How far a batch is."""
    record, _ = await _batch(request, state.store, batch_id)
    return json_answer(wire.batch_object(record))


@post("/v1/batches/{batch_id:str}/cancel", status_code=200)
async def cancel_batch(request: HttpRequest, state: State, batch_id: BatchId) -> Response[bytes]:
    """Stop a batch; what was answered by then is in its output."""
    store: Store = state.store
    while True:
        record, revision = await _batch(request, store, batch_id)
        if record.status == "cancelling":
            return json_answer(wire.batch_object(record))
        if not states.can_be_cancelled(record):
            words = f"A batch that is {record.status} can not be cancelled."
            raise ApiError(409, "batch_not_cancellable", words)
        record = states.moved(record, "cancelling", time.time())
        try:
            await store.batches.put(record.batch, record, expect=revision)
        except JetStreamError as error:
            if error.is_wrong_revision:  # it has moved on meanwhile
                continue
            raise errors.bus_unavailable() from error
        except BusError as error:
            raise errors.bus_unavailable() from error
        return json_answer(wire.batch_object(record))


# -- parts of these ------------------------------------------------------------------------


def _query(request: HttpRequest, kind: type[Q], most: int) -> Q:
    given = dict(request.query_params.items())
    try:
        query = msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as error:
        raise invalid(None, f"The query can not be read: {error}.") from error
    if not 1 <= (query.limit or 1) <= most:
        raise invalid("limit", f"limit = {query.limit} must be between 1 and {most}.")
    return query


# `create_file` has a larger body than others may have, and so a router of its own.
HANDLERS = [
    list_files,
    get_file,
    get_file_content,
    delete_file,
    create_batch,
    list_batches,
    get_batch,
    cancel_batch,
]


async def _asked(question: Any) -> Any:
    try:
        return await question
    except (BusError, TimeoutError) as error:
        raise errors.bus_unavailable() from error


async def _form(request: HttpRequest, store: Store) -> Any:
    try:
        form = await request.form()
    except ClientException as error:
        if error.status_code == 413:
            raise _too_large(store) from error
        raise ApiError(400, "invalid_form", f"The form can not be read: {error.detail}.") from error
    except InternalServerException as error:
        raise ApiError(400, "client_left", "The client left before the file was here.") from error
    if not form:
        words = "The body must be multipart/form-data with the fields file and purpose."
        raise ApiError(400, "invalid_form", words)
    return form


async def _parts(upload: UploadFile, store: Store) -> AsyncIterator[bytes]:
    num_bytes = 0
    while part := await upload.read(_READ_BYTES):
        num_bytes += len(part)
        if num_bytes > store.max_file_bytes:
            raise _too_large(store)
        yield part


def _too_large(store: Store) -> ApiError:
    words = f"The file has more than {store.max_file_bytes} bytes (api.max_file_bytes): split it."
    return ApiError(413, "file_too_large", words, param="file")


async def _file(
    request: HttpRequest, store: Store, file_id: str, param: str = "file_id"
) -> FileRecord:
    record: FileRecord | None = await _asked(store.files.get(file_id))
    tenant = tenant_of(request.headers.get("authorization"))
    if record is None or record.tenant != tenant:
        words = f"There is no file {show(file_id)}."
        raise ApiError(404, "file_not_found", words, param=param)
    return record


async def _batch(request: HttpRequest, store: Store, batch_id: str) -> tuple[BatchRecord, int]:
    """The record and its revision."""
    record: BatchRecord | None = None
    revision = 0
    if names.is_key(batch_id):
        entry = await _asked(store.batches.get(batch_id))
        record, revision = entry.value, entry.revision
    tenant = tenant_of(request.headers.get("authorization"))
    if record is None or record.tenant != tenant:
        words = f"There is no batch {show(batch_id)}."
        raise ApiError(404, "batch_not_found", words, param="batch_id")
    return record, revision


def _ends(page: list[Any]) -> tuple[str | None, str | None]:
    return (page[0].id, page[-1].id) if page else (None, None)
