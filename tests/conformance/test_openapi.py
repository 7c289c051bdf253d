"""The api and its own OpenAPI document, both ways. `make fuzz` runs far more of the first test."""

from pathlib import Path

import httpx
import pytest

from tests.conformance.fuzz import METHODS, document, fuzz
from tests.conformance.willing_agent import CHAT, EMBEDS

POSTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")


def test_generated_requests(api_url: str, tmp_path: Path) -> None:
    """The same requests in every run."""
    report = fuzz(api_url, tmp_path, examples=5, seed=1, deterministic=True)
    assert not report.problems, "\n".join(report.problems)
    assert report.server_errors == 0
    assert report.cases > 1000
    operations = {
        f"{method.upper()} {path}"
        for path, item in document(api_url)["paths"].items()
        for method in item.keys() & METHODS
    }
    untouched = [name for name in operations if report.operations[name].cases == 0]
    assert not untouched
    # Requests that get somewhere, and not only requests that are refused.
    for path in POSTS:
        statuses = report.operations[f"POST {path}"].statuses
        assert statuses["200"] > 10
        assert statuses["400"] > 50


# What no schema can describe.
NOT_JSON = {
    "nothing": b"",
    "cut off": b'{"model": "x"',
    "not UTF-8": b'{"model": "\xff\xfe"}',
    "half a surrogate pair": b'{"model": "\\ud800"}',
    "a NUL byte": b'{"model": "x"}\0',
    "a byte order mark": b'\xef\xbb\xbf{"model": "x"}',
    "NaN": b'{"model": "x", "temperature": NaN}',
    "infinity": b'{"model": "x", "temperature": -Infinity}',
    "a number beyond all floats": b'{"model": "x", "temperature": 1e999}',
    "nested": b'{"model": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    "two objects": b"{}{}",
    "a list": b"[]",
    "a text": b'"x"',
    "null": b"null",
    "a form": b"model=x&prompt=y",
    "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00",
}


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("what", NOT_JSON)
def test_bodies_that_are_no_json_object(api_url: str, path: str, what: str) -> None:
    answer = httpx.post(api_url + path, content=NOT_JSON[what], timeout=20)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["code"] == "invalid_json"
    assert error["message"]


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("/v1/chat/completions", "seed", 1 << 63),
        ("/v1/chat/completions", "max_tokens", 10**400),
        ("/v1/completions", "stop_token_ids", [10**30]),
        ("/v1/completions", "prompt", [10**30]),
        ("/v1/completions", "prompt", [[-(10**30)]]),
        ("/v1/embeddings", "input", [10**30]),
        ("/v1/embeddings", "dimensions", 10**30),
    ],
)
def test_numbers_that_are_too_large(api_url: str, path: str, field: str, value: object) -> None:
    fine: dict[str, dict[str, object]] = {
        POSTS[0]: {"model": CHAT, "messages": [{"role": "user", "content": "hi"}]},
        POSTS[1]: {"model": CHAT, "prompt": "hi"},
        POSTS[2]: {"model": EMBEDS, "input": "hi"},
    }
    body = fine[path] | {field: value}
    answer = httpx.post(api_url + path, json=body, timeout=20)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith(field)


def test_any_text_comes_through(api_url: str) -> None:
    text = "".join(map(chr, range(0x300))) + "\u2028\U0001f600\ufffd\0"
    body = {"model": CHAT, "prompt": text, "stop": ["\0"], "user": text}
    answer = httpx.post(f"{api_url}/v1/completions", json=body, timeout=20)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"]


def test_a_body_that_is_too_large(api_url: str) -> None:
    for path in POSTS:
        answer = httpx.post(api_url + path, content=b" " * 150_000, timeout=20)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/nothing", "/v1/models/", "/%00", "/v1/models/%FF"]
)
def test_paths_that_nobody_serves(api_url: str, path: str) -> None:
    answer = httpx.get(api_url + path, timeout=20)
    assert answer.status_code in (200, 404)  # /v1/models/ is /v1/models
    assert answer.headers["content-type"] == "application/json"
