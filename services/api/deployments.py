"""``/v1/deployments``: what is deployed, and with which settings, changed while everything runs.

    GET, PUT, PATCH, DELETE  /v1/deployments/NAME            NAME may hold slashes, or %2F for them
    POST                     /v1/deployments/NAME/ACTION     the last part of the path is the action

The leading scheduler decides and stores (`schemas.admin`); here requests are checked, and waited
for. A version is the deployment's revision there, and its ETag.
"""

import re
import time
from typing import Annotated, Any, Final, TypeAlias, TypeVar

import msgspec
from litestar import Response, delete, get, patch, post, put
from litestar.datastructures import State
from litestar.params import Parameter

from schemas import names
from schemas.admin import (
    AdminAnswer,
    AdminRequest,
    DeleteDeployment,
    MoveDeployment,
    PutDeployment,
    SwapInDeployment,
    SwapOutDeployment,
    action_of,
)
from schemas.state import DeploymentRecord, ReplicaState
from services.api.catalog import Catalog
from services.api.deployment_settings import (
    ActionResult,
    DeploymentInfo,
    DeploymentList,
    describe,
    parse,
    patched,
)
from services.api.errors import RETRY_AFTER_S, ApiError, invalid
from services.api.exchange import HttpRequest, json_answer, read_body
from services.api.parsing import convert, json_object
from services.api.tenants import tenant_of
from services.bus import Bus, BusError, NoResponder

ACTIONS: Final = {
    "swap-in": "Bring it in though nobody waits, if that hurts nobody",
    "swap-out": "Let running requests end, and leave; the next request brings it back",
    "move": "Be resident on another GPU, then leave the first one",
    "drain": "Take no new requests, and leave when those it has have ended",
    "undrain": "Take requests again",
    "pin": "Come in unasked, and leave for no other model",
    "unpin": "Leave for other models again",
}
_SETTING_OF: Final = {
    "undrain": ("drained", False),
    "pin": ("pinned", True),
    "unpin": ("pinned", False),
}

T = TypeVar("T")
PathName: TypeAlias = Annotated[str, Parameter(description="may hold slashes")]

_SEEN_S: Final = 2.0  # until what the leader stored is known here
_WAIT_S: Final = 30.0  # for an action, where nobody says how long
_MOST_WAIT_S: Final = 600.0
_MOST_TRIES: Final = 5  # of a change of what others change, too
_ETAG = re.compile(r'(?:W/)?"?(\d+)"?')
_ON_DEVICE: Final[tuple[ReplicaState, ...]] = (
    "resident",
    "swapping_in",
    "draining",
    "swapping_out",
)


class Where(msgspec.Struct, forbid_unknown_fields=True):
    """Body of swap-in and swap-out. ``gpu``: null: any, or every one."""

    gpu: str | None = None


class FromTo(msgspec.Struct, forbid_unknown_fields=True):
    """Body of move: two GPUs."""

    from_: str = msgspec.field(name="from")
    to: str


# -- what there is -------------------------------------------------------------------------


@get("/v1/deployments")
async def list_deployments(state: State) -> Response[bytes]:
    """Every deployment, with its settings and where it is."""
    catalog: Catalog = state.catalog
    return json_answer(DeploymentList([_info(catalog, record) for record in catalog.records()]))


@get("/v1/deployments/{name:path}")
async def get_deployment(state: State, name: PathName) -> Response[bytes]:
    """One deployment."""
    catalog: Catalog = state.catalog
    return _deployment(catalog, catalog.record(_name(name)))


@put("/v1/deployments/{name:path}")
async def put_deployment(request: HttpRequest, state: State, name: PathName) -> Response[bytes]:
    """Create it, or replace all of its settings."""
    catalog: Catalog = state.catalog
    name = _name(name)
    spec = parse(name, json_object(await read_body(request)))
    must_be_new = request.headers.get("if-none-match") == "*"
    message = PutDeployment(spec, _who(request), _if_match(request), must_be_new)
    answer = await _ask(state, message)
    record = await _seen(catalog, name, answer.revision)
    return _deployment(catalog, record, 201 if answer.created else 200)


@patch("/v1/deployments/{name:path}")
async def patch_deployment(request: HttpRequest, state: State, name: PathName) -> Response[bytes]:
    """Replace the settings that the body names; null: the default again."""
    changes = json_object(await read_body(request))
    record = await _change(request, state, _name(name), changes)
    return _deployment(state.catalog, record)


@delete("/v1/deployments/{name:path}", status_code=200)
async def delete_deployment(request: HttpRequest, state: State, name: PathName) -> Response[bytes]:
    """Take no more requests, and let running ones end (``drain=false``: end them)."""
    catalog: Catalog = state.catalog
    name = _name(name)
    drain = _flag(request, "drain", True)
    wait_s = _wait_s(request)
    if_match = _if_match(request)
    await _ask(state, DeleteDeployment(name, _who(request), if_match, drain))
    is_gone = await catalog.until(
        lambda: _known(catalog, name) is None and not catalog.states(name), max(wait_s, _SEEN_S)
    )
    words = "" if is_gone else "its running requests end first"
    return _result(catalog, name, is_gone, words)


# -- actions -------------------------------------------------------------------------------


@post("/v1/deployments/{name:path}", status_code=200)
async def act_on_deployment(request: HttpRequest, state: State, name: PathName) -> Response[bytes]:
    """One of `ACTIONS`: the last part of the path."""
    name, _, action = _name(name).rpartition("/")
    if action not in ACTIONS or not name:
        words = f"POST {request.scope['path']} names no action: end it in one of "
        raise ApiError(404, "unknown_action", f"{words}/{', /'.join(ACTIONS)}.")
    state.catalog.record(name)
    match action:
        case "swap-in":
            return await _swap_in(request, state, name)
        case "swap-out":
            return await _swap_out(request, state, name)
        case "move":
            return await _move(request, state, name)
        case "drain":
            return await _drain(request, state, name)
        case _:
            await _change(request, state, name, dict([_SETTING_OF[action]]))
            return _result(state.catalog, name, True, "")


async def _swap_in(request: HttpRequest, state: State, name: str) -> Response[bytes]:
    catalog: Catalog = state.catalog
    gpu = _optional_body(await read_body(request), Where).gpu or ""
    wait_s = _wait_s(request)
    until = time.time() + (wait_s or _WAIT_S)
    answer = await _ask(state, SwapInDeployment(name, until, _who(request), gpu))

    def is_there() -> bool:
        return any(
            where == "resident" and gpu in ("", one) for one, where in catalog.states(name).items()
        )

    is_done = answer.outcome == "done" or await catalog.until(is_there, wait_s)
    if wait_s and not is_done:
        raise _not_done(f"{name} did not come in within {wait_s:g} s", answer.reason)
    return _result(catalog, name, is_done, answer.reason)


async def _swap_out(request: HttpRequest, state: State, name: str) -> Response[bytes]:
    catalog: Catalog = state.catalog
    gpu = _optional_body(await read_body(request), Where).gpu or ""
    wait_s = _wait_s(request)
    answer = await _ask(state, SwapOutDeployment(name, _who(request), gpu))
    is_done = answer.outcome == "done" or await catalog.until(
        lambda: not _is_on_device(catalog, name, gpu), wait_s
    )
    return _result(catalog, name, is_done, answer.reason)


async def _move(request: HttpRequest, state: State, name: str) -> Response[bytes]:
    catalog: Catalog = state.catalog
    where = convert(json_object(await read_body(request)), FromTo)
    wait_s = _wait_s(request)
    until = time.time() + (wait_s or _WAIT_S)
    ask = MoveDeployment(name, where.from_, where.to, until, _who(request))
    answer = await _ask(state, ask)

    def has_moved() -> bool:
        gpus = catalog.states(name)
        return gpus.get(where.to) == "resident" and gpus.get(where.from_) not in _ON_DEVICE

    is_done = await catalog.until(has_moved, wait_s)
    if wait_s and not is_done and catalog.states(name).get(where.to) != "resident":
        raise _not_done(f"{name} was not on {where.to} within {wait_s:g} s", answer.reason)
    return _result(catalog, name, is_done, answer.reason)


async def _drain(request: HttpRequest, state: State, name: str) -> Response[bytes]:
    catalog: Catalog = state.catalog
    wait_s = _wait_s(request)
    await _change(request, state, name, {"drained": True})
    is_done = await catalog.until(lambda: not _is_on_device(catalog, name, ""), wait_s)
    words = "" if is_done else "its requests end first"
    return _result(catalog, name, is_done, words)


def _is_on_device(catalog: Catalog, name: str, gpu: str) -> bool:
    return any(
        where in _ON_DEVICE and gpu in ("", one) for one, where in catalog.states(name).items()
    )


# -- the leader ----------------------------------------------------------------------------


async def _ask(state: State, message: AdminRequest) -> AdminAnswer:
    """The leader's answer, if it is a good one. Raises ApiError."""
    bus: Bus = state.bus
    if not bus.is_connected:
        raise _unavailable("The message bus does not answer; nothing was changed.")
    subject = names.admin_subject(action_of(message), message.model)
    try:
        answer: AdminAnswer = await bus.request(subject, message, AdminAnswer)
    except NoResponder as error:
        raise _unavailable("No scheduler leads, so nothing was changed; try again.") from error
    except BusError as error:
        words = f"The scheduler did not answer, so it is not known whether this was done: {error}."
        raise _unavailable(words) from error
    if answer.outcome in ("done", "accepted"):
        return answer
    words = f"{answer.reason}."
    match answer.outcome:
        case "invalid":
            raise invalid(None, words)
        case "not_found":
            raise ApiError(404, "deployment_not_found", words, param="name")
        case "precondition_failed":
            raise PreconditionFailed(words, answer.revision)
        case "unavailable":
            raise _unavailable(words)
        case _:
            raise ApiError(409, "conflict", words)


class PreconditionFailed(ApiError):
    """``revision``: the version that there is, if any."""

    def __init__(self, words: str, revision: int) -> None:
        super().__init__(412, "precondition_failed", words)
        self.revision = revision
        if revision:
            self.headers["etag"] = _etag(revision)


async def _change(
    request: HttpRequest, state: State, name: str, changes: dict[str, Any]
) -> DeploymentRecord:
    """Change some settings of whatever there is, or of the version that If-Match names."""
    catalog: Catalog = state.catalog
    wanted = _if_match(request)
    least = min(wanted) if wanted else 0
    for _ in range(_MOST_TRIES):
        record = catalog.record(name)
        if least > record.revision:
            record = await _seen(catalog, name, least)
        if wanted and record.revision not in wanted:
            words = f"deployment {name!r} is at version {record.revision} by now."
            raise PreconditionFailed(words, record.revision)
        spec = parse(name, patched(record.spec, changes))
        message = PutDeployment(spec, _who(request), (record.revision,))
        try:
            answer = await _ask(state, message)
        except PreconditionFailed as error:
            if wanted or not error.revision:
                raise
            least = error.revision
            continue
        return await _seen(catalog, name, answer.revision)
    words = f"deployment {name!r} was changed by others each time that this was tried; try again."
    raise ApiError(409, "conflict", words)


async def _seen(catalog: Catalog, name: str, revision: int) -> DeploymentRecord:
    """Its record at ``revision`` or later, so that who is answered can rely on it."""

    def is_known() -> bool:
        record = _known(catalog, name)
        return record is not None and record.revision >= revision

    await catalog.until(is_known, _SEEN_S)
    return catalog.record(name)


def _known(catalog: Catalog, name: str) -> DeploymentRecord | None:
    """The deployment ``name``, by no alias."""
    record = catalog.find(name)
    return record if record and record.spec.name == name else None


# -- headers and parameters ----------------------------------------------------------------


def _name(path: str) -> str:
    return str(path).removeprefix("/")


def _who(request: HttpRequest) -> str:
    tenant = tenant_of(request.headers.get("authorization"))
    return f"key {tenant}" if tenant else "http"


def _etag(revision: int) -> str:
    return f'"{revision}"'


def _if_match(request: HttpRequest) -> tuple[int, ...] | None:
    """The versions that If-Match names; (): any; None: there is no such header."""
    header = request.headers.get("if-match")
    if header is None:
        return None
    if header.strip() == "*":
        return ()
    found = [_ETAG.fullmatch(part.strip()) for part in header.split(",")]
    if not all(found):
        words = f'If-Match: {header} must be *, or ETags as they are answered, such as "42".'
        raise invalid("If-Match", words)
    return tuple(int(match[1]) for match in found if match)


def _flag(request: HttpRequest, key: str, default: bool) -> bool:
    value = request.query_params.get(key)
    if value is None:
        return default
    if value.lower() not in ("true", "false", "1", "0"):
        raise invalid(key, f"{key} = {value!r} must be true or false.")
    return value.lower() in ("true", "1")


def _wait_s(request: HttpRequest) -> float:
    """How long to wait until it is done (seconds)."""
    given = request.query_params.get("timeout_s")
    try:
        seconds = _WAIT_S if given is None else float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= _MOST_WAIT_S:
        raise invalid("timeout_s", f"timeout_s = {given!r} must be from 0 to {_MOST_WAIT_S:g}.")
    return seconds if _flag(request, "wait", True) else 0.0


def _optional_body(body: bytes, kind: type[T]) -> T:
    return convert(json_object(body) if body.strip() else {}, kind)


# -- answers -------------------------------------------------------------------------------


def _info(catalog: Catalog, record: DeploymentRecord) -> DeploymentInfo:
    return describe(record, catalog.states(record.spec.name))


def _deployment(catalog: Catalog, record: DeploymentRecord, status: int = 200) -> Response[bytes]:
    return json_answer(_info(catalog, record), status, {"etag": _etag(record.revision)})


def _result(catalog: Catalog, name: str, is_done: bool, reason: str) -> Response[bytes]:
    record = _known(catalog, name)
    info = _info(catalog, record) if record else None
    headers = {"etag": _etag(record.revision)} if record else {}
    result = ActionResult("done" if is_done else "accepted", reason, info)
    return json_answer(result, 200 if is_done else 202, headers)


def _not_done(words: str, reason: str) -> ApiError:
    return ApiError(409, "conflict", f"{words}; it was given up{f': {reason}' if reason else ''}.")


def _unavailable(words: str) -> ApiError:
    return ApiError(503, "scheduler_unavailable", words, retry_after_s=RETRY_AFTER_S)


HANDLERS: Final = [
    list_deployments,
    get_deployment,
    put_deployment,
    patch_deployment,
    delete_deployment,
    act_on_deployment,
]
