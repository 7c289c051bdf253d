"""The engine while a model arrives: requests wait for weights, and nothing leaves unchecked."""

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from schemas.state import ModelSpec
from services.gpu_agent.canary import Canary
from services.gpu_agent.checksums import Checksums
from services.gpu_agent.device_cpu import CpuPool
from services.gpu_agent.engine.library import EngineOptions
from services.gpu_agent.engine.native import NativeEngine
from services.gpu_agent.hosted import HostedModel
from services.gpu_agent.ipc import (
    Arriving,
    Begun,
    Broke,
    Corrupted,
    Done,
    FromWorker,
    Loaded,
    OpFailed,
    Produced,
    Registered,
    SwapInCancelled,
    SwappedIn,
    SwappedOut,
    Verified,
)
from services.gpu_agent.transfer import Verify
from tests.unit import tiny_models
from tests.unit.engine_kit import Answers, request, save_tokenizer
from tests.unit.swap_kit import PATIENCE_S, InStep, leave_only

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

    def add(self, family: str) -> None:
        path = self.folder / family
        if not path.exists():
            save_tokenizer(tiny_models.write(path, family))
        spec = ModelSpec(family, str(path), dtype="float32")
        assert isinstance(self.engine.register(spec), Registered)
        self.load(family)

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


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.pool.close()


@pytest.fixture
def strict(tmp_path: Path) -> Iterator[Bench]:
    """Every page is checked."""
    bench = Bench(tmp_path, "all")
    yield bench
    bench.pool.close()


# -- requests while a model arrives ------------------------------------------------------


@pytest.mark.parametrize("verify", ["all", "sampled", "off"])
@pytest.mark.parametrize("family", ["llama", "falcon_alibi"])
def test_requests_during_the_arrival_get_the_same_tokens_as_warm(
    tmp_path: Path, family: str, verify: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, verify)
    bench.add(family)
    tokens = bench.warm_tokens(family)
    step = InStep(monkeypatch, bench.pool)
    bench.is_interrupted = step.interrupted
    bench.begin(family)
    for name in ("a", "b"):
        bench.submit(name, family)
    answers = bench.finish()
    assert step.num_waits >= 3
    assert [answers[name].tokens for name in ("a", "b")] == [tokens, tokens]
    order = kinds(bench.told)
    assert order.count(SwappedIn) == 1
    assert order.index(SwappedIn) < order.index(Produced)
    assert order.index(Begun) > order.index(SwappedIn)  # it left together with its first token
    bench.pool.close()


def test_messages_of_random_interleavings(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """No token before SwappedIn, every request ends once, every operation is answered once."""
    families = ["llama", "mistral", "falcon_7b"]
    warm = {}
    for family in families:
        bench.add(family)
        warm[family] = bench.warm_tokens(family)
    engine, chance = bench.engine, random.Random(23)
    size = bench.hosted("llama").layout.num_bytes
    bench.pool.link_bytes_per_s = size / 0.02
    bench.is_interrupted = lambda: chance.random() < 0.2  # any message may have come
    there: dict[str, str] = {}  # model -> "arriving" or "resident"
    model_of: dict[str, str] = {}
    cancelled: set[str] = set()
    counts: dict[type, int] = dict.fromkeys((SwappedIn, SwapInCancelled, SwappedOut, Done), 0)
    answers = Answers()

    def take(messages: list[FromWorker]) -> None:
        for message in messages:
            counts[type(message)] = counts.get(type(message), 0) + 1
            match message:
                case Arriving(model):
                    there[model] = "arriving"
                case SwappedIn(model):
                    assert there[model] == "arriving"
                    there[model] = "resident"
                case SwapInCancelled(model):
                    assert there[model] == "arriving"
                case SwappedOut(model):
                    del there[model]
                case Produced(request_id):
                    assert there[model_of[request_id]] == "resident", message
                case Done(request_id, reason):
                    assert reason == ("cancelled" if request_id in cancelled else "length")
        answers.take(messages)
        bench.pool.free.validate()

    for number in range(400):
        family = chance.choice(families)
        match chance.choice(("swap", "swap", "submit", "submit", "cancel", "poll", *["step"] * 6)):
            case "swap" if family in there:
                if not engine._batches[family].num_requests:
                    take(engine.swap_out(family))
            case "swap" if len(there) < 2:
                take([engine.swap_in(family)])
            case "submit" if family in there:
                name = f"r{number}"
                model_of[name] = family
                take(engine.submit(request(name, PROMPT, family)))
            case "cancel" if engine.is_busy:
                name = chance.choice(list(engine._owner))
                cancelled.add(name)
                take(engine.cancel(name))
            case "poll":
                take(engine.poll())
            case "step":
                take(engine.step())
    while engine.is_busy:
        take(engine.step())
    assert min(counts.values()) >= 8, counts
    for name, answer in answers.items():
        assert isinstance(answer.end, Done)
        expected = warm[model_of[name]]
        assert answer.tokens == (expected[: len(answer.tokens)] if name in cancelled else expected)


def test_a_message_gives_a_waiting_forward_up_and_nothing_is_lost(bench: Bench) -> None:
    bench.add("llama")
    tokens = bench.warm_tokens("llama")
    bench.is_interrupted = lambda: True
    with bench.pool.link:
        bench.begin("llama")
        bench.submit("a", "llama")
        bench.submit("b", "llama")
        for _ in range(3):
            bench.told += bench.engine.step()  # comes back, though no byte will come
        assert not [m for m in bench.told if isinstance(m, Produced | Done | Broke)]
        ended = bench.engine.cancel("a")
        assert kinds(ended) == [Done]
        refused = bench.engine.swap_out("llama")
        assert kinds(refused) == [OpFailed]  # "b" is still there
        bench.told += ended
    bench.is_interrupted = lambda: False
    answers = bench.finish()
    assert answers["b"].tokens == tokens
    assert answers["a"].tokens == []


def test_swap_out_calls_an_arrival_off(bench: Bench) -> None:
    bench.add("llama")
    tokens = bench.warm_tokens("llama")
    with bench.pool.link:
        bench.begin("llama")
        bench.submit("a", "llama")
        bench.told += bench.engine.cancel("a")
        out = bench.engine.swap_out("llama")
    assert kinds(out) == [SwapInCancelled, SwappedOut]
    assert isinstance(out[0], SwapInCancelled)
    assert out[0].trace.num_bytes == 0
    assert isinstance(out[1], SwappedOut)
    assert out[1].memory.device_bytes == 0
    assert bench.engine.poll() == []  # its end was told already
    assert bench.warm_tokens("llama") == tokens


def test_other_models_go_on_while_one_arrives(bench: Bench) -> None:
    for family in ("llama", "mistral"):
        bench.add(family)
    tokens = bench.warm_tokens("mistral")
    bench.bring_in("llama")
    with bench.pool.link:  # not a byte comes
        bench.begin("mistral")
        bench.submit("late", "mistral")
        bench.submit("here", "llama")
        for _ in range(8):
            bench.told += bench.engine.step()
        ends = [message for message in bench.told if isinstance(message, Done)]
        assert [end.request_id for end in ends] == ["here"]
    assert bench.finish()["late"].tokens == tokens


# -- verification ------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["step", "poll", "interrupted"])
def test_a_flipped_bit_never_gives_a_token(strict: Bench, how: str) -> None:
    strict.add("llama")
    tokens = strict.warm_tokens("llama")
    strict.flip_a_bit("llama")
    strict.is_interrupted = lambda: how == "interrupted"
    strict.begin("llama")
    for name in ("a", "b"):
        strict.submit(name, "llama")
    if how == "step":
        while strict.engine.is_busy:  # the first forward of all is the canary's
            strict.told += strict.engine.step()
    else:
        strict.wait_until_over()
        strict.told += strict.engine.poll()
    assert kinds(strict.told) == [Corrupted, OpFailed, Broke, Broke]
    corrupted, failure, *broken = strict.told
    assert isinstance(corrupted, Corrupted)
    assert (corrupted.model, corrupted.check) == ("llama", "page")
    assert (corrupted.memory.device_bytes, corrupted.memory.host_bytes) == (0, 0)
    assert isinstance(failure, OpFailed)
    assert (failure.op, failure.reason) == ("swap_in", corrupted.reason)
    assert {m.code for m in broken if isinstance(m, Broke)} == {"model_unavailable"}
    assert strict.hosted("llama").state == "cold"
    assert not strict.engine.is_busy
    refusal = strict.engine.swap_in("llama")
    assert isinstance(refusal, OpFailed)
    assert "is not loaded yet" in refusal.reason
    # Read anew from its files it is as good as before, though its canary ran on bad weights.
    strict.told.clear()
    strict.load("llama")
    assert strict.warm_tokens("llama") == tokens


def test_a_request_that_ended_otherwise_is_told_with_the_failure(strict: Bench) -> None:
    strict.add("llama")
    strict.flip_a_bit("llama")
    strict.begin("llama")
    strict.submit("short", "llama", max_tokens=1)
    strict.submit("long", "llama")
    late = request("late", PROMPT, "llama", deadline_at=0.0)
    strict.told += strict.engine.submit(late)
    answers = strict.finish()
    codes = {name: a.end.code for name, a in answers.items() if isinstance(a.end, Broke)}
    assert codes == {
        "short": "model_unavailable",
        "long": "model_unavailable",
        "late": "deadline_exceeded",
    }
    assert not [m for m in strict.told if isinstance(m, Produced | Done)]


def test_corruption_that_was_found_before_a_call_off_is_told(strict: Bench) -> None:
    strict.add("llama")
    strict.flip_a_bit("llama")
    strict.begin("llama")
    strict.wait_until_over()
    out = strict.engine.swap_out("llama")
    assert kinds(out) == [Corrupted, OpFailed, OpFailed]
    assert [m.op for m in out if isinstance(m, OpFailed)] == ["swap_in", "swap_out"]
    assert strict.hosted("llama").state == "cold"
    strict.load("llama")
    strict.bring_in("llama")


def test_verify_on_demand(bench: Bench) -> None:
    bench.add("llama")
    (fine,) = bench.engine.verify("llama")  # of the host image
    assert isinstance(fine, Verified)
    layout = bench.hosted("llama").layout
    assert (fine.num_pages, fine.num_bytes) == (1, layout.num_bytes)
    bench.bring_in("llama")
    assert kinds(bench.engine.verify("llama")) == [Verified]  # on the device
    bench.submit("a", "llama")
    bench.told += bench.engine.step()
    bench.hosted("llama")._region.tensor[layout.num_bytes - 1] ^= 1
    bench.told.clear()
    out = bench.engine.verify("llama")
    assert kinds(out) == [Corrupted, Broke]
    assert isinstance(out[0], Corrupted)
    assert "on the device" in out[0].reason
    assert (out[0].memory.device_bytes, out[0].memory.cached_bytes) == (0, {})
    assert bench.hosted("llama").state == "cold"
    assert not bench.engine.is_busy
    assert kinds(bench.engine.verify("llama")) == [OpFailed]  # nothing to check
    bench.load("llama")
    bench.flip_a_bit("llama")
    out = bench.engine.verify("llama")
    assert kinds(out) == [Corrupted]
    assert isinstance(out[0], Corrupted)
    assert "of the host image" in out[0].reason
    assert bench.hosted("llama").state == "cold"


@pytest.mark.parametrize(
    ("verify", "num_pages", "num_forwards"), [("off", 0, 0), ("sampled", 3, 1), ("all", 3, 3)]
)
def test_how_much_is_checked(
    tmp_path: Path,
    verify: Verify,
    num_pages: int,
    num_forwards: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(tmp_path, verify)
    bench.add("llama")
    pages: list[int] = []
    canaries: list[int] = []
    check, forward = Checksums.check, Canary._forward

    def checked(checksums: Checksums, page: int, content: torch.Tensor, where: str) -> None:
        pages.append(page)
        check(checksums, page, content, where)

    def ran(canary: Canary) -> torch.Tensor:
        canaries.append(1)
        return forward(canary)

    monkeypatch.setattr(Checksums, "check", checked)
    monkeypatch.setattr(Canary, "_forward", ran)
    for _ in range(3):
        bench.bring_in("llama")
        bench.take_out("llama")
    assert (len(pages), len(canaries)) == (num_pages, num_forwards)
    bench.flip_a_bit("llama")
    bench.begin("llama")
    expected = [SwappedIn] if verify == "off" else [Corrupted, OpFailed]
    assert kinds(bench.engine.end_swap_in("llama")) == expected
    bench.pool.close()


@pytest.mark.parametrize("has_requests", [True, False])
def test_a_canary_that_differs_fails_closed(
    strict: Bench, has_requests: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict.add("llama")
    tokens = strict.warm_tokens("llama")
    with monkeypatch.context() as patch:
        patch.setattr(Canary, "_forward", lambda _: torch.randint(256, (64,)))
        strict.begin("llama")
        if has_requests:
            strict.submit("a", "llama")
            strict.finish()
        else:
            strict.told += strict.engine.end_swap_in("llama")
    assert kinds(strict.told) == [Corrupted, OpFailed, *[Broke] * has_requests]
    assert isinstance(strict.told[0], Corrupted)
    assert strict.told[0].check == "canary"
    assert strict.hosted("llama").state == "cold"
    assert strict.pool.free.num_free == strict.pool.num_pages
    strict.told.clear()
    strict.load("llama")
    assert strict.warm_tokens("llama") == tokens
