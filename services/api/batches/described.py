"""``/v1/files`` and ``/v1/batches`` in the OpenAPI document."""

from collections.abc import Callable
from typing import Any, TypeAlias, get_args

import msgspec

from schemas.batches import FilePurpose
from services.api.batches import wire

Json: TypeAlias = dict[str, Any]

KINDS: tuple[type[msgspec.Struct], ...] = (
    wire.FileObject,
    wire.FileList,
    wire.FileDeleted,
    wire.BatchRequest,
    wire.BatchObject,
    wire.BatchList,
)


def paths(of: Callable[[type[msgspec.Struct]], Json], errors: Callable[..., Json]) -> Json:
    """``of``: the reference to a struct; ``errors``: the answers with these statuses."""

    def operation(
        name: str,
        summary: str,
        answer: type[msgspec.Struct] | None,
        *statuses: int,
        parameters: list[Json] | None = None,
        body: Json | None = None,
    ) -> Json:
        content = {"application/json": of(answer)} if answer else _BYTES
        doc: Json = {
            "operationId": name,
            "summary": summary,
            "responses": {
                "200": {"description": summary, "content": content},
                **errors(*statuses, 503),
            },
        }
        if parameters:
            doc["parameters"] = parameters
        if body:
            doc["requestBody"] = {"required": True, "content": body}
        return doc

    file_id, batch_id = [_in_path("file_id")], [_in_path("batch_id")]
    listing = [_in_query("limit", _integer()), _in_query("after", {"type": "string"})]
    filtered = [
        *listing,
        _in_query("order", {"enum": ["asc", "desc"]}),
        _in_query("purpose", {"enum": list(get_args(FilePurpose))}),
    ]
    create: Json = {"application/json": of(wire.BatchRequest)}
    return {
        "/v1/files": {
            "post": operation(
                "create_file", "Upload a file", wire.FileObject, 400, 413, 507, body=_FORM
            ),
            "get": operation(
                "list_files", "The files, the newest first", wire.FileList, 400, parameters=filtered
            ),
        },
        "/v1/files/{file_id}": {
            "get": operation(
                "get_file", "What is known about a file", wire.FileObject, 404, parameters=file_id
            ),
            "delete": operation(
                "delete_file", "Delete a file", wire.FileDeleted, 404, 409, parameters=file_id
            ),
        },
        "/v1/files/{file_id}/content": {
            "get": operation("get_file_content", "The file itself", None, 404, parameters=file_id)
        },
        "/v1/batches": {
            "post": operation(
                "create_batch", "Run a file of requests", wire.BatchObject, 400, 404, body=create
            ),
            "get": operation(
                "list_batches",
                "The batches, the newest first",
                wire.BatchList,
                400,
                parameters=listing,
            ),
        },
        "/v1/batches/{batch_id}": {
            "get": operation(
                "get_batch", "How far a batch is", wire.BatchObject, 404, parameters=batch_id
            )
        },
        "/v1/batches/{batch_id}/cancel": {
            "post": operation(
                "cancel_batch", "Stop a batch", wire.BatchObject, 404, 409, parameters=batch_id
            )
        },
    }


_BYTES: Json = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_FORM: Json = {
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "required": ["file", "purpose"],
            "properties": {
                "file": {"type": "string", "format": "binary"},
                "purpose": {"enum": ["batch"]},
            },
        }
    }
}


def _integer() -> Json:
    return {"type": "integer", "minimum": 1}


def _in_path(name: str) -> Json:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _in_query(name: str, schema: Json) -> Json:
    return {"name": name, "in": "query", "required": False, "schema": schema}
