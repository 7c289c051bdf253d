"""TLS for HTTP and for NATS, with certificates made here, and what is said of bad ones."""

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trustme
from click.testing import CliRunner

from services.api import service
from services.api.service import ApiStartError
from services.bus import Bus, BusError, BusOptions, BusUnavailable
from services.cli import cli
from services.ops import stack as whole
from services.ops.nats_server import NatsServerError, ServerTls, free_port
from services.ops.supervisor import Supervisor
from services.settings import ApiSettings, NatsSettings, Settings, dump
from tests.integration.api_stack import MODEL, running_stack
from tests.integration.nats_process import NatsServer


class Files:
    """PEM files of a certificate for 127.0.0.1, and of who signed it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        authority = trustme.CA()
        issued = authority.issue_cert("127.0.0.1", "localhost")
        self.ca, self.cert, self.key = (str(folder / f"{n}.pem") for n in ("ca", "cert", "key"))
        authority.cert_pem.write_to_path(self.ca)
        issued.private_key_pem.write_to_path(self.key)
        Path(self.cert).write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))

    def spoil(self, how: str) -> None:
        if how == "missing":
            Path(self.cert).unlink()
        elif how == "not PEM":
            Path(self.cert).write_text("hello")
        else:
            self.key = Files(Path(self.key).parent / "other").key

    @property
    def server(self) -> ServerTls:
        return ServerTls(self.cert, self.key, self.ca)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path / "pem")


@pytest.fixture
async def tls_nats(tmp_path: Path, files: Files) -> AsyncIterator[NatsServer]:
    server = NatsServer(tmp_path / "nats", files.server)
    server.start()
    yield server
    server.stop()


# -- HTTP ----------------------------------------------------------------------------------


async def test_https(nats_server: NatsServer, files: Files) -> None:
    tls: dict[str, Any] = {"tls_cert": files.cert, "tls_key": files.key}
    context = ssl.create_default_context(cafile=files.ca)
    async with running_stack(nats_server, 30, verify=context, **tls) as stack:
        assert str(stack.http.base_url).startswith("https://")
        await stack.agent.pull(MODEL)
        asking = asyncio.create_task(stack.ask(stream=True))
        await stack.agent.answer(await stack.agent.next(), "ok")
        assert '"ok"' in (await asking).text
        plain = str(stack.http.base_url).replace("https", "http")
        async with httpx.AsyncClient() as client:
            with pytest.raises(httpx.HTTPError):
                await client.get(f"{plain}/healthz")
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await client.get(f"{stack.http.base_url}/healthz")


@pytest.mark.parametrize("wrong", ["missing", "not PEM", "another's key"])
async def test_files_that_can_not_be_used_are_named(
    wrong: str, files: Files, tmp_path: Path, nats_server: NatsServer
) -> None:
    files.spoil(wrong)
    api = ApiSettings(port=free_port(0), tls_cert=files.cert, tls_key=files.key)
    options = nats_server.credentials["api"]
    with pytest.raises(ApiStartError) as caught:
        await service.run(Settings(api=api), options, stop=asyncio.Event())
    said = [str(caught.value)]
    nats = NatsSettings(tls_cert=files.cert, tls_key=files.key)
    with pytest.raises(NatsServerError) as of_nats:
        whole._write_nats_config(Settings(state_dir=str(tmp_path / "new"), nats=nats))
    said.append(str(of_nats.value))
    for words in said:
        assert f"tls_cert = {files.cert!r}, tls_key = {files.key!r}" in words
        assert "belong together" in words
    assert not (tmp_path / "new").exists()


# -- NATS ----------------------------------------------------------------------------------


async def test_services_speak_tls_to_nats(tls_nats: NatsServer) -> None:
    options = tls_nats.credentials["api"]
    assert options.url.startswith("tls://")
    async with running_stack(tls_nats, 30) as stack:
        await stack.agent.pull(MODEL)
        asking = asyncio.create_task(stack.ask())
        await stack.agent.answer(await stack.agent.next(), "ok")
        assert (await asking).status_code == 200
        tls_nats.restart()
        await stack.until(lambda got: got[0] == 503)
        await stack.until(lambda got: "no connection to NATS" not in got[1].get("missing", []))
    assert "NATS_CA=" in tls_nats.plan.credential_files["api"].with_suffix(".env").read_text()


async def test_who_is_not_trusted_gets_nothing(
    tls_nats: NatsServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = tls_nats.credentials["api"]
    replace = msgspec.structs.replace
    stranger = replace(options, tls_ca=Files(tmp_path / "other").ca)
    with pytest.raises(BusUnavailable, match="certificate is not to be trusted"):
        await Bus.connect(stranger, service="api", patience_s=10)
    with pytest.raises(BusError, match=r"tls_ca = '/nowhere.pem' can not be used: No such file"):
        await Bus.connect(replace(options, tls_ca="/nowhere.pem"), service="api")
    with pytest.raises(BusUnavailable):
        await Bus.connect(replace(options, password="wrong"), service="api", patience_s=10)
    # The server's own files are not asked for where the client has none: it takes the system's.
    with pytest.raises(BusUnavailable, match="not to be trusted"):
        await Bus.connect(replace(options, tls_ca=""), service="api", patience_s=10)


async def test_up_listens_beyond_loopback_with_tls_only(
    tmp_path: Path, files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    nats = NatsSettings(
        host="0.0.0.0",
        port=free_port(0),
        http_port=free_port(0),
        tls_cert=files.cert,
        tls_key=files.key,
        tls_ca=files.ca,
    )
    pem: Any = {"tls_cert": files.cert, "tls_key": files.key}
    api = ApiSettings(host="0.0.0.0", port=free_port(0), **pem)
    config = tmp_path / "hotswap.toml"
    settings = Settings(state_dir=str(tmp_path / "state"), api=api, nats=nats)
    config.write_text(dump(settings))
    supervisor = Supervisor(tmp_path / "logs")
    try:
        endpoints = await whole.start(supervisor, settings, config, [])
        assert endpoints.api_url == f"https://127.0.0.1:{api.port}"
        assert endpoints.nats_url == f"tls://127.0.0.1:{nats.port}"
        bus = await Bus.connect(endpoints.options("admin"), service="test", patience_s=10)
        await bus.close()
        async with asyncio.timeout(30):
            while True:
                if "no GPU agent" in whole._probe(f"{endpoints.api_url}/readyz"):
                    break
                await asyncio.sleep(0.1)
        # Beyond loopback a key is asked for, and the first one is there.
        key = (settings.state_path / "admin.key").read_text().strip()
        trusted = ssl.create_default_context(cafile=files.ca)
        async with httpx.AsyncClient(base_url=endpoints.api_url, verify=trusted) as client:
            assert (await client.get("/v1/keys")).status_code == 401
            answer = await client.get("/v1/keys", headers={"Authorization": f"Bearer {key}"})
            assert [one["role"] for one in answer.json()["data"]] == ["admin"]
    finally:
        await supervisor.stop()
    text = (tmp_path / "state" / "nats" / "nats-server.conf").read_text()
    assert f'http: "127.0.0.1:{nats.http_port}"' in text


def test_nats_config_writes_tls_for_a_server_elsewhere(tmp_path: Path) -> None:
    """Its files are where that server is, and need not be here."""
    out = tmp_path / "out"
    run = CliRunner().invoke
    pem = ["--tls-cert", "/etc/nats/c.pem", "--tls-key", "/etc/nats/k.pem", "--tls-ca", "/etc/ca"]
    done = run(cli, ["nats-config", "--out", str(out), *pem])
    assert (done.exit_code, done.stderr) == (0, "")
    text = (out / "nats-server.conf").read_text()
    assert 'cert_file: "/etc/nats/c.pem"' in text
    options = BusOptions.read(out / "api.json")
    assert (options.url, options.tls_ca) == ("tls://nats:4222", "/etc/ca")
    done = run(cli, ["nats-config", "--out", str(out)])
    assert "no TLS" in done.stderr
    assert "tls {" not in (out / "nats-server.conf").read_text()
    done = run(cli, ["nats-config", "--out", str(out), "--tls-cert", "c"])
    assert (done.exit_code, "give both, or neither" in done.output) == (2, True)
