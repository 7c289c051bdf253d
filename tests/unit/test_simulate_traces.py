"""Public traces made into traffic: each format in small, and what is refused."""

import json
import pickle
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from services.cli import cli
from services.scheduler.simulate import presets, tail, traces, workload
from services.scheduler.simulate.errors import SimulateError
from services.scheduler.simulate.workload import Request

AZURE_HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
CODE = AZURE_HEAD + "2023-11-16 18:17:04.0319600,3180,8\n2023-11-16 18:17:03.9799600,4808,10"
CONV = AZURE_HEAD + "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
IMAGES = """gmt_create,predict_type,exec_time_seconds,checkpoint_model_version_id,num_lora
2024-11-15 18:16:14,TXT_2_IMG,43.0,M1,0
2024-11-15 16:57:50,TXT_2_IMG,32.0,M0,0
2024-11-15 18:16:14,TXT_2_IMG,9.0,M0,2
"""


def convert(*argv: str | Path) -> Result:
    return CliRunner().invoke(cli, ["traffic", *map(str, argv)])


def made(*argv: str | Path, out: Path) -> list[Request]:
    """What the simulator reads of the file that the command wrote."""
    done = convert(*argv, "--out", out)
    assert done.exit_code == 0, done.output
    return workload.read(Path(done.output.split(": ")[0])).requests


# -- azure ---------------------------------------------------------------------------------


@pytest.fixture
def azure(tmp_path: Path) -> Path:
    """A clone with the two files."""
    folder = tmp_path / "AzurePublicDataset"
    for name, text in zip(traces.AZURE_FILES.values(), (CODE, CONV), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_azure_has_two_services_in_order_of_time(azure: Path, tmp_path: Path) -> None:
    expected = [
        Request(0.0, "conv", 374, 44),
        Request(4.314, "conv", 396, 109),
        Request(77.299, "code", 4808, 10),
        Request(77.351, "code", 3180, 8),
    ]
    assert made("azure", azure, out=tmp_path) == expected
    assert made("azure", azure / "data", out=tmp_path) == expected  # the files' own folder
    lengths = presets.lengths(tmp_path)
    assert lengths is not workload.lognormal_lengths


def test_the_same_source_gives_the_same_bytes(azure: Path, tmp_path: Path) -> None:
    files = [tmp_path / name / presets.LENGTHS_FILE for name in "ab"]
    for file in files:
        assert convert("azure", azure, "--out", file.parent).exit_code == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [path.name for path in files[0].parent.iterdir()] == [presets.LENGTHS_FILE]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("time,tokens\n1,2\n", "column TIMESTAMP, ContextTokens, GeneratedTokens is missing"),
        (AZURE_HEAD, "no line after the first; was it cut off?"),
        (CONV[:-5], "line 3: 2 of 3 columns; TIMESTAMP, ContextTokens, Generated"),  # cut off
        (AZURE_HEAD + "yesterday,1,2\n", "line 2: Invalid isoformat string: 'yesterday'"),
        (AZURE_HEAD + "2023-11-16 18:15:46.68,many,2\n", "line 2: invalid literal for int()"),
        (AZURE_HEAD + "2023-11-16 18:15:46.68,-1,2\n", "line 2: -1 is less than 0"),
    ],
)
def test_a_csv_file_that_is_wrong_is_told_by_name_and_line(
    azure: Path, tmp_path: Path, text: str, told: str
) -> None:
    (azure / traces.AZURE_FILES["conv"]).write_text(text)
    done = convert("azure", azure, "--out", tmp_path)
    assert done.exit_code == 1
    assert "AzureLLMInferenceTrace_conv.csv" in done.output
    assert told in done.output
    assert len(done.output.strip().splitlines()) == 1


# -- gentd26 -------------------------------------------------------------------------------


def test_gentd26_borrows_the_lengths_of_conversations(azure: Path, tmp_path: Path) -> None:
    (tmp_path / "lora_request_trace.csv").write_text(IMAGES)
    done = convert("gentd26", tmp_path, "--out", tmp_path)
    assert done.exit_code == 1
    assert "run `hotswap traffic azure` first" in done.output
    made("azure", azure, out=tmp_path)
    requests = made("gentd26", tmp_path, out=tmp_path)
    assert [(request.at_s, request.model) for request in requests] == [
        (0.0, "M0"), (4704.0, "M0"), (4704.0, "M1")
    ]  # fmt: skip
    assert {request[2:4] for request in requests} <= {(374, 44), (396, 109)}
    assert presets.market87(tmp_path).duration_s == 47.04


# -- arena ---------------------------------------------------------------------------------


def arena_file(path: Path, monkeypatch: pytest.MonkeyPatch, **wrong: Any) -> Path:
    """As the artifact pickled it, with its own class."""
    module = types.ModuleType("trace")
    theirs = type("Request", (), {"__module__": "trace"})
    module.Request = theirs  # type: ignore[attr-defined]
    records = []
    for adapter, at_s in (("lora-b", 1.25), ("lora-a", 0.25), ("lora-b", 2.0)):
        record = theirs()
        vars(record).update(
            {"adapter_dir": adapter, "prompt": "Hello", "prompt_len": 5, "output_len": 7}
            | {"req_time": at_s} | wrong
        )  # fmt: skip
        records.append(record)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "trace", module)
        path.write_bytes(pickle.dumps([["lora-a", "lora-b"], records]))
    return path


def test_arena_names_models_by_the_order_of_their_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = arena_file(tmp_path / "real_trace.pkl", monkeypatch)
    assert made("arena", source, out=tmp_path) == [
        Request(0.0, "A00", 5, 7), Request(1.0, "A01", 5, 7), Request(1.75, "A01", 5, 7)
    ]  # fmt: skip
    assert list(presets.arena27(tmp_path).models) == ["A00", "A01"]


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    source = tmp_path / "real_trace.pkl"
    source.write_bytes(pickle.dumps([["a"], [Malicious(touched)]]))
    with pytest.raises(SimulateError, match=r"refused, it names .*; only trace\.Request belongs"):
        traces.arena(source)
    assert not touched.exists()
    pickle.loads(source.read_bytes())
    assert touched.exists()  # so it would have


@pytest.mark.parametrize("code", ["cbuiltins\neval\n(S'1'\ntR.", "cos\nsystem\n.", "ctrace\nx\n."])
def test_a_pickle_names_nothing_else_either(tmp_path: Path, code: str) -> None:
    source = tmp_path / "real_trace.pkl"
    source.write_bytes(code.encode())
    with pytest.raises(SimulateError, match="refused"):
        traces.arena(source)


def test_an_arena_that_is_wrong_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = arena_file(tmp_path / "real_trace.pkl", monkeypatch)
    source.write_bytes(source.read_bytes()[:-20])
    with pytest.raises(SimulateError, match="not a whole pickle"):
        traces.arena(source)
    source.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(SimulateError, match="expected a list of adapters and a list of requests"):
        traces.arena(source)
    with pytest.raises(SimulateError, match=r"request 0: .*prompt_len"):
        traces.arena(arena_file(source, monkeypatch, prompt_len=-1))
    with pytest.raises(SimulateError, match="request 0: no adapter 'lora-z'"):
        traces.arena(arena_file(source, monkeypatch, adapter_dir="lora-z"))


# -- servegen ------------------------------------------------------------------------------


@pytest.fixture
def servegen(tmp_path: Path) -> Path:
    """A clone with two clients per pool: one that sends in two windows, one that sends too much."""
    folder = tmp_path / "ServeGen"
    for pool in tail.POOLS:
        day_s = pool.day * tail.DAY_S
        (folder / pool.folder).mkdir(parents=True)
        for number, rates in enumerate(({0: 0.05, 1200: 0.1}, {600: 90.0})):
            lines = [
                f"{at},{rate},1.5,{'Weibull' if at % 1200 else 'Gamma'},0.4,3.0"
                if (rate := rates.get(at - day_s))
                else f"{at},0,0,,0,0"
                for at in range(day_s - 1200, day_s + tail.DAY_S + 1200, 600)
            ]
            client = folder / pool.folder / f"chunk-{number}"
            Path(f"{client}-trace.csv").write_text("\n".join(lines))
            histograms = {
                "0": {"input_tokens": "{}", "output_tokens": "{}"},
                f"{day_s}": {"input_tokens": "{3: 0.5, 8: 0.5}", "output_tokens": "{7: 1.0}"},
            }
            Path(f"{client}-dataset.json").write_text(json.dumps(histograms))
    return folder


def test_servegen_keeps_counts_per_window_and_draws_the_rest(
    servegen: Path, tmp_path: Path
) -> None:
    requests = made("servegen", servegen, out=tmp_path)
    windows = Counter((request.model, int(request.at_s // 600)) for request in requests)
    models = ["S000", "S001", "S002", "S003"]  # of each pool the client that sends little
    assert windows == {(model, at): num for model in models for at, num in ((0, 30), (2, 60))}
    assert {request.input_tokens for request in requests} == {3, 8}
    assert {request.output_tokens for request in requests} == {7}
    assert requests == sorted(tail.tail(servegen))
    with pytest.raises(SimulateError, match="4 models besides those that burst, and not 115"):
        presets.tail115(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("chunk-0-trace.csv", "0,0.1\n", r"chunk-0-trace.csv, line 1: .* a line has six columns"),
        ("chunk-0-trace.csv", "0,0.1,1,Pareto,1,1\n", r"line 1: gaps like 'Pareto' 1; known: Gam"),
        ("chunk-0-trace.csv", "0,0,0,,0,0\n", r"1 windows of the day .* and not 144: was it cut"),
        ("chunk-0-dataset.json", "{", r"chunk-0-dataset.json: JSONDecodeError"),
        ("chunk-0-dataset.json", "{}", r"chunk-0-dataset.json: all histograms are empty"),
        (
            "chunk-0-dataset.json",
            '{"0": {"input_tokens": "__import__(\'os\')", "output_tokens": "{1: 1.0}"}}',
            r"chunk-0-dataset.json, second 0: ValueError.*expected by second input_tokens",
        ),
    ],
)
def test_a_servegen_that_is_wrong_is_told(servegen: Path, name: str, text: str, told: str) -> None:
    (servegen / "data/reason/deepseek-r1" / name).write_text(text)
    with pytest.raises(SimulateError, match=told):
        tail.tail(servegen)


def test_a_source_that_is_no_clone_is_told(servegen: Path, tmp_path: Path) -> None:
    (servegen / "data/language/m-mid/chunk-0-dataset.json").unlink()
    for argv, told in (
        (("azure", tmp_path), "give a clone of its repository, or the folder it is in"),
        (("arena", tmp_path), "fair_bench/real_trace.pkl is not there"),
        (("servegen", tmp_path), "give a clone of ServeGen"),
        (("servegen", servegen), "chunk-0-dataset.json: No such file or directory; give a whole"),
    ):
        done = convert(*argv, "--out", tmp_path)
        assert done.exit_code == 1
        assert told in done.output
