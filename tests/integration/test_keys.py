"""API keys at work: made and withdrawn over HTTP and on the command line, with NATS away too."""

import asyncio
import contextlib
import json
import logging
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from services import keys
from services.api import refusals
from services.api.errors import ApiError
from services.api.keyring import Keyring
from services.bus import Bus, declare
from services.keys import FIRST_KEY_FILE, make
from tests.integration.api_stack import MODEL, Stack, error_of, running_stack
from tests.integration.nats_process import NatsServer
from tests.integration.test_api_tenants import heard
from tests.integration.test_refusals import bearer, write

COMPLETION = {"model": MODEL, "prompt": "x"}
ADMIN, _ADMIN = make("root", role="admin")


@pytest.fixture
async def keyed(nats_server: NatsServer) -> AsyncIterator[Stack]:
    """A stack that asks for API keys; its clients have an admin's."""
    await write(nats_server, _ADMIN)
    async with running_stack(nats_server, 30, ADMIN, auth="on") as stack:
        yield stack


async def status_of(stack: Stack, key: str) -> int:
    return (await stack.http.get("/v1/models", headers=bearer(key))).status_code


async def until_status(stack: Stack, key: str, status: int) -> None:
    """Until the key's record has come from the bucket."""
    async with asyncio.timeout(10):
        while True:
            if await status_of(stack, key) == status:
                return
            await asyncio.sleep(0.02)


# -- over HTTP -----------------------------------------------------------------------------


async def test_a_keys_life(keyed: Stack, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    listener = await Bus.connect(keyed.nats.credentials["admin"], service="listener")
    said = await heard(listener)
    body: dict[str, Any] = {"name": "ada", "models": ["Qwen/*"], "max_concurrent": 2}
    answer = await keyed.http.post("/v1/keys", json=body)
    made = answer.json()
    assert answer.status_code == 201
    key, key_id = made.pop("key"), made["id"]
    assert key.startswith(f"hs-{key_id}-")
    assert made == {
        "id": key_id,
        "name": "ada",
        "role": "user",
        "models": ["Qwen/*"],
        "requests_per_minute": None,
        "tokens_per_minute": None,
        "max_concurrent": 2,
        "created_at": made["created_at"],
        "expires_at": None,
        "disabled": False,
        "object": "key",
    }
    await until_status(keyed, key, 200)

    # what it does: its id is the tenant
    await keyed.agent.pull(MODEL)
    asking = asyncio.create_task(
        keyed.http.post("/v1/completions", json=COMPLETION, headers=bearer(key))
    )
    delivery = await keyed.agent.next()
    assert delivery.request.tenant == key_id
    await keyed.agent.answer(delivery, "ok")
    assert (await asking).status_code == 200

    # listed without the key; changed, and the change applies
    listed = (await keyed.http.get("/v1/keys")).json()
    assert [one["name"] for one in listed["data"]] == ["root", "ada"]
    assert (await keyed.http.get(f"/v1/keys/{key_id}")).json() == made
    answer = await keyed.http.patch(f"/v1/keys/{key_id}", json={"models": ["other"]})
    assert answer.json() == made | {"models": ["other"]}
    async with asyncio.timeout(10):
        while True:
            answer = await keyed.http.get("/v1/models", headers=bearer(key))
            if answer.json()["data"] == []:
                break
            await asyncio.sleep(0.02)
    answer = await keyed.http.post("/v1/completions", json=COMPLETION, headers=bearer(key))
    assert error_of(answer)["code"] == "model_not_allowed"
    await keyed.http.patch(f"/v1/keys/{key_id}", json={"disabled": True, "models": []})
    await until_status(keyed, key, 401)
    await keyed.http.patch(f"/v1/keys/{key_id}", json={"disabled": False})
    await until_status(keyed, key, 200)

    # withdrawn
    gone = (await keyed.http.delete(f"/v1/keys/{key_id}")).json()
    assert gone == {"id": key_id, "deleted": True, "object": "key"}
    await until_status(keyed, key, 401)
    answer = await keyed.http.get(f"/v1/keys/{key_id}")
    assert error_of(answer)["code"] == "key_not_found"

    # who did what is told, and no key anywhere: not in logs, not on the bus
    assert f"POST /v1/keys: 201, with the key 'root' ({_ADMIN.id})" in caplog.text
    assert f"DELETE /v1/keys/{key_id}: 200, with the key 'root'" in caplog.text
    await listener.flush()
    await listener.close()
    everything = caplog.text + "".join(f"{one.subject}{one.headers}{one.data!r}" for one in said)
    for secret in (key, ADMIN):
        assert secret not in everything
        assert secret.split("-", 2)[2] not in everything


async def test_two_changes_at_once_are_told_apart(keyed: Stack) -> None:
    made = (await keyed.http.post("/v1/keys", json={"name": "ada"})).json()
    await until_status(keyed, made["key"], 200)
    changes = [{"max_concurrent": n} for n in range(1, 9)]
    answers = await asyncio.gather(
        *(keyed.http.patch(f"/v1/keys/{made['id']}", json=change) for change in changes)
    )
    statuses = [answer.status_code for answer in answers]
    assert 200 in statuses
    assert set(statuses) <= {200, 409}
    last = (await keyed.http.get(f"/v1/keys/{made['id']}")).json()
    written = [a.json()["max_concurrent"] for a in answers if a.status_code == 200]
    assert last["max_concurrent"] in written


async def test_the_official_client_gets_its_own_errors(keyed: Stack) -> None:
    key, picky = make("picky", models=("x",))
    await write(keyed.nats, picky)
    await until_status(keyed, key, 200)
    models = await keyed.openai.models.list()
    assert [model.id for model in models.data] == [MODEL]
    allowed = keyed.openai.with_options(api_key=key)
    assert (await allowed.models.list()).data == []
    with pytest.raises(openai.PermissionDeniedError) as denied:
        await allowed.completions.create(model=MODEL, prompt="x")
    assert denied.value.code == "model_not_allowed"
    with pytest.raises(openai.AuthenticationError) as caught:
        await keyed.openai.with_options(api_key="wrong").models.list()
    assert caught.value.code == "invalid_api_key"


async def test_nobody_comes_in_with_two_keys(keyed: Stack) -> None:
    """Or the one that is checked and the one that is charged could be different ones."""
    key, record = make("ada")
    await write(keyed.nats, record)
    await until_status(keyed, key, 200)
    for pair in ((ADMIN, key), (key, ADMIN)):
        request = httpx.Request("GET", f"{keyed.http.base_url}/v1/models")
        request.headers = httpx.Headers([("Authorization", f"Bearer {one}") for one in pair])
        request.headers["Host"] = "x"
        answer = await keyed.http.send(request)
        assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key")


async def test_what_needs_no_key(keyed: Stack) -> None:
    for path in ("/healthz", "/readyz", "/schema", "/schema/openapi.json"):
        answer = await keyed.http.get(path, headers={"Authorization": ""})
        assert answer.status_code == 200, path
    for path in ("/v1/models", "/v1/files", "/nothing", "/", "/schemas", "/healthz/x"):
        answer = await keyed.http.get(path, headers={"Authorization": ""})
        assert answer.status_code == 401, path


async def test_keys_known_last_are_good_while_nats_is_away(keyed: Stack) -> None:
    made = (await keyed.http.post("/v1/keys", json={"name": "ada"})).json()
    await until_status(keyed, made["key"], 200)
    keyed.nats.kill()
    await keyed.proxy.cut()
    await keyed.until(lambda got: "no connection to NATS" in got[1].get("missing", []))
    assert await status_of(keyed, made["key"]) == 200
    assert await status_of(keyed, made["key"] + "x") == 401
    answer = await keyed.http.post("/v1/keys", json={"name": "eve"})
    assert (answer.status_code, error_of(answer)["code"]) == (503, "bus_unavailable")
    keyed.nats.start()
    await keyed.proxy.start()
    await keyed.until(lambda got: "no connection to NATS" not in got[1].get("missing", []))
    assert await status_of(keyed, made["key"]) == 200  # the bucket is a file


async def test_without_auth_everybody_is_nobody_in_particular(stack: Stack) -> None:
    assert (await stack.http.get("/v1/models")).status_code == 200
    made = await stack.http.post("/v1/keys", json={"name": "ada"})
    assert made.status_code == 201  # ready for the day it is switched on
    answer = await stack.http.get("/v1/models", headers=bearer("sk-anything"))
    assert answer.status_code == 200
    assert answer.json()["data"]


# -- work that does not come by HTTP -------------------------------------------------------


async def test_what_goes_to_the_queue_is_asked_for_its_key_again(nats_server: NatsServer) -> None:
    _, picky = make("picky", models=("x*",))
    await write(nats_server, picky)
    async with keyring_of(nats_server) as keyring:
        assert keyring.of_tenant(picky.id) == picky
        with pytest.raises(ApiError) as caught:
            keyring.of_tenant("")
        assert caught.value.info == refusals.invalid_api_key().info
    async with keyring_of(nats_server, required=False) as keyring:
        assert keyring.of_tenant("") is None


# -- the first key -------------------------------------------------------------------------


async def test_the_first_key_is_made_once_for_its_owner_only(
    nats_server: NatsServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "state"
    file = folder / FIRST_KEY_FILE
    async with keyring_of(nats_server) as keyring:
        await keyring.make_first_key(folder)
        key = file.read_text().strip()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert str(file) in caplog.text
        assert key not in caplog.text
    async with keyring_of(nats_server) as keyring:
        record = keyring.check(f"Bearer {key}")
        assert record.role == "admin"
        file.unlink()
        await keyring.make_first_key(folder)  # there is one
        assert not file.exists()
        await keyring.bucket.delete(record.id)
    file.write_text(key)
    async with keyring_of(nats_server) as keyring:
        await keyring.make_first_key(folder)  # NATS has lost it, the file has not
    async with keyring_of(nats_server) as keyring:
        assert keyring.check(f"Bearer {key}").role == "admin"
    async with keyring_of(nats_server, required=False) as keyring:
        await keyring.make_first_key(tmp_path / "none")
        assert not (tmp_path / "none").exists()


@contextlib.asynccontextmanager
async def keyring_of(nats: NatsServer, *, required: bool = True) -> AsyncIterator[Keyring]:
    """One that no api is around."""
    bus = await Bus.connect(nats.credentials["api"], service="api")
    await declare(bus)
    keyring = Keyring(bus, required=required)
    await keyring.start()
    try:
        yield keyring
    finally:
        await keyring.stop()
        await bus.close()


# -- the command line ----------------------------------------------------------------------


async def test_the_command_line(keyed: Stack, tmp_path: Path) -> None:
    config = tmp_path / "hotswap.toml"
    config.write_text("")
    creds = keyed.nats.plan.credential_files["admin"]
    base = ["-m", "services.cli", "keys", "--config", str(config), "--creds", str(creds)]

    async def run(*arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
        return await asyncio.to_thread(
            subprocess.run,
            [sys.executable, *base, *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            input=given,
        )

    limits = ("--requests-per-minute", "60", "--expires", "30d")
    done = await run("create", "ada", "--model", "Qwen/*", *limits)
    key = done.stdout.strip()
    assert (done.returncode, key.count("\n")) == (0, 0), done.stderr
    assert "not shown again" in done.stderr
    await until_status(keyed, key, 200)

    old = "sk-the-key-that-everybody-has"
    assert (await run("create", "old", "--stdin", given=old)).stdout.strip() == old
    await until_status(keyed, old, 200)

    listed = json.loads((await run("list", "--json")).stdout)
    assert {one["name"]: one["models"] for one in listed}["ada"] == ["Qwen/*"]
    assert "hash" not in listed[0]
    table = (await run("list")).stdout
    assert keys.key_id(key) in table
    assert key not in table

    done = await run("change", "ada", "--requests-per-minute", "none", "--disable")
    assert done.returncode == 0, done.stderr
    await until_status(keyed, key, 401)
    assert "withdrew 'old'" in (await run("revoke", "old")).stdout
    await until_status(keyed, old, 401)
    done = await run("revoke", "old")
    assert (done.returncode, "there is no key 'old'" in done.stderr) == (1, True)
    done = await run("create", "x", "--max-concurrent", "0")
    assert (done.returncode, "max_concurrent = 0" in done.stderr) == (2, True)
