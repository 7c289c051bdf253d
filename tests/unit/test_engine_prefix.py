"""A request that goes on after the tokens of an earlier run: as if it had never stopped."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from schemas.requests import GenerateRequest
from services.gpu_agent.ipc import Broke, Done, FromWorker, Produced
from tests.unit import tiny_models
from tests.unit.engine_kit import byte_tokenizer, make_batch, model_text, request
from tests.unit.test_engine import tiny_module

NUM_NEW = 24
PROMPT = tiny_models.prompt(40, 1).tolist()[0]

# Whatever depends on the tokens before.
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": 11},
    "penalties": {
        "presence_penalty": 1.5,
        "frequency_penalty": 0.7,
        "repetition_penalty": 1.3,
        "temperature": 1.1,
    },
    "min_tokens": {"min_tokens": 12, "ignore_eos": False},
    "logprobs": {"logprobs": 2},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_module(Path(tmp_path_factory.mktemp("models")), "llama")


class Run:
    """One run to its end: what came out, in how many steps, and tokens put through the model."""

    def __init__(
        self, module: Any, asked: GenerateRequest, prefix: list[int] | None = None
    ) -> None:
        batch = make_batch(module, text=model_text(eos_ids=(7, 60, 130)))
        asked = msgspec.structs.replace(asked, prefix_token_ids=tuple(prefix or ()))
        self.out: list[FromWorker] = batch.submit(asked)
        self.num_steps = 0
        while batch.num_requests:
            self.out += batch.step()
            self.num_steps += 1
            batch.validate()
        self.num_computed = batch.kv.num_computed
        self.told = [message for message in self.out if isinstance(message, Produced)]
        self.tokens = [message.token_ids[0] for message in self.told]
        self.end = self.out[-1]

    @property
    def texts(self) -> list[str]:
        return [message.text for message in self.told]

    @property
    def done(self) -> tuple[str, int, int, str]:
        assert isinstance(self.end, Done)
        end = self.end
        return end.finish_reason, end.prompt_tokens, end.completion_tokens, end.text


@pytest.mark.parametrize("known", [1, 7, NUM_NEW - 1])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_rest_is_what_would_have_come(llama: Any, name: str, known: int) -> None:
    asked = request("r", PROMPT, max_tokens=NUM_NEW, **SETTINGS[name])
    whole = Run(llama, asked)
    assert len(whole.told) > known, "the undisturbed run is too short to be cut here"
    rest = Run(llama, asked, whole.tokens[:known])
    assert [message.index for message in rest.told] == list(range(known, len(whole.told)))
    assert rest.tokens == whole.tokens[known:]
    assert rest.texts == whole.texts[known:]
    assert rest.done == whole.done
    for one, other in zip(rest.told, whole.told[known:], strict=True):
        for ours, theirs in zip(one.logprobs, other.logprobs, strict=True):
            assert ours.offset == theirs.offset
            assert ours.chosen.logprob == pytest.approx(theirs.chosen.logprob, abs=1e-4)
            assert [top.token_id for top in ours.top] == [top.token_id for top in theirs.top]


def test_what_is_known_is_prefilled_and_not_decoded(llama: Any) -> None:
    """Prompt and prefix in chunks of 32, then one step for each new token."""
    asked = request("r", PROMPT, max_tokens=NUM_NEW)
    whole = Run(llama, asked)
    rest = Run(llama, asked, whole.tokens[:20])
    assert whole.num_steps == 2 + (NUM_NEW - 1)
    assert rest.num_steps == 2 + (NUM_NEW - 20 - 1)
    assert rest.num_computed == whole.num_computed


def test_half_a_character_at_the_cut_is_neither_lost_nor_doubled(llama: Any) -> None:
    """With the byte tokenizer a character takes up to four tokens: every cut between them."""
    ids = list("café \U0001f600!".encode())
    pieces: dict[int, list[str]] = {}
    for cut in range(len(ids)):
        batch = make_batch(llama)
        asked = request("r", [65, 66], max_tokens=len(ids) + 1)
        batch.submit(msgspec.structs.replace(asked, prefix_token_ids=tuple(ids[:cut])))
        row = batch._rows.find("r")
        assert row is not None
        pieces[cut] = [row._append(token_id)[0] for token_id in ids[cut:]]
    assert all(rest == pieces[0][cut:] for cut, rest in pieces.items())
    assert "".join(pieces[0]) == byte_tokenizer().decode(ids)


def test_a_stop_string_may_begin_in_the_prefix(llama: Any) -> None:
    free = Run(llama, request("r", PROMPT, max_tokens=NUM_NEW))
    text = "".join(free.texts)
    starts = range(4, len(text) - 3)
    stop = next(text[at : at + 3] for at in starts if text.find(text[at : at + 3]) == at)
    asked = request("r", PROMPT, max_tokens=NUM_NEW, stop=(stop,))
    whole = Run(llama, asked)
    assert whole.done[0] == "stop"
    rest = Run(llama, asked, whole.tokens[:-1])  # all but the token that completes it
    assert (rest.tokens, rest.texts) == (whole.tokens[-1:], whole.texts[-1:])
    assert rest.done == whole.done


@pytest.mark.parametrize("reason", ["length", "stop"])
def test_a_whole_answer_as_prefix_only_ends(llama: Any, reason: str) -> None:
    """The tokens had all arrived and the end was lost: nothing is computed."""
    free = Run(llama, request("r", PROMPT, max_tokens=NUM_NEW))
    ends = (free.tokens[5],) if reason == "stop" else ()
    asked = request("r", PROMPT, max_tokens=NUM_NEW, stop_token_ids=ends)
    whole = Run(llama, asked)
    rest = Run(llama, asked, whole.tokens)
    assert (rest.done, rest.out) == (whole.done, [rest.end])
    assert rest.done[0] == reason
    assert (rest.num_steps, rest.num_computed) == (0, 0)


def test_a_prefix_of_another_vocabulary_is_refused(llama: Any) -> None:
    end = Run(llama, request("r", PROMPT), [5, 256]).end
    assert isinstance(end, Broke)
    assert "token id 256" in end.message
