"""Sampling settings through a whole batch: what ends a row, what is told of each token."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from schemas.requests import GenerateRequest
from schemas.stream import TokenLogprobs
from services.gpu_agent.engine.batch import Batch
from services.gpu_agent.ipc import Broke, Done, Produced
from tests.unit import tiny_models
from tests.unit.engine_kit import expected_greedy, make_batch, model_text, request, run

PROMPT = list(b"the same prompt for all")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tiny_models.write(tmp_path_factory.mktemp("models"), "llama")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def produced(batch: Batch, *requests: GenerateRequest) -> dict[str, list[Produced]]:
    """Every Produced by request, from submission to the end of all of them."""
    found: dict[str, list[Produced]] = {each.request_id: [] for each in requests}
    for each in requests:
        assert batch.submit(each) == []
    while batch.num_requests:
        for message in batch.step():
            if isinstance(message, Produced):
                found[message.request_id].append(message)
    return found


def told(messages: list[Produced]) -> list[TokenLogprobs]:
    assert all(len(one.logprobs) == len(one.token_ids) for one in messages)
    return [logprobs for one in messages for logprobs in one.logprobs]


def test_stop_token_ids_end_a_request_also_with_ignore_eos(llama: Any) -> None:
    plain = expected_greedy(llama, PROMPT, 12)
    at = next(i for i in range(2, 12) if plain[i] not in plain[:i])
    eos = plain[0]
    ask: dict[str, Any] = {"max_tokens": 12, "stop_token_ids": (plain[at],)}
    batch = make_batch(llama, text=model_text(eos_ids=(eos,)))
    answers = run(
        batch,
        request("ignoring", PROMPT, **ask),
        request("not", PROMPT, ignore_eos=False, **ask),
        request("later", PROMPT, min_tokens=at + 3, **ask),
    )
    assert answers["ignoring"].tokens == plain[: at + 1]
    end = answers["ignoring"].end
    assert isinstance(end, Done)
    assert (end.finish_reason, end.completion_tokens) == ("stop", at + 1)
    # The token that ended it is counted, and is no part of the text.
    assert answers["ignoring"].text == batch._text.tokenizer.decode(plain[:at])
    assert answers["not"].tokens == [eos]
    later = answers["later"].tokens
    assert plain[at] not in later[: at + 3]
    assert eos not in later[: at + 3]


def test_log_probabilities_are_those_of_the_model(llama: Any) -> None:
    """Against one forward pass over the whole answer, whatever the settings chose from."""
    settings: dict[str, Any] = {
        "temperature": 0.9,
        "top_k": 30,
        "presence_penalty": 1.0,
        "max_tokens": 10,
    }
    found = produced(
        make_batch(llama),
        request("plain", PROMPT, **settings),
        request("chosen", PROMPT, logprobs=0, **settings),
        request("top", PROMPT, logprobs=4, **settings),
    )
    tokens = {name: [i for one in all_ for i in one.token_ids] for name, all_ in found.items()}
    assert tokens["plain"] == tokens["chosen"] == tokens["top"]
    assert told(found["chosen"])[0].top == ()
    assert all(one.logprobs == () for one in found["plain"])
    with torch.inference_mode():
        logits = llama(input_ids=torch.tensor([PROMPT + tokens["top"]])).logits[0]
    table = torch.log_softmax(logits[len(PROMPT) - 1 : -1], -1)
    best = table.topk(4, dim=-1)
    for i, one in enumerate(told(found["top"])):
        assert one.chosen.token_id == tokens["top"][i]
        assert one.chosen.logprob == pytest.approx(float(table[i, one.chosen.token_id]), abs=1e-4)
        assert [each.token_id for each in one.top] == best.indices[i].tolist()
        assert [each.logprob for each in one.top] == pytest.approx(
            best.values[i].tolist(), abs=1e-4
        )


def test_each_token_has_its_text_and_its_place(llama: Any) -> None:
    """Bytes put together are the text; offsets count its characters."""
    batch = make_batch(llama)
    tokenizer = batch._text.tokenizer
    wanted = tokenizer.encode("é x❤y")
    # A bias of 100 forces the token, one request for each.
    messages: list[Produced] = []
    ids = list(PROMPT)
    for token_id in wanted:
        [one] = produced(
            batch, request("r", ids, logprobs=1, max_tokens=1, logit_bias={token_id: 100})
        )["r"]
        messages.append(one)
        ids.append(token_id)
    pieces = [one.chosen for one in told(messages)]
    assert [piece.token_id for piece in pieces] == wanted
    assert b"".join(piece.raw or piece.text.encode() for piece in pieces) == "é x❤y".encode()
    assert pieces[0].text == "\\xc3"
    letters = dict.fromkeys(tokenizer.encode("ab"), 90.0)
    answer = produced(
        batch, request("s", PROMPT, logprobs=0, logit_bias=letters, stop=["zz"], max_tokens=6)
    )["s"]
    assert [one.offset for one in told(answer)] == list(range(6))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"logit_bias": {256: 1.0}}, "logit_bias names token id 256"),
        ({"stop_token_ids": (256,)}, "stop_token_ids names token id 256"),
        ({"min_p": 2.0}, "min_p = 2.0"),
    ],
)
def test_settings_of_another_vocabulary_are_refused_alone(
    llama: Any, settings: dict[str, Any], words: str
) -> None:
    answers = run(make_batch(llama), request("wrong", PROMPT, **settings), request("right", PROMPT))
    wrong = answers["wrong"].end
    assert isinstance(wrong, Broke)
    assert wrong.code == "invalid_prompt"
    assert words in wrong.message
    assert answers["right"].tokens == expected_greedy(llama, PROMPT, 8)


def test_a_parked_row_keeps_its_counts(llama: Any) -> None:
    """Penalties go on where they were, whatever became of the row's blocks."""
    settings: dict[str, Any] = {
        "temperature": 0.8,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.5,
        "max_tokens": 40,
    }
    requests = [request(str(n), PROMPT[n:], seed=n, **settings) for n in range(4)]
    roomy = run(make_batch(llama), *requests)
    tight = make_batch(llama, kv_tokens=96)
    answers = run(tight, *requests)
    assert tight.num_parked > 0
    assert {name: one.tokens for name, one in answers.items()} == {
        name: one.tokens for name, one in roomy.items()
    }
