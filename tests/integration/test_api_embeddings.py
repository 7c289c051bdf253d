"""/v1/embeddings over a real nats-server and real HTTP, with an agent whose answers we write."""

import asyncio
from typing import Any

import msgspec
import pytest

from schemas.state import SwapTrace
from services.api.tenants import tenant_of
from services.bus import Delivery
from tests.integration.api_stack import MODEL, Stack, error_of
from tests.integration.scripted_agent import FACTS

EMBEDS = "BAAI/bge"
EMBED_FACTS = msgspec.structs.replace(FACTS, runner="embed", dimensions=2, kv_bytes=0)


@pytest.fixture
async def embeds(stack: Stack) -> Stack:
    """A stack with a second model, which embeds."""
    await stack.scheduler.deploy(EMBEDS, EMBED_FACTS)
    await stack.until(lambda got: len(got[1]["data"]) == 2, "/v1/models")
    await stack.agent.pull(EMBEDS)
    return stack


async def test_the_official_client_asks_for_base64_and_gets_floats(embeds: Stack) -> None:
    async def answer() -> None:
        delivery, request = await embeds.agent.next_embed()
        assert request.inputs == ("hello", "there", "you")
        assert request.tenant == tenant_of("Bearer none")
        swap = SwapTrace(started_at=1.0, total_s=0.25, num_bytes=4096)
        await embeds.agent.started(delivery, "switch", swap)
        await embeds.agent.vectors(delivery, (1.0, 0.25), (0.5, 2.0))
        await embeds.agent.vectors(delivery, (-1.0, 3.0), index=2)
        await embeds.agent.finished(delivery, 0)

    answering = asyncio.create_task(answer())
    raw = await embeds.openai.embeddings.with_raw_response.create(
        model=EMBEDS, input=["hello", "there", "you"], user="ada", extra_body={"made_up": 1}
    )
    await answering
    got = raw.parse()
    assert [one.embedding for one in got.data] == [[1.0, 0.25], [0.5, 2.0], [-1.0, 3.0]]
    assert [one.index for one in got.data] == [0, 1, 2]
    assert (got.usage.prompt_tokens, got.usage.total_tokens) == (7, 7)
    assert got.model == EMBEDS
    assert raw.headers["x-hotswap-start"] == "switch"
    assert raw.headers["x-hotswap-ignored-fields"] == "made_up"
    await embeds.queue_holds(0)


async def test_floats_and_base64_over_the_wire(embeds: Stack) -> None:
    async def answer_all() -> None:
        for _ in range(2):
            delivery, request = await embeds.agent.next_embed()
            assert (request.inputs, request.dimensions) == (((1, 2),), 2)
            await embeds.agent.vectors(delivery, (1.0, 0.25))
            await embeds.agent.finished(delivery, 0)

    answering = asyncio.create_task(answer_all())
    body: dict[str, Any] = {"model": EMBEDS, "input": [1, 2], "dimensions": 2}
    floats = (await embeds.http.post("/v1/embeddings", json=body)).json()
    assert floats == {
        "object": "list",
        "model": EMBEDS,
        "data": [{"object": "embedding", "index": 0, "embedding": [1.0, 0.25]}],
        "usage": {"prompt_tokens": 7, "total_tokens": 7},
    }
    coded = await embeds.http.post("/v1/embeddings", json=body | {"encoding_format": "base64"})
    assert coded.json()["data"][0]["embedding"] == "AACAPwAAgD4="
    await answering


async def test_vectors_that_were_lost_are_computed_again(embeds: Stack) -> None:
    asking = asyncio.create_task(
        embeds.http.post("/v1/embeddings", json={"model": EMBEDS, "input": ["a", "b"]})
    )
    first, request = await embeds.agent.next_embed()
    await embeds.agent.vectors(first, (1.0, 1.0))
    await embeds.agent.finished(first, 0)
    second, again = await embeds.agent.next_embed()
    assert again.request_id == f"{request.request_id}-r2"
    await embeds.agent.vectors(second, (2.0, 2.0), index=1)
    await embeds.agent.finished(second, 0)
    answer = (await asking).json()
    assert [one["embedding"] for one in answer["data"]] == [[1.0, 1.0], [2.0, 2.0]]


async def test_a_worker_that_died_is_followed_by_another_delivery(embeds: Stack) -> None:
    asking = asyncio.create_task(
        embeds.http.post("/v1/embeddings", json={"model": EMBEDS, "input": "a"})
    )
    first, _ = await embeds.agent.next_embed()
    await embeds.agent.started(first)
    await first.nak()
    await embeds.agent.pullers[f"interactive.{EMBEDS}"].want(8)
    second, request = await embeds.agent.next_embed()
    assert (second.num_delivered, request.inputs) == (2, ("a",))
    await embeds.agent.vectors(second, (1.0, 1.0))
    await embeds.agent.finished(second, 0)
    assert (await asking).status_code == 200


async def test_what_a_model_is_not_for_is_refused(embeds: Stack) -> None:
    wrong = await embeds.http.post("/v1/embeddings", json={"model": MODEL, "input": "a"})
    assert wrong.status_code == 400
    assert (error_of(wrong)["code"], error_of(wrong)["param"]) == ("model_not_supported", "model")
    reverse = await embeds.ask(model=EMBEDS)
    assert reverse.status_code == 400
    assert "use /v1/embeddings" in error_of(reverse)["message"]
    wide = await embeds.http.post(
        "/v1/embeddings", json={"model": EMBEDS, "input": "a", "dimensions": 3}
    )
    assert error_of(wide)["param"] == "dimensions"
    nobody = await embeds.http.post("/v1/embeddings", json={"model": "x", "input": "a"})
    assert nobody.status_code == 404
    await embeds.queue_holds(0)


async def test_what_the_engine_refuses(embeds: Stack) -> None:
    async def refused(code: Any) -> dict[str, Any]:
        asking = asyncio.create_task(
            embeds.http.post("/v1/embeddings", json={"model": EMBEDS, "input": "a"})
        )
        delivery: Delivery
        delivery, _ = await embeds.agent.next_embed()
        await embeds.agent.failed(delivery, code, "no")
        answer = await asking
        assert answer.status_code == 400
        return error_of(answer)

    too_long = await refused("context_length_exceeded")
    assert (too_long["param"], too_long["code"]) == ("input", "context_length_exceeded")
    assert (await refused("model_not_supported"))["param"] == "model"


async def test_a_client_that_leaves_takes_its_request_back(embeds: Stack) -> None:
    asking = asyncio.create_task(
        embeds.http.post("/v1/embeddings", json={"model": EMBEDS, "input": "a"})
    )
    _, request = await embeds.agent.next_embed()
    asking.cancel()
    cancel = await embeds.agent.next_cancel()
    assert (cancel.request_id, cancel.model) == (request.request_id, EMBEDS)
