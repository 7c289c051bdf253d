"""Deployments that come, change, move and go while the whole system runs, on two CPU devices."""

import concurrent.futures
import json
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.integration.system_kit import MIB, System, write_models

GPU = """
[[gpus]]
name = "{name}"
device = "cpu"
memory = "{memory}B"
threads = 1
"""


class Admin:
    """``/v1/deployments`` of ``system``."""

    def __init__(self, system: System) -> None:
        self.system = system

    def call(
        self, method: str, path: str = "", body: Any = None, **headers: str
    ) -> tuple[int, Any, str]:
        """(status, decoded JSON, ETag)."""
        data = None if body is None else json.dumps(body).encode()
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        request = urllib.request.Request(
            f"{self.system.url}/v1/deployments{path}", data, named, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.load(answer), answer.headers.get("etag", "")
        except urllib.error.HTTPError as error:
            return error.code, json.load(error), error.headers.get("etag", "")

    def put(self, name: str, body: Any, **headers: str) -> tuple[int, Any, str]:
        return self.call("PUT", f"/{name}", body, **headers)

    def act(self, name: str, action: str, body: Any = None) -> tuple[int, Any, str]:
        return self.call("POST", f"/{name}/{action}?timeout_s=60", body)

    def command(self, *arguments: str) -> None:
        """`hotswap model`, as an operator runs it."""
        config = str(self.system.config_file)
        command = [sys.executable, "-m", "services.cli", "model", "--config", config, *arguments]
        subprocess.run(command, check=True, timeout=120)

    def gpus(self, name: str) -> dict[str, str]:
        status, info, _ = self.call("GET", f"/{name}")
        assert status == 200, info
        return dict(info["gpus"])

    def resident_on(self, name: str) -> list[str]:
        return [gpu for gpu, state in self.gpus(name).items() if state == "resident"]


class Stream:
    """A long streamed answer in a thread; ``ended`` has what came last."""

    def __init__(self, system: System, model: str, max_tokens: int) -> None:
        body = {
            "model": model,
            "prompt": "once",
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "stream": True,
        }
        self._request = urllib.request.Request(
            f"{system.url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        self.begun = threading.Event()
        self.lines: list[str] = []
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        assert self.begun.wait(60)

    def _read(self) -> None:
        with urllib.request.urlopen(self._request, timeout=120) as answer:
            for line in answer:
                if line.startswith(b"data: "):
                    self.lines.append(line.decode().removeprefix("data: ").strip())
                    self.begun.set()

    def end(self) -> list[str]:
        self._thread.join(120)
        assert not self._thread.is_alive()
        return self.lines


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("models"))


def test_a_deployment_lives_and_moves_and_goes(tmp_path: Path, models: dict[str, Path]) -> None:
    gpus = "".join(GPU.format(name=name, memory=60 * MIB) for name in ("cpu0", "cpu1"))
    system = System(tmp_path, gpus + f'[models.falcon]\nsource = "{models["falcon"]}"\n')
    admin = Admin(system)
    with system:
        system.wait(lambda: len(admin.gpus("falcon")) == 2, "both agents to be up")

        # deploy -> ask
        status, made, etag = admin.put("team/llama", {"source": str(models["llama"])})
        assert (status, made["version"], made["origin"]) == (201, int(etag.strip('"')), "api")
        status, answer = system.complete("team/llama")
        assert status == 200, answer
        assert answer["model"] == "team/llama"
        assert admin.put("team/llama", {"source": str(models["llama"])})[::2] == (200, etag)

        # update: engine settings while it is there; what it answers stays the same
        text = answer["choices"][0]["text"]
        status, changed, new_etag = admin.call("PATCH", "/team/llama", {"max_batch": 2})
        assert (status, changed["settings"]["max_batch"], new_etag != etag) == (200, 2, True)
        system.wait(
            lambda: (admin.call("GET", "/team/llama")[1]["facts"] or {}).get("max_batch") == 2,
            "the new settings to be in force",
        )
        assert system.complete("team/llama")[1]["choices"][0]["text"] == text

        # aliases, defaults and overrides
        settings = {"aliases": ["gpt-4o"], "defaults": {"max_tokens": 3}, "overrides": {"seed": 7}}
        assert admin.call("PATCH", "/team/llama", settings)[0] == 200
        body = {"model": "gpt-4o", "prompt": "hello", "ignore_eos": True}
        status, answer = system.post("/v1/completions", body)
        assert (status, answer["model"]) == (200, "gpt-4o")
        assert answer["usage"]["completion_tokens"] == 3
        again = system.post("/v1/completions", body)[1]["choices"]
        assert again == answer["choices"]  # by the seed, at temperature 1
        assert system.models()["gpt-4o"]["alias_of"] == "team/llama"
        status, refusal, _ = admin.put(
            "other", {"source": str(models["mistral"]), "aliases": ["gpt-4o"]}
        )
        assert (status, refusal["error"]["code"]) == (409, "conflict")

        # swap-out -> swap-in -> move
        assert admin.act("team/llama", "swap-out")[0] == 200
        assert admin.resident_on("team/llama") == []
        admin.command("swap-in", "team/llama", "--gpu", "cpu1")
        assert admin.resident_on("team/llama") == ["cpu1"]
        status, done, _ = admin.act("team/llama", "move", {"from": "cpu1", "to": "cpu0"})
        assert (status, done.get("outcome")) == (200, "done"), done
        assert admin.resident_on("team/llama") == ["cpu0"]

        # drain -> undrain
        assert admin.act("team/llama", "drain")[0] == 200
        status, refusal = system.complete("team/llama")
        assert (status, refusal["error"]["code"]) == (503, "model_unavailable")
        assert admin.act("team/llama", "undrain")[0] == 200

        # a restart of everything keeps it
        stream = Stream(system, "gpt-4o", 5)
        assert stream.end()[-1] == "[DONE]"
        before = admin.call("GET", "/team/llama")[1]
        assert admin.call("DELETE", "/falcon")[0] == 200

    with system:
        after = admin.call("GET", "/team/llama")[1]
        assert after["settings"] == before["settings"]
        assert after["version"] == before["version"]
        assert admin.call("GET", "/falcon")[0] == 404  # though the file still names it
        assert system.complete("gpt-4o")[0] == 200

        # two changes of the same version: one wins
        _, info, etag = admin.call("GET", "/team/llama")
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            answers = [
                pool.submit(
                    admin.put,
                    "team/llama",
                    info["settings"] | {"priority": number},
                    If_Match=etag,
                )
                for number in (1, 2)
            ]
            assert sorted(one.result()[0] for one in answers) == [200, 412]

        # deleted while an answer runs: that one ends, others are refused
        stream = Stream(system, "team/llama", 150)
        status, deleted, _ = admin.call("DELETE", "/team/llama?wait=false")
        assert status in (200, 202), deleted
        assert system.complete("team/llama")[0] == 404
        assert stream.end()[-1] == "[DONE]"
        system.wait(lambda: admin.call("GET", "")[1]["data"] == [], "nothing to be left")

        # deleted at once: the answer ends with an error
        assert admin.put("llama", {"source": str(models["llama"])})[0] == 201
        stream = Stream(system, "llama", 400)
        assert admin.call("DELETE", "/llama?drain=false")[0] == 200
        assert "removed" in json.loads(stream.end()[-1])["error"]["message"]
        # and under the same name again
        assert admin.put("llama", {"source": str(models["mistral"])})[0] == 201
        assert system.complete("llama")[0] == 200
