"""The engine while a model arrives: requests wait for weights, and nothing leaves unchecked."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.gpu_agent.ipc import (
    Arriving,
    Begun,
    Broke,
    Done,
    FromWorker,
    OpFailed,
    Produced,
    SwapInCancelled,
    SwappedIn,
    SwappedOut,
)
from services.gpu_agent.transfer import Verify
from tests.unit import tiny_models
from tests.unit.engine_bench import Bench, kinds
from tests.unit.engine_kit import Answers, request
from tests.unit.swap_kit import InStep

PROMPT = tiny_models.prompt(20).tolist()[0]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
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
                preempt = chance.random() < 0.3
                if preempt or not engine._batches[family].num_requests:
                    take(engine.swap_out(family, preempt))
            case "swap" if len(there) < 2:
                take([engine.swap_in(family)])
            case "submit" if family in there:
                name = f"r{number}"
                model_of[name] = family
                take(engine.submit(request(name, PROMPT, family)))
            case "cancel" if engine._owner:
                name = chance.choice(list(engine._owner))
                cancelled.add(name)
                take(engine.cancel(name))
            case "poll":
                take(engine.poll())
            case "step":
                take(engine.step())
    for _ in range(2):  # what is suspended by the end goes on once its model is back
        while engine.is_busy:
            take(engine.step())
        for family in list(there):
            take(engine.end_swap_in(family) if there[family] == "arriving" else [])
            take(engine.swap_out(family))
        for family in {model_of[name] for name in engine._owner}:
            take([engine.swap_in(family)])
    assert not engine._owner
    assert min(counts.values()) >= 5, counts
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
