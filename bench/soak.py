"""A day of traffic on simulated GPUs whose agents and workers keep dying, every step checked.

24 models of 8 to 64 GB share 3 GPUs, few enough that models are preempted, and about every 20
minutes an agent or an engine worker dies, at times drawn by ``--seed``. All invariants of the
scheduler's belief are looked at after every single input (`services.scheduler.invariants`), the
simulated GPUs' own books at every tick. What is violated ends the run, and counts as a missed
target; the last inputs before it are printed.

``--hours`` is how long, in simulated time; ``--quick`` makes it one hour, with a death every five
minutes.
"""

import argparse
import random
import sys
import traceback
from collections import deque
from collections.abc import Sequence
from typing import Final, Literal

from bench.harness import Bench
from schemas.commands import Command
from services.scheduler.inputs import Input
from services.scheduler.simulate.errors import SimulationFault
from services.scheduler.simulate.presets import MIXED_GB
from services.scheduler.simulate.run import Failure, Gpus, Options, Result, simulate
from services.scheduler.simulate.workload import GB, ModelSize, Workload, poisson
from services.scheduler.state import InvariantViolation

NUM_MODELS: Final = 24
NUM_GPUS: Final = 3
RATE_PER_S: Final = 1.0
ZIPF: Final = 0.8
HOURS: Final = 24.0
QUICK_HOURS: Final = 1.0
DEATH_EVERY_S: Final = 1200.0
QUICK_DEATH_EVERY_S: Final = 300.0
HEARTBEAT_S: Final = 5.0
DEATHS_AT_LEAST: Final = 0.5  # of those that the interval promises
NUM_SHOWN: Final = 30  # inputs before the end of a run that broke


def workload(hours: float, seed: int) -> Workload:
    """Popular models are small, mostly; one is large enough to need most of a GPU."""
    sizes = [MIXED_GB[number % len(MIXED_GB)] for number in range(NUM_MODELS)]
    models = {f"S{i:02}-{size}GB": ModelSize(size * GB) for i, size in enumerate(sizes)}
    return poisson(models, RATE_PER_S, hours * 3600, seed=seed, zipf=ZIPF, name="soak")


def failures(hours: float, every_s: float, seed: int) -> tuple[Failure, ...]:
    """Deaths at random times, of any GPU, of either kind."""
    rng = random.Random(f"deaths {seed}")
    drawn = []
    at_s = rng.expovariate(1 / every_s)
    while at_s < hours * 3600:
        what: Literal["agent", "worker"] = "agent" if rng.random() < 0.5 else "worker"
        drawn.append(Failure(at_s, rng.randrange(NUM_GPUS), what))
        at_s += rng.expovariate(1 / every_s)
    return tuple(drawn)


class Soak:
    """One run, and how it ended: ``result`` or ``broken``."""

    def __init__(self, hours: float, death_every_s: float, seed: int) -> None:
        self.hours = hours
        self.death_every_s = death_every_s
        self.workload = workload(hours, seed)
        self.failures = failures(hours, death_every_s, seed)
        self.num_inputs = 0
        self.num_deaths = 0  # that the scheduler heard the end of
        self.result: Result | None = None
        self.broken = ""
        self._last: deque[tuple[float, Input, list[Command]]] = deque(maxlen=NUM_SHOWN)
        self._shown = 0

    def run(self) -> None:
        options = Options(heartbeat_s=HEARTBEAT_S, validate_every=1, failures=self.failures)
        try:
            self.result = simulate(
                self.workload,
                Gpus(NUM_GPUS),
                options=options,
                on_progress=self._progress,
                listen=self._hear,
            )
        except Exception as error:  # whatever ends it is what it was to find
            kinds = (InvariantViolation, SimulationFault)
            if not isinstance(error, kinds):
                traceback.print_exc(file=sys.stdout)
            self.broken = f"{type(error).__name__}: {error}"
        if self.result:
            inputs = self.result.inputs
            self.num_deaths = inputs.get("WorkerDied", 0) + inputs.get("AgentStarted", 0)

    def show_end(self) -> None:
        """The last inputs of a run that broke."""
        for now, event, commands in self._last:
            print(f"{now:.6f} {event}")
            for command in commands:
                print(f"    -> {command}")
        print(self.broken, flush=True)

    def _hear(self, event: Input, now: float, commands: list[Command]) -> None:
        self.num_inputs += 1
        self._last.append((now, event, commands))

    def _progress(self, share: float) -> None:
        if int(share * 10) > self._shown:
            self._shown = int(share * 10)
            print(f"{share * self.hours:.1f} h: {self.num_inputs} inputs checked", flush=True)


def report(bench: Bench, soak: Soak) -> None:
    """What came of it, and what is promised."""
    num_requests = len(soak.workload.requests)
    bench.value("simulated", soak.hours, "h")
    bench.value("requests", num_requests)
    bench.value("inputs, each followed by a check", soak.num_inputs)
    result = soak.result
    if result:
        bench.value("swap-ins", result.num_swap_ins)
        bench.value("swap-ins called off", result.num_called_off)
        bench.value("preemptions", result.num_preemptions)
        for name, num in sorted(result.commands.items()):
            bench.value(f"commands: {name}", num)
        late = sum(not ttft_s <= 2.0 for ttft_s in result.ttft_s)
        bench.value("first token < 2 s", 1 - late / max(num_requests, 1))
        slowest = max((s for s in result.ttft_s if s == s), default=0.0)
        bench.value("slowest first token", slowest, "s")
    num_lost = result.num_failed if result else num_requests
    bench.target("requests that did not end", num_lost, at_most=0)
    bench.target("violations of an invariant", 1 if soak.broken else 0, at_most=0)
    expected = soak.hours * 3600 / soak.death_every_s
    bench.target("deaths", soak.num_deaths, at_least=max(1, int(expected * DEATHS_AT_LEAST)))


def main(argv: Sequence[str]) -> int:
    """Run the benchmark. Returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", add_help=False)
    parser.add_argument("--hours", type=float)
    parser.add_argument("--seed", type=int, default=0)
    args, others = parser.parse_known_args(argv)
    if "-h" in others or "--help" in others:
        print(__doc__)
    bench = Bench("soak", "a day with agents that die, every step checked", others)
    hours = args.hours or (QUICK_HOURS if bench.quick else HOURS)
    soak = Soak(hours, QUICK_DEATH_EVERY_S if bench.quick else DEATH_EVERY_S, args.seed)
    soak.run()
    if soak.broken:
        soak.show_end()
    report(bench, soak)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
