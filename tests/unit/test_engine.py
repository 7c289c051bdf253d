"""The engine against transformers' own generate, and everything that may happen to a request."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from services.gpu_agent.ipc import Broke, Done, Produced
from tests.unit import tiny_models
from tests.unit.engine_kit import (
    Answers,
    expected_greedy,
    make_batch,
    model_text,
    request,
    run,
)


def tiny_module(folder: Path, family: str) -> Any:
    """A family's reference model in float32, so that batch shapes can not flip a choice."""
    path = tiny_models.write(folder / family, family)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_module(tmp_path_factory.mktemp("models"), "llama")


def prompts(sizes: tuple[int, ...]) -> list[list[int]]:
    return [tiny_models.prompt(n, seed).tolist()[0] for seed, n in enumerate(sizes)]


# -- the same tokens as transformers ------------------------------------------------------


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_staggered_greedy_batch_equals_generate(tmp_path: Path, family: str) -> None:
    """Longer and shorter than a chunk (32), a page (24) and Mistral's window (16)."""
    module = tiny_module(tmp_path, family)
    texts = prompts((5, 70, 1, 33, 48, 20))
    lengths = (24, 10, 30, 16, 4, 12)
    requests = [
        request(str(n), ids, max_tokens=length)
        for n, (ids, length) in enumerate(zip(texts, lengths, strict=True))
    ]
    answers = run(make_batch(module), *requests, stagger=3)
    for n, (ids, length) in enumerate(zip(texts, lengths, strict=True)):
        assert answers[str(n)].tokens == expected_greedy(module, ids, length), f"request {n}"


def test_sampled_tokens_depend_on_the_seed_and_nothing_else(llama: Any) -> None:
    texts = prompts((40, 7, 19, 3))
    requests = [
        request(str(n), ids, seed=n + 5, temperature=0.9, top_k=40, top_p=0.95, max_tokens=20)
        for n, ids in enumerate(texts)
    ]
    together = run(make_batch(llama), *requests, stagger=2)
    for each in requests:
        alone = run(make_batch(llama), each)[each.request_id].tokens
        assert alone == together[each.request_id].tokens
    other_seed = request("0", texts[0], seed=99, temperature=0.9, max_tokens=20)
    assert run(make_batch(llama), other_seed)["0"].tokens != together["0"].tokens


# -- how a request ends -------------------------------------------------------------------


def test_a_prompt_too_long_is_refused_alone(llama: Any) -> None:
    batch = make_batch(llama, max_model_len=64)
    good, bad = request("good", [1, 2, 3]), request("bad", [1] * 64)
    answers = run(batch, good, bad)
    assert isinstance(answers["good"].end, Done)
    end = answers["bad"].end
    assert isinstance(end, Broke)
    assert end.code == "context_length_exceeded"
    assert "prompt has 64 tokens; this model's context is 64 tokens" in end.message


def test_a_small_kv_reserve_limits_the_context_and_says_so(llama: Any) -> None:
    batch = make_batch(llama, kv_tokens=48)
    answers = run(batch, request("long", [1] * 60), request("rest", [1] * 40, max_tokens=None))
    long, rest = answers["long"].end, answers["rest"].end
    assert isinstance(long, Broke)
    assert "KV reserve holds 48 tokens" in long.message
    assert "kv_tokens" in long.message
    assert isinstance(rest, Done)
    assert (rest.finish_reason, rest.completion_tokens) == ("length", 8)


def test_requests_wait_for_blocks_first_come_first_served(llama: Any) -> None:
    batch = make_batch(llama, kv_tokens=96)
    requests = [request(str(n), [n + 1] * 40, max_tokens=8) for n in range(4)]
    answers = Answers()
    for each in requests:
        answers.take(batch.submit(each))
    order = []
    while batch.num_requests:
        out = batch.step()
        answers.take(out)
        order += [m.request_id for m in out if isinstance(m, Done)]
        batch.validate()
        assert sum(a.begun for a in answers.values()) - len(order) <= 2
    assert order == ["0", "1", "2", "3"]


@pytest.mark.parametrize("family", ["llama", "mistral", "falcon_alibi"])
def test_rows_that_outgrow_the_reserve_take_turns_and_lose_no_token(
    tmp_path: Path, family: str
) -> None:
    """Four requests that may each fill the whole reserve: admitted together, parked, resumed."""
    module = tiny_module(tmp_path, family)
    batch = make_batch(module, kv_tokens=96, page_tokens=8)
    texts = prompts((10, 17, 5, 12))
    answers = run(batch, *(request(str(n), ids, max_tokens=60) for n, ids in enumerate(texts)))
    assert batch.num_parked > 0
    for n, ids in enumerate(texts):
        answer = answers[str(n)]
        assert answer.begun == 1
        assert answer.tokens == expected_greedy(module, ids, 60), f"request {n}"


def test_a_parked_row_goes_on_sampling_where_it_was(llama: Any) -> None:
    texts = prompts((10, 17, 5, 12))
    requests = [
        request(str(n), ids, seed=n, temperature=0.9, top_p=0.9, max_tokens=50)
        for n, ids in enumerate(texts)
    ]
    small = make_batch(llama, kv_tokens=96, page_tokens=8)
    together = run(small, *requests)
    assert small.num_parked > 0
    for each in requests:
        alone = run(make_batch(llama), each)
        assert together[each.request_id].tokens == alone[each.request_id].tokens


def test_requests_without_max_tokens_are_decoded_together(llama: Any) -> None:
    batch = make_batch(llama, kv_tokens=256, max_model_len=256)
    answers = Answers()
    for n in range(4):
        answers.take(batch.submit(request(str(n), [n + 1] * 10, max_tokens=None)))
    for _ in range(8):
        answers.take(batch.step())
    assert [len(answers[str(n)].tokens) > 0 for n in range(4)] == [True] * 4
    assert batch.num_parked == 0


def test_max_batch_is_kept(llama: Any) -> None:
    batch = make_batch(llama, max_batch=2)
    answers = Answers()
    for n in range(5):
        answers.take(batch.submit(request(str(n), [n + 1])))
    answers.take(batch.step())
    assert [a.begun for a in answers.values()] == [1, 1]
    answers = run(batch, answers=answers)
    assert all(len(a.tokens) == 8 for a in answers.values())


def test_cancel_ends_a_request_at_once_running_or_waiting(llama: Any) -> None:
    batch = make_batch(llama, max_batch=1)
    answers = Answers()
    answers.take(batch.submit(request("running", [1, 2], max_tokens=100)))
    answers.take(batch.submit(request("waiting", [1, 2], max_tokens=100)))
    for _ in range(4):
        answers.take(batch.step())
    for name, tokens in (("waiting", 0), ("running", 4)):
        answers.take(batch.cancel(name))
        end = answers[name].end
        assert isinstance(end, Done)
        assert (end.finish_reason, end.completion_tokens) == ("cancelled", tokens)
    assert batch.cancel("running") == []
    assert batch.num_requests == 0
    batch.validate()


def test_a_passed_deadline_ends_a_request(llama: Any) -> None:
    now = 10.0
    batch = make_batch(llama, wall_clock=lambda: now)
    answers = Answers()
    answers.take(batch.submit(request("a", [1], max_tokens=50, deadline_at=11.0)))
    answers.take(batch.submit(request("b", [1], max_tokens=3, deadline_at=99.0)))
    answers.take(batch.step())
    now = 12.0
    while batch.num_requests:
        answers.take(batch.step())
    end = answers["a"].end
    assert isinstance(end, Broke)
    assert end.code == "deadline_exceeded"
    assert isinstance(answers["b"].end, Done)


def test_the_same_id_again_ends_the_earlier_run(llama: Any) -> None:
    batch = make_batch(llama)
    batch.submit(request("a", [1, 2]))
    batch.step()
    out = batch.submit(request("a", [3, 4]))
    assert [type(m) for m in out] == [Broke]
    assert run(batch)["a"].tokens == expected_greedy(llama, [3, 4], 8)


def test_a_long_prompt_does_not_stall_a_stream(llama: Any) -> None:
    batch = make_batch(llama, chunk_tokens=8)
    batch.submit(request("stream", [1], max_tokens=100))
    batch.step()
    batch.submit(request("long", [2] * 80, max_tokens=1))
    produced = [m.request_id for _ in range(22) for m in batch.step() if isinstance(m, Produced)]
    # Ten chunks of the long prompt, a token of the stream between any two.
    assert produced == ["stream"] * 10 + ["long"] + ["stream"] * 2


def test_eos_ends_a_request_unless_ignored_or_too_early(llama: Any) -> None:
    ids = [1, 2, 3]
    greedy = expected_greedy(llama, ids, 12)
    eos = greedy[4]
    first = greedy.index(eos)
    text = model_text(eos_ids=(eos, 255 - eos))
    stops = run(make_batch(llama, text=text), request("a", ids, max_tokens=12, ignore_eos=False))
    assert stops["a"].tokens == greedy[: first + 1]
    assert isinstance(stops["a"].end, Done)
    assert stops["a"].end.finish_reason == "stop"
    ignores = run(make_batch(llama, text=text), request("a", ids, max_tokens=12))
    assert ignores["a"].tokens == greedy
    late = request("a", ids, max_tokens=12, min_tokens=first + 3, ignore_eos=False)
    assert len(run(make_batch(llama, text=text), late)["a"].tokens) >= first + 3


def test_a_stop_string_ends_the_text_before_it(llama: Any) -> None:
    text = model_text()
    ids = next(
        candidate
        for seed in range(200)
        if (candidate := tiny_models.prompt(6, seed).tolist()[0])
        and text.tokenizer.decode(expected_greedy(llama, candidate, 8)).isascii()
    )
    whole = text.tokenizer.decode(expected_greedy(llama, ids, 8))
    stop = whole[3:6]  # spans three tokens
    answer = run(make_batch(llama), request("a", ids, max_tokens=8, stop=(stop, "\0\0")))["a"]
    assert answer.text == whole[: whole.index(stop)]
    assert isinstance(answer.end, Done)
    assert answer.end.finish_reason == "stop"
    assert answer.end.completion_tokens == whole.index(stop) + 3


def test_all_text_arrives_and_no_piece_ends_in_half_a_character(llama: Any) -> None:
    tokenizer = model_text().tokenizer
    for seed in range(6):
        prompt = list(tokenizer.encode("Hello there"))
        answer = run(
            make_batch(llama), request("a", prompt, max_tokens=60, temperature=1.5, seed=seed)
        )["a"]
        assert answer.text == tokenizer.decode(answer.tokens)


class _Flaky:
    """A module whose forward raises, or gives NaN, where a prompt asks for it."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.forward = module.forward

    def __call__(self, **arguments: Any) -> Any:
        ids = arguments["input_ids"]
        if (ids == 66).any():
            raise RuntimeError("the device caught fire")
        result = self._module(**arguments)
        if (ids == 77).any():
            result.logits[(ids == 77).any(dim=1)] = torch.nan
        return result


def test_a_raising_forward_breaks_its_own_requests_only(llama: Any) -> None:
    batch = make_batch(llama)
    batch.module = _Flaky(llama)
    good = request("good", [1, 2, 3], max_tokens=20)
    answers = run(
        batch, good, request("fire", [66]), request("nan", [77]), request("late", [5]), stagger=2
    )
    expected = expected_greedy(llama, [1, 2, 3], 20)
    assert 66 not in expected
    assert 77 not in expected
    assert answers["good"].tokens == expected
    assert isinstance(answers["late"].end, Done)
    for name, words in (("fire", "RuntimeError: the device caught fire"), ("nan", "not finite")):
        end = answers[name].end
        assert isinstance(end, Broke)
        assert end.code == "engine_failed"
        assert words in end.message
