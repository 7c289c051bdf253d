"""Damaged weights in the engine: found, told, never used, and loaded again."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from services.gpu_agent.canary import Canary
from services.gpu_agent.checksums import Checksums
from services.gpu_agent.ipc import (
    Broke,
    Corrupted,
    Done,
    OpFailed,
    Produced,
    SwappedIn,
    Verified,
)
from services.gpu_agent.transfer import Verify
from tests.unit import tiny_models
from tests.unit.engine_bench import Bench, kinds
from tests.unit.engine_kit import request

PROMPT = tiny_models.prompt(20).tolist()[0]


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
