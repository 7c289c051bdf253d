"""Rows that give way and come back: parked, suspended, restored from host memory or recomputed.

Tokens are compared with those of runs that nobody disturbed. float32 and well separated logits:
a row that went another way would show.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.gpu_agent.engine.batch import Batch
from services.gpu_agent.ipc import Broke, Done, OpFailed, SwappedOut
from tests.unit import tiny_models
from tests.unit.engine_bench import Bench, kinds
from tests.unit.engine_kit import Answers, bring_in, expected_greedy, make_batch, request, run

RESERVE = [2 * n + 1 for n in reversed(range(12))]
EVICT = 1 << 30  # host memory for all KV of these tests


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_models.reference(tiny_models.write(tmp_path_factory.mktemp("llama"), "llama"))


def resident(module: Any, **options: Any) -> Batch:
    """With a reserve of RESERVE: 12 pages of 8 tokens."""
    return make_batch(module, **{"kv_tokens": 96, "page_tokens": 8, **options})


def leave_and_return(batch: Batch) -> int:
    batch.validate()
    copied = batch.suspend()
    batch.validate()
    bring_in(batch, RESERVE)
    return copied


@pytest.mark.parametrize("host_bytes", [0, EVICT])
def test_rows_go_on_after_their_model_was_away(llama: Any, host_bytes: int) -> None:
    batch = resident(llama, host_bytes=host_bytes)
    prompts = {"a": [3, 1, 4, 1, 5, 9, 2, 6, 5, 3], "b": [2, 7], "c": [8] * 17}
    answers = Answers()
    for name, prompt in prompts.items():
        answers.take(batch.submit(request(name, prompt, max_tokens=12)))
    computed = []
    while batch.num_requests:
        leave_and_return(batch)
        before = batch.kv.num_computed
        for _ in range(4):
            answers.take(batch.step())
            batch.validate()
        computed.append(batch.kv.num_computed - before)
    for name, prompt in prompts.items():
        assert answers[name].tokens == expected_greedy(llama, prompt, 12)
    if host_bytes:
        assert sum(computed) == sum(len(p) + 11 for p in prompts.values()), "computed twice"
    assert batch.kv.blocks.num_used == 0


def test_what_was_written_behind_is_not_copied_again(llama: Any) -> None:
    batch = resident(llama, host_bytes=EVICT)
    batch.submit(request("a", list(range(20)), max_tokens=30))
    for _ in range(10):
        batch.step()
    full = (batch.kv.copied_bytes, 28 // 8 * batch.kv.store.block_bytes)
    assert full[0] == full[1], "all full blocks were written behind"
    assert batch.suspend() == batch.kv.store.block_bytes, "only the unfinished one was left"
    bring_in(batch, RESERVE)
    assert batch.suspend() == 0, "nothing was computed in between"


def test_a_prompt_that_was_seen_before_is_not_computed_again(llama: Any) -> None:
    batch = resident(llama, host_bytes=EVICT)
    shared = list(range(50, 74))
    run(batch, request("a", [*shared, 1, 2], max_tokens=4))
    before = batch.kv.num_computed
    answers = run(batch, request("b", [*shared, 9], max_tokens=4))
    assert batch.kv.num_computed - before == 1 + 3
    assert answers["b"].tokens == expected_greedy(llama, [*shared, 9], 4)
    leave_and_return(batch)
    before = batch.kv.num_computed
    answers = run(batch, request("c", [*shared, 7, 7], max_tokens=4))
    assert batch.kv.num_computed - before == 2 + 3, "host memory kept it while the model was away"
    assert answers["c"].tokens == expected_greedy(llama, [*shared, 7, 7], 4)


def test_a_prompt_of_whole_blocks_computes_its_last_token(llama: Any) -> None:
    batch = resident(llama)
    prompt = list(range(16))
    run(batch, request("a", prompt))
    answers = run(batch, request("b", prompt))
    assert answers["b"].tokens == expected_greedy(llama, prompt, 8)


def test_rows_that_run_together_share_blocks(llama: Any) -> None:
    batch = resident(llama)
    shared = list(range(100, 140))
    answers = Answers()
    answers.take(batch.submit(request("a", [*shared, 1], max_tokens=20)))
    for _ in range(4):
        answers.take(batch.step())
    answers.take(batch.submit(request("b", [*shared, 2], max_tokens=20)))
    answers.take(batch.step())
    assert batch.kv.blocks.num_used < 2 * -(-41 // 8)
    run(batch, answers=answers)
    for name, last in (("a", 1), ("b", 2)):
        assert answers[name].tokens == expected_greedy(llama, [*shared, last], 20)


def test_without_sharing_rows_keep_to_themselves(llama: Any) -> None:
    batch = resident(llama, shares=False, host_bytes=EVICT)
    prompt = list(range(30))
    run(batch, request("a", prompt, max_tokens=4))
    before = batch.kv.num_computed
    answers = Answers()
    answers.take(batch.submit(request("b", prompt, max_tokens=8)))
    for _ in range(3):
        answers.take(batch.step())
    leave_and_return(batch)
    run(batch, answers=answers)
    assert batch.kv.num_computed - before == 30 + 7
    assert answers["b"].tokens == expected_greedy(llama, prompt, 8)


def test_host_memory_that_is_too_small_costs_time_but_no_token(llama: Any) -> None:
    block_bytes = resident(llama).kv.store.block_bytes
    batch = resident(llama, host_bytes=5 * block_bytes)
    prompts = {f"r{n}": [(7 * n + i) % 256 for i in range(15 + n)] for n in range(4)}
    answers = Answers()
    for name, prompt in prompts.items():
        answers.take(batch.submit(request(name, prompt, max_tokens=10)))
    while batch.num_requests:
        for _ in range(3):
            answers.take(batch.step())
        leave_and_return(batch)
    for name, prompt in prompts.items():
        assert answers[name].tokens == expected_greedy(llama, prompt, 10)


def test_pages_are_borrowed_for_more_rows_and_given_back_when_asked(llama: Any) -> None:
    batch = resident(llama, num_spare=24, host_bytes=EVICT)
    prompts = {f"r{n}": [n] * 40 for n in range(4)}
    answers = Answers()
    for name, prompt in prompts.items():
        answers.take(batch.submit(request(name, prompt, max_tokens=24)))
    for _ in range(16):
        answers.take(batch.step())
        batch.validate()
    assert batch.num_parked == 0
    borrowed = batch.kv.blocks.num_borrowed_pages
    assert borrowed > 8
    batch.give_back(borrowed)
    batch.validate()
    assert batch.kv.blocks.num_borrowed_pages == 0
    assert batch.num_parked > 0
    run(batch, answers=answers)
    for name, prompt in prompts.items():
        assert answers[name].tokens == expected_greedy(llama, prompt, 24)
    assert batch.kv.blocks.num_borrowed_pages == 0


def test_what_was_computed_from_unverified_weights_is_not_kept(llama: Any) -> None:
    batch = resident(llama, host_bytes=EVICT)
    answers = Answers()
    answers.take(batch.submit(request("a", list(range(20)), max_tokens=16)))
    for _ in range(5):
        answers.take(batch.step())
    batch.suspend()
    copied = batch.kv.copied_bytes
    batch.attach(RESERVE)  # arriving, and called off after some steps
    for _ in range(9):
        answers.take(batch.step())
        batch.validate()
    batch.suspend()
    batch.validate()
    assert batch.kv.copied_bytes == copied
    bring_in(batch, RESERVE)
    run(batch, answers=answers)
    assert answers["a"].tokens == expected_greedy(llama, list(range(20)), 16)
    assert batch.kv.copied_bytes > copied


def test_a_suspended_request_is_cancelled_and_expires(llama: Any) -> None:
    now = 0.0
    batch = resident(llama, host_bytes=EVICT, wall_clock=lambda: now)
    batch.submit(request("a", [1] * 20, max_tokens=40))
    batch.submit(request("b", [2] * 20, max_tokens=40, deadline_at=5.0))
    for _ in range(4):
        batch.step()
    batch.suspend()
    assert batch.next_deadline == 5.0
    assert kinds(batch.cancel("a")) == [Done]
    assert batch.expire() == []
    now = 6.0
    (end,) = batch.expire()
    assert isinstance(end, Broke)
    assert end.code == "deadline_exceeded"
    batch.validate()
    assert batch.num_requests == 0
    assert batch.kv.host is not None
    assert not batch.kv.host.holds


# -- the whole engine ----------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.pool.close()


def test_two_models_take_turns_in_the_middle_of_generations(bench: Bench) -> None:
    families = ["llama", "falcon_7b", "mistral"]
    warm = {}
    for family in families:
        bench.add(family)
        bench.bring_in(family)
        bench.submit("warm", family, max_tokens=40)
        warm[family] = bench.finish()["warm"].tokens
        bench.told.clear()
        bench.take_out(family)
    chance, started = random.Random(5), 0
    for turn in range(60):
        family = families[turn % 3]
        bench.bring_in(family)
        if turn < 30:
            bench.submit(f"{family} {turn}", family, max_tokens=40)
            started += 1
        for _ in range(chance.randrange(12)):
            bench.told += bench.engine.step()
        (out,) = bench.engine.swap_out(family, preempt=True)
        assert isinstance(out, SwappedOut)
        assert out.num_suspended == bench.engine._batches[family].num_requests
        assert bench.pool.used_bytes == 0
    for family in families:
        bench.bring_in(family)
        answers = bench.finish()
        bench.take_out(family)
    assert len(answers) == started
    for name, answer in answers.items():
        assert answer.tokens == warm[name.split()[0]]


def test_without_preemption_a_busy_model_stays(bench: Bench) -> None:
    bench.add("llama")
    bench.bring_in("llama")
    bench.submit("r", "llama")
    (refused,) = bench.engine.swap_out("llama")
    assert isinstance(refused, OpFailed)
    assert "still has 1 requests: drain, cancel or preempt them" in refused.reason
    assert bench.finish()["r"].tokens


def test_suspended_requests_of_a_model_that_is_registered_anew_end(bench: Bench) -> None:
    bench.add("llama")
    bench.bring_in("llama")
    bench.submit("r", "llama", max_tokens=50)
    bench.told += bench.engine.step()
    bench.engine.swap_out("llama", preempt=True)
    bench.engine._unload("llama")
    tiny_models.write(bench.folder / "llama", "llama", seed=1)
    bench.add("llama")
    assert bench.engine.is_busy
    end = bench.finish()["r"].end
    assert isinstance(end, Broke)
    assert "registered anew" in end.message
    assert not bench.engine._owner


def test_the_image_of_a_model_with_suspended_requests_is_the_last_to_go(bench: Bench) -> None:
    for family in ("llama", "falcon_7b", "mistral"):
        bench.add(family)
    bench.bring_in("llama")
    bench.submit("r", "llama", max_tokens=50)
    bench.engine.swap_out("llama", preempt=True)
    bench.bring_in("falcon_7b")
    bench.take_out("falcon_7b")  # used after llama
    bench.bring_in("mistral")
    tier = bench.engine._tier
    asked = (lambda name: name != "mistral", bench.engine._is_wanted)
    half = tier.budget_bytes - tier.used_bytes + 1
    assert tier.victims_for("new", half, *asked) == ["falcon_7b"]
    most = tier.budget_bytes - bench.hosted("mistral").layout.num_bytes
    assert tier.victims_for("new", most, *asked) == ["falcon_7b", "llama"]
    bench.engine.validate()


def test_a_swap_in_takes_borrowed_pages_back(bench: Bench) -> None:
    for family in ("llama", "falcon_7b"):
        bench.add(family)
    warm = {family: bench.warm_tokens(family) for family in ("llama", "falcon_7b")}
    bench.bring_in("llama")
    batch = bench.engine._batches["llama"]
    assert isinstance(batch, Batch)
    blocks = batch.kv.blocks
    held = [blocks.take() for _ in range(blocks.num_free + blocks.per_page)]
    assert blocks.num_borrowed_pages > 0
    free = bench.pool.free.num_free
    for block in held:
        blocks.release(block)
    assert bench.pool.free.num_free > free
    bench.bring_in("falcon_7b")
    for family in ("llama", "falcon_7b"):
        bench.submit(family, family)
    answers = bench.finish()
    assert {family: answers[family].tokens for family in warm} == warm


def test_prefixes_are_shared_unless_the_model_s_settings_say_no(bench: Bench) -> None:
    computed = {}
    for name, caching in (("shared", True), ("apart", False)):
        bench.add("llama", name=name, prefix_caching=caching)
        bench.bring_in(name)
        for number in range(2):
            bench.submit(f"{name} {number}", name)
            bench.finish()
        batch = bench.engine._batches[name]
        assert isinstance(batch, Batch)
        computed[name] = batch.kv.num_computed
        bench.take_out(name)
    assert computed["apart"] == 2 * (20 + 7)
    assert computed["shared"] < computed["apart"]
