"""Computing while weights arrive: time to first token over a link of a known rate.

    in turn      |---- copy ----||---- forward ----|
    overlapped   |---- copy ----|
                    |---- forward ----|              at best as long as the longer of the two

The link is slowed down to where the two take equally long, which is the hardest case, and to half
and double that rate. Requests go through the engine that serves them.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

from bench import _models
from bench.harness import Bench
from schemas.requests import GenerateRequest, SamplingParams, TokenPrompt
from services.gpu_agent.device import open_pool
from services.gpu_agent.engine.native import NativeEngine
from services.gpu_agent.ipc import Arriving, Done, FromWorker, OpFailed, Produced, SwappedIn

PROMPT_TOKENS = 2048
RATES = {"equal": 1.0, "half": 0.5, "double": 2.0}  # of the rate at which copy = forward
AT_MOST = 1.10


class Server:
    """One model in an engine of its own."""

    def __init__(self, folder: Path) -> None:
        spec = _models.write(_models.layered(), folder, kv_tokens=PROMPT_TOKENS + 64)
        _models.write_tokenizer(Path(spec.source))
        self.pool = open_pool("cpu", 2 * 2**30)
        self.engine = NativeEngine(self.pool)
        self.name = spec.name
        self._num = 0
        self.engine.register(spec)
        load = self.engine.load(spec.name)
        if isinstance(load, OpFailed):
            raise TypeError(load.reason)
        _refuse(self.engine.end_load(load.run(lambda *_: None)))

    def warm(self) -> float:
        """Seconds to first token of a resident model."""
        began = time.perf_counter()
        self._submit()
        first, _ = self._first_token(began)
        return first

    def switched(self, link_bytes_per_s: float) -> tuple[float, float]:
        """Seconds to first token from the begin of a swap-in, and seconds of its copy."""
        self._swap_out()
        self.pool.free.give(self.pool.free.take(self.pool.free.num_free))  # nothing is kept
        self.pool.link_bytes_per_s = link_bytes_per_s
        began = time.perf_counter()
        if not isinstance(answer := self.engine.swap_in(self.name), Arriving):
            raise TypeError(answer.reason)
        self._submit()
        first, copy_s = self._first_token(began)
        self.pool.link_bytes_per_s = 0.0
        return first, copy_s

    def _submit(self) -> None:
        self._num += 1
        # Other tokens each time: nothing may be remembered.
        prompt = tuple((7 * i + self._num) % 2000 for i in range(PROMPT_TOKENS))
        request = GenerateRequest(
            request_id=str(self._num),
            model=self.name,
            klass="interactive",
            prompt=TokenPrompt(prompt),
            sampling=SamplingParams(seed=0, temperature=0.0, max_tokens=1, ignore_eos=True),
            reply_to="",
            created_at=0.0,
            deadline_at=math.inf,
        )
        self.engine.submit(request)

    def _first_token(self, began: float) -> tuple[float, float]:
        first, copy_s, ended = 0.0, 0.0, False
        while not ended:
            for message in self.engine.step():
                match message:
                    case Produced() if not first:
                        first = time.perf_counter() - began
                    case SwappedIn(_, trace, _):
                        copy_s = trace.copy_s
                    case Done():
                        ended = True
                    case _:
                        _refuse(message)
        return first, copy_s

    def _swap_out(self) -> None:
        self.engine.poll()
        self.engine.swap_out(self.name)


def _refuse(message: FromWorker) -> None:
    if isinstance(message, OpFailed):
        raise TypeError(message.reason)


def measure(bench: Bench, folder: Path) -> None:
    """Record the targets."""
    server = Server(folder)
    num_bytes = server.engine.registered(server.name).layout.num_bytes
    server.switched(0.0)
    forward_s = min(server.warm() for _ in range(3))
    copies: dict[str, list[float]] = {name: [] for name in RATES}

    def switch(name: str) -> Callable[[], float]:
        rate = RATES[name] * num_bytes / forward_s

        def once() -> float:
            first, copy_s = server.switched(rate)
            copies[name].append(copy_s)
            return first

        return once

    variants: dict[str, Callable[[], float]] = {"forward, warm": server.warm}
    variants |= {f"first token, {name} link": switch(name) for name in RATES}
    rounds = 3 if bench.quick else 7
    took = bench.round_robin(variants, rounds=rounds)
    forwards = took["forward, warm"].values
    for name in RATES:
        firsts = took[f"first token, {name} link"].values
        ratios = sorted(
            first / max(copy, forward)
            for first, copy, forward in zip(
                firsts, copies[name][-len(firsts) :], forwards, strict=True
            )
        )
        bench.target(
            f"{PROMPT_TOKENS} tokens, {name} link: first token / max(copy, forward)",
            ratios[len(ratios) // 2],
            at_most=AT_MOST,
            unit="x",
        )
