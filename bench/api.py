"""The api's own cost: the whole path against the agent alone, streams against a bare server.

    HTTP -> api -> queue -> agent -> tokens over the bus -> api -> server-sent events

All of it is real, and in processes of its own, but for the engine: the agent answers at once
(`bench._api_agent`).

    first token   through the path, less the same request published straight to the agent
    idle streams  the same with 1,000 other streams open that have said something and wait
    streams       tokens per second over 64 streams, each token a message of its own, against a bare
                  ASGI app on the same server that sends the same bytes, one send for each event
"""

import asyncio
import functools
import statistics
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop

from bench._api_rig import ApiRig, open_api_rig
from bench.harness import Bench, Samples

ADDS_AT_MOST_S = 3e-3
OF_BARE_AT_LEAST = 0.5
IDLE_AT_MOST = 1.5

NUM_STREAMS = 64
NUM_TOKENS = 500
NUM_IDLE = 1000
NUM_REQUESTS = 20  # per round
IDLE_ROUNDS = 4

Measure = Callable[[], Coroutine[Any, Any, float]]


async def _median(measure: Measure, count: int = NUM_REQUESTS) -> float:
    return statistics.median([await measure() for _ in range(count)])


async def _overhead(rig: ApiRig, num_idle: int) -> float:
    """What the path adds to a first token beside ``num_idle`` idle streams."""
    await rig.open_idle(num_idle)
    pairs = [(await rig.through_api(), await rig.direct()) for _ in range(5 * NUM_REQUESTS)]
    await rig.close_idle()
    return statistics.median(path for path, _ in pairs) - statistics.median(
        direct for _, direct in pairs
    )


def main(argv: list[str]) -> int:
    """Run the benchmark. Returns its exit status."""
    bench = Bench("api", "the api's own cost, beside the agent alone and a bare server", argv)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        opening = open_api_rig(NUM_STREAMS, NUM_TOKENS)
        rig = runner.run(opening.__aenter__())

        def take(measures: dict[str, Measure], **options: Any) -> dict[str, Samples]:
            runs = {name: functools.partial(_run, runner, m) for name, m in measures.items()}
            return bench.round_robin(runs, **options)

        try:
            first = take(
                {
                    "first token, agent alone": lambda: _median(rig.direct),
                    "first token, whole path": lambda: _median(rig.through_api),
                }
            )
            cpu_s, taken = rig.api_cpu_s(), 0.0
            rates = take(
                {
                    "64 streams, bare server": lambda: rig.stream_bare(NUM_TOKENS),
                    "64 streams, api": lambda: rig.stream_api(NUM_TOKENS),
                },
                unit="tok/s",
            )
            taken = (len(rates["64 streams, api"].values) + 1) * NUM_STREAMS * NUM_TOKENS
            cpu_s = rig.api_cpu_s() - cpu_s
            idle = take(
                {
                    "overhead, nobody else": lambda: _overhead(rig, 0),
                    "overhead, 1,000 idle streams": lambda: _overhead(rig, NUM_IDLE),
                },
                rounds=IDLE_ROUNDS,
                warmup=0,
            )
        finally:
            runner.run(opening.__aexit__(None, None, None))

    direct, path = first.values()
    added = Samples(tuple(p - d for p, d in zip(path.values, direct.values, strict=True)))
    bench.target("the path adds to a first token", added.median, at_most=ADDS_AT_MOST_S, unit="s")
    bare, streamed = rates.values()
    of_bare = streamed.over(bare).median
    bench.target("streams, api over bare server", of_bare, at_least=OF_BARE_AT_LEAST, unit="x")
    bench.value("the api's processor time per token", cpu_s / taken, "s")
    alone, beside = idle.values()
    more = beside.over(alone).median
    bench.target("overhead beside 1,000 idle streams", more, at_most=IDLE_AT_MOST, unit="x")
    return bench.finish()


def _run(runner: asyncio.Runner, measure: Measure) -> float:
    return runner.run(measure())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
