"""What a grammar costs: decode steps of constrained rows against steps of free ones.

One engine with a small model (0.02e9 parameters, almost all of them its vocabulary of 32,768), on
one thread of the CPU device: masks weigh less beside larger models. Both kinds of rows are sampled
at temperature 1, so the mask is all that differs. Also how long a first and a later request with a
schema wait for it, which are seconds of this machine and no promise.
"""

import functools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

from bench import _engine_models, _models
from bench._engine_rig import Rig
from bench.harness import Bench
from schemas.requests import GenerateRequest, Grammar, SamplingParams, TokenPrompt
from services.demo.models import VOCAB_SIZE
from services.gpu_agent.ipc import Done, Produced

MIB: Final = 2**20
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
        """CPU seconds of one decode step of ``rows`` rows, the mean over STEPS. There is one
        thread, so what others do on the machine does not count.
        """
        for _ in range(rows):
            self.submit(grammar, STEPS + 1)
        produced = 0
        while produced < rows:  # prompts, and the first token of each
            produced += sum(isinstance(message, Produced) for message in self._engine.step())
        began = time.thread_time()
        done = 0
        while done < rows:
            done += sum(isinstance(message, Done) for message in self._engine.step())
        return (time.thread_time() - began) / STEPS

    def first_token_s(self, grammar: Grammar | None) -> float:
        """Seconds from a request to its only token."""
        began = time.perf_counter()
        self.submit(grammar, 1)
        while not any(isinstance(message, Done) for message in self._engine.step()):
            if not self._engine.is_busy:
                time.sleep(0.0002)  # as the worker's loop, which sleeps until it is told
        return time.perf_counter() - began


def _write_model(place: Path) -> Path:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=3,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(place)
    _models.write_tokenizer(place)
    return place


def main(argv: list[str]) -> int:
    """Run the benchmark. Returns its exit status."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    bench = Bench("structured", "decode steps with a grammar against free ones", argv, rounds=24)
    with tempfile.TemporaryDirectory() as folder:
        engine = _Engine(_write_model(Path(folder) / "m"))
        free_s = engine.first_token_s(None)
        first_s = engine.first_token_s(GRAMMAR)
        other_s = engine.first_token_s(OTHER)
        again_s = engine.first_token_s(GRAMMAR)
        for rows in (1, 4):
            took = bench.round_robin(
                {
                    f"{rows} free": functools.partial(engine.per_step_s, None, rows),
                    f"{rows} constrained": functools.partial(engine.per_step_s, GRAMMAR, rows),
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
