"""One engine with models of several pages, and a test's hands on its arrivals."""

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from schemas.state import ModelSpec
from services.gpu_agent.device_cpu import CpuPool
from services.gpu_agent.engine.library import EngineOptions
from services.gpu_agent.engine.native import NativeEngine
from services.gpu_agent.hosted import HostedModel
from services.gpu_agent.ipc import (
    Arriving,
    FromWorker,
    Loaded,
    OpFailed,
    Registered,
    SwappedIn,
    SwappedOut,
)
from services.gpu_agent.transfer import Verify
from tests.unit import tiny_models
from tests.unit.engine_kit import Answers, request, save_tokenizer
from tests.unit.swap_kit import PATIENCE_S, leave_only

PROMPT = tiny_models.prompt(20).tolist()[0]


@dataclass
class Bench:
    """An engine with room for two tiny models, and everything that it told."""

    folder: Path
    verify: Verify = "sampled"
    told: list[FromWorker] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pool = CpuPool(4)
        self.over = threading.Event()
        self.is_interrupted: Callable[[], bool] = lambda: False
        self.engine = NativeEngine(
            self.pool,
            EngineOptions(verify=self.verify),
            interrupted=lambda: self.is_interrupted(),
            on_swap_in_over=self.over.set,
        )

    def add(self, family: str, name: str = "", **settings: Any) -> None:
        path = self.folder / family
        if not path.exists():
            save_tokenizer(tiny_models.write(path, family))
        spec = ModelSpec(name or family, str(path), dtype="float32", **settings)
        assert isinstance(self.engine.register(spec), Registered)
        self.load(spec.name)

    def load(self, model: str) -> None:
        job = self.engine.load(model)
        assert not isinstance(job, OpFailed)
        assert isinstance(self.engine.end_load(job.run(lambda done, total: None)), Loaded)

    def hosted(self, model: str) -> HostedModel:
        return self.engine._models[model]

    def begin(self, model: str) -> None:
        self.over.clear()
        assert isinstance(self.engine.swap_in(model), Arriving)

    def bring_in(self, model: str) -> None:
        self.begin(model)
        assert kinds(self.engine.end_swap_in(model)) == [SwappedIn]

    def take_out(self, model: str) -> None:
        """And nothing of it stays on the device."""
        assert kinds(self.engine.swap_out(model)) == [SwappedOut]
        leave_only(self.pool, 0, random.Random(0))
        self.pool.free.give(range(self.pool.num_pages))

    def submit(self, name: str, model: str, **sampling: Any) -> None:
        self.told += self.engine.submit(request(name, PROMPT, model, **sampling))

    def finish(self) -> Answers:
        while self.engine.is_busy:
            self.told += self.engine.step()
        answers = Answers()
        answers.take(self.told)
        return answers

    def warm_tokens(self, model: str) -> list[int]:
        """What it answers when resident; it is swapped out again."""
        self.bring_in(model)
        self.submit("warm", model)
        tokens = self.finish()["warm"].tokens
        self.told.clear()
        self.take_out(model)
        assert len(tokens) == 8
        return tokens

    def flip_a_bit(self, model: str) -> None:
        """In the host image."""
        image = self.hosted(model)._image
        assert image is not None
        image.tensor[image.layout.num_bytes // 2] ^= 0x40

    def wait_until_over(self) -> None:
        assert self.over.wait(PATIENCE_S)


def kinds(messages: list[FromWorker]) -> list[type]:
    return [type(message) for message in messages]
