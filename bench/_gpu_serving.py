"""Parts of a GPU run that serve: time to first token of a switch, decoding after a swap.

Requests go through `NativeEngine`, as in a worker. Its models come from memory: `serve` puts them
where registering and loading would, and is the one place that knows the inside of the engine.
"""

import math
import time
from collections.abc import Sequence
from typing import Final

from bench._gpu_models import NUM_ROWS, MemoryModel
from bench._gpu_report import Part
from bench._gpu_stage import Stage, prompt
from bench._stats import Samples
from schemas.requests import GenerateRequest, SamplingParams, TokenPrompt
from services.gpu_agent.engine.decode_graph import Recorder
from services.gpu_agent.engine.library import EngineOptions
from services.gpu_agent.engine.native import NativeEngine
from services.gpu_agent.engine.prompts import ModelText
from services.gpu_agent.ipc import Arriving, Broke, Done, FromWorker, OpFailed, Produced, SwappedIn

FIRST_TOKEN_AT_MOST: Final = 1.10
DECODE_AT_LEAST: Final = 0.98


class _NoText:
    """A tokenizer that has no words."""

    def decode(self, *_: object, **__: object) -> str:
        return ""


def serve(
    stage: Stage, models: list[MemoryModel], recorder: Recorder | None = None
) -> NativeEngine:
    """An engine that has these models, on the stage's pool."""
    engine = NativeEngine(stage.pool, EngineOptions(recorder=recorder))
    for model in models:
        name, vocab_size = model.spec.name, int(model.config.vocab_size)
        engine._models[name] = model
        engine._texts[name] = ModelText(name, _NoText(), frozenset(), vocab_size)
    return engine


class Client:
    """Sends greedy requests to an engine, and steps it until they are answered."""

    def __init__(self, engine: NativeEngine) -> None:
        self._engine = engine
        self._num = 0
        self.first_s = 0.0  # perf_counter of the first token since `send`
        self.all_first_s = 0.0  # when every request had its first token
        self.copy_s = 0.0  # of the swap-in that ended meanwhile
        self.tokens: dict[str, list[int]] = {}

    def swap_in(self, model: str) -> None:
        answer = self._engine.swap_in(model)
        if not isinstance(answer, Arriving):
            raise TypeError(answer.reason)

    def swap_out(self, model: str) -> None:
        for message in self._engine.swap_out(model):
            _refuse(message)

    def send(self, model: str, prompts: Sequence[tuple[int, ...]], max_tokens: int) -> None:
        self.first_s = self.all_first_s = self.copy_s = 0.0
        self.tokens = {}
        for ids in prompts:
            self._num += 1
            self.tokens[str(self._num)] = []
            request = GenerateRequest(
                request_id=str(self._num),
                model=model,
                klass="interactive",
                prompt=TokenPrompt(ids),
                sampling=SamplingParams(
                    seed=0, temperature=0.0, max_tokens=max_tokens, ignore_eos=True
                ),
                reply_to="",
                created_at=0.0,
                deadline_at=math.inf,
            )
            for message in self._engine.submit(request):
                _refuse(message)

    def finish(self) -> None:
        """Step until all requests are over."""
        open_ones = set(self.tokens)
        while open_ones:
            for message in self._engine.step():
                match message:
                    case Produced(name, _, ids, _):
                        self.tokens[name] += ids
                        now = time.perf_counter()
                        self.first_s = self.first_s or now
                        if not self.all_first_s and all(self.tokens.values()):
                            self.all_first_s = now
                    case SwappedIn(_, trace, _):
                        self.copy_s = trace.copy_s
                    case Done():
                        open_ones.discard(message.request_id)
                    case _:
                        _refuse(message)

    def decode(
        self, model: MemoryModel, num_prompt: int, max_tokens: int, rows: int = NUM_ROWS
    ) -> float:
        """Tokens per second of ``rows`` together, from when all of them have their first one."""
        prompts = [prompt(model, num_prompt, seed) for seed in range(rows)]
        self.send(model.spec.name, prompts, max_tokens)
        self.finish()
        num_timed = rows * (max_tokens - 1)
        return num_timed / (time.perf_counter() - self.all_first_s)


def _refuse(message: FromWorker) -> None:
    match message:
        case OpFailed(_, _, reason):
            raise TypeError(reason)
        case Broke():
            raise TypeError(message.message)


def switches(stage: Stage, part: Part, *names: str) -> None:
    """Time to first token of a request for a model whose place another one holds."""
    models = stage.pair(part, *names)
    client = Client(serve(stage, models))
    for model, other in zip(models, reversed(models), strict=True):
        for num_tokens in stage.sizes.prompts:
            _switch(stage, part, client, model, other, num_tokens)


def _switch(
    stage: Stage,
    part: Part,
    client: Client,
    model: MemoryModel,
    other: MemoryModel,
    num_tokens: int,
) -> None:
    name = model.spec.name
    firsts: list[float] = []
    copies: list[float] = []
    forwards: list[float] = []

    def first_token(began: float, seed: int) -> float:
        client.send(name, [prompt(model, num_tokens, seed)], 1)
        client.finish()
        return client.first_s - began

    for number in range(-1, stage.sizes.rounds):  # the first one warms up
        client.swap_in(other.spec.name)
        end(client, other)
        stage.keep_pages(0)
        stage.synchronize()
        began = time.perf_counter()
        client.swap_out(other.spec.name)
        client.swap_in(name)
        first = first_token(began, number)
        copy = client.copy_s
        forward = min(first_token(time.perf_counter(), number + seed) for seed in (100, 200, 300))
        client.swap_out(name)
        if number >= 0:
            firsts.append(first)
            copies.append(copy)
            forwards.append(forward)
    label = f"{name}, {num_tokens} tokens"
    part.taken(f"{label}: first token after a switch", firsts)
    part.taken(f"{label}: copy", copies)
    part.taken(f"{label}: first token, warm", forwards)
    longer = Samples(tuple(map(max, copies, forwards)))
    ratio = Samples(tuple(firsts)).over(longer).median
    part.speed(f"{label}: first token / max(copy, prefill)", ratio, at_most=FIRST_TOKEN_AT_MOST)


def end(client: Client, model: MemoryModel) -> None:
    """Have a swap-in end by a request of one token."""
    client.send(model.spec.name, [prompt(model, 1)], 1)
    client.finish()


def decoding(stage: Stage, part: Part, *names: str) -> None:
    """Rate and tokens of a full batch before and after swaps with another model in between."""
    model, other = stage.pair(part, *names)
    client = Client(serve(stage, [model, other]))
    num_prompt, num_tokens = stage.sizes.prompts[0], stage.sizes.decode_tokens
    client.swap_in(model.spec.name)
    client.decode(model, num_prompt, num_tokens)  # warms up
    before: list[float] = []
    after: list[float] = []
    same = 0
    for _ in range(stage.sizes.decode_rounds):
        before.append(client.decode(model, num_prompt, num_tokens))
        known = list(client.tokens.values())
        client.swap_out(model.spec.name)
        client.swap_in(other.spec.name)
        end(client, other)
        client.swap_out(other.spec.name)
        client.swap_in(model.spec.name)
        end(client, model)
        after.append(client.decode(model, num_prompt, num_tokens))
        same += list(client.tokens.values()) == known
    client.swap_out(model.spec.name)
    rate = part.taken(f"{model.spec.name}: tokens/s before", before, "/s")
    rate_after = part.taken(f"{model.spec.name}: tokens/s after", after, "/s")
    part.speed(
        f"{model.spec.name}: decode rate after / before",
        rate_after.over(rate).median,
        at_least=DECODE_AT_LEAST,
    )
    part.value(f"{model.spec.name}: different tokens in an answer", len(set(known[0])))
    part.holds(
        f"{model.spec.name}: greedy tokens equal before and after",
        same == stage.sizes.decode_rounds,
    )
