"""Embeddings end to end: the official client, real services, and a model that generates beside.

The two share a device that holds one of them.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import BertConfig, BertModel

from tests.integration.system_kit import MIB, System, config_of, write_models
from tests.unit import tiny_embedders
from tests.unit.engine_kit import byte_tokenizer, save_tokenizer

BUDGET = 56 * MIB
MAX_LEN = 256
TEXTS = ["hello", "a somewhat longer text " * 5, "x", "hello"]


def write_bert(folder: Path) -> Path:
    """25 MB, most of it in the MLP: quick to compute."""
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=256,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=12_000,
        max_position_embeddings=MAX_LEN,
    )
    model = BertModel(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(2.0)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    tiny_embedders.add_modules(folder, "mean_tokens", "Normalize")
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Iterator[System]:
    folder = tmp_path_factory.mktemp("embeddings")
    models = {"llama": write_models(folder / "models")["llama"], "bert": bert}
    with System(folder, config_of(models, f"{BUDGET}B")) as running:
        running.wait(
            lambda: all(found["state"] == "host" for found in running.models().values()),
            "the models to be loaded",
        )
        yield running


def expected(folder: Path, text: str) -> torch.Tensor:
    ids = byte_tokenizer().encode(text)
    return tiny_embedders.reference(folder, ids, "mean", normalized=True)


def client_of(system: System) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{system.url}/v1", api_key="-", max_retries=0)


async def test_vectors_do_not_depend_on_swaps(system: System, bert: Path) -> None:
    client = client_of(system)
    wanted = torch.stack([expected(bert, text) for text in TEXTS])
    bits, starts = [], []
    for _ in range(4):
        raw = await client.embeddings.with_raw_response.create(model="bert", input=TEXTS)
        starts.append(raw.headers["x-hotswap-start"])
        got = raw.parse()
        bits.append(torch.tensor([one.embedding for one in got.data]))
        assert (bits[-1] - wanted).abs().max() < 1e-5
        assert got.usage.prompt_tokens == sum(map(len, TEXTS))
        status, _ = await asyncio.to_thread(system.complete, "llama")
        assert status == 200
    assert starts == ["switch"] * 4 or starts[1:] == ["switch"] * 3
    assert all(torch.equal(bits[0], other) for other in bits[1:])
    await client.close()


async def test_token_ids_floats_and_fewer_dimensions(system: System, bert: Path) -> None:
    client = client_of(system)
    ids = byte_tokenizer().encode("hello")
    whole = expected(bert, "hello")
    inputs: list[Any] = [ids, [ids, ids], "hello"]
    for given in inputs:
        got = await client.embeddings.create(
            model="bert", input=given, encoding_format="float", dimensions=16
        )
        for one in got.data:
            short = whole[:16] / whole[:16].norm()
            assert (torch.tensor(one.embedding) - short).abs().max() < 1e-5
    await client.close()


async def test_many_at_once_beside_a_model_that_generates(system: System, bert: Path) -> None:
    """One of them a batch whose vectors take several messages."""
    client = client_of(system)
    texts = ["".join(chr(97 + (i * j) % 26) for j in range(i % 30 + 1)) for i in range(2048)]
    large = asyncio.create_task(client.embeddings.create(model="bert", input=texts))
    small = [
        asyncio.create_task(client.embeddings.create(model="bert", input=texts[i]))
        for i in range(12)
    ]
    written = [
        asyncio.create_task(client.completions.create(model="llama", prompt="hi", max_tokens=5))
        for _ in range(12)
    ]
    assert len((await large).data) == 2048
    for i, task in enumerate(small):
        vector = torch.tensor((await task).data[0].embedding)
        assert (vector - expected(bert, texts[i])).abs().max() < 1e-5
        assert (vector - torch.tensor(large.result().data[i].embedding)).abs().max() < 1e-5
    assert all([(await task).usage for task in written])
    await client.close()


async def test_a_killed_worker_costs_no_request(system: System, bert: Path) -> None:
    client = client_of(system)
    texts = ["some text of a certain length " * 8] * 80
    asking = asyncio.create_task(client.embeddings.create(model="bert", input=texts))
    await asyncio.to_thread(
        system.wait, lambda: any(one.in_flight for one in system.status().replicas), "the request"
    )
    system.kill("worker")
    got = await asking
    assert len(got.data) == 80
    assert (torch.tensor(got.data[79].embedding) - expected(bert, texts[0])).abs().max() < 1e-5
    await client.close()


@pytest.mark.parametrize(
    ("path", "body", "code", "words"),
    [
        ("embeddings", {"model": "llama", "input": "x"}, "model_not_supported", "makes no emb"),
        ("completions", {"model": "bert", "prompt": "x"}, "model_not_supported", "/v1/embeddings"),
        (
            "embeddings",
            {"model": "bert", "input": ["x", "y" * (MAX_LEN + 1)]},
            "context_length_exceeded",
            "input 1 has 257 tokens",
        ),
        ("embeddings", {"model": "bert", "input": [[1], [999]]}, "invalid_prompt", "999"),
        ("embeddings", {"model": "bert", "input": "x", "dimensions": 129}, "invalid_value", "128"),
    ],
)
def test_refusals(system: System, path: str, body: Any, code: str, words: str) -> None:
    status, answer = system.post(f"/v1/{path}", body)
    assert status == 400
    assert answer["error"]["code"] == code
    assert words in answer["error"]["message"]
