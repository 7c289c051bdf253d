"""How many demand events a second the scheduler's process handles, over a real nats-server.

200 models are resident on four agents. Requests for them come as the stream republishes them
(headers only), each followed by its RequestStarted and RequestEnded: three messages to read and
to decide about for one demand event. At the end one request for a model that is in host memory:
when its SwapIn is commanded, everything before it has been handled, in order.

    burst   all at once; demand events per CPU second of the scheduler process, and per second
    paced   10,000 demand events a second for a while; the share of a core that takes, and how
            long after the last of them a SwapIn is commanded

``--profile FILE`` runs the scheduler under cProfile instead, and writes its statistics.
"""

import asyncio
import itertools
import sys
import time
from datetime import UTC, datetime

import msgspec
import psutil

from bench._scheduler_rig import (
    FakeAgents,
    RawPublisher,
    Rig,
    Service,
    headed,
    open_rig,
    plain,
    status_of,
)
from bench.harness import Bench
from schemas import names
from schemas.commands import SwapIn
from schemas.events import LeaderElected, RequestEnded, RequestStarted
from schemas.stream import RequestTiming
from services.settings import ModelSettings, Settings

RATE = 10_000  # demand events per second, promised on one core

NUM_AGENTS = 4
NUM_RESIDENT = 200
NUM_PROBES = 40  # models in host memory; each is asked for once
BURST = 20_000
NUM_RUNNING = 64  # requests between start and end
PACED_S = 5.0
PACE_S = 0.01

_numbers = itertools.count()


def gpu_of(number: int) -> str:
    return f"gpu{number % NUM_AGENTS}"


def demand(request_id: str, model: str, *, number: int = 0) -> bytes:
    stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f") + "000Z"
    return headed(
        names.demand_subject("interactive", model),
        {
            "traceparent": f"00-{number:032x}-b7ad6b7169203331-01",
            "Nats-Msg-Id": request_id,
            "Nats-TTL": "60s",
            "Nats-Stream": names.STREAM_REQUESTS,
            "Nats-Subject": names.request_subject("interactive", model),
            "Nats-Sequence": str(number),
            "Nats-Last-Sequence": str(number),
            "Nats-Time-Stamp": stamp,
            "Nats-Msg-Size": "431",
        },
    )


def requests(count: int) -> list[bytes]:
    """The messages of ``count`` requests: demand, start and end, in overlapping order."""
    out: list[bytes] = []
    running: list[tuple[str, str, str]] = []
    for _ in range(count):
        number = next(_numbers)
        at = number % NUM_RESIDENT
        who = (gpu_of(at), f"model-{at}", f"req-{number:032x}")
        gpu, model, request_id = who
        now = time.time()
        started = RequestStarted(*who, now, 1, 0.001)
        out.append(
            demand(request_id, model, number=number)
            + plain(
                names.event_subject("request_started", gpu, model), msgspec.json.encode(started)
            )
        )
        running.append(who)
        if len(running) > NUM_RUNNING:
            out[-1] += _end(running.pop(0), now)
    out[-1] += b"".join(_end(who, time.time()) for who in running)
    return out


def _end(who: tuple[str, str, str], now: float) -> bytes:
    ended = RequestEnded(*who, now, "stop", 10, 20, RequestTiming())
    return plain(names.event_subject("request_ended", *who[:2]), msgspec.json.encode(ended))


class Load:
    """One scheduler that leads, and the requests for it."""

    def __init__(self, rig: Rig, scheduler: Service) -> None:
        self.rig = rig
        self.publisher = RawPublisher(rig.plan)
        self.process = psutil.Process(scheduler.pid)
        self._probes = (f"probe-{number}" for number in range(NUM_PROBES))

    def cpu_s(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system)

    async def all_handled(self) -> float:
        """Ask for a model that must be swapped in; when that is commanded (monotonic)."""
        probe = next(self._probes)
        await asyncio.to_thread(self.publisher.send, demand(f"ask-{probe}", probe))
        at, _ = await self.rig.seen.until(SwapIn, model=probe)
        return at

    async def burst(self, count: int) -> tuple[float, float]:
        """Demand events per CPU second, and per second."""
        data = b"".join(requests(count))
        cpu_s, began = self.cpu_s(), time.monotonic()
        await asyncio.to_thread(self.publisher.send, data)
        ended = await self.all_handled()
        return count / (self.cpu_s() - cpu_s), count / (ended - began)

    async def paced(self, for_s: float) -> tuple[float, float]:
        """CPU seconds per second at `RATE`, and seconds until all of it was handled."""
        per_step = int(RATE * PACE_S)
        steps = [b"".join(requests(per_step)) for _ in range(round(for_s / PACE_S))]
        cpu_s, began = self.cpu_s(), time.monotonic()
        for number, data in enumerate(steps, start=1):
            await asyncio.to_thread(self.publisher.send, data)
            await asyncio.sleep(max(0.0, began + number * PACE_S - time.monotonic()))
        sent = time.monotonic()
        ended = await self.all_handled()
        return (self.cpu_s() - cpu_s) / (ended - began), ended - sent


async def start(rig: Rig, *python: str) -> tuple[Load, FakeAgents, Service]:
    resident = [f"model-{n}" for n in range(NUM_RESIDENT)]
    probes = [f"probe-{n}" for n in range(NUM_PROBES)]
    models = {name: ModelSettings(source="/none", preload=False) for name in (*resident, *probes)}
    statuses = [
        status_of(
            f"gpu{g}",
            [m for n, m in enumerate(resident) if n % NUM_AGENTS == g],
            [m for n, m in enumerate(probes) if n % NUM_AGENTS == g],
            [*resident, *probes],  # whatever it does not hold
            num_free=NUM_PROBES,
        )
        for g in range(NUM_AGENTS)
    ]
    scheduler = await rig.start("scheduler", Settings(models=models), *python)
    await rig.seen.until(LeaderElected)
    agents = FakeAgents(rig.bus, statuses)
    await agents.start()
    load = Load(rig, scheduler)
    await load.all_handled()
    return load, agents, scheduler


async def measure(bench: Bench) -> None:
    async with open_rig() as rig:
        load, agents, _ = await start(rig)
        count = BURST // 4 if bench.quick else BURST
        rounds = 3 if bench.quick else 7
        per_cpu: list[float] = []
        per_wall: list[float] = []
        for _ in range(rounds):
            cpu, wall = await load.burst(count)
            per_cpu.append(cpu)
            per_wall.append(wall)
        share, lag = await load.paced(1.0 if bench.quick else PACED_S)
        await agents.end()
        load.publisher.close()
    median = sorted(per_cpu)[rounds // 2]
    bench.value("burst: demand events per second", sorted(per_wall)[rounds // 2], "1/s")
    bench.value("burst: worst round, per CPU second", min(per_cpu), "1/s")
    bench.value(f"paced at {RATE}/s: lag at the end", lag, "s")
    bench.value(f"paced at {RATE}/s: of one core", share, "x")
    bench.target("demand events per CPU second", median, at_least=RATE, unit="1/s")


async def profile(file: str) -> None:
    async with open_rig() as rig:
        load, agents, scheduler = await start(rig, "-m", "cProfile", "-o", file, "-m")
        for _ in range(3):
            cpu, _ = await load.burst(BURST)
            print(f"{cpu:.0f} demand events per CPU second, under the profiler")
        await agents.end()
        load.publisher.close()
        await scheduler.stop()


def main(argv: list[str]) -> int:
    if argv[:1] == ["--profile"]:
        asyncio.run(profile(argv[1]))
        return 0
    bench = Bench("scheduler_service", "demand events through the scheduler's process", argv)
    asyncio.run(measure(bench))
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
