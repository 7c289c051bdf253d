"""``/v1/keys``: API keys made, listed, changed and withdrawn. For admins (`guard` sees to it)."""

from typing import Annotated, Any, Literal

import msgspec
from litestar import Response, delete, get, patch, post
from litestar.datastructures import State
from litestar.params import Parameter
from msgspec import UNSET, UnsetType

from schemas.keys import KeyRecord, Role
from services import keys
from services.api import errors
from services.api.errors import ApiError, invalid
from services.api.exchange import HttpRequest, json_answer, read_body
from services.api.keyring import Keyring
from services.api.parsing import convert, json_object
from services.bus import BusError, JetStreamError

KeyId = Annotated[str, Parameter(description="a key's id")]


class KeyFields(msgspec.Struct, forbid_unknown_fields=True):
    """What may be said of a key. What is left out stays as it is."""

    name: str | UnsetType = UNSET
    role: Role | UnsetType = UNSET
    models: tuple[str, ...] | UnsetType = UNSET  # names or patterns of deployments; empty: all
    requests_per_minute: int | UnsetType | None = UNSET
    tokens_per_minute: int | UnsetType | None = UNSET
    max_concurrent: int | UnsetType | None = UNSET
    expires_at: int | UnsetType | None = UNSET  # unix seconds
    disabled: bool | UnsetType = UNSET


class NewKey(KeyFields, kw_only=True):
    """A key to be made. Limits that are left out or null do not apply."""

    name: str


class KeyInfo(msgspec.Struct):
    """A key as it is. ``key`` itself is told once, when it is made, and kept nowhere."""

    id: str
    name: str
    role: Role
    models: tuple[str, ...]
    requests_per_minute: int | None
    tokens_per_minute: int | None
    max_concurrent: int | None
    created_at: int
    expires_at: int | None
    disabled: bool
    object: Literal["key"] = "key"
    key: str | UnsetType = UNSET


class KeyList(msgspec.Struct):
    """All keys, the oldest first."""

    data: list[KeyInfo]
    object: Literal["list"] = "list"


class KeyDeleted(msgspec.Struct):
    """A key that is not valid any more."""

    id: str
    deleted: bool = True
    object: Literal["key"] = "key"


@post("/v1/keys", status_code=201)
async def create_key(request: HttpRequest, state: State) -> Response[bytes]:
    """Make a key; the answer is the only place that ever shows it."""
    fields = _given(convert(json_object(await read_body(request)), NewKey))
    try:
        key, record = keys.make(fields.pop("name"), **fields)
    except keys.BadKey as error:
        raise invalid(error.field, f"{error}.") from error
    await _write(state.keyring, record, 0)
    return json_answer(_info(record, key), status=201)


@get("/v1/keys")
async def list_keys(state: State) -> Response[bytes]:
    """All keys, without the keys themselves."""
    keyring: Keyring = state.keyring
    return json_answer(KeyList([_info(record) for record in keyring.records()]))


@get("/v1/keys/{key_id:str}")
async def get_key(state: State, key_id: KeyId) -> Response[bytes]:
    """One key."""
    record, _ = await _read(state.keyring, key_id)
    return json_answer(_info(record))


@patch("/v1/keys/{key_id:str}")
async def change_key(request: HttpRequest, state: State, key_id: KeyId) -> Response[bytes]:
    """Change what is named in the body; it applies to the next request with the key."""
    fields = _given(convert(json_object(await read_body(request)), KeyFields))
    record, revision = await _read(state.keyring, key_id)
    try:
        record = keys.changed(record, **fields)
    except keys.BadKey as error:
        raise invalid(error.field, f"{error}.") from error
    await _write(state.keyring, record, revision)
    return json_answer(_info(record))


@delete("/v1/keys/{key_id:str}", status_code=200)
async def delete_key(state: State, key_id: KeyId) -> Response[bytes]:
    """Withdraw a key. Requests that are under way end as they would."""
    keyring: Keyring = state.keyring
    record, revision = await _read(keyring, key_id)
    try:
        await keyring.bucket.delete(record.id, expect=revision)
    except BusError as error:
        raise _not_written(error) from error
    return json_answer(KeyDeleted(record.id))


KEY_ROUTES = (create_key, list_keys, get_key, change_key, delete_key)


def _given(fields: KeyFields) -> dict[str, Any]:
    return {k: v for k, v in msgspec.structs.asdict(fields).items() if v is not UNSET}


def _info(record: KeyRecord, key: str = "") -> KeyInfo:
    told = msgspec.structs.asdict(record)
    del told["hash"]
    return KeyInfo(**told, key=key or UNSET)


async def _read(keyring: Keyring, key_id: str) -> tuple[KeyRecord, int]:
    """The record as it is now, and its revision. Raises ApiError (404, 503)."""
    record = keyring.find(key_id)
    try:
        entry = await keyring.bucket.get(record.id) if record else None
    except BusError as error:
        raise _not_written(error) from error
    if entry is None or entry.value is None:
        message = f"There is no API key with the id {key_id[:64]!r}; see GET /v1/keys."
        raise ApiError(404, "key_not_found", message)
    return entry.value, entry.revision


async def _write(keyring: Keyring, record: KeyRecord, over: int) -> None:
    """Replace the revision ``over``. Raises ApiError (409, 503)."""
    try:
        await keyring.bucket.put(record.id, record, expect=over)
    except BusError as error:
        raise _not_written(error) from error


def _not_written(error: BusError) -> ApiError:
    if isinstance(error, JetStreamError):
        message = "Somebody else changed this key at the same time; look again, then try again."
        return ApiError(409, "key_conflict", message)
    return errors.bus_unavailable()
