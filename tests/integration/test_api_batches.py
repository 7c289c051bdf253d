"""Files and batches over HTTP, with the official client; scheduler and agent are scripted."""

import asyncio
import json
import struct
from collections.abc import Callable
from typing import Any, Literal

import msgspec
import openai
import pytest
from openai.types import Batch

from schemas.events import RequestWithdrawn
from schemas.stream import Vectors
from services.api.batches import driver, wire, work
from tests.integration.api_stack import MODEL, Stack, error_of
from tests.integration.scripted_agent import FACTS, GenerateDelivery

PATIENCE_S = 15.0
CHAT: Literal["/v1/chat/completions"] = "/v1/chat/completions"


def line(custom_id: str, text: str = "hi", model: str = MODEL, **more: Any) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": text}], **more}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}


def jsonl(*lines: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in lines)


async def submit(stack: Stack, data: bytes, **more: Any) -> Batch:
    file = await stack.openai.files.create(file=("in.jsonl", data), purpose="batch")
    return await stack.openai.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h", **more
    )


async def reaches(stack: Stack, batch: Batch, holds: Callable[[Any], bool]) -> Batch:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            now = await stack.openai.batches.retrieve(batch.id)
            if holds(now):
                return now
            await asyncio.sleep(0.02)


async def ended(stack: Stack, batch: Batch) -> Batch:
    last = ("completed", "failed", "expired", "cancelled")
    return await reaches(stack, batch, lambda now: now.status in last)


async def lines_of(stack: Stack, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    content = await stack.openai.files.content(file_id)
    return [json.loads(text) for text in content.text.splitlines()]


async def answer(stack: Stack, delivery: GenerateDelivery) -> None:
    """Say back what was asked."""
    text = delivery.request.prompt.messages[-1].content  # type: ignore[union-attr]
    await stack.agent.started(delivery)
    await stack.agent.tokens(delivery, text, "!")
    await stack.agent.finished(delivery, 2)


async def test_files_come_and_go(stack: Stack) -> None:
    client = stack.openai
    data = jsonl(*(line(f"a{i}", "x" * 1000) for i in range(3000)))  # several chunks
    file = await client.files.create(file=("in.jsonl", data), purpose="batch")
    assert (file.filename, file.bytes, file.purpose) == ("in.jsonl", len(data), "batch")
    assert (await client.files.retrieve(file.id)) == file
    assert (await client.files.content(file.id)).content == data
    other = await client.files.create(file=("b.jsonl", b""), purpose="batch")
    assert {one.id for one in (await client.files.list()).data} == {file.id, other.id}
    [first] = (await client.files.list(limit=1, order="asc")).data
    rest = (await client.files.list(limit=1, order="asc", after=first.id)).data
    assert {first.id, rest[0].id} == {file.id, other.id}
    assert (await client.files.delete(file.id)).deleted
    with pytest.raises(openai.NotFoundError):
        await client.files.content(file.id)
    with pytest.raises(openai.NotFoundError):
        await client.files.retrieve("../etc")
    assert [one.id for one in (await client.files.list()).data] == [other.id]


async def test_what_another_key_stored_is_not_there(stack: Stack) -> None:
    file = await stack.openai.files.create(file=("in.jsonl", b"x"), purpose="batch")
    other = stack.openai.with_options(api_key="another")
    assert (await other.files.list()).data == []
    with pytest.raises(openai.NotFoundError):
        await other.files.content(file.id)
    with pytest.raises(openai.NotFoundError):
        await other.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")


async def test_uploads_that_are_wrong_are_told_so(stack: Stack) -> None:
    def form(purpose: str, size: int = 1) -> dict[str, Any]:
        return {"files": {"file": ("in.jsonl", b"x" * size)}, "data": {"purpose": purpose}}

    refused = await stack.http.post("/v1/files", **form("fine-tune"))
    assert error_of(refused)["param"] == "purpose"
    refused = await stack.http.post("/v1/files", **form("batch", 20_001 * 1024))
    assert refused.status_code == 413
    assert "max_file_bytes" in error_of(refused)["message"]
    refused = await stack.http.post("/v1/files", json={"purpose": "batch"})
    assert error_of(refused)["code"] == "invalid_form"
    refused = await stack.http.post("/v1/files", data={"purpose": "batch"}, files={"x": b"1"})
    assert error_of(refused)["param"] == "file"


async def test_a_batch_is_answered_line_by_line(stack: Stack) -> None:
    await stack.agent.pull(MODEL, 50, "batch")
    texts = {f"id-{i}": f"text {i}" for i in range(20)}
    batch = await submit(stack, jsonl(*(line(*one) for one in texts.items())), metadata={"k": "v"})
    assert (batch.status, batch.metadata) == ("validating", {"k": "v"})
    for _ in texts:
        delivery = await stack.agent.next()
        assert delivery.request.klass == "batch"
        assert delivery.request.deadline_at == batch.expires_at
        await answer(stack, delivery)
    done = await ended(stack, batch)
    assert done.status == "completed"
    assert done.request_counts is not None
    assert done.request_counts.to_dict() == {"total": 20, "completed": 20, "failed": 0}
    assert done.error_file_id is None
    assert done.created_at <= (done.in_progress_at or 0) <= (done.completed_at or 0)
    found = await lines_of(stack, done.output_file_id)
    assert len(found) == 20
    for one in found:
        assert one["error"] is None
        assert one["response"]["status_code"] == 200
        body = one["response"]["body"]
        assert body["choices"][0]["message"]["content"] == texts[one["custom_id"]] + "!"
        assert body["object"] == "chat.completion"
        assert body["usage"]["completion_tokens"] == 2
    assert {one["custom_id"] for one in found} == set(texts)
    assert [one.id for one in (await stack.openai.batches.list()).data] == [batch.id]
    await stack.queue_holds(0)


async def test_lines_that_can_not_be_run_are_in_the_error_file(stack: Stack) -> None:
    await stack.agent.pull(MODEL, 8, "batch")
    data = jsonl(
        line("hot", temperature=9),
        line("nobody", model="nobody"),
        line("streams", stream=True),
        line("long"),
        line("good"),
    )
    batch = await submit(stack, data)
    for _ in range(2):
        delivery = await stack.agent.next()
        if delivery.request.request_id.split("-")[1] == "4":
            await stack.agent.failed(delivery, "context_length_exceeded", "too long")
        else:
            await answer(stack, delivery)
    done = await ended(stack, batch)
    assert done.status == "completed"
    assert done.request_counts is not None
    assert done.request_counts.to_dict() == {"total": 5, "completed": 1, "failed": 4}
    [good] = await lines_of(stack, done.output_file_id)
    assert good["custom_id"] == "good"
    failed = {
        one["custom_id"]: one["response"] for one in await lines_of(stack, done.error_file_id)
    }
    codes = {name: (r["status_code"], r["body"]["error"]["code"]) for name, r in failed.items()}
    assert codes == {
        "hot": (400, "invalid_value"),
        "nobody": (404, "model_not_found"),
        "streams": (400, "invalid_value"),
        "long": (400, "context_length_exceeded"),
    }


async def test_an_input_that_is_wrong_fails_the_batch_with_line_numbers(stack: Stack) -> None:
    data = b'not json\n\n{"custom_id": "a", "method": "POST"}\n' + jsonl(line("a"), line("a"))
    done = await ended(stack, await submit(stack, data))
    assert done.status == "failed"
    assert done.errors is not None
    told = [(error.line, error.code, error.param) for error in done.errors.data or []]
    assert told == [
        (1, "invalid_json_line", None),
        (3, "invalid_request", "body"),
        (5, "duplicate_custom_id", "custom_id"),
    ]


async def test_a_run_without_a_whole_answer_is_run_again_and_counts_once(stack: Stack) -> None:
    await stack.agent.pull(MODEL, 8, "batch")
    batch = await submit(stack, jsonl(line("a", "text")))
    first = await stack.agent.next()
    await stack.agent.tokens(first, "text")
    await stack.agent.finished(first, 5)  # four of them were lost
    second = await stack.agent.next()
    assert second.request.request_id == f"{batch.id}-1-2"
    assert second.request.sampling == first.request.sampling  # the seed, too
    await answer(stack, second)
    done = await ended(stack, batch)
    [found] = await lines_of(stack, done.output_file_id)
    assert found["response"]["body"]["choices"][0]["message"]["content"] == "text!"


async def test_a_request_that_is_lost_is_noticed(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "LOOK_EVERY_S", 0.2)
    await stack.agent.pull(MODEL, 8, "batch")
    batch = await submit(stack, jsonl(line("a", "text")))
    await (await stack.agent.next()).ack()  # and never a word
    second = await stack.agent.next()
    await answer(stack, second)
    done = await ended(stack, batch)
    assert len(await lines_of(stack, done.output_file_id)) == 1


async def test_cancelling_keeps_what_was_answered(stack: Stack) -> None:
    await stack.agent.pull(MODEL, 2, "batch")
    batch = await submit(stack, jsonl(*(line(f"a{i}") for i in range(6))))
    first, second = await stack.agent.next(), await stack.agent.next()
    await answer(stack, first)
    await stack.agent.answer_begins(second, "t")
    await reaches(stack, batch, lambda now: now.request_counts.completed == 1)
    cancelling = await stack.openai.batches.cancel(batch.id)
    assert cancelling.status == "cancelling"
    cancel = await stack.agent.next_cancel()
    while cancel.request_id != second.request.request_id:
        cancel = await stack.agent.next_cancel()
    await stack.agent.finished(second, 1, "cancelled")
    done = await ended(stack, batch)
    assert done.status == "cancelled"
    assert len(await lines_of(stack, done.output_file_id)) == 1
    errors = await lines_of(stack, done.error_file_id)
    assert {one["error"]["code"] for one in errors} == {"batch_cancelled"}
    assert len(errors) == 5
    await stack.queue_holds(0)
    assert (await stack.queue.depths("batch"))[0] == {}
    withdrawn = await stack.withdrawals.next()
    assert isinstance(withdrawn, RequestWithdrawn)
    with pytest.raises(openai.ConflictError):
        await stack.openai.batches.cancel(batch.id)


async def test_what_the_window_leaves_over_has_expired(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "MIN_WINDOW_S", 1)
    monkeypatch.setitem(wire._SECONDS, "m", 2)  # a short minute
    await stack.agent.pull(MODEL, 1, "batch")
    file = await stack.openai.files.create(
        file=("in.jsonl", jsonl(line("a"), line("b"))), purpose="batch"
    )
    batch = await stack.openai.batches.create(
        input_file_id=file.id,
        endpoint=CHAT,
        completion_window="1m",  # type: ignore[arg-type]
    )
    await answer(stack, await stack.agent.next())
    done = await ended(stack, batch)
    assert (done.status, done.expires_at) == ("expired", batch.created_at + 2)
    assert len(await lines_of(stack, done.output_file_id)) == 1
    [late] = await lines_of(stack, done.error_file_id)
    assert (late["response"], late["error"]["code"]) == (None, "batch_expired")
    assert (await stack.queue.depths("batch"))[0] == {}


async def test_a_batch_of_embeddings(stack: Stack) -> None:
    await stack.scheduler.deploy("embeds", msgspec.structs.replace(FACTS, runner="embed"))
    await stack.agent.pull("embeds", 1, "batch")
    body = {"model": "embeds", "input": ["x", "y"]}
    asked = {"custom_id": "e", "method": "POST", "url": "/v1/embeddings", "body": body}
    file = await stack.openai.files.create(file=("in.jsonl", jsonl(asked)), purpose="batch")
    batch = await stack.openai.batches.create(
        input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h"
    )
    delivery, request = await stack.agent.next_embed()
    chunk = Vectors(request.request_id, 1, 0, 1, struct.pack("<2f", 1.0, 2.0))
    await stack.agent.bus.publish(request.reply_to, chunk)
    await stack.agent.finished(delivery, 0)
    [found] = await lines_of(stack, (await ended(stack, batch)).output_file_id)
    assert [one["embedding"] for one in found["response"]["body"]["data"]] == [[1.0], [2.0]]


async def test_batches_take_turns_and_one_that_waits_can_be_cancelled(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "MOST_AT_ONCE", 1)
    await stack.restart_api()
    await stack.until(lambda got: got[0] == 200)
    await stack.agent.pull(MODEL, 8, "batch")
    first = await submit(stack, jsonl(line("a")))
    delivery = await stack.agent.next()
    second = await submit(stack, jsonl(line("b")))
    third = await submit(stack, jsonl(line("c")))
    await stack.openai.batches.cancel(second.id)
    assert (await ended(stack, second)).status == "cancelled"
    assert (await stack.openai.batches.retrieve(third.id)).status == "validating"
    await answer(stack, delivery)
    await answer(stack, await stack.agent.next())
    assert [(await ended(stack, one)).status for one in (first, third)] == ["completed"] * 2


async def test_the_input_of_a_running_batch_stays(stack: Stack) -> None:
    batch = await submit(stack, jsonl(line("a")))
    with pytest.raises(openai.ConflictError):
        await stack.openai.files.delete(batch.input_file_id)
    await stack.openai.batches.cancel(batch.id)
    await ended(stack, batch)
    await stack.openai.files.delete(batch.input_file_id)


async def test_requests_for_batches_that_are_wrong_are_told_so(stack: Stack) -> None:
    file = await stack.openai.files.create(file=("in.jsonl", b"x"), purpose="batch")

    async def refused(**changes: Any) -> dict[str, Any]:
        body = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"} | changes
        answered = await stack.http.post(
            "/v1/batches", json=body, headers={"authorization": "Bearer none"}
        )
        return error_of(answered)

    assert (await refused(completion_window="soon"))["param"] == "completion_window"
    assert (await refused(endpoint="/v1/responses"))["param"] == "endpoint"
    assert (await refused(input_file_id="file-x"))["code"] == "file_not_found"
    assert (await refused(metadata={"k": "v" * 600}))["param"] == "metadata"
    assert (await stack.http.get("/v1/batches/nobody")).status_code == 404


async def test_a_batch_goes_on_with_another_api_and_after_the_death_of_the_server(
    stack: Stack,
) -> None:
    """The api that drives it ends in the middle, and so does the server: one answer a line."""
    await stack.agent.pull(MODEL, 4, "batch")
    batch = await submit(stack, jsonl(*(line(f"a{i}", f"text {i}") for i in range(12))))
    for _ in range(4):
        await answer(stack, await stack.agent.next())
    await stack.restart_api()
    stack.nats.restart()
    await stack.until(lambda got: got[0] == 200)
    await stack.agent.pull(MODEL, 4, "batch")
    answering = asyncio.create_task(_answer_all(stack))
    done = await ended(stack, batch)
    answering.cancel()
    assert done.status == "completed"
    found = await lines_of(stack, done.output_file_id)
    assert sorted(one["custom_id"] for one in found) == sorted(f"a{i}" for i in range(12))


async def _answer_all(stack: Stack) -> None:
    while True:
        delivery = await stack.agent.deliveries.get()
        await answer(stack, delivery)  # type: ignore[arg-type]
        for puller in stack.agent.pullers.values():
            await puller.want(4)
