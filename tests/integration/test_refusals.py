"""Each refusal, over real HTTP: its status, its code, and what it tells the client."""

import ast
import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from schemas import names
from schemas.keys import KeyRecord
from services import keys
from services.api import errors
from services.bus import Bucket, Bus, declare
from tests.integration.api_stack import CHAT, MAX_QUEUED, MODEL, Stack, error_of, running_stack
from tests.integration.nats_process import NatsServer

SOURCES = Path(errors.__file__).parent
COMPLETION = {"model": MODEL, "prompt": "x"}
MAX_PROMPT = 50
MAX_OPEN = MAX_QUEUED + 1
OTHER = "other"
LONG = 3600

ADMIN, _ADMIN = keys.make("root", role="admin")
USER, _USER = keys.make("ada")
PICKY, _PICKY = keys.make("picky", models=("llama*", "m2"))
EXPIRED, _EXPIRED = keys.make("old", expires_at=int(time.time()) + LONG)
_EXPIRED = keys.changed(_EXPIRED, created_at=1, expires_at=1_767_225_600)
DISABLED, _DISABLED = keys.make("off", disabled=True)
ONE_A_MINUTE, _ONE_A_MINUTE = keys.make("slow", requests_per_minute=1)
FEW_TOKENS, _FEW_TOKENS = keys.make("small", tokens_per_minute=3)
ONE_AT_ONCE, _ONE_AT_ONCE = keys.make("single", max_concurrent=1)
RECORDS = (
    _ADMIN,
    _USER,
    _PICKY,
    _EXPIRED,
    _DISABLED,
    _ONE_A_MINUTE,
    _FEW_TOKENS,
    _ONE_AT_ONCE,
)


@pytest.fixture
async def guarded(nats_server: NatsServer) -> AsyncIterator[Stack]:
    """A stack that asks for API keys; its clients have an admin's."""
    await write(nats_server, *RECORDS)
    limits: Any = {
        "max_prompt_chars": MAX_PROMPT,
        "max_open_requests": MAX_OPEN,
        "read_timeout_s": 1.0,
    }
    async with running_stack(nats_server, 30, ADMIN, auth="on", **limits) as stack:
        yield stack


async def write(nats: NatsServer, *records: KeyRecord) -> None:
    bus = await Bus.connect(nats.credentials["admin"], service="keys")
    await declare(bus, MAX_QUEUED)
    bucket = Bucket(bus, names.BUCKET_KEYS, KeyRecord)
    for record in records:
        await bucket.put(record.id, record)
    await bus.close()


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


class Refusal(NamedTuple):
    """What is sent, and what must come back. ``says``: parts of the message."""

    code: str
    status: int
    says: tuple[str, ...]
    key: str = USER
    method: str = "POST"
    path: str = "/v1/completions"
    body: Any = COMPLETION
    param: str | None = None


def bad(code: str, body: Any, param: str | None, *says: str) -> Refusal:
    return Refusal(code, 400, says, body=body, param=param)


TABLE = (
    # who asks
    Refusal("missing_api_key", 401, ("Authorization: Bearer KEY", "hotswap keys create"), key=""),
    Refusal("invalid_api_key", 401, ("not one of this server's",), key="sk-made-up"),
    Refusal("invalid_api_key", 401, ("mistyped",), key=USER[:-1]),
    Refusal("invalid_api_key", 401, ("withdrawn",), key=f"{USER[:19]}-{ADMIN[20:]}"),
    Refusal("invalid_api_key", 401, ("withdrawn",), key=_USER.hash),
    Refusal("expired_api_key", 401, ("'old'", "2026-01-01 00:00:00 UTC"), key=EXPIRED),
    Refusal("disabled_api_key", 401, ("'off'", _DISABLED.id, "switched off"), key=DISABLED),
    Refusal(
        "insufficient_role",
        403,
        ("GET /v1/keys", "'ada'", "'admin'"),
        method="GET",
        path="/v1/keys",
    ),
    Refusal("insufficient_role", 403, ("'ada'",), path="/v1//keys/", body={"name": "mine"}),
    Refusal("insufficient_role", 403, ("'ada'",), method="GET", path="/v1/%6beys"),
    Refusal("model_not_allowed", 403, ("'picky'", MODEL, "llama*, m2"), key=PICKY, param="model"),
    Refusal(
        "model_not_allowed",
        403,
        ("'picky'", "'nope'"),  # whether it exists is not told
        key=PICKY,
        body={"model": "nope", "prompt": "x"},
        param="model",
    ),
    Refusal(
        "model_not_allowed",
        403,
        ("'picky'",),
        key=PICKY,
        path="/v1/embeddings",
        body={"model": MODEL, "input": "x"},
        param="model",
    ),
    # what for
    Refusal("unknown_url", 404, ("GET /v2/other", "/schema"), method="GET", path="/v2/other"),
    Refusal("method_not_allowed", 405, ("use POST",), method="GET"),
    Refusal(
        "model_not_found",
        404,
        ("'nope'", f"Models here: {MODEL}"),
        body={"model": "nope", "prompt": "x"},
        param="model",
    ),
    Refusal(
        "model_not_found",
        404,
        ("Models here: none yet",),  # none that this key may know of
        key=PICKY,
        method="GET",
        path=f"/v1/models/{MODEL}",
        param="model",
    ),
    Refusal("key_not_found", 404, ("'x'",), key=ADMIN, method="DELETE", path="/v1/keys/x"),
    Refusal(
        "model_not_supported",
        400,
        ("makes no embeddings",),
        path="/v1/embeddings",
        body={"model": MODEL, "input": "x"},
        param="model",
    ),
    # how
    bad("invalid_json", b'{"model": ', None, "not valid JSON"),
    bad("invalid_json", b"[1]", None, "must be a JSON object"),
    bad("missing_field", {"model": MODEL}, "prompt", "prompt is required"),
    bad("invalid_type", COMPLETION | {"max_tokens": "9"}, "max_tokens", "max_tokens = '9'"),
    bad("invalid_value", COMPLETION | {"top_p": 2}, "top_p", "top_p = 2", "between"),
    bad("unsupported_parameter", COMPLETION | {"best_of": 3}, "best_of", "best_of"),
    bad("prompt_too_long", {"model": MODEL, "prompt": "x" * 51}, "prompt", "51", "50"),
    bad("context_length_exceeded", {"model": MODEL, "prompt": [1] * 512}, "prompt", "512 tokens"),
    Refusal(
        "prompt_too_long",
        400,
        ("60 characters", "max_prompt_chars"),
        path="/v1/chat/completions",
        body=CHAT | {"messages": [{"role": "user", "content": "x" * 30}] * 2},
        param="messages",
    ),
    Refusal("request_too_large", 413, ("larger than 100000 bytes",), body=b" " * 100_001),
    # keys of keys
    Refusal(
        "invalid_value",
        400,
        ("max_concurrent = 0",),
        key=ADMIN,
        path="/v1/keys",
        body={"name": "x", "max_concurrent": 0},
        param="max_concurrent",
    ),
    Refusal(
        "invalid_type",
        400,
        ("unknown field `colour`",),
        key=ADMIN,
        path="/v1/keys",
        body={"name": "x", "colour": "red"},
    ),
    Refusal(
        "missing_field",
        400,
        ("name is required",),
        key=ADMIN,
        path="/v1/keys",
        body={},
        param="name",
    ),
)


async def test_the_table_of_refusals(guarded: Stack) -> None:
    for case in TABLE:
        content = {"content" if isinstance(case.body, bytes) else "json": case.body}
        answer = await guarded.http.request(
            case.method,
            case.path,
            headers=bearer(case.key) if case.key else {"Authorization": ""},
            **(content if case.method in ("POST", "PATCH") else {}),
        )
        error = error_of(answer)
        got = (answer.status_code, error["code"], error["param"])
        assert got == (case.status, case.code, case.param), (case, error)
        for part in case.says:
            assert part in error["message"], (case, error)
        assert error["type"] == "invalid_request_error"
        assert (answer.headers.get("www-authenticate") == "Bearer") == (case.status == 401)
        assert not any(key in answer.text for key in (case.key, ADMIN) if key)
    await guarded.queue_holds(0)  # none of them reached it


# -- limits that something has to be used up for -------------------------------------------


async def refused(stack: Stack, key: str, code: str, *says: str) -> httpx.Response:
    answer = await stack.http.post("/v1/completions", json=COMPLETION, headers=bearer(key))
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (429, code), error
    assert error["type"] == "rate_limit_error"
    for part in says:
        assert part in error["message"]
    assert int(answer.headers["retry-after"]) > 0
    return answer


async def answered(stack: Stack, key: str, *texts: str) -> httpx.Response:
    asking = asyncio.create_task(
        stack.http.post("/v1/completions", json=COMPLETION, headers=bearer(key))
    )
    await stack.agent.answer(await stack.agent.next(), *texts)
    answer = await asking
    assert answer.status_code == 200
    return answer


async def test_requests_per_minute(guarded: Stack) -> None:
    await guarded.agent.pull(MODEL)
    first = await answered(guarded, ONE_A_MINUTE, "ok")
    assert first.headers["x-ratelimit-limit-requests"] == "1"
    assert first.headers["x-ratelimit-remaining-requests"] == "0"
    says = ("'slow'", _ONE_A_MINUTE.id, "1 requests per minute", "try again in 60 s")
    answer = await refused(guarded, ONE_A_MINUTE, "rate_limit_exceeded", *says)
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    assert answer.headers["x-ratelimit-reset-requests"].endswith(("s", "m0s"))
    await answered(guarded, USER, "ok")  # nobody else's


async def test_tokens_per_minute(guarded: Stack) -> None:
    await guarded.agent.pull(MODEL)
    first = await answered(guarded, FEW_TOKENS, "a", "b")  # a prompt of 7 tokens, it says
    assert first.headers["x-ratelimit-limit-tokens"] == "3"
    await refused(guarded, FEW_TOKENS, "rate_limit_exceeded", "'small'", "3 tokens per minute")


async def test_requests_at_once(guarded: Stack) -> None:
    await guarded.agent.pull(MODEL)
    asking = asyncio.create_task(
        guarded.http.post("/v1/completions", json=COMPLETION, headers=bearer(ONE_AT_ONCE))
    )
    delivery = await guarded.agent.next()
    await refused(guarded, ONE_AT_ONCE, "concurrency_limit_exceeded", "'single'", "1 requests")
    await guarded.agent.answer(delivery, "ok")
    assert (await asking).status_code == 200
    await answered(guarded, ONE_AT_ONCE, "ok")


async def test_a_full_queue(guarded: Stack) -> None:
    waiting = [asyncio.create_task(guarded.ask()) for _ in range(MAX_QUEUED)]
    await guarded.queue_holds(MAX_QUEUED)
    await refused(guarded, USER, "queue_full", MODEL, f"{MAX_QUEUED} requests")
    for one in waiting:
        one.cancel()
    await guarded.queue_holds(0)


async def test_too_many_open_requests_are_refused_before_their_body_is_read(guarded: Stack) -> None:
    await guarded.scheduler.deploy(OTHER)
    await guarded.until(lambda got: len(got[1]["data"]) == 2, "/v1/models")
    waiting = [asyncio.create_task(guarded.ask()) for _ in range(MAX_QUEUED)]
    waiting.append(asyncio.create_task(guarded.ask(model=OTHER)))
    await guarded.queue_holds(MAX_OPEN)
    async with raw(guarded) as (reader, writer):
        writer.write(head(USER, length=1000))  # and no body
        answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 503 "), answer
    for part in (
        b"server_overloaded",
        b"4 requests open",
        b"api.max_open_requests",
        b"retry-after",
    ):
        assert part in answer
    for one in waiting:
        one.cancel()


# -- connections ---------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def raw(
    stack: Stack,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    url = stack.http.base_url
    reader, writer = await asyncio.open_connection(url.host, url.port)
    try:
        async with asyncio.timeout(20):
            yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def head(key: str, length: int) -> bytes:
    lines = ("POST /v1/completions HTTP/1.1", "Host: x", f"Authorization: Bearer {key}")
    return "\r\n".join((*lines, f"Content-Length: {length}", "Connection: close", "", "")).encode()


@pytest.mark.parametrize(
    ("sent", "status", "says"),
    [
        (head(USER, 1000) + b'{"model"', 408, ("request_timeout", "8 bytes", "read_timeout_s")),
        (b"POST /v1/completions HTTP/1.1\r\nHost:", 408, ("request_timeout", "headers")),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 70_000, 431, ("headers_too_large", "65536")),
        (
            b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /v1/mod",
            200,
            ("request_timeout", "408 Request Timeout"),
        ),
        (b"nonsense\r\n\r\n", 400, ("invalid_http", "no valid HTTP")),
        (b"GET / HTTP/1.1\r\nHost: a/b\r\nConnection: close\r\n\r\n", 401, ("missing_api_key",)),
        (b"", 0, ()),  # it never says a word, and is closed without one
    ],
    ids=["body", "head", "endless head", "second head", "no HTTP", "strange host", "silence"],
)
async def test_what_comes_late_or_not_at_all(
    guarded: Stack, sent: bytes, status: int, says: tuple[str, ...]
) -> None:
    async with raw(guarded) as (reader, writer):
        writer.write(sent)
        answer = (await reader.read()).decode()
    if status:
        assert answer.startswith(f"HTTP/1.1 {status} ")
    else:
        assert answer == ""
    for part in says:
        assert part in answer


# -- the table of codes --------------------------------------------------------------------


def codes_in_the_table() -> set[str]:
    rows = [line.split("|") for line in (errors.__doc__ or "").splitlines() if line.startswith("|")]
    return {code for row in rows[1:] for code in re.findall(r"[a-z]+(?:_[a-z]+)*", row[2])}


def codes_in_the_code() -> set[str]:
    """The constants that errors are made with, wherever that is."""
    position = {"ApiError": 1, "__init__": 1, "_refuse": 1, "_unauthorized": 0, "invalid": 2}
    found: set[str] = set(errors._STATUS_OF_FAILURE)
    for file in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                codes = node.args[position.get(name, 99) :][:1]
                codes += [word.value for word in node.keywords if word.arg == "code"]
                if name in position:
                    found |= {str(one.value) for one in codes if isinstance(one, ast.Constant)}
    return found


def test_the_table_of_codes_names_every_code_that_there_is() -> None:
    made, told = codes_in_the_code(), codes_in_the_table()
    assert len(made) > 25
    assert made <= told
    # Those that are not written down where they are made.
    assert told - made <= {"invalid_value", "bad_request"}
