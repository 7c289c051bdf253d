"""``/v1/deployments`` of one api: what it refuses, and a leader that answers by script."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from schemas import names
from schemas.admin import AdminAnswer, AdminRequest, PutDeployment
from schemas.state import DeploymentRecord
from services.bus import Bucket, Bus
from services.bus.connection import RawMessage
from tests.integration.agent_kit import eventually
from tests.integration.api_stack import MODEL, Stack, error_of, events_of
from tests.integration.scripted_agent import FACTS

PATH = f"/v1/deployments/{MODEL}"


class Leader:
    """Gives the answers that it was told to, in turn; a put that is done gets its record."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.asked: list[AdminRequest] = []
        self.answers: list[AdminAnswer] = []

    async def start(self) -> None:
        await self._bus.subscribe_raw(names.admin_subject(), self._on_request)
        await self._bus.flush()

    async def _on_request(self, raw: RawMessage) -> None:
        request: AdminRequest = msgspec.json.decode(raw.data, type=AdminRequest)
        self.asked.append(request)
        answer = self.answers.pop(0)
        if isinstance(request, PutDeployment) and answer.outcome == "done":
            await self.record(request, answer.revision)
        await self._bus.publish(raw.reply, answer)

    async def record(self, put: PutDeployment, revision: int) -> None:
        record = DeploymentRecord(put.spec, "ready", facts=FACTS, revision=revision, origin="api")
        bucket = Bucket(self._bus, names.BUCKET_MODELS, DeploymentRecord)
        await bucket.put(names.escape(put.model), record)


@pytest.fixture
async def leader(stack: Stack) -> AsyncIterator[Leader]:
    bus = await Bus.connect(stack.nats.credentials["scheduler"], service="scheduler")
    leader = Leader(bus)
    await leader.start()
    yield leader
    await bus.close()


async def test_without_a_leader_nothing_is_changed(stack: Stack) -> None:
    answer = await stack.http.put(PATH, json={"source": "/models/x"})
    assert (answer.status_code, error_of(answer)["code"]) == (503, "scheduler_unavailable")
    assert answer.headers["retry-after"]
    assert (await stack.http.get("/v1/deployments")).json()["data"][0]["name"] == MODEL


REFUSALS: list[tuple[str, str, dict[str, Any], int, str]] = [
    ("GET", "/v1/deployments/x", {}, 404, "no deployment 'x'. Deployments here: Qwen"),
    ("PUT", PATH, {"content": b"{"}, 400, "not valid JSON"),
    ("PUT", PATH, {"json": []}, 400, "must be a JSON object"),
    ("PUT", PATH, {"json": {"source": "/x", "prio": 1}}, 400, "unknown key prio = 1"),
    ("PATCH", PATH, {"json": {"max_batch": 0}}, 400, "max_batch = 0 must be greater than 0"),
    ("PATCH", "/v1/deployments/x", {"json": {}}, 404, "no deployment 'x'"),
    ("POST", f"{PATH}/dance", {}, 404, "end it in one of /swap-in, /swap-out"),
    ("POST", f"{PATH}/swap-in?wait=maybe", {}, 400, "wait = 'maybe' must be true or false"),
    ("POST", f"{PATH}/swap-in?timeout_s=9e9", {}, 400, "timeout_s = '9e9' must be from 0"),
    ("POST", f"{PATH}/swap-in", {"json": {"gup": "x"}}, 400, "gup"),
    ("POST", f"{PATH}/move", {"json": {"from": "a"}}, 400, "to is required"),
    ("DELETE", PATH, {"headers": {"If-Match": "x"}}, 400, "as they are answered"),
]


async def test_a_refusal_says_what_is_wrong(stack: Stack) -> None:
    for method, path, more, status, words in REFUSALS:
        answer = await stack.http.request(method, path, **more)
        assert answer.status_code == status, (method, path, more)
        assert words in error_of(answer)["message"]


async def test_a_patch_is_tried_again_on_what_others_made_of_it(
    stack: Stack, leader: Leader
) -> None:
    leader.answers = [
        AdminAnswer("precondition_failed", "it is at version 8", 8),
        AdminAnswer("done", revision=9),
    ]
    patching = asyncio.create_task(stack.http.patch(PATH, json={"priority": 3}))

    async def was_asked() -> bool:
        return bool(leader.asked)

    await eventually(was_asked, "the first attempt")
    [first] = leader.asked
    assert isinstance(first, PutDeployment)
    theirs = msgspec.structs.replace(first.spec, priority=0, max_batch=2)
    await leader.record(PutDeployment(theirs), 8)
    answer = await patching
    assert (answer.status_code, answer.headers["etag"]) == (200, '"9"')
    settings = answer.json()["settings"]
    assert (settings["priority"], settings["max_batch"]) == (3, 2)
    assert [one.if_match for one in leader.asked if isinstance(one, PutDeployment)] == [(0,), (8,)]


REFUSED = [
    (AdminAnswer("invalid", "no such GPU"), 400, "invalid_value"),
    (AdminAnswer("conflict", "the alias is taken"), 409, "conflict"),
    (AdminAnswer("precondition_failed", "changed", 8), 412, "precondition_failed"),
    (AdminAnswer("unavailable", "the server is away"), 503, "scheduler_unavailable"),
]


async def test_what_the_leader_refuses_is_told(stack: Stack, leader: Leader) -> None:
    headers = {"If-Match": '"7"', "Authorization": "Bearer secret"}
    for answer, status, code in REFUSED:
        leader.answers = [answer]
        told = await stack.http.put(PATH, json={"source": "/x"}, headers=headers)
        assert (told.status_code, error_of(told)["code"]) == (status, code)
        assert answer.reason in error_of(told)["message"]
        assert told.headers.get("etag") == ('"8"' if status == 412 else None)
    asked = leader.asked[0]
    assert isinstance(asked, PutDeployment)
    assert asked.if_match == (7,)
    assert asked.who.startswith("key ")
    assert "secret" not in asked.who


async def test_a_name_may_be_escaped_and_new(stack: Stack, leader: Leader) -> None:
    leader.answers = [AdminAnswer("done", revision=5, created=True)]
    headers = {"If-None-Match": "*"}
    answer = await stack.http.put("/v1/deployments/a%2Fb", json={"source": "/x"}, headers=headers)
    assert (answer.status_code, answer.json()["name"]) == (201, "a/b")
    [asked] = leader.asked
    assert isinstance(asked, PutDeployment)
    assert asked.must_be_new


async def test_what_runs_ends_where_its_agent_is_lost_after_the_removal(stack: Stack) -> None:
    await stack.agent.pull(MODEL)
    asking = asyncio.create_task(stack.ask(stream=True))
    delivery = await stack.agent.next()
    await stack.agent.answer_begins(delivery, "one")
    await stack.scheduler.remove(MODEL)
    await stack.until(lambda got: got[1]["data"] == [], "/v1/models")
    await stack.agent.hold(MODEL, "cold")
    answer = await asyncio.wait_for(asking, 10)
    assert "its deployment was removed" in events_of(answer.text)[-1]["error"]["message"]
