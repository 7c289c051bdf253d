"""`hotswap simulate`: which options there are, and what they make of a run."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from services.scheduler.simulate.cost import CostModel
    from services.scheduler.simulate.policies import Policy
    from services.scheduler.simulate.run import Result
    from services.scheduler.simulate.workload import Workload

F = TypeVar("F", bound=Callable[..., Any])

# The heavy imports are in the functions: `hotswap --help` reads this module too.
WORKLOADS = ("tail115", "poisson100", "market87", "arena27", "mixed")
POLICIES = (
    "hotswap",
    "lru",
    "gdsf",
    "belady",
    "hotswap-no-shares",
    "hotswap-prefetch",
    "hotswap-infinite-link",
    "dedicated",
)
_FILE = click.Path(dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)


def _traffic(command: F) -> F:
    """What comes."""
    for option in (
        click.option("--duration", "hours", type=float, help="Only the first so many hours."),
        click.option("--speed", type=float, help="Compress the time of --trace by this factor."),
        click.option("--max-batch", type=click.IntRange(1),
                     help="Requests of a model that run together. Default: as the workload."),
        click.option("--sizes", type=_FILE, help="CSV of model,weight_bytes, for --trace."),
        click.option("--size", default="16GB", show_default=True, help="Weights, for --trace."),
        click.option("--trace", "trace_file", type=_FILE, help="Your own traffic, CSV or CSV.gz."),
        click.option("--traces", "folder", type=_FOLDER, help="Folder of `hotswap traffic`."),
        click.option("--seed", default=0, show_default=True, help="Of workloads that are drawn."),
    ):  # fmt: skip
        command = option(command)
    return command


def _cluster(command: F) -> F:
    """What serves it."""
    for option in (
        click.option("--set", "changes", multiple=True, metavar="KEY=VALUE",
                     help="Another constant of the cost model, say, kv_bytes_per_token=0."),
        click.option("--fixed", "fixed_s", type=float, help="Seconds of a swap besides its bytes."),
        click.option("--link", "link_gb", type=float, help="GB/s from host to GPU."),
        click.option("--cost", default="h100", show_default=True,
                     help="Cost model: h100, h100-kv, or a JSON file of bench.swap."),
        click.option("--policy", "policies", multiple=True, type=click.Choice(POLICIES),
                     help="Policy; give it again for several side by side. Default: hotswap, lru."),
        click.option("--gpu-memory", default="74GB", show_default=True, help="Of one GPU."),
        click.option("--gpus", "num_gpus", type=click.IntRange(1),
                     help="How many. Default: the workload's own number."),
    ):  # fmt: skip
        command = option(command)
    return command


def _output(command: F) -> F:
    """What is asked, and where the answer goes."""
    for option in (
        click.option("--plot", "plot_file", type=_FILE, help="Draw a picture there (.png, .svg)."),
        click.option("--json", "json_file", type=_FILE, help="Also write the figures there."),
        click.option("--ttft", "ttft_s", default=2.0, show_default=True,
                     help="With --plan: seconds to the first token."),
        click.option("--target", default=0.995, show_default=True,
                     help="With --plan: share of requests that must meet --ttft."),
        click.option("--plan", "is_plan", is_flag=True,
                     help="Find the smallest number of GPUs that meets the target."),
    ):  # fmt: skip
        command = option(command)
    return command


@click.command()
@click.argument("names", nargs=-1, metavar="[WORKLOAD]...")
@_traffic
@_cluster
@_output
def simulate(
    names: tuple[str, ...],
    *,
    folder: Path | None,
    trace_file: Path | None,
    policies: tuple[str, ...],
    num_gpus: int | None,
    is_plan: bool,
    json_file: Path | None,
    plot_file: Path | None,
    target: float,
    ttft_s: float,
    **how: Any,
) -> None:
    """Run traffic through the real scheduler on simulated GPUs, faster than it comes.

    \b
    WORKLOAD is one or more of
      tail115      24 h, 115 models with little traffic each   6 GPUs   needs --traces
      poisson100   1 h, 100 equal models at random             6 GPUs
      market87     5.5 h, 87 models, few have most             4 GPUs   needs --traces
      arena27      10 min, 27 chat models                      2 GPUs   needs --traces
      mixed        1 h, models of 8 to 64 GB                   8 GPUs
    or bring your own: --trace FILE with the columns
      t_s,model_id,input_tokens,output_tokens    and, if you like, tenant

    \b
    hotswap simulate poisson100                                   beside LRU
    hotswap simulate tail115 --traces DIR --duration 2 --gpus 5
    hotswap simulate --trace my.csv --size 16GB --plan --target 0.99 --ttft 1
    """
    from services.scheduler.simulate.errors import SimulateError

    with plain_errors():
        workloads = _workloads(names, folder, trace_file, num_gpus, how)
        if plot_file:
            from services.scheduler.simulate import plots

            plots.check()
            if len(workloads) > 1:
                raise SimulateError(f"--plot {plot_file}: a picture shows one workload")
        chosen = _policies(policies or (("hotswap",) if is_plan else ("hotswap", "lru")), how)
        memory = _size("--gpu-memory", how["gpu_memory"])
        if is_plan:
            _plan(workloads, chosen, memory, (target, ttft_s), json_file, plot_file)
        else:
            _compare(workloads, chosen, memory, json_file, plot_file)


@contextmanager
def plain_errors() -> Iterator[None]:
    """What can be wrong with input and files, in one line for who typed the command."""
    from services.scheduler.simulate.errors import SimulateError

    try:
        yield
    except SimulateError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:  # of a file that is written
        raise click.ClickException(f"{error.filename}: {error.strerror}") from error


# -- from options to things ----------------------------------------------------------------


def _workloads(
    names: tuple[str, ...],
    folder: Path | None,
    trace_file: Path | None,
    num_gpus: int | None,
    how: dict[str, Any],
) -> "list[tuple[Workload, int]]":
    """Each with its number of GPUs."""
    from services.scheduler.simulate import presets
    from services.scheduler.simulate.errors import SimulateError

    hours, speed = how["hours"], how["speed"]
    for option, value in (("--duration", hours), ("--speed", speed)):
        if value is not None and value <= 0:
            raise SimulateError(f"{option} {value:g} must be greater than 0")
    duration_s = float("inf") if hours is None else hours * 3600
    found = []
    if trace_file is not None:
        own = _own(trace_file, speed or 1.0, duration_s, how)
        found.append((own, num_gpus or max(1, len(own.models) // 16)))
    elif not names:
        raise SimulateError(f"name a workload ({', '.join(WORKLOADS)}), or give --trace FILE")
    for name in names:
        preset = presets.preset(name)
        made = preset.make(folder, how["seed"], duration_s)
        found.append((made, num_gpus or preset.num_gpus))
    return [(_with_batch(made, how["max_batch"]), number) for made, number in found]


def _with_batch(workload: "Workload", max_batch: int | None) -> "Workload":
    import msgspec

    if max_batch is None:
        return workload
    models = {
        model: msgspec.structs.replace(size, max_batch=max_batch)
        for model, size in workload.models.items()
    }
    return msgspec.structs.replace(workload, models=models)


def _own(file: Path, speed: float, duration_s: float, how: dict[str, Any]) -> "Workload":
    from services.scheduler.simulate import workload

    size = workload.ModelSize(_size("--size", how["size"]))
    sizes = workload.read_sizes(how["sizes"], size) if how["sizes"] else {}
    return workload.read(file, speed=speed, duration_s=duration_s, sizes=sizes, size=size)


def _size(option: str, text: str) -> int:
    from services import settings
    from services.scheduler.simulate.errors import SimulateError

    try:
        num_bytes = settings.parse_bytes(text)
    except ValueError as error:
        raise SimulateError(f"{option}: {error}") from error
    if num_bytes <= 0:
        raise SimulateError(f"{option} {text} must be greater than 0")
    return num_bytes


def _policies(names: tuple[str, ...], how: dict[str, Any]) -> "list[Policy]":
    from services.scheduler.simulate import policies

    cost = _cost(how)
    return [policies.policy(name, cost) for name in dict.fromkeys(names)]


def _cost(how: dict[str, Any]) -> "CostModel":
    from services.scheduler.simulate import cost
    from services.scheduler.simulate.workload import GB

    changes = dict(_change(text) for text in how["changes"])
    if how["link_gb"] is not None:
        changes["link_bytes_per_s"] = how["link_gb"] * GB
    if how["fixed_s"] is not None:
        changes["swap_fixed_s"] = how["fixed_s"]
    return cost.changed(cost.named(how["cost"]), changes)


def _change(text: str) -> tuple[str, float]:
    from services.scheduler.simulate.errors import SimulateError

    key, _, value = text.partition("=")
    try:
        return key.strip(), float(value)
    except ValueError as error:
        raise SimulateError(f"--set {text}: write it as KEY=VALUE, VALUE a number") from error


# -- runs ----------------------------------------------------------------------------------


def _compare(
    workloads: "list[tuple[Workload, int]]",
    chosen: "list[Policy]",
    memory: int,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    from rich.console import Console

    from services.scheduler.simulate import plots, report
    from services.scheduler.simulate.policies import run_policy
    from services.scheduler.simulate.run import Gpus

    console = Console()
    written: list[report.Summary] = []
    for workload, num_gpus in workloads:
        results: dict[str, Result] = {}
        for one in chosen:
            with progress(f"{workload.name}, {one.name}") as on_progress:
                gpus = Gpus(num_gpus, memory)
                results[one.name] = run_policy(workload, gpus, one, on_progress=on_progress)
        summaries = {name: report.summarize(result, name) for name, result in results.items()}
        console.print(report.table(list(summaries.values())))
        closed = report.gap_of(summaries)
        if closed == closed:  # not nan: all three were run
            console.print(f"of what LRU loses, {closed:.0%} is gained back")
        written += summaries.values()
        if plot_file:
            plots.ttft_cdf(results, plot_file)
    if json_file:
        json_file.write_bytes(report.to_json(written))


def _plan(
    workloads: "list[tuple[Workload, int]]",
    chosen: "list[Policy]",
    memory: int,
    wanted: tuple[float, float],
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    from rich.console import Console

    from services.scheduler.simulate import plan, plots, report
    from services.scheduler.simulate.errors import SimulateError

    target = plan.Target(*wanted)
    if not 0 < target.share <= 1 or target.ttft_s <= 0:
        raise SimulateError(f"--target {wanted[0]:g} --ttft {wanted[1]:g}: a share, and seconds")
    if any(one.is_dedicated for one in chosen) or len(chosen) > 1:
        raise SimulateError("--plan looks at one --policy, and not at dedicated")
    console = Console()
    written: dict[str, plan.Plan] = {}
    for workload, _ in workloads:
        with progress(f"{workload.name}, plan") as on_progress:
            made = plan.plan(workload, memory, chosen[0], target, on_progress=on_progress)
        console.print(plan.table(workload, made))
        if made.num_gpus is None:
            console.print("no number of GPUs is enough: a request alone takes longer than that")
        else:
            console.print(f"{made.num_gpus} GPUs are enough for {len(workload.models)} models")
        written[workload.name] = made
        if plot_file:
            plots.share_by_gpus(made, workload.name, plot_file)
    if json_file:
        json_file.write_bytes(report.to_json(written))


@contextmanager
def progress(label: str) -> Iterator[Callable[[float], None] | None]:
    """A bar, where somebody looks at a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    with click.progressbar(length=1000, label=label, file=sys.stderr) as bar:

        def show(share: float) -> None:
            done = int(1000 * share)
            if done < bar.pos:  # the next run of a plan
                bar.pos = 0
            bar.update(done - bar.pos)

        yield show
