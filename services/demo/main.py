"""`hotswap demo`: the main job on any machine, measured from the client's side.

Three models on a device that holds one and a half of them, the reference's three scenarios:

    cold     nothing runs: the engine worker is killed first, so the request waits for worker
             start, load from disk, swap-in, prefill
    switch   another model holds the memory: swap-out, swap-in, prefill
    warm     the model is resident: prefill

Every answer is greedy, and the three scenarios must give the same text.
"""

import asyncio
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from services import memcpy, settings
from services.bus import BusError
from services.demo.client import DemoClient, Measurement
from services.demo.models import make_demo_models, prompt_of
from services.ops import stack
from services.ops.nats_server import free_port
from services.ops.stack import StackError
from services.ops.supervisor import Supervisor, stop_on_signals
from services.settings import GpuSettings, ModelSettings, Settings

PROMPT_TOKENS = (128, 2048)
MAX_TOKENS = 16
REPEATS = 3  # of switch and warm, which are short; cold is measured once
DEVICE_SHARE = 1.5  # the device holds this many of the smallest model


class DemoReport(msgspec.Struct, frozen=True):
    """What ``--json`` writes."""

    memcpy_gb_per_s: float
    device_budget_bytes: int
    model_bytes: dict[str, int]
    rows: list[Measurement]
    took_s: float


async def run(folder: Path, json_file: Path | None) -> None:
    """Run the demo in ``folder``. Raises StackError where anything does not come out right."""
    console = Console()
    job = asyncio.create_task(_run(folder, json_file, console))
    stop = asyncio.create_task(stop_on_signals().wait())
    await asyncio.wait((job, stop), return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if not job.done():
        console.print("stopping ...")
        job.cancel()
        await asyncio.wait((job,))
        raise StackError("the demo was interrupted")
    await job


async def _run(folder: Path, json_file: Path | None, console: Console) -> None:
    began = time.monotonic()
    console.print("[bold]1/3[/] demo models: Llama, Mistral, Falcon (made once, then kept)")
    models = await asyncio.to_thread(_make_models, folder / "models", console)
    sizes = {model.name: _weight_bytes(model) for model in models}
    budget = int(DEVICE_SHARE * min(sizes.values()))

    console.print(
        "      "
        + ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in sizes.items())
        + f"; device budget {budget / 1e6:.0f} MB"
    )

    console.print("[bold]2/3[/] starting nats-server, scheduler, agent, api ...")
    config = _config(folder, models, budget)
    config_file = folder / "hotswap.toml"
    config_file.write_text(settings.dump(config))
    supervisor = Supervisor(log_folder=folder / "logs")
    try:
        gpus = list(config.gpus)
        endpoints = await stack.start(supervisor, config, config_file, gpus)
        await stack.wait_ready(supervisor, endpoints)
        console.print(f"      ready at {endpoints.api_url}/v1, logs in {folder / 'logs'}")
        console.print("[bold]3/3[/] measuring cold, switch, warm; raw memcpy in between ...")
        rows: list[Measurement] = []
        raw_copy = memcpy.RawCopy()
        copies = [raw_copy.once()]
        async with DemoClient(endpoints) as client:
            await client.wait_registered(list(sizes))
            async for row in _scenarios(client, models):
                rows.append(row)
                copies.append(raw_copy.once())
                console.print(
                    f"      {row.model:8} {row.prompt_tokens:5} tokens  {row.scenario:6}  "
                    f"first token after {row.ttft_s:7.3f} s"
                )
    except BusError as error:
        raise StackError(str(error)) from error
    finally:
        await supervisor.stop()
    ceiling = memcpy.ceiling(copies)
    _table_console().print(_table(rows, ceiling))
    _check(rows)
    _report(DemoReport(ceiling, budget, sizes, rows, time.monotonic() - began), json_file)
    console.print(f"A trace:   hotswap trace --config {_shown(config_file)}")
    console.print(f"Serve it:  hotswap up --config {_shown(config_file)}")


def _shown(path: Path) -> str:
    return os.path.relpath(path)


def _report(report: DemoReport, json_file: Path | None) -> None:
    switch = min(cold.ready_s / switch.ready_s for cold, switch, _ in _by_case(report.rows))
    first = min(cold.ttft_s / switch.ttft_s for cold, switch, _ in _by_case(report.rows))
    print(
        f"At the least, a switch was {switch:.0f} times shorter than a cold start, and its first "
        f"token {first:.1f} times sooner.\n"
        f"Cold, switched and warm answers agree, token for token. Took {report.took_s:.0f} s."
    )
    if json_file:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")


def _make_models(folder: Path, console: Console) -> list[Path]:
    def on_progress(what: str, done: int, total: int) -> None:
        console.print(f"      [{done}/{total}] {what}")

    return make_demo_models(folder, on_progress)


def _config(folder: Path, models: list[Path], budget_bytes: int) -> Settings:
    """Nothing is preloaded, so that a cold start loads exactly the model that is asked for. No
    prompt is remembered: the same one is sent again and again, and each time is to be computed.
    """
    return msgspec.structs.replace(
        Settings(),
        state_dir=str(folder / "state"),
        api=settings.ApiSettings(port=free_port(8000)),
        gpus=(GpuSettings(name="cpu0", device="cpu", memory=f"{budget_bytes}B"),),
        telemetry=settings.TelemetrySettings(log_level="info"),
        models={
            model.name: ModelSettings(source=str(model), preload=False, prefix_caching=False)
            for model in models
        },
    )


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


async def _scenarios(client: DemoClient, models: list[Path]) -> Any:
    from transformers import AutoTokenizer

    names = [model.name for model in models]
    for model, other in zip(names, names[1:] + names[:1], strict=True):
        tokenizer = AutoTokenizer.from_pretrained(models[names.index(model)])
        for num_tokens in PROMPT_TOKENS:
            prompt = prompt_of(tokenizer, num_tokens)
            await client.kill_worker(lambda pid: os.kill(pid, signal.SIGKILL))
            yield await client.measure("cold", model, num_tokens, prompt, MAX_TOKENS)
            switches, warms = [], []
            for _ in range(REPEATS):
                await client.complete(other, "hello", 1)
                switches.append(
                    await client.measure("switch", model, num_tokens, prompt, MAX_TOKENS)
                )
                warms.append(await client.measure("warm", model, num_tokens, prompt, MAX_TOKENS))
            for rows in (switches, warms):
                yield _median_row(rows)


def _median_row(rows: list[Measurement]) -> Measurement:
    """The row whose time to first token is the median; all must have said the same."""
    if len({row.text for row in rows}) != 1:
        raise StackError(f"{rows[0].model}: repeated {rows[0].scenario} answers differ")
    middle = statistics.median_low(row.ttft_s for row in rows)
    return next(row for row in rows if row.ttft_s == middle)


def _check(rows: list[Measurement]) -> None:
    for cold, switch, warm in _by_case(rows):
        if not cold.text == switch.text == warm.text:
            raise StackError(
                f"{cold.model}, {cold.prompt_tokens} tokens: the answers differ between "
                f"cold {cold.text!r}, switch {switch.text!r}, warm {warm.text!r}"
            )
        for row, wanted in ((cold, "cold"), (switch, "switch"), (warm, "warm")):
            if row.start != wanted:
                raise StackError(f"{row.model}: a {wanted} request was served {row.start}")


def _by_case(rows: list[Measurement]) -> Iterator[list[Measurement]]:
    for index in range(0, len(rows), 3):
        yield rows[index : index + 3]


def _table_console() -> Console:
    """As wide as the table where the output is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=120)


def _table(rows: list[Measurement], ceiling: float) -> Table:
    table = Table(
        title="Three models, one device that holds one and a half of them",
        caption=(
            "resident: request sent -> weights on the device; "
            f"memcpy of the same run: {ceiling:.1f} GB/s"
        ),
    )
    for heading in ("model", "prompt", "scenario"):
        table.add_column(heading)
    for heading in ("first token", "resident", "moved", "GB/s", "of memcpy"):
        table.add_column(heading, justify="right")
    for heading in ("first token\nvs cold", "resident\nvs cold"):
        table.add_column(heading, justify="right")
    for case in _by_case(rows):
        cold = case[0]
        for row in case:
            moved = row.num_bytes > 0
            table.add_row(
                row.model if row is cold else "",
                f"{row.prompt_tokens}" if row is cold else "",
                row.scenario,
                f"{row.ttft_s:.3f} s",
                f"{row.ready_s:.3f} s" if moved else "-",
                f"{row.num_bytes / 1e6:.0f} MB" if moved else "0",
                f"{row.gb_per_s:.1f}" if moved else "-",
                f"{row.gb_per_s / ceiling:.0%}" if moved else "-",
                "" if row is cold else f"1/{cold.ttft_s / row.ttft_s:.0f}",
                "" if row is cold or not moved else f"1/{cold.ready_s / row.ready_s:.0f}",
            )
        table.add_section()
    return table
