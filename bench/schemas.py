"""Encoding and decoding on the bus: typed msgspec against the standard library's json.

Both write and read the same content. msgspec also checks every field on the way in, which
the standard library doesn't, so the comparison favours the latter.
"""

import json
import sys
import time
from collections.abc import Callable

import msgspec

from bench.harness import Bench
from schemas.requests import ChatMessage, ChatPrompt, GenerateRequest, SamplingParams
from schemas.stream import Tokens

TOKENS = Tokens(request_id="c0ffee-0001", attempt=1, index=128, token_ids=(4711,), text=" time")
REQUEST = GenerateRequest(
    request_id="c0ffee-0001",
    model="Qwen/Qwen2.5-7B",
    klass="interactive",
    prompt=ChatPrompt(
        messages=tuple(
            ChatMessage(role=role, content="Tell me how a page table works. " * 16)
            for role in ("system", "user", "assistant", "user")
        )
    ),
    sampling=SamplingParams(seed=42, max_tokens=256, temperature=0.7, top_p=0.9, stop=("\n\n",)),
    reply_to="_INBOX_api.c0ffee.0001",
    created_at=1767225600.5,
    deadline_at=1767225660.5,
)
AT_LEAST = 3.0


def _per_call_s(call: Callable[[], object], calls: int) -> Callable[[], float]:
    """A variant that reports the seconds of one ``call``, averaged over ``calls``."""

    def measure() -> float:
        started = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - started) / calls

    return measure


def _compare(bench: Bench, name: str, message: Tokens | GenerateRequest, calls: int) -> None:
    encoder = msgspec.json.Encoder()
    decoder = msgspec.json.Decoder(type(message))
    wire = encoder.encode(message)
    content = json.loads(wire)
    if decoder.decode(json.dumps(content).encode()) != message:
        raise AssertionError(f"{name}: the two sides do not write the same content")
    took = bench.round_robin(
        {
            f"{name}, msgspec": _per_call_s(lambda: decoder.decode(encoder.encode(message)), calls),
            f"{name}, json": _per_call_s(lambda: json.loads(json.dumps(content).encode()), calls),
        }
    )
    speedup = took[f"{name}, json"].over(took[f"{name}, msgspec"]).median
    bench.target(f"{name} speed-up", speedup, at_least=AT_LEAST, unit="x")
    bench.value(f"{name} on the wire", len(wire), "B")


def main(argv: list[str]) -> int:
    """Run the benchmark. Returns its exit status."""
    bench = Bench("schemas", "msgspec against json, one encode and decode", argv, rounds=50)
    _compare(bench, "tokens", TOKENS, calls=2_000)
    _compare(bench, "request", REQUEST, calls=1_000)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
