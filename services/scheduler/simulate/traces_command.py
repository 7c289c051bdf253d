"""`hotswap traffic`: the files of the named workloads, made from public sources."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from services.scheduler.simulate.command import plain_errors, progress

if TYPE_CHECKING:
    from services.scheduler.simulate.workload import Request

F = TypeVar("F", bound=Callable[..., Any])

# The heavy imports are in the functions: `hotswap --help` reads this module too.


def _places(command: F) -> F:
    for option in (
        click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True,
                     help="Folder for the file; `hotswap simulate --traces` takes it."),
        click.argument("source", type=click.Path(exists=True, path_type=Path)),
    ):  # fmt: skip
        command = option(command)
    return command


@click.group()
def traffic() -> None:
    """Make the traffic files of `hotswap simulate` from public traces.

    Clone the repository that the command names and give the clone as SOURCE; nothing is
    downloaded. The traces keep their licences, and ask to be cited.

    \b
    hotswap traffic azure    AzurePublicDataset --out DIR   lengths of requests
    hotswap traffic gentd26  clusterdata --out DIR          for market87; needs that of azure
    hotswap traffic arena    VTC-artifact --out DIR         for arena27
    hotswap traffic servegen ServeGen --out DIR             for tail115
    """


@traffic.command()
@_places
def azure(source: Path, out: Path) -> None:
    """Azure LLM inference trace 2023: an hour of two services.

    \b
    repository  github.com/Azure/AzurePublicDataset
    files       data/AzureLLMInferenceTrace_code.csv and _conv.csv
    licence     CC-BY 4.0
    cite        Patel et al., Splitwise: Efficient generative LLM inference using phase
                splitting. ISCA 2024
    """
    from services.scheduler.simulate import presets, traces

    with plain_errors():
        _written(traces.azure(source), out / presets.LENGTHS_FILE)


@traffic.command()
@_places
@click.option("--lengths", type=click.Path(dir_okay=False, path_type=Path),
              help="The file of `hotswap traffic azure`. Default: the one in --out.")  # fmt: skip
def gentd26(source: Path, out: Path, lengths: Path | None) -> None:
    """GenTD26: three weeks of a service that makes images with many models.

    Images have no tokens: lengths are those of random conversations of the Azure trace.

    \b
    repository  github.com/alibaba/clusterdata
    file        cluster-trace-v2026-GenAI/lora_request_trace.csv
    licence     none in its folder; the repository allows use for research or study
    cite        Lin et al., Understanding Diffusion Model Serving in Production: A Top-Down
                Analysis of Workload, Scheduling, and Resource Efficiency. SoCC 2025
    """
    from services.scheduler.simulate import presets, traces

    lengths = lengths or out / presets.LENGTHS_FILE
    if not lengths.exists():
        raise click.ClickException(
            f"{lengths} does not exist, and lengths come from there: run `hotswap traffic azure` "
            "first, or name its file with --lengths"
        )
    with plain_errors():
        _written(traces.gentd26(source, lengths), out / presets.MARKET_FILE)


@traffic.command()
@_places
def arena(source: Path, out: Path) -> None:
    """A chat arena: ten minutes of 27 models, as the VTC artifact resampled it.

    A pickle can run code. This one is read by a reader that takes lists, texts, numbers and
    the one class the file needs, and refuses a file that names anything else.

    \b
    repository  github.com/Ying1123/VTC-artifact
    file        fair_bench/real_trace.pkl
    licence     Apache-2.0
    cite        Sheng et al., Fairness in Serving Large Language Models. OSDI 2024,
                arXiv 2401.00588
    """
    from services.scheduler.simulate import presets, traces

    with plain_errors():
        _written(traces.arena(source), out / presets.ARENA_FILE)


@traffic.command()
@_places
def servegen(source: Path, out: Path) -> None:
    """ServeGen: a day of the clients of a cloud that send little; each becomes a model.

    Requests per ten minutes are measured; their moments and lengths are drawn, by a fixed
    seed, from the distributions that were fitted to each client.

    \b
    repository  github.com/alibaba/ServeGen
    files       data/language/m-small, m-mid, m-large and data/reason/deepseek-r1
    licence     Apache-2.0
    cite        Xiang et al., ServeGen: Workload Characterization and Generation of Large
                Language Model Serving in Production. arXiv 2505.09999
    """
    from services.scheduler.simulate import presets, tail

    with plain_errors():
        with progress("ServeGen") as on_progress:
            requests = tail.tail(source, on_progress)
        _written(requests, out / presets.TAIL_FILE)


def _written(requests: "list[Request]", path: Path) -> None:
    from services.scheduler.simulate import traces

    traces.write(requests, path)
    num_models = len({request.model for request in requests})
    hours = (requests[-1].at_s - requests[0].at_s) / 3600
    click.echo(f"{path}: {len(requests):,} requests, {num_models} models, {hours:.2f} h")
