"""What a grammar costs: decode steps of constrained rows against steps of free ones.

One engine with a model of 0.09e9 parameters and a vocabulary of 32,768, on the CPU device. Both
kinds of rows are sampled at temperature 1, so the mask is all that differs. Also how long a first
and a later request with a schema wait for it, which are seconds of this machine and no promise.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import torch

from bench import _engine_models
from bench._engine_rig import Rig
from bench.harness import Bench
from schemas.requests import Grammar, GenerateRequest, SamplingParams, TokenPrompt
from services.gpu_agent.ipc import Done, Produced

MIB: Final = 2**20
LAYERS: Final = 2
STEPS: Final = 24
AT_MOST: Final = 1.35  # of a free step, for a row with a grammar

# A list without an end, of objects with texts: every step has many tokens to choose from.
SCHEMA: Final = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "kind": {"enum": ["cat", "dog", "horse"]},
            "age": {"type": "integer"},
        },
        "required": ["name", "kind", "age"],
        "additionalProperties": False,
    },
}
GRAMMAR: Final = Grammar("json_schema", json.dumps(SCHEMA), "response_format")
OTHER: Final = Grammar("json_schema", json.dumps({**SCHEMA, "minItems": 7}), "response_format")


class _Engine:
    """One engine, and rows that decode in it."""

    def __init__(self, place: Path) -> None:
        self._rig = Rig(1024 * MIB)
        spec = _engine_models.spec("m", place, kv_tokens=4096, max_batch=8)
        self._rig.add(spec)
        self._rig.bring_in("m")
        self._engine = self._rig.engine
        self._count = 0

    def submit(self, grammar: Grammar | None, num_tokens: int) -> None:
        self._count += 1
        now = time.time()
        sampling = SamplingParams(
            seed=self._count, max_tokens=num_tokens, ignore_eos=True, grammar=grammar
        )
        prompt = TokenPrompt(tuple(range(100, 116)))
        name = f"r{self._count}"
        request = GenerateRequest(name, "m", "interactive", prompt, sampling, "x", now, now + 3600)
        self._engine.submit(request)

    def per_step_s(self, grammar: Grammar | None, rows: int) -> float:
        """Seconds of one decode step of ``rows`` rows, the mean over STEPS."""
        for _ in range(rows):
            self.submit(grammar, STEPS + 1)
        produced = 0
        while produced < rows:  # prompts, and the first token of each
            produced += sum(isinstance(message, Produced) for message in self._engine.step())
        began = time.perf_counter()
        done = 0
        while done < rows:
            done += sum(isinstance(message, Done) for message in self._engine.step())
        return (time.perf_counter() - began) / STEPS

    def first_token_s(self, grammar: Grammar | None) -> float:
        """Seconds from a request to its only token."""
        began = time.perf_counter()
        self.submit(grammar, 1)
        while not any(isinstance(message, Done) for message in self._engine.step()):
            if not self._engine.is_busy:
                time.sleep(0.0002)  # as the worker's loop, which sleeps until it is told
        return time.perf_counter() - began


def main(argv: list[str]) -> int:
    """Run the benchmark. Returns its exit status."""
    bench = Bench("structured", "decode steps with a grammar against free ones", argv, rounds=12)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "m"
        place.mkdir()
        _engine_models.write_serving(place, torch.float32, LAYERS)
        engine = _Engine(place)
        free_s = engine.first_token_s(None)
        first_s = engine.first_token_s(GRAMMAR)
        other_s = engine.first_token_s(OTHER)
        again_s = engine.first_token_s(GRAMMAR)
        for rows in (1, 4):
            took = bench.round_robin(
                {
                    f"{rows} free": lambda rows=rows: engine.per_step_s(None, rows),
                    f"{rows} constrained": lambda rows=rows: engine.per_step_s(GRAMMAR, rows),
                }
            )
            ratio = took[f"{rows} constrained"].over(took[f"{rows} free"]).median
            bench.target(f"constrained step, {rows} rows", ratio, at_most=AT_MOST, unit="x")
    bench.value("first token without a grammar", free_s, "s")
    bench.value("first token, the model's first grammar", first_s, "s")
    bench.value("first token, another schema", other_s, "s")
    bench.value("first token, a schema seen before", again_s, "s")
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
