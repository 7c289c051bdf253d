"""The native engine on real pages: swaps, several models, and operations out of place."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from schemas.requests import TextPrompt
from schemas.state import ModelSpec
from services.gpu_agent.device_cpu import CpuPool
from services.gpu_agent.engine.native import NativeEngine
from services.gpu_agent.ipc import (
    Arriving,
    Broke,
    Forgotten,
    Loaded,
    OpFailed,
    Produced,
    Registered,
    SwappedIn,
    SwappedOut,
)
from tests.unit import tiny_models
from tests.unit.engine_kit import Answers, expected_greedy, request, save_tokenizer


@pytest.fixture
def engine() -> Iterator[NativeEngine]:
    pool = CpuPool(4)  # each tiny model takes one page of weights and one of KV: two fit
    yield NativeEngine(pool)
    pool.close()


def add(engine: NativeEngine, folder: Path, family: str) -> None:
    path = tiny_models.write(folder / family, family)
    save_tokenizer(path)
    spec = ModelSpec(family, str(path), dtype="float32")
    assert isinstance(engine.register(spec), Registered)
    load = engine.load(family)
    assert not isinstance(load, OpFailed)
    assert isinstance(engine.end_load(load.run(lambda done, total: None)), Loaded)


def bring_in(engine: NativeEngine, family: str) -> None:
    assert isinstance(engine.swap_in(family), Arriving)
    (end,) = engine.end_swap_in(family)
    assert isinstance(end, SwappedIn)


def take_out(engine: NativeEngine, family: str) -> None:
    (end,) = engine.swap_out(family)
    assert isinstance(end, SwappedOut)


def finish(engine: NativeEngine, answers: Answers) -> Answers:
    while engine.is_busy:
        answers.take(engine.step())
    return answers


def test_tokens_are_the_same_after_random_swaps(tmp_path: Path, engine: NativeEngine) -> None:
    families = ["llama_tied", "mistral", "falcon_7b", "falcon_alibi"]
    for family in families:
        add(engine, tmp_path, family)
    prompt = tiny_models.prompt(40).tolist()[0]
    sampled = {"temperature": 1.0, "top_p": 0.9, "seed": 3, "max_tokens": 12}

    def ask(family: str) -> list[list[int]]:
        answers = Answers()
        answers.take(engine.submit(request("g", prompt, family, max_tokens=12)))
        answers.take(engine.submit(request("s", prompt, family, **sampled)))
        finish(engine, answers)
        return [answers["g"].tokens, answers["s"].tokens]

    rng = random.Random(5)
    expected: dict[str, list[list[int]]] = {}
    resident: list[str] = []
    for _ in range(24):
        family = rng.choice(families)
        if family not in resident:
            if len(resident) == 2:
                take_out(engine, resident.pop(rng.randrange(2)))
            bring_in(engine, family)
            resident.append(family)
        tokens = ask(family)
        reference = AutoModelForCausalLM.from_pretrained(tmp_path / family, dtype=torch.float32)
        expected.setdefault(family, tokens)
        assert tokens == expected[family]
        assert tokens[0] == expected_greedy(reference.eval(), prompt, 12)
    assert set(expected) == set(families)


def test_two_models_take_turns_and_text_prompts_work(tmp_path: Path, engine: NativeEngine) -> None:
    for family in ("llama", "qwen2"):
        add(engine, tmp_path, family)
        bring_in(engine, family)
    answers = Answers()
    for family in ("llama", "qwen2"):
        answers.take(engine.submit(request(family, TextPrompt("Hello"), family)))
    outs = [engine.step() for _ in range(6)]
    ids = [m.request_id for out in outs for m in out if isinstance(m, Produced)]
    assert ids == ["llama", "qwen2"] * 3
    for out in outs:
        answers.take(out)
    assert all(len(a.tokens) == 8 for a in finish(engine, answers).values())


def test_operations_out_of_place_are_refused(tmp_path: Path, engine: NativeEngine) -> None:
    add(engine, tmp_path, "llama")
    answers = Answers()
    answers.take(engine.submit(request("early", [1], "llama")))
    answers.take(engine.submit(request("nobody", [1], "nope")))
    for name, words in (("early", "is host on this GPU"), ("nobody", "is not registered")):
        end = answers[name].end
        assert isinstance(end, Broke)
        assert end.code == "model_unavailable"
        assert words in end.message
    refusals: list[object] = [*engine.swap_out("llama"), *engine.swap_out("nope")]
    refusals += [engine.swap_in("nope"), engine.load("nope"), *engine.verify("nope")]
    assert [type(refusal) for refusal in refusals] == [OpFailed] * 5
    bring_in(engine, "llama")
    engine.submit(request("busy", [1], "llama"))
    (refusal,) = engine.swap_out("llama")
    assert isinstance(refusal, OpFailed)
    assert "still has 1 requests" in refusal.reason
    aborted = engine.abort("model_unavailable", "the engine is shutting down")
    assert [type(m) for m in aborted] == [Broke]
    assert not engine.is_busy
    take_out(engine, "llama")


def test_a_full_device_and_bad_files_are_told_with_their_cause(
    tmp_path: Path, engine: NativeEngine
) -> None:
    for family in ("llama", "qwen2", "mistral"):
        add(engine, tmp_path, family)
    for family in ("llama", "qwen2"):
        bring_in(engine, family)
    full = engine.swap_in("mistral")
    assert isinstance(full, OpFailed)
    assert "2 pages wanted, 0 free of 4" in full.reason
    missing = engine.register(ModelSpec("gone", str(tmp_path / "gone")))
    assert isinstance(missing, OpFailed)
    assert "gone" in missing.reason
    path = tiny_models.write(tmp_path / "mute", "llama")
    engine.register(ModelSpec("mute", str(path)))
    load = engine.load("mute")
    assert not isinstance(load, OpFailed)
    mute = engine.end_load(load.run(lambda done, total: None))
    assert isinstance(mute, OpFailed)
    assert "no usable tokenizer" in mute.reason


def test_a_model_that_is_forgotten_leaves_nothing_and_may_come_again(
    engine: NativeEngine, tmp_path: Path
) -> None:
    add(engine, tmp_path, "llama")
    bring_in(engine, "llama")
    refused = engine.forget("llama")
    assert isinstance(refused, OpFailed)
    assert "resident" in refused.reason
    asked = request("r1", TextPrompt("hello"), "llama", max_tokens=30)
    answers = Answers()
    answers.take(engine.submit(asked))
    answers.take(engine.step())
    engine.swap_out("llama", preempt=True)
    forgotten = engine.forget("llama")
    assert isinstance(forgotten, Forgotten)
    assert forgotten.num_bytes > 0
    assert (forgotten.memory.host_bytes, forgotten.memory.device_bytes) == (0, 0)
    answers.take(engine.step())  # what was suspended ends, for control to queue it again
    assert isinstance(answers["r1"].end, Broke)
    engine.validate()
    assert engine.forget("llama") == Forgotten("llama", 0, forgotten.memory)
    add(engine, tmp_path, "llama")
    bring_in(engine, "llama")
    assert engine.is_resident("llama")
