"""The main job, end to end: real nats-server, real services, real models, one small device.

One system serves all tests of this file. Three models of 25-37 MB share a device of 56 MiB.
"""

import asyncio
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nats
import openai
import psutil
import pytest

from schemas import names
from schemas.requests import GenerateRequest, SamplingParams, TextPrompt
from schemas.state import ModelSpec
from services.bus import Bus
from services.gpu_agent.device import open_pool
from services.gpu_agent.engine.native import NativeEngine
from services.gpu_agent.ipc import Done, Loaded, OpFailed, Produced, SwappedIn
from services.ops.trace_view import Span, read_spans, trees
from tests.integration.system_kit import CONTEXT, MIB, MODELS, System, config_of, write_models
from tests.unit.engine_kit import byte_tokenizer

BUDGET = 56 * MIB
BROKEN = """
[models.huge]
source = "{folder}/llama"
kv_tokens = 10_000_000
[models.missing]
source = "{folder}/nowhere"
[models.corrupt]
source = "{folder}/corrupt"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("system")
    models = write_models(found / "models")
    corrupt = found / "models" / "corrupt"
    corrupt.mkdir()
    for file in models["llama"].iterdir():
        data = file.read_bytes()
        (corrupt / file.name).write_bytes(
            data[: len(data) // 2] if "safetensors" in file.name else data
        )
    return found


@pytest.fixture(scope="module")
def system(folder: Path) -> Iterator[System]:
    models = {name: folder / "models" / name for name in MODELS}
    extra = BROKEN.format(folder=folder / "models")
    with System(folder, config_of(models, f"{BUDGET}B", extra)) as running:
        running.wait(
            lambda: all(running.models()[name]["state"] == "host" for name in MODELS),
            "the models to be loaded",
        )
        yield running


# -- the same tokens ------------------------------------------------------------------------

Case = tuple[str, str, SamplingParams]


def cases() -> list[Case]:
    """(model, prompt, sampling): greedy, and sampled with a seed."""
    found: list[Case] = []
    for number, model in enumerate(MODELS):
        for prompt in ("Once upon a time", "def main():\n" * 12):
            found.append((model, prompt, SamplingParams(seed=0, temperature=0.0, max_tokens=12)))
            sampled = SamplingParams(seed=100 + number, temperature=0.9, top_p=0.95, max_tokens=12)
            found.append((model, prompt, sampled))
    return found


def never_swapped(folder: Path) -> list[tuple[int, ...]]:
    """The tokens of every case from engines that hold all models at once and never swap."""
    pool = open_pool("cpu", 256 * MIB)
    engine = NativeEngine(pool)
    tokens: list[tuple[int, ...]] = []
    for name in MODELS:
        spec = ModelSpec(name=name, source=str(folder / "models" / name))
        engine.register(spec)
        load = engine.load(name)
        assert not isinstance(load, OpFailed)
        assert isinstance(engine.end_load(load.run(lambda done, total: None)), Loaded)
        engine.swap_in(name)
        assert isinstance(engine.end_swap_in(name)[0], SwappedIn)
    for number, (model, prompt, sampling) in enumerate(cases()):
        now = time.time()
        request = GenerateRequest(
            f"r{number}", model, "interactive", TextPrompt(prompt), sampling, "x", now, now + 60
        )
        engine.submit(request)
        ids: list[int] = []
        done = False
        while not done:
            for message in engine.step():
                if isinstance(message, Produced):
                    ids += message.token_ids
                done = done or isinstance(message, Done)
        tokens.append(tuple(ids))
    pool.close()
    return tokens


async def test_tokens_do_not_depend_on_swaps(folder: Path, system: System) -> None:
    """20 random sequences over three models; every token as if the model had never left."""
    expected = await asyncio.to_thread(never_swapped, folder)
    rng = random.Random(5)
    client = openai.AsyncOpenAI(base_url=f"{system.url}/v1", api_key="-")
    bus = await Bus.connect(system.admin, service="test")
    tokens: dict[str, list[int]] = {}
    ended: dict[str, asyncio.Event] = {}

    async def on_chunk(raw: Any) -> None:
        chunk = json.loads(raw.data) if raw.data else {}
        request_id = chunk.get("request_id", "")
        if chunk.get("type") == "hotswap.stream.v1.tokens":
            tokens.setdefault(request_id, []).extend(chunk["token_ids"])
        elif chunk.get("type") == "hotswap.stream.v1.finished":
            ended.setdefault(request_id, asyncio.Event()).set()

    await bus.subscribe_raw("_INBOX_api.>", on_chunk)
    await bus.flush()
    num_switches = 0
    for _ in range(20):
        for number in rng.sample(range(len(expected)), 4):
            model, prompt, sampling = cases()[number]
            raw = await client.completions.with_raw_response.create(
                model=model,
                prompt=prompt,
                max_tokens=12,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=sampling.seed,
            )
            request_id = raw.headers["x-request-id"]
            num_switches += raw.headers["x-hotswap-start"] != "warm"
            await asyncio.wait_for(ended.setdefault(request_id, asyncio.Event()).wait(), 10)
            assert tuple(tokens[request_id]) == expected[number], (model, prompt, sampling)
    assert num_switches >= 20  # else this showed nothing
    await bus.close()
    await client.close()


# -- what stays alive, what stays within bounds ---------------------------------------------


async def test_a_switch_reuses_the_live_worker_and_loads_nothing(system: System) -> None:
    pid = system.service("worker").pid
    bus = await Bus.connect(system.admin, service="test")
    seen: list[str] = []

    async def on_event(raw: Any) -> None:
        seen.append(json.loads(raw.data)["type"].rsplit(".", 1)[1])

    await bus.subscribe_raw(f"{names.PREFIX}.events.>", on_event)
    await bus.flush()
    for model in MODELS * 3:
        status, _ = await asyncio.to_thread(system.complete, model)
        assert status == 200
    await bus.close()
    assert system.service("worker").pid == pid
    assert seen.count("swap_in_completed") >= 8
    assert seen.count("swap_out_completed") >= 8
    assert "model_loaded" not in seen
    assert "model_registered" not in seen


def test_device_memory_stays_within_its_budget(system: System) -> None:
    """Counted by the agent, and seen from outside: the worker's resident memory."""
    worker = psutil.Process(system.service("worker").pid)
    for model in MODELS * 2:  # warm up allocators and code paths of every architecture
        assert system.complete(model, "x" * 200, max_tokens=4)[0] == 200
    before = worker.memory_info().rss
    highest = 0
    for model in MODELS * 4:
        assert system.complete(model, "x" * 200, max_tokens=4)[0] == 200
        highest = max(highest, worker.memory_info().rss)
    # One model weighs at least 24 MiB: keeping one more than the budget holds would show.
    assert highest - before < 12 * MIB
    status = system.status()
    assert status.budget_bytes == BUDGET
    assert 0 < status.used_bytes <= status.budget_bytes
    resident = [r for r in status.replicas if r.state == "resident"]
    assert sum(r.facts.footprint_bytes for r in resident if r.facts) == status.used_bytes
    weights = sum(r.facts.weight_bytes for r in status.replicas if r.facts and r.model in MODELS)
    assert weights > 1.5 * status.budget_bytes  # more models than the device holds


# -- watching from outside ------------------------------------------------------------------


async def test_events_can_be_read_with_plain_nats(system: System) -> None:
    """No code of ours but the credentials file, which is plain JSON."""
    creds = json.loads((system.settings.state_path / "nats" / "admin.json").read_text())
    client = await nats.connect(creds["url"], user=creds["user"], password=creds["password"])
    subscription = await client.subscribe("hs.v1.>")
    await client.flush()
    for model in ("llama", "falcon"):
        await asyncio.to_thread(system.complete, model)
    found: dict[str, Any] = {}
    while "hotswap.agent.v1.swap_in_completed" not in found or len(found) < 5:
        message = await subscription.next_msg(timeout=5)
        if message.data:
            body = json.loads(message.data)
            found[body["type"]] = body
    await client.close()
    trace = found["hotswap.agent.v1.swap_in_completed"]["trace"]
    assert trace["num_bytes"] > 20e6
    assert trace["copy_s"] > 0


def test_one_trace_joins_all_services(system: System) -> None:
    assert system.complete("mistral")[0] == 200
    status, answer = system.complete("llama", "trace me")
    assert status == 200
    request_id = answer["id"].split("-", 1)[1]
    roots: list[Span] = []

    def found() -> bool:
        for candidate in trees(read_spans(system.settings.state_path / "spans")).values():
            if any(root.attributes.get("hotswap.request_id") == request_id for root in candidate):
                roots[:] = candidate
                return {"request.decode", "scheduler.switch"} <= {
                    child.name for root in candidate for child in root.children
                }
        return False

    system.wait(found, "the spans", 10)
    (root,) = roots
    assert root.name == "POST /v1/completions"
    assert root.service == "hotswap-api"
    children = {span.name: span for span in root.children}
    assert {"request.queue_wait", "request.prefill", "request.decode"} <= set(children)
    switch = children["scheduler.switch"]
    assert switch.service == "hotswap-scheduler"
    below = {span.name: span for span in switch.children}
    assert set(below) == {"agent.swap_out", "agent.swap_in"}
    assert below["agent.swap_in"].service == "hotswap-agent-cpu0"
    assert below["agent.swap_in"].attributes["hotswap.num_bytes"] > 20_000_000  # type: ignore[operator]
    assert below["agent.swap_in"].attributes["hotswap.gb_per_s"] > 0  # type: ignore[operator]
    assert below["agent.swap_out"].end <= below["agent.swap_in"].start + 1e-3
    assert root.start <= switch.start <= switch.end <= root.end


async def test_the_openai_client_works(system: System) -> None:
    client = openai.AsyncOpenAI(base_url=f"{system.url}/v1", api_key="-")
    listed = [model.id async for model in client.models.list()]
    assert set(MODELS) <= set(listed)
    messages: Any = [{"role": "user", "content": "hi"}]
    for model in MODELS:
        whole = await client.chat.completions.create(
            model=model, messages=messages, max_tokens=9, temperature=0
        )
        assert whole.usage
        assert whole.usage.completion_tokens == 9
        assert whole.choices[0].finish_reason == "length"
        text = ""
        stream = await client.chat.completions.create(
            model=model, messages=messages, max_tokens=9, temperature=0, stream=True
        )
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
        assert text == whole.choices[0].message.content
    await client.close()


async def test_log_probabilities_come_from_the_engine_to_the_client(system: System) -> None:
    client = openai.AsyncOpenAI(base_url=f"{system.url}/v1", api_key="-")
    letters = byte_tokenizer().encode("abc")
    whole = await client.chat.completions.create(
        model="llama",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=6,
        logprobs=True,
        top_logprobs=3,
        logit_bias={str(token_id): 100 for token_id in letters},
    )
    choice = whole.choices[0]
    assert choice.logprobs
    content = choice.logprobs.content or []
    assert "".join(one.token for one in content) == choice.message.content
    assert set(choice.message.content or "") <= set("abc")
    assert all(len(one.top_logprobs) == 3 for one in content)
    # The bias chose, but what is told is of the model's own distribution.
    assert all(one.logprob <= one.top_logprobs[0].logprob <= 0 for one in content)
    assert any(one.token != one.top_logprobs[0].token for one in content)
    await client.close()


async def test_several_choices_and_prompts_of_one_request(system: System) -> None:
    """Each choice says what its seed says alone; echo and usage are of one answer."""
    client = openai.AsyncOpenAI(base_url=f"{system.url}/v1", api_key="-")
    ask: dict[str, Any] = {"model": "llama", "max_tokens": 6, "temperature": 0.9}
    both = await client.completions.create(prompt=["abc", "xyz"], n=2, seed=5, echo=True, **ask)
    assert [one.index for one in both.choices] == [0, 1, 2, 3]
    for prompt, seed, choice in zip(
        ("abc", "abc", "xyz", "xyz"), (5, 6) * 2, both.choices, strict=True
    ):
        alone = await client.completions.create(prompt=prompt, seed=seed, **ask)
        assert choice.text == prompt + alone.choices[0].text
    assert len({one.text for one in both.choices}) == 4
    assert both.usage
    assert (both.usage.prompt_tokens, both.usage.completion_tokens) == (6, 24)
    long = "the same beginning " * 10
    for cached in (False, True):
        stream = await client.completions.create(
            prompt=byte_tokenizer().encode(long),
            n=2,
            seed=5,
            stream=True,
            stream_options={"include_usage": True},
            echo=True,
            **ask,
        )
        texts, usage = ["", ""], None
        async for chunk in stream:
            usage = chunk.usage or usage
            for one in chunk.choices:
                texts[one.index] += one.text
        assert all(text.startswith(long) and text != long for text in texts)
        assert usage
        assert usage.prompt_tokens == len(long)
        assert usage.prompt_tokens_details
        assert (usage.prompt_tokens_details.cached_tokens or 0) > 100 or not cached
    await client.close()


def test_tokens_of_a_model_wherever_its_weights_are(system: System) -> None:
    """No swap is caused; what is told is what a request is given."""
    before = {name: model["state"] for name, model in system.models().items()}
    for model in MODELS:
        status, answer = system.post("/tokenize", {"model": model, "prompt": "Grüße, Welt"})
        assert status == 200, answer
        assert answer["tokens"] == byte_tokenizer().encode("Grüße, Welt")
        assert (answer["count"], answer["max_model_len"]) == (13, CONTEXT)
        status, answer = system.post("/detokenize", {"model": model, "tokens": answer["tokens"]})
        assert (status, answer) == (200, {"prompt": "Grüße, Welt"})
    after = {name: model["state"] for name, model in system.models().items()}
    assert after == before
    chat = {"model": "llama", "messages": [{"role": "user", "content": "hi"}]}
    status, tokens = system.post("/v1/tokenize", chat)
    assert status == 200
    status, answer = system.post("/v1/chat/completions", chat | {"max_tokens": 1})
    assert answer["usage"]["prompt_tokens"] == tokens["count"]
    status, answer = system.post("/tokenize", {"model": "missing", "prompt": "x"})
    assert (status, answer["error"]["code"]) == (503, "model_unavailable")


async def test_many_at_once_all_end(system: System) -> None:
    """48 requests over three models that can not be resident together."""
    client = openai.AsyncOpenAI(base_url=f"{system.url}/v1", api_key="-", max_retries=0)
    rng = random.Random(1)

    async def one(number: int) -> int:
        answer = await client.completions.create(
            model=rng.choice(MODELS), prompt=f"request {number}", max_tokens=6, temperature=0
        )
        assert answer.usage
        return answer.usage.completion_tokens

    counts = await asyncio.wait_for(asyncio.gather(*(one(n) for n in range(48))), 120)
    assert counts == [6] * 48
    await client.close()


# -- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"model": "nobody", "prompt": "x"}, 404, "nobody"),
        (b'{"model": "llama", "prompt":', 400, "JSON"),
        ({"model": "llama", "prompt": "x", "max_tokens": "many"}, 400, "max_tokens"),
        ({"model": "llama", "prompt": "x" * (CONTEXT + 1)}, 400, str(CONTEXT)),
        ({"model": "llama", "prompt": "x", "logit_bias": {"256": 1}}, 400, "token id 256"),
        ({"model": "huge", "prompt": "x"}, 503, "MiB of device memory"),
        ({"model": "missing", "prompt": "x"}, 503, "nowhere"),
        ({"model": "corrupt", "prompt": "x"}, 503, "model.safetensors"),
    ],
)
def test_bad_input_gets_a_clear_error(system: System, body: Any, status: int, says: str) -> None:
    got, answer = system.post("/v1/completions", body)
    assert got == status, answer
    assert says in answer["error"]["message"]
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert system.complete("llama")[0] == 200  # nothing else is lost
