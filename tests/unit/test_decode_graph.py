"""Recorded decode steps: of fixed shapes, padded, tried before use.

Here the recorder only runs again what it was given, as a CUDA graph would.
"""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from services.gpu_agent.engine import decode_graph
from services.gpu_agent.engine.decode_graph import can_record
from services.gpu_agent.engine.kv import KVStore
from tests.unit import tiny_models
from tests.unit.engine_kit import (
    FakePool,
    bring_in,
    expected_greedy,
    geometry_of,
    make_batch,
    request,
    run,
)

PROMPTS = {"a": [3, 1, 4, 1, 5], "b": [2] * 40, "c": [9, 8, 7]}


class Recorder:
    """Runs a function twice, as warming up and recording do, and counts."""

    def __init__(self) -> None:
        self.num_recorded = self.num_replayed = 0

    def __call__(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        self.num_recorded += 1
        result = run()

        def replay() -> torch.Tensor:
            self.num_replayed += 1
            result.copy_(run())
            return result

        return replay


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_graph, "MIN_COLUMNS", 16)


@pytest.fixture(scope="module", params=["llama", "llama_tied", "qwen3", "falcon_7b", "falcon_40b"])
def module(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    return tiny_models.reference(tiny_models.write(folder, request.param)).float()


def test_replayed_steps_choose_the_same_tokens(module: Any) -> None:
    recorder = Recorder()
    batch = make_batch(module, recorder=recorder)
    answers = run(batch, *(request(n, p, max_tokens=24) for n, p in PROMPTS.items()), stagger=3)
    for name, prompt in PROMPTS.items():
        assert answers[name].tokens == expected_greedy(module, prompt, 24)
    sizes = batch._graphs._recordings.keys() if batch._graphs else ()
    assert recorder.num_recorded == len(sizes) < recorder.num_replayed
    assert all(rows in (1, 2, 4) and columns in (16, 32, 64) for rows, columns in sizes)


def test_a_recording_outlives_the_model_s_absence(module: Any) -> None:
    recorder = Recorder()
    batch = make_batch(module, recorder=recorder, page_tokens=24, kv_tokens=96, host_bytes=1 << 26)
    run(batch, request("a", [5] * 30, max_tokens=8))
    recorded = recorder.num_recorded
    batch.suspend()
    bring_in(batch, [2 * n + 1 for n in reversed(range(4))])
    answers = run(batch, request("b", [6] * 30, max_tokens=8))
    assert recorder.num_recorded == recorded
    assert answers["b"].tokens == expected_greedy(module, [6] * 30, 8)


def test_what_answers_otherwise_is_not_used(module: Any, caplog: pytest.LogCaptureFixture) -> None:
    def wrong(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        result = run()
        return lambda: result.flip(-1)

    batch = make_batch(module, recorder=wrong)
    with caplog.at_level(logging.WARNING):
        answers = run(batch, request("a", [1, 2, 3], max_tokens=12))
    assert answers["a"].tokens == expected_greedy(module, [1, 2, 3], 12)
    assert "a recorded decode step is off by" in caplog.text
    assert caplog.text.count("going on without") == 1


def test_what_can_not_be_recorded_goes_on_without(
    module: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    batch = make_batch(module, recorder=refuse)
    answers = run(batch, request("a", [1, 2, 3], max_tokens=12))
    assert answers["a"].tokens == expected_greedy(module, [1, 2, 3], 12)
    assert caplog.text.count("can not be recorded") == 1


def test_the_number_of_recordings_is_bounded(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_graph, "MAX_RECORDINGS", 1)
    recorder = Recorder()
    batch = make_batch(module, recorder=recorder)
    answers = run(batch, *(request(n, p, max_tokens=20) for n, p in PROMPTS.items()))
    assert recorder.num_recorded == 1
    assert answers["b"].tokens == expected_greedy(module, PROMPTS["b"], 20)


@pytest.mark.parametrize(
    ("family", "can"),
    [("llama", True), ("falcon_7b", True), ("mistral", False), ("falcon_alibi", False)],
)
def test_models_that_need_to_know_more_than_a_mask_are_left_out(
    family: str, can: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    module = tiny_models.reference(tiny_models.write(tmp_path_factory.mktemp(family), family))
    geometry = geometry_of(module)
    store = KVStore(FakePool(geometry.bytes_per_token * 16, 2), geometry)  # type: ignore[arg-type]
    assert can_record(module, store) is can
