"""A whole running system for tests: `hotswap up` as a real process over small real models."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, FalconConfig, LlamaConfig, MistralConfig

from schemas.state import AgentStatus
from services import settings
from services.bus import BusOptions
from services.ops.nats_server import free_port
from services.ops.status import take
from services.settings import Settings
from tests.unit.engine_kit import save_tokenizer

MIB = 2**20
MODELS = ("llama", "mistral", "falcon")
CONTEXT = 512
START_S = 90.0

_COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "dtype": "float32",
}
_WIDE = 12_000  # most bytes in the MLP: 37 MB of weights, quick to compute


def write_models(folder: Path) -> dict[str, Path]:
    """Llama, Mistral and Falcon of about 25-37 MB each, with a byte tokenizer."""
    configs = {
        "llama": LlamaConfig(**_COMMON, num_key_value_heads=2, intermediate_size=_WIDE),
        "mistral": MistralConfig(
            **_COMMON, num_key_value_heads=2, intermediate_size=_WIDE, sliding_window=64
        ),
        "falcon": FalconConfig(
            **_COMMON, multi_query=True, alibi=False, bias=False, ffn_hidden_size=_WIDE
        ),
    }
    for seed, (name, config) in enumerate(configs.items()):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.mul_(2.0)  # fresh weights give nearly the same token for ever
        model.save_pretrained(folder / name)
        save_tokenizer(folder / name)
    return {name: folder / name for name in configs}


class System:
    """`hotswap up` in its own process. Use as a context manager."""

    def __init__(self, folder: Path, config: str, api: str = "") -> None:
        self.folder = folder
        self.port = free_port(0)
        self.config_file = folder / "hotswap.toml"
        self.config_file.write_text(
            f"[api]\nport = {self.port}\n{api}"
            f"[nats]\nport = {free_port(0)}\nhttp_port = {free_port(0)}\n{config}"
        )
        self.log_file = folder / "up.log"
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def settings(self) -> Settings:
        return settings.load(self.config_file)

    @property
    def admin(self) -> BusOptions:
        return BusOptions.read(self.settings.state_path / "nats" / "admin.json")

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.pid

    def __enter__(self) -> "System":
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "services.cli", "up", "--config", str(self.config_file)],
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self.wait(self.is_ready, "the system to be ready", START_S)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> int:
        """SIGTERM; returns the exit status. Nothing of it may be left running."""
        assert self._process
        family = self.family()
        self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(60)
        _, alive = psutil.wait_procs(family, timeout=5)
        for process in alive:
            process.kill()
        assert not alive, f"left running: {alive}\n{self.tail()}"
        return code

    def family(self) -> list[psutil.Process]:
        """The supervisor's children and their children."""
        return psutil.Process(self.pid).children(recursive=True)

    def service(self, name: str) -> psutil.Process:
        """The process of api, scheduler, agent, worker or nats-server."""
        wanted = {
            "worker": ["services.gpu_agent.worker"],
            "nats-server": ["nats-server.conf"],
        }.get(name, ["services.cli", name])
        for process in self.family():
            line = " ".join(process.cmdline())
            if all(f"{word}" in line for word in wanted) and (
                name in ("worker", "nats-server") or process.cmdline()[3] == name
            ):
                return process
        raise AssertionError(f"no {name} runs\n{self.tail()}")

    def kill(self, name: str) -> None:
        """kill -9 of one service."""
        self.service(name).kill()

    def is_ready(self) -> bool:
        assert self._process
        assert self._process.poll() is None, f"hotswap up ended\n{self.tail()}"
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=2):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def wait(self, done: Callable[[], bool], what: str, patience_s: float = 60.0) -> None:
        give_up_at = time.monotonic() + patience_s
        while not done():
            assert time.monotonic() < give_up_at, f"waited for {what}\n{self.tail()}"
            time.sleep(0.05)

    def status(self) -> AgentStatus:
        """The only agent's newest heartbeat."""
        return asyncio.run(take(self.admin)).agents["cpu0"]

    def tail(self, num_lines: int = 60) -> str:
        return "\n".join(self.log_file.read_text(errors="replace").splitlines()[-num_lines:])

    # -- HTTP, without any client library ---------------------------------------------------

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """(status, decoded JSON). ``body``: bytes as they are, else encoded as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def get(self, path: str) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=120) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def complete(self, model: str, prompt: str = "hello", **more: Any) -> tuple[int, Any]:
        body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0, **more}
        return self.post("/v1/completions", body)

    def models(self) -> dict[str, Any]:
        """``/v1/models``: the hotswap part by model."""
        _, answer = self.get("/v1/models")
        return {entry["id"]: entry["hotswap"] for entry in answer["data"]}


def config_of(models: dict[str, Path], budget: str, extra: str = "") -> str:
    """TOML for one CPU device of ``budget`` and these models."""
    tables = "\n".join(f'[models.{name}]\nsource = "{path}"' for name, path in models.items())
    return f'[[gpus]]\nname = "cpu0"\ndevice = "cpu"\nmemory = "{budget}"\n{tables}\n{extra}'
