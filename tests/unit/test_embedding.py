"""Embeddings on pages against transformers and pooling by hand."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from schemas.requests import GenerateRequest, SamplingParams, TextPrompt
from schemas.state import ModelSpec
from services.gpu_agent.arrival import NotArrived
from services.gpu_agent.device_cpu import CpuPool
from services.gpu_agent.engine import embedding
from services.gpu_agent.engine.embedding import Embedder
from services.gpu_agent.engine.native import NativeEngine
from services.gpu_agent.hosted import HostedModel
from services.gpu_agent.ipc import (
    Broke,
    Done,
    Embedded,
    FromWorker,
    Loaded,
    OpFailed,
    SwappedIn,
    SwappedOut,
)
from services.gpu_agent.runner import PoolingMode
from tests.unit import tiny_embedders
from tests.unit.tiny_embedders import FAMILIES, MAX_LEN, WIDTH, request, run, some_ids


@pytest.fixture
def pool() -> Iterator[CpuPool]:
    pool = CpuPool(4)
    yield pool
    pool.close()


def loaded(folder: Path, pool: CpuPool, **spec: Any) -> HostedModel:
    model = HostedModel.inspect(tiny_embedders.spec(folder, **spec), pool, verify="all")
    model.load(lambda done, total: None)
    return model


@pytest.fixture
def bert(tmp_path: Path, pool: CpuPool) -> HostedModel:
    model = loaded(tiny_embedders.write(tmp_path / "bert", "bert"), pool)
    model.swap_in()
    return model


# -- what comes out ------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_those_of_transformers_before_and_after_a_swap(
    tmp_path: Path, pool: CpuPool, family: str
) -> None:
    model = loaded(tiny_embedders.write(tmp_path / family, family), pool)
    embedder = tiny_embedders.embedder_of(model, pool)
    is_decoder = family.startswith(("llama", "qwen3"))
    mode: PoolingMode = "lasttoken" if is_decoder else "mean"
    ids = list(some_ids(24, 1, 17, 24, MAX_LEN))
    found = []
    for _ in range(2):
        model.swap_in()
        got = run(embedder, request("a", *ids))
        found.append(got.vectors("a"))
        model.swap_out()
        pool.free.give(pool.free.take(pool.free.num_free))  # nothing is kept
    assert torch.equal(*found)
    for one, vector in zip(ids, found[0], strict=True):
        expected = tiny_embedders.reference(model.folder, one, mode, normalized=True)
        assert (vector - expected).abs().max() < 1e-5
    assert got.ends["a"] == Done("a", "stop", sum(map(len, ids)), 0, got.ends["a"].prefill_s, 0.0)  # type: ignore[union-attr]
    model.close()


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_one_input_alone_is_bit_for_bit_what_transformers_gives(
    tmp_path: Path, pool: CpuPool, family: str
) -> None:
    folder = tiny_embedders.write(tmp_path / family, family)
    tiny_embedders.add_modules(folder, "lasttoken")
    model = loaded(folder, pool)
    model.swap_in()
    (ids,) = some_ids(19)
    vector = run(tiny_embedders.embedder_of(model, pool), request("a", ids)).vectors("a")[0]
    assert torch.equal(vector, tiny_embedders.reference(folder, ids, "lasttoken", normalized=False))


@pytest.mark.parametrize("mode", get_args(PoolingMode))
@pytest.mark.parametrize("normalized", [True, False])
def test_every_pooling_under_padding(
    tmp_path: Path, pool: CpuPool, mode: PoolingMode, normalized: bool
) -> None:
    folder = tiny_embedders.write(tmp_path / "bert", "bert")
    key = {"cls": "cls_token", "lasttoken": "lasttoken"}.get(mode, f"{mode}_tokens")
    tiny_embedders.add_modules(folder, key, *(["Normalize"] if normalized else []))
    model = loaded(folder, pool)
    model.swap_in()
    ids = list(some_ids(7, 30, 12))
    got = run(tiny_embedders.embedder_of(model, pool), request("a", *ids)).vectors("a")
    for one, vector in zip(ids, got, strict=True):
        expected = tiny_embedders.reference(folder, one, mode, normalized)
        assert (vector - expected).abs().max() < 1e-5


def test_fewer_dimensions_are_the_first_ones_normalised_again(
    bert: HostedModel, pool: CpuPool
) -> None:
    (ids,) = some_ids(9)
    embedder = tiny_embedders.embedder_of(bert, pool)
    got = run(embedder, request("all", ids), request("few", ids, dimensions=5))
    whole, few = got.vectors("all")[0], got.vectors("few")[0]
    assert few.shape == (5,)
    assert torch.allclose(few, whole[:5] / whole[:5].norm(), atol=1e-6)
    for wrong in (0, WIDTH + 1):
        end = run(embedder, request("x", ids, dimensions=wrong)).ends["x"]
        assert isinstance(end, Broke)
        assert end.code == "invalid_prompt"


def test_texts_and_token_ids_are_the_same_inputs(bert: HostedModel, pool: CpuPool) -> None:
    embedder = tiny_embedders.embedder_of(bert, pool)
    ids = embedder._text.encode(TextPrompt("hello there"))
    got = run(embedder, request("a", "hello there", ids)).vectors("a")
    assert torch.equal(got[0], got[1])


def test_large_answers_come_in_chunks(
    bert: HostedModel, pool: CpuPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "VECTORS_BYTES", 3 * 4 * WIDTH)
    got = run(tiny_embedders.embedder_of(bert, pool), request("a", *some_ids(*range(1, 8))))
    assert got.num_chunks("a") == 3
    assert got.vectors("a").shape == (7, WIDTH)


# -- how it is packed ----------------------------------------------------------------------


def lengths_of_steps(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Filled with the lengths of every forward's rows."""
    seen: list[list[int]] = []
    forward = embedder._forward

    def spy(ids: list[list[int]]) -> torch.Tensor:
        seen.append([len(one) for one in ids])
        return forward(ids)

    monkeypatch.setattr(embedder, "_forward", spy)
    return seen


def test_a_window_is_the_oldest_input_and_its_neighbours_in_length(
    bert: HostedModel, pool: CpuPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder = tiny_embedders.embedder_of(bert, pool, step_tokens=240)
    seen = lengths_of_steps(embedder, monkeypatch)
    got = run(embedder, request("a", *some_ids(60, 10, 100)), request("b", *some_ids(59, 31, 2)))
    assert seen == [[31, 59, 60], [2, 10], [100]]
    assert sorted(got.begun) == ["a", "b"]


def test_steps_stay_within_their_budget_but_for_one_long_input(
    bert: HostedModel, pool: CpuPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder = tiny_embedders.embedder_of(bert, pool, step_tokens=64)
    seen = lengths_of_steps(embedder, monkeypatch)
    ids = list(some_ids(*([5, 90, 12, 13, 30, 31, 64] * 4)))
    got = run(embedder, *(request(f"r{i}", one) for i, one in enumerate(ids)))
    assert sum(map(len, seen)) == len(ids)
    assert all(len(step) * max(step) <= 64 or len(step) == 1 for step in seen)
    for i, one in enumerate(ids):
        alone = run(embedder, request("alone", one)).vectors("alone")
        assert (got.vectors(f"r{i}") - alone).abs().max() < 1e-5


# -- every request ends once ---------------------------------------------------------------


def test_what_is_too_long_or_empty_is_refused_alone(bert: HostedModel, pool: CpuPool) -> None:
    embedder = tiny_embedders.embedder_of(bert, pool)
    got = run(
        embedder,
        request("long", *some_ids(5, MAX_LEN + 1)),
        request("none"),
        request("empty", ""),
        request("strange", [3, 999]),
        request("good", *some_ids(5)),
    )
    ends = {name: getattr(end, "code", "done") for name, end in got.ends.items()}
    assert ends == {
        "long": "context_length_exceeded",
        "none": "invalid_prompt",
        "empty": "invalid_prompt",
        "strange": "invalid_prompt",
        "good": "done",
    }
    assert "input 1 has 129 tokens" in got.ends["long"].message  # type: ignore[union-attr]
    assert "input 0: token id 999" in got.ends["strange"].message  # type: ignore[union-attr]


def test_cancelled_expired_repeated_and_aborted(bert: HostedModel, pool: CpuPool) -> None:
    embedder = tiny_embedders.embedder_of(bert, pool, wall_clock=lambda: 100.0)
    got = tiny_embedders.Collected()
    for name, deadline_at in (("a", 200.0), ("late", 99.0), ("b", 200.0)):
        got.take(embedder.submit(request(name, *some_ids(4, 5), deadline_at=deadline_at)))
    got.take(embedder.cancel("a"))
    got.take(embedder.cancel("nobody"))
    got.take(embedder.submit(request("b2", *some_ids(4), deadline_at=200.0)))
    assert isinstance(embedder.submit(request("b", *some_ids(4)))[0], Broke)
    embedder.validate()
    out = embedder.abort("engine_failed", "no more")
    assert [(m.request_id, m.code) for m in out if isinstance(m, Broke)] == [
        ("late", "engine_failed"),
        ("b2", "engine_failed"),
        ("b", "engine_failed"),
    ]
    assert embedder.num_requests == 0
    assert not embedder.step()
    (end,) = (got.ends[name] for name in ("a",))
    assert isinstance(end, Done)
    assert end.finish_reason == "cancelled"
    late = run(embedder, request("late", *some_ids(3), deadline_at=99.0)).ends["late"]
    assert isinstance(late, Broke)
    assert late.code == "deadline_exceeded"


def test_a_forward_that_fails_ends_its_requests_and_one_that_waits_none(
    bert: HostedModel, pool: CpuPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder = tiny_embedders.embedder_of(bert, pool)

    def fail(error: Exception) -> None:
        def forward(ids: list[list[int]]) -> torch.Tensor:
            raise error

        monkeypatch.setattr(embedder, "_forward", forward)

    fail(NotArrived())
    embedder.submit(request("a", *some_ids(3, 60)))
    embedder.step()
    assert embedder.has("a")
    fail(RuntimeError("out of memory"))
    (broke,) = embedder.step()
    assert isinstance(broke, Broke)
    assert "out of memory" in broke.message
    embedder.validate()
    monkeypatch.setattr(embedder, "_forward", lambda ids: torch.full((len(ids), 4), torch.nan))
    end = run(embedder, request("nan", *some_ids(3, 4))).ends["nan"]
    assert isinstance(end, Broke)
    assert "NaN" in end.message


# -- in the engine -------------------------------------------------------------------------


def engine_with(pool: CpuPool, *specs: ModelSpec) -> NativeEngine:
    engine = NativeEngine(pool)
    for spec in specs:
        assert not isinstance(engine.register(spec), OpFailed)
        load = engine.load(spec.name)
        assert not isinstance(load, OpFailed)
        assert isinstance(engine.end_load(load.run(lambda done, total: None)), Loaded)
    return engine


def generate(model: str) -> GenerateRequest:
    sampling = SamplingParams(seed=0, max_tokens=2, temperature=0.0)
    return GenerateRequest("g", model, "interactive", TextPrompt("hi"), sampling, "x", 0, 2e9)


def test_requests_may_come_while_the_model_arrives(tmp_path: Path, pool: CpuPool) -> None:
    folder = tiny_embedders.write(tmp_path / "roberta", "roberta")
    engine = engine_with(pool, ModelSpec("tiny", str(folder)))
    vectors = []
    for _ in range(3):
        engine.swap_in("tiny")
        engine.submit(request("a", *some_ids(9, 20), deadline_at=2e9))
        out: list[FromWorker] = []
        while not any(isinstance(message, Done) for message in out):
            out += engine.step()
        kinds = [type(message) for message in out]
        assert kinds.index(SwappedIn) < kinds.index(Embedded)
        got = tiny_embedders.Collected()
        got.take(out)
        vectors.append(got.vectors("a"))
        assert not any(isinstance(message, OpFailed) for message in engine.swap_out("tiny"))
        pool.free.give(pool.free.take(pool.free.num_free))
    assert torch.equal(vectors[0], vectors[1])
    assert torch.equal(vectors[0], vectors[2])


def test_a_preempted_model_goes_on_after_its_next_swap_in(tmp_path: Path, pool: CpuPool) -> None:
    folder = tiny_embedders.write(tmp_path / "bert", "bert")
    engine = engine_with(pool, ModelSpec("tiny", str(folder)))
    got = tiny_embedders.Collected()
    ids = list(some_ids(5, 40, 100))  # too unlike for one step
    engine.swap_in("tiny")
    got.take(engine.end_swap_in("tiny"))
    got.take(engine.submit(request("a", *ids, deadline_at=2e9)))
    got.take(engine.submit(request("late", *ids, deadline_at=1.0)))
    got.take(engine.step())
    assert isinstance(got.ends["late"], Broke)
    refused, out = engine.swap_out("tiny"), engine.swap_out("tiny", preempt=True)
    assert isinstance(refused[0], OpFailed)
    (left,) = out
    assert isinstance(left, SwappedOut)
    assert (left.num_suspended, left.trace.kv_bytes) == (1, 0)
    assert not engine.is_busy
    assert engine.next_deadline == 2e9
    pool.free.give(pool.free.take(pool.free.num_free))
    engine.swap_in("tiny")
    while "a" not in got.ends:
        got.take(engine.step())
    assert got.begun == ["a"]
    for one, vector in zip(ids, got.vectors("a"), strict=True):
        expected = tiny_embedders.reference(folder, one, "mean", normalized=True)
        assert (vector - expected).abs().max() < 1e-5


def test_a_model_refuses_what_it_is_not_for(tmp_path: Path, pool: CpuPool) -> None:
    folder = tiny_embedders.write(tmp_path / "llama", "llama_causal")
    engine = engine_with(
        pool,
        ModelSpec("writes", str(folder), kv_tokens=64),
        ModelSpec("embeds", str(folder), runner="embed"),
    )
    for name in ("writes", "embeds"):
        engine.swap_in(name)
        assert isinstance(engine.end_swap_in(name)[0], SwappedIn)
    for wrong in (generate("embeds"), request("e", "hi", model="writes", deadline_at=2e9)):
        (broke,) = engine.submit(wrong)
        assert isinstance(broke, Broke)
        assert broke.code == "model_not_supported"
        assert not engine.is_busy
