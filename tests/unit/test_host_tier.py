"""Host memory as a tier: who leaves, who stays, and never more bytes than the budget."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.state import ModelSpec
from services.gpu_agent.device_cpu import CpuPool
from services.gpu_agent.engine.library import EngineOptions, LoadJob
from services.gpu_agent.engine.native import NativeEngine
from services.gpu_agent.host_tier import HostTier, OutOfHostMemory
from services.gpu_agent.ipc import Arriving, Loaded, OpFailed, Registered, SwappedIn, Unloaded
from tests.unit import tiny_models
from tests.unit.engine_kit import Answers, request, save_tokenizer

PROMPT = [3, 1, 4, 1, 5]


def anybody(_model: str) -> bool:
    return True


# -- the budget alone --------------------------------------------------------------------


def test_the_least_recently_used_leave_and_no_more_than_needed() -> None:
    tier = HostTier(100)
    for model, size in (("a", 40), ("b", 30), ("c", 30)):
        assert tier.victims_for(model, size, anybody) == []
        tier.hold(model, size)
    assert tier.used_bytes == 100
    assert tier.victims_for("d", 40, anybody) == ["a"]
    assert tier.victims_for("d", 41, anybody) == ["a", "b"]
    tier.touch("a")
    assert tier.victims_for("d", 41, anybody) == ["b", "c"]
    assert tier.victims_for("d", 10, lambda model: model != "b") == ["c"]
    tier.touch("nobody")
    tier.release("nobody")
    tier.release("b")
    assert tier.used_bytes == 70
    assert tier.victims_for("d", 30, anybody) == []


def test_a_model_that_holds_its_image_needs_no_room_and_is_not_its_own_victim() -> None:
    tier = HostTier(100)
    tier.hold("a", 60)
    tier.hold("b", 40)
    assert tier.victims_for("a", 60, anybody) == []
    assert tier.victims_for("a", 61, anybody) == ["b"]
    tier.hold("a", 60)  # again: counted once, and used just now
    assert tier.used_bytes == 100
    assert tier.victims_for("c", 1, anybody) == ["b"]


def test_what_can_not_fit_is_refused_with_numbers_and_a_remedy() -> None:
    tier = HostTier(100)
    tier.hold("a", 60)
    tier.hold("b", 30)
    with pytest.raises(OutOfHostMemory) as caught:
        tier.victims_for("c", 50, lambda model: model == "b")
    story = str(caught.value)
    for word in ("'c'", "50 bytes", "budget of 100 bytes", "60 are held", "host_memory"):
        assert word in story
    assert tier.used_bytes == 90
    with pytest.raises(OutOfHostMemory, match="0 are held"):
        tier.victims_for("c", 101, anybody)


NAMES = ["a", "b", "c", "d", "e"]


@given(
    budget=st.integers(0, 100),
    steps=st.lists(
        st.tuples(
            st.sampled_from(["load", "touch", "release", "pin", "unpin"]),
            st.sampled_from(NAMES),
            st.integers(0, 70),
        ),
        max_size=60,
    ),
)
def test_never_over_the_budget(budget: int, steps: list[tuple[str, str, int]]) -> None:
    tier = HostTier(budget)
    held: dict[str, int] = {}  # by hand, least recently used first
    pinned: set[str] = set()
    for step, model, size in steps:
        match step:
            case "load":
                movable = [m for m in held if m not in pinned and m != model]
                most = budget - sum(held[m] for m in held if m not in movable and m != model)
                try:
                    victims = tier.victims_for(model, size, lambda m: m not in pinned)
                except OutOfHostMemory:
                    assert size > most
                    continue
                assert size <= most
                assert victims == movable[: len(victims)]  # the oldest, in order
                for victim in victims:
                    assert size + sum(held.values()) - held.get(model, 0) > budget  # one more
                    tier.release(victim)
                    del held[victim]
                tier.hold(model, size)
                held.pop(model, None)
                held[model] = size
            case "touch":
                tier.touch(model)
                if model in held:
                    held[model] = held.pop(model)
            case "release":
                tier.release(model)
                held.pop(model, None)
            case "pin":
                pinned.add(model)
            case "unpin":
                pinned.discard(model)
        assert tier.used_bytes == sum(held.values()) <= budget


# -- in the engine -----------------------------------------------------------------------

FAMILIES = ["llama", "qwen2", "llama_yarn"]  # their images are about as large


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        save_tokenizer(tiny_models.write(root / family, family))
    return {family: root / family for family in FAMILIES}


@pytest.fixture
def engine(folders: dict[str, Path]) -> Iterator[NativeEngine]:
    """With host memory for two of three models."""
    pool = CpuPool(6)
    probe = NativeEngine(pool)
    for family, folder in folders.items():
        probe.register(ModelSpec(family, str(folder)))
    sizes = sorted(size_of(probe, family) for family in FAMILIES)
    assert sizes[0] * 3 > sum(sizes[1:])
    engine = NativeEngine(pool, EngineOptions(host_budget_bytes=sum(sizes[1:])))
    for family, folder in folders.items():
        assert isinstance(engine.register(ModelSpec(family, str(folder))), Registered)
    yield engine
    assert engine.memory().host_bytes <= sum(sizes[1:])
    pool.close()


def size_of(engine: NativeEngine, model: str) -> int:
    return engine._models[model].layout.num_bytes


def states(engine: NativeEngine) -> list[str]:
    return [engine._models[family].state for family in FAMILIES]


def load(engine: NativeEngine, model: str) -> list[str]:
    """Returns who was unloaded for it."""
    job = engine.load(model)
    assert isinstance(job, LoadJob), job
    # They are gone before the load begins: it may need their very bytes.
    assert all(engine._models[gone.model].state == "cold" for gone in job.first)
    held = {name for name in FAMILIES if engine._models[name].state != "cold"} | {model}
    assert engine.memory().host_bytes == sum(size_of(engine, name) for name in held)
    assert all(gone.num_bytes == size_of(engine, gone.model) for gone in job.first)
    loaded = engine.end_load(job.run(lambda done, total: None))
    assert isinstance(loaded, Loaded)
    assert loaded.memory.host_bytes == engine.memory().host_bytes
    return [gone.model for gone in job.first]


def refused(engine: NativeEngine, model: str) -> str:
    answer = engine.load(model)
    assert isinstance(answer, OpFailed)
    assert answer.op == "load"
    return answer.reason


def swap_in(engine: NativeEngine, model: str) -> None:
    assert isinstance(engine.swap_in(model), Arriving)
    assert [type(message) for message in engine.end_swap_in(model)] == [SwappedIn]


def test_three_models_are_served_with_room_for_two(
    engine: NativeEngine, folders: dict[str, Path]
) -> None:
    tokens: dict[str, list[int]] = {}
    chance = random.Random(1)
    num_unloaded = 0
    for _ in range(25):
        model = chance.choice(FAMILIES)
        if engine._models[model].state == "cold":
            num_unloaded += len(load(engine, model))
        swap_in(engine, model)
        answers = Answers()
        answers.take(engine.submit(request("r", PROMPT, model)))
        while engine.is_busy:
            answers.take(engine.step())
        assert tokens.setdefault(model, answers["r"].tokens) == answers["r"].tokens
        engine.swap_out(model)
        assert states(engine).count("cold") >= 1
    assert num_unloaded >= 5
    assert set(tokens) == set(folders)


def test_the_least_recently_swapped_leaves_with_what_it_left_on_the_device(
    engine: NativeEngine,
) -> None:
    assert load(engine, "llama") == load(engine, "qwen2") == []
    for model in ("qwen2", "llama"):
        swap_in(engine, model)
        engine.swap_out(model)
    assert set(engine.memory().cached_bytes) == {"llama", "qwen2"}
    assert load(engine, "llama_yarn") == ["qwen2"]
    assert set(engine.memory().cached_bytes) == {"llama"}
    assert load(engine, "qwen2") == ["llama"]
    engine._pool.free.validate()


def test_who_is_resident_arriving_or_loading_keeps_its_image(engine: NativeEngine) -> None:
    load(engine, "llama")
    swap_in(engine, "llama")
    loading = engine.load("qwen2")
    assert isinstance(loading, LoadJob)
    story = refused(engine, "llama_yarn")
    held = size_of(engine, "llama") + size_of(engine, "qwen2")
    budget = engine._options.host_budget_bytes
    for word in ("'llama_yarn'", f"{budget} bytes", f"{held} are held", "host_memory"):
        assert word in story
    assert "is being loaded already" in refused(engine, "qwen2")
    loaded = loading.run(lambda done, total: None)
    assert "are held" in refused(engine, "llama_yarn")  # it is there, but nobody was told yet
    assert isinstance(engine.end_load(loaded), Loaded)
    with engine._pool.link:
        assert isinstance(engine.swap_in("qwen2"), Arriving)
        assert "are held" in refused(engine, "llama_yarn")
        assert states(engine) == ["resident", "arriving", "cold"]
    engine.end_swap_in("qwen2")
    engine.swap_out("llama")
    assert load(engine, "llama_yarn") == ["llama"]


def test_a_load_that_fails_holds_nothing(engine: NativeEngine, tmp_path: Path) -> None:
    mute = tiny_models.write(tmp_path / "mute", "llama")  # has no tokenizer
    assert isinstance(engine.register(ModelSpec("mute", str(mute))), Registered)
    job = engine.load("mute")
    assert isinstance(job, LoadJob)
    assert engine.memory().host_bytes == size_of(engine, "mute")  # while it loads
    assert isinstance(engine.end_load(job.run(lambda done, total: None)), OpFailed)
    assert engine.memory().host_bytes == 0


def test_the_victims_are_told_in_order(engine: NativeEngine, folders: dict[str, Path]) -> None:
    budget = 2 * size_of(engine, "llama") + size_of(engine, "llama") // 2
    small = NativeEngine(engine._pool, EngineOptions(host_budget_bytes=budget))
    for name in ("a", "b", "c"):
        small.register(ModelSpec(name, str(folders["llama"])))
    for name, gone in (("a", []), ("b", []), ("c", ["a"]), ("a", ["b"])):
        job = small.load(name)
        assert isinstance(job, LoadJob)
        assert job.first == [Unloaded(m, size_of(small, m)) for m in gone]
        small.end_load(job.run(lambda done, total: None))
