"""What a simulation is made from: traffic files, drawn traffic, cost models, and the command."""

import gzip
import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from services.cli import cli
from services.scheduler.simulate import command, cost, policies, presets, workload
from services.scheduler.simulate.errors import SimulateError
from services.scheduler.simulate.workload import GB, Request

RESULTS = Path(__file__).parents[2] / "docs" / "results"
TRAFFIC = """t_s,model_id,input_tokens,output_tokens
4.0,b,20,5
0.5,a,10,1
2,a,30,7
"""


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "mine.csv"
    path.write_text(TRAFFIC)
    return path


def simulate(*argv: str | Path) -> Result:
    return CliRunner().invoke(cli, ["simulate", *map(str, argv)])


# -- traffic -------------------------------------------------------------------------------


def test_traffic_is_read_in_order_of_time(trace: Path) -> None:
    read = workload.read(trace)
    assert read.name == "mine"
    assert read.requests == [
        Request(0.5, "a", 10, 1), Request(2.0, "a", 30, 7), Request(4.0, "b", 20, 5)
    ]  # fmt: skip
    assert list(read.models) == ["a", "b"]
    assert read.duration_s == 4.0


def test_traffic_may_be_packed_cut_and_compressed(trace: Path) -> None:
    packed = trace.with_suffix(".csv.gz")
    packed.write_bytes(gzip.compress(trace.read_bytes()))
    read = workload.read(packed, speed=2.0, duration_s=1.5, without=["b"])
    assert [request.at_s for request in read.requests] == [0.25, 1.0]
    assert [r.at_s for r in read.compressed(2.0).shortened(0.3).requests] == [0.125]


def test_sizes_come_from_a_file_too(trace: Path, tmp_path: Path) -> None:
    sizes = tmp_path / "sizes.csv"
    sizes.write_text("model,weight_bytes\nb,8000000000\n")
    read = workload.read(trace, sizes=workload.read_sizes(sizes))
    assert [size.weight_bytes for size in read.models.values()] == [16 * GB, 8 * GB]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("t_s,model_id\n1,a\n", "input_tokens, output_tokens is missing"),
        ("", "t_s, model_id, input_tokens, output_tokens is missing"),
        (TRAFFIC + "soon,a,1,1\n", "line 5"),
        (TRAFFIC + "-1,a,1,1\n", "line 5: -1 is not a finite number"),
        (TRAFFIC + "1,a\n", "line 5"),
        (TRAFFIC + "1,a,1.5,1\n", "line 5"),
        (TRAFFIC + "nan,a,1,1\n", "line 5"),
        (TRAFFIC.splitlines()[0], "no request is left"),
    ],
)
def test_a_file_that_is_no_traffic(trace: Path, text: str, told: str) -> None:
    trace.write_text(text)
    with pytest.raises(SimulateError, match=told):
        workload.read(trace)


def test_requests_may_say_who_they_are_for(trace: Path) -> None:
    assert workload.read(trace).tenants() == ()
    ends = (",tenant", ",x", ",", ",y")
    lines = [line + end for line, end in zip(TRAFFIC.split(), ends, strict=True)]
    trace.write_text("\n".join(lines))
    assert workload.read(trace).tenants() == ("", "y", "x")


def test_workloads_go_together_in_order_of_time() -> None:
    one, other = (
        workload.poisson({name: workload.DEFAULT_SIZE}, 2.0, 20.0, seed=seed, tenant=name)
        for seed, name in enumerate("ab")
    )
    both = workload.together("both", one, other)
    assert list(both.models) == ["a", "b"]
    assert sorted(both.requests) == both.requests
    assert set(both.tenants()) == {"a", "b"}
    assert len(both.requests) == len(one.requests) + len(other.requests)


def test_drawn_traffic_follows_its_seed_and_rate() -> None:
    models = dict.fromkeys("abcd", workload.DEFAULT_SIZE)
    first, again, other = (workload.poisson(models, 10.0, 500.0, seed=s) for s in (1, 1, 2))
    assert first == again != other
    assert len(first.requests) == pytest.approx(5000, rel=0.1)
    skewed = workload.poisson(models, 10.0, 500.0, seed=1, zipf=1.0)
    num_first = sum(request.model == "a" for request in skewed.requests)
    assert num_first / len(skewed.requests) == pytest.approx(12 / 25, rel=0.1)
    outputs = sorted(request.output_tokens for request in first.requests)
    assert outputs[len(outputs) // 2] == pytest.approx(90, rel=0.1)


def test_drawn_workloads_need_no_files() -> None:
    for name in ("poisson100", "mixed"):
        made = presets.preset(name).make(None, 1, 60.0)
        assert made.requests[-1].at_s < 60
        assert max(size.weight_bytes for size in made.models.values()) <= 72 * GB
    assert set(presets.PRESETS) == set(command.WORKLOADS)
    assert set(policies.ABOUT) == set(command.POLICIES)


# -- cost models ---------------------------------------------------------------------------


def test_the_results_of_the_swap_benchmark_are_a_cost_model() -> None:
    made = cost.from_bench(RESULTS / "bench-swap-cpu.json")
    assert 1e9 < made.link_bytes_per_s < 100e9
    assert 0 <= made.swap_fixed_s < 0.1
    assert made.decode_fixed_s == cost.H100.decode_fixed_s


def test_two_sizes_give_rate_and_fixed_cost(tmp_path: Path) -> None:
    took = {"small": (100.0, 0.3), "large": (300.0, 0.5)}
    path = tmp_path / "swap.json"
    path.write_text(
        json.dumps(
            {
                "name": "swap",
                "groups": [
                    {"unit": "s", "variants": {f"{m}: swap-in": {"values": [s]}}}
                    for m, (_, s) in took.items()
                ],
                "values": {f"{m}: bytes moved": {"value": mb} for m, (mb, _) in took.items()},
            }
        )
    )
    made = cost.named(str(path))
    assert made.link_bytes_per_s == pytest.approx(1e9)
    assert made.swap_fixed_s == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("no", "not JSON"),
        ("[]", "no result of bench.swap"),
        ('{"name": "bus"}', "no result of bench.swap"),
        ('{"name": "swap"}', "'groups' is missing"),
        ('{"name": "swap", "groups": [], "values": {}}', "MODEL: swap-in"),
    ],
)
def test_a_file_that_is_no_cost_model(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(SimulateError, match=told):
        cost.from_bench(path)


def test_costs_that_make_no_sense_are_refused() -> None:
    with pytest.raises(SimulateError, match="link_bytes_per_s = 0"):
        cost.CostModel(link_bytes_per_s=0)
    with pytest.raises(SimulateError, match="swap_fixed_s = -1"):
        msgspec.structs.replace(cost.H100, swap_fixed_s=-1.0)
    assert cost.H100.infinite_link().swap_in_s(10**15) == 0.0


# -- the command ---------------------------------------------------------------------------


def test_own_traffic_side_by_side(trace: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    done = simulate("--trace", trace, "--size", "8GB", "--gpus", "1", "--json", file)
    assert done.exit_code == 0, done.output
    assert "hotswap" in done.output
    assert "lru" in done.output
    written = json.loads(file.read_bytes())
    assert [one["policy"] for one in written] == ["hotswap", "lru"]
    assert [one["num_requests"] for one in written] == [3, 3]


def test_tenants_are_told_apart_where_there_are_any(trace: Path, tmp_path: Path) -> None:
    assert "tenant" not in simulate("--trace", trace, "--gpus", "1").output
    file = tmp_path / "out.json"
    header, *lines = TRAFFIC.split()
    tenants = ("ada", "", "ada")
    named = [f"{line},{tenant}" for line, tenant in zip(lines, tenants, strict=True)]
    trace.write_text("\n".join([f"{header},tenant", *named]))
    done = simulate("--trace", trace, "--gpus", "1", "--policy", "hotswap", "--json", file)
    assert done.exit_code == 0, done.output
    assert "tenant ada: < 2 s" in done.output
    assert "tenant (none): < 2 s" in done.output
    (written,) = json.loads(file.read_bytes())
    assert {name: one["num_requests"] for name, one in written["tenants"].items()} == {
        "": 1, "ada": 2
    }  # fmt: skip


def test_a_plan_for_own_traffic(trace: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    done = simulate("--trace", trace, "--plan", "--target", "0.9", "--json", file)
    assert done.exit_code == 0, done.output
    assert "1 GPUs are enough for 2 models" in done.output
    assert json.loads(file.read_bytes())["mine"]["num_gpus"] == 1


def test_a_workload_by_name() -> None:
    done = simulate("poisson100", "--duration", "0.001", "--policy", "hotswap", "--seed", "3",
                    "--set", "kv_bytes_per_token=0", "--max-batch", "8")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "poisson100" in done.output


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ((), "name a workload"),
        (("nothing",), "no workload 'nothing'"),
        (("arena27",), "arena27.csv.gz is needed: say where it is with --traces"),
        (("arena27", "--traces", "."), "arena27.csv.gz is not in ."),
        (("mixed", "--gpu-memory", "lots"), "--gpu-memory: 'lots' is not a size"),
        (("mixed", "--duration", "0.001", "--gpu-memory", "40GB"), "a GPU has 40.0"),
        (("mixed", "--duration", "-1"), "--duration -1"),
        (("mixed", "--cost", "b200"), "no cost model 'b200'"),
        (("mixed", "--cost", "gone.json"), "gone.json: No such file"),
        (("mixed", "--link", "0", "--duration", "0.001"), "link_bytes_per_s"),
        (("mixed", "--set", "speed=1", "--duration", "0.001"), "no constant speed"),
        (("mixed", "--set", "suspend_s", "--duration", "0.001"), "write it as KEY=VALUE"),
        (("--trace", "gone.csv"), "gone.csv: No such file"),
        (("mixed", "--plan", "--target", "2", "--duration", "0.001"), "--target 2"),
        (("mixed", "--plan", "--policy", "dedicated", "--duration", "0.001"), "dedicated"),
    ],
)
def test_bad_options_are_told_in_one_line(argv: tuple[str, ...], told: str) -> None:
    done = simulate(*argv)
    assert done.exit_code == 1
    assert told in done.output
    assert len(done.output.strip().splitlines()) == 1


def test_a_picture_needs_its_library(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    done = simulate("--trace", trace, "--plot", tmp_path / "out.png")
    assert done.exit_code == 1
    assert "pip install 'hotswap[plots]'" in done.output
