"""Traffic through `decide` and simulated GPUs: times by hand, all ends, the same every time."""

import math

import msgspec
import pytest

from schemas.commands import Command
from services.scheduler.inputs import Input, Tick
from services.scheduler.simulate import policies
from services.scheduler.simulate.cost import H100, CostModel
from services.scheduler.simulate.errors import SimulateError
from services.scheduler.simulate.plan import Target, plan
from services.scheduler.simulate.report import gap_closed, percentile, summarize
from services.scheduler.simulate.run import Failure, Gpus, Options, Result, next_use, simulate
from services.scheduler.simulate.workload import (
    DEFAULT_SIZE,
    GB,
    ModelSize,
    Request,
    Workload,
    poisson,
)
from services.scheduler.simulate.world import START_S

CHECKED = Options(validate_every=1, bus_s=0.0)
ONE = Gpus(1, 20 * GB)  # holds one model of `DEFAULT_SIZE`
SWAP_S = 0.05 + 16 / 50
COST = msgspec.structs.replace(H100, swap_out_s=0.25)


def load(*requests: Request) -> Workload:
    models = dict.fromkeys(sorted({request.model for request in requests}), DEFAULT_SIZE)
    return Workload("by hand", models, list(requests))


def busy(seed: int = 0, num_models: int = 10, rate: float = 4.0, for_s: float = 60.0) -> Workload:
    models = {f"m{number}": DEFAULT_SIZE for number in range(num_models)}
    return poisson(models, rate, for_s, seed=seed)


def test_a_warm_model_takes_its_prefill() -> None:
    result = simulate(load(Request(0, "a", 10, 2), Request(5, "a", 1000, 11)), ONE, COST,
                      options=CHECKED)  # fmt: skip
    assert result.ttft_s[0] == pytest.approx(SWAP_S + COST.prefill_s(10))
    assert result.ttft_s[1] == pytest.approx(0.008 + 1000 * 36e-6)
    assert result.tpot_s[1] == pytest.approx(0.00812)
    assert result.num_swap_ins == 1


def test_a_switch_takes_the_copy_and_the_prefill() -> None:
    result = simulate(load(Request(0, "a", 10, 2), Request(5, "b", 1000, 2)), ONE, COST,
                      options=CHECKED)  # fmt: skip
    assert result.ttft_s[1] == pytest.approx(0.25 + SWAP_S + COST.prefill_s(1000))
    assert result.commands == {"SwapIn": 2, "SwapOut": 1}
    assert result.bytes_moved == 32 * GB


def test_every_command_is_on_its_way_for_a_while() -> None:
    options = Options(validate_every=1, bus_s=0.125)
    result = simulate(load(Request(0, "a", 10, 2), Request(5, "b", 10, 2)), ONE, COST,
                      options=options)  # fmt: skip
    assert result.ttft_s[1] == pytest.approx(0.125 + 0.25 + 0.125 + SWAP_S + COST.prefill_s(10))


def test_all_requests_end_and_the_same_seed_gives_the_same() -> None:
    results = [
        simulate(busy(seed), Gpus(2, 40 * GB), options=Options(validate_every=7))
        for seed in (1, 1, 2)
    ]
    assert [result.num_failed for result in results] == [0, 0, 0]
    first, again, other = (_figures(result) for result in results)
    assert first == again != other


def _figures(result: Result) -> tuple[object, ...]:
    return (result.ttft_s, result.tpot_s, result.commands, result.inputs, result.bytes_moved)


def test_more_than_a_batch_of_two_models_all_end() -> None:
    """Long answers on one GPU that holds one model: they must take turns."""
    requests = [Request(0.01 * i, "ab"[i % 2], 500, 400) for i in range(80)]
    result = simulate(load(*requests), ONE, options=CHECKED)
    assert result.num_failed == 0
    assert result.num_swap_ins >= 2


def test_heartbeats_change_little() -> None:
    workload = busy(3)
    plain = simulate(workload, Gpus(2, 40 * GB))
    beating = simulate(workload, Gpus(2, 40 * GB), options=Options(heartbeat_s=1.0))
    assert beating.num_failed == 0
    assert beating.inputs["AgentStatus"] > 50 > plain.inputs["AgentStatus"]


def test_an_idle_hour_costs_nothing() -> None:
    ticks: list[float] = []

    def listen(event: Input, now: float, commands: list[Command]) -> None:
        if isinstance(event, Tick):
            ticks.append(now - START_S)

    workload = load(Request(0, "a", 10, 2), Request(3600, "a", 10, 2))
    result = simulate(workload, ONE, listen=listen)
    assert result.num_failed == 0
    assert len(ticks) < 10


def test_what_never_ends_is_counted() -> None:
    workload = load(Request(0, "a", 10, 20_000), Request(1, "a", 10, 2))
    result = simulate(workload, ONE, options=Options(patience_s=10.0))
    assert result.num_failed == 1
    assert math.isnan(result.ttft_s[0])


@pytest.mark.parametrize("what", ["agent", "worker"])
def test_a_death_loses_no_request(what: str) -> None:
    failures = tuple(
        msgspec.convert({"at_s": at_s, "gpu": gpu, "what": what}, Failure)
        for at_s, gpu in ((5.0, 0), (20.0, 1), (21.0, 0))
    )
    cost = msgspec.structs.replace(H100, load_bytes_per_s=100e9)
    options = Options(validate_every=1, failures=failures)
    result = simulate(busy(4, 6, 3.0, 40.0), Gpus(2, 40 * GB), cost, options=options)
    assert result.num_failed == 0
    assert result.commands["Load"] >= 6
    assert result.inputs["QueueDepths"] > 10


def test_time_in_decide_is_told_by_kind() -> None:
    workload = busy(for_s=2.0)
    result = simulate(workload, Gpus(2), options=Options(time_decide=True))
    assert result.decide_s.keys() == result.inputs.keys()
    assert 0 < sum(result.decide_s.values()) < result.took_s


@pytest.mark.parametrize("name", list(policies.ABOUT))
def test_every_policy_runs(name: str) -> None:
    policy = policies.policy(name, H100)
    result = policies.run_policy(busy(for_s=10.0), Gpus(2), policy)
    assert result.num_failed == 0
    summary = summarize(result, name)
    assert summary.num_gpus == (10 if name == "dedicated" else 2)
    if name == "dedicated":
        assert result.num_swap_ins == 10


def test_an_unknown_policy_is_told_which_there_are() -> None:
    with pytest.raises(SimulateError, match=r"hotswap, .*lru"):
        policies.policy("mru", H100)


def test_belady_knows_what_comes_next() -> None:
    ask = next_use(load(Request(1, "a", 1, 1), Request(2, "b", 1, 1), Request(3, "a", 1, 1)))
    assert ask("a", START_S) == START_S + 1
    assert ask("a", START_S + 1) == START_S + 3
    assert ask("b", START_S + 2) == math.inf


def test_a_plan_finds_the_fewest_gpus() -> None:
    workload = busy(5, num_models=8, for_s=30.0)
    memory = 20 * GB
    made = plan(workload, memory, policies.policy("hotswap", H100), Target(0.95, 1.0))
    tried = {one.num_gpus: one.is_enough for one in made.tries}
    assert made.num_gpus is not None
    assert tried[made.num_gpus]
    assert not tried.get(made.num_gpus - 1, False)


def test_a_plan_that_can_not_be_met() -> None:
    slow = CostModel(prefill_fixed_s=5.0)
    workload = load(Request(0, "a", 10, 2))
    made = plan(workload, 20 * GB, policies.policy("hotswap", slow), Target(0.5, 1.0))
    assert made.num_gpus is None


def test_a_model_that_fits_no_gpu_is_refused() -> None:
    workload = Workload("big", {"a": ModelSize(30 * GB)}, [Request(0, "a", 1, 1)])
    with pytest.raises(SimulateError, match=r"a needs 32.0 GB .* a GPU has 20.0"):
        simulate(workload, ONE)


def test_figures_by_hand() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.0
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.99) == 4.0
    assert math.isnan(percentile([], 0.5))
    assert gap_closed(0.98, 0.9, 1.0) == pytest.approx(0.8)
    assert math.isnan(gap_closed(1.0, 1.0, 1.0))
