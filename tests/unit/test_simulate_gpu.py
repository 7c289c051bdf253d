"""A simulated GPU does by the second what its cost model says, and answers as agents do."""

import msgspec
import pytest

from schemas.events import (
    CommandRejected,
    ModelRegistered,
    RequestStarted,
    SwapInCancelled,
    SwapInCompleted,
    SwapOutCompleted,
)
from schemas.state import AgentStatus
from services.scheduler.simulate.errors import SimulationFault
from services.scheduler.simulate.workload import GB
from tests.unit.simulate_rig import COST, Rig


def resident(*models: str) -> Rig:
    """These are there from 0 s on, for the price of nothing."""
    rig = Rig(*models)
    for model in models:
        rig.swap_in(model)
    rig.until(10)
    assert [rig.replica(model).state for model in models] == ["resident"] * len(models)
    return rig


def test_swap_ins_take_turns_on_the_link() -> None:
    rig = Rig("a", "b")
    rig.swap_in("a")
    rig.swap_in("b")
    rig.until(10)
    assert rig.names() == ["1.5 SwapInCompleted", "3 SwapInCompleted"]
    traces = [e.trace for _, e in rig.events if isinstance(e, SwapInCompleted)]
    assert [trace.total_s for trace in traces] == pytest.approx([1.5, 1.5])
    assert [trace.num_bytes for trace in traces] == [10 * GB, 10 * GB]


def test_a_request_alone_takes_its_prompt_and_its_rounds() -> None:
    rig = resident("a")
    rig.request("r", "a", 400, 101)
    rig.until(20)
    assert rig.ended() == {"r": pytest.approx(10 + 0.5 + 1.0)}


def test_one_token_ends_with_the_prompt() -> None:
    rig = resident("a")
    rig.request("r", "a", 400, 1)
    rig.until(20)
    assert rig.ended() == {"r": pytest.approx(10.5)}


def test_rows_of_one_model_share_its_rounds() -> None:
    rig = resident("a")
    rig.request("r", "a", 400, 101)
    rig.request("s", "a", 400, 101)
    rig.until(20)
    # r's prompt until 10.5, s's and one round of r in turns until 11.01, then rounds of both
    assert rig.ended() == {"r": pytest.approx(12.0), "s": pytest.approx(12.01)}


def test_models_take_turns_with_their_rounds() -> None:
    rig = resident("a", "b")
    rig.request("r", "a", 400, 2001)
    rig.until(11)
    rig.request("s", "b", 400, 101)
    rig.until(100)
    # s: its prompt takes turns with one round of r, then 100 rounds of 0.02 s
    assert rig.ended()["s"] == pytest.approx(11 + 0.51 + 2.0)
    # r: 50 rounds alone, one beside the prompt, 100 beside s's, 1849 alone
    assert rig.ended()["r"] == pytest.approx(11 + 0.51 + 2.0 + 18.49)


def test_a_batch_is_no_larger_than_the_model_allows() -> None:
    rig = resident("a")
    for name in "rstuv":
        rig.request(name, "a", 0, 101)
    rig.until(10)
    assert len(rig.replica("a").rows) == 4
    rig.until(30)
    started = {e.request_id: at for at, e in rig.events if isinstance(e, RequestStarted)}
    assert started["v"] == pytest.approx(min(rig.ended().values()))
    assert len(rig.ended()) == 5


def test_kv_that_is_not_there_is_waited_for() -> None:
    rig = resident("a", "b")  # 25 GB less 20 GB of weights: 5000 tokens
    rig.request("r", "a", 3000, 1000)
    rig.request("s", "a", 500, 600)
    assert len(rig.replica("a").rows) == 1
    rig.request("t", "b", 9000, 2)  # alone on its model: it may always
    assert len(rig.replica("b").rows) == 1
    rig.until(200)
    started = {e.request_id: at for at, e in rig.events if isinstance(e, RequestStarted)}
    assert started["s"] == pytest.approx(max(rig.ended()["r"], started["s"]))
    assert set(rig.ended()) == {"r", "s", "t"}


def test_kv_that_a_leaving_model_frees_is_used_at_once() -> None:
    rig = resident("a", "b")
    rig.request("r", "a", 3000, 1000)
    rig.request("s", "a", 500, 600)
    rig.swap_out("b")
    rig.until(10.25)
    assert len(rig.replica("a").rows) == 2


def test_an_idle_model_leaves_at_once_and_its_pages_stay() -> None:
    rig = resident("a")
    rig.swap_out("a")
    rig.until(11)
    assert rig.names(1) == ["10.25 SwapOutCompleted"]
    rig.swap_in("a")
    rig.until(20)
    assert rig.names(2) == ["11.5 SwapInCompleted"]
    event = rig.events[2][1]
    assert isinstance(event, SwapInCompleted)
    assert (event.trace.num_bytes, event.trace.kept_bytes) == (0, 10 * GB)


def test_pages_are_taken_from_who_left_first() -> None:
    rig = Rig("a", "b", "c")
    rig.swap_in("a")
    rig.swap_in("b")
    rig.until(10)
    rig.swap_out("a")
    rig.until(11)
    rig.swap_out("b")
    rig.until(12)
    rig.swap_in("c")  # 11 of 25 GB: 6 of a's 10 go
    cached = [rig.gpu.memory.cached_bytes(model) for model in ("a", "b")]
    assert cached == [4 * GB, 10 * GB]
    rig.gpu.report()
    status = rig.events[-1][1]
    assert isinstance(status, AgentStatus)
    assert [r.cached_bytes for r in status.replicas] == [4 * GB, 10 * GB, 0]


def test_a_drain_ends_with_its_last_request_and_takes_no_other() -> None:
    rig = resident("a")
    rig.request("r", "a", 400, 101)
    rig.until(11)
    rig.swap_out("a")
    rig.request("s", "a", 400, 101)
    rig.until(20)
    assert rig.names(2) == ["11.5 RequestEnded", "11.75 SwapOutCompleted"]
    assert rig.world.num_queued == 1


def test_a_preempted_request_keeps_its_tokens() -> None:
    rig = resident("a")
    rig.request("r", "a", 400, 101)
    rig.until(11)  # 50 of its 100 rounds are done
    rig.swap_out("a", preempt=True)
    rig.until(20)
    at, event = rig.events[-1]
    assert isinstance(event, SwapOutCompleted)
    assert (at, event.num_suspended) == (11.5, 1)
    assert rig.world.num_suspended == 1
    rig.swap_in("a")  # its weights are there; its KV, 451 tokens of 1 MB, is not
    rig.until(30)
    assert rig.ended() == {"r": pytest.approx(20 + 0.5 + 0.0451 + 0.5, abs=2e-4)}
    assert rig.world.num_suspended == 0


def test_a_preempted_prompt_goes_on_where_it_was() -> None:
    rig = resident("a", "b")
    rig.request("r", "a", 900, 1)
    rig.request("s", "b", 400, 1)
    rig.until(10.6)
    rig.swap_out("a", preempt=True)
    rig.until(15)
    assert rig.ended() == {"s": pytest.approx(11.1)}
    rig.swap_in("a")
    rig.until(30)
    assert rig.ended()["r"] == pytest.approx(15 + 0.5 + 0.4)


def test_a_preemption_cuts_a_drain_short() -> None:
    rig = resident("a")
    rig.request("r", "a", 400, 5001)
    rig.swap_out("a")
    rig.until(11)
    rig.swap_out("a", preempt=True)
    rig.until(12)
    assert rig.names(2) == ["11.5 SwapOutCompleted"]


def test_a_swap_in_is_called_off_and_what_came_stays() -> None:
    rig = Rig("a", "b")
    rig.swap_in("a")
    rig.swap_in("b")
    rig.until(1)  # 0.5 s fixed, 5 GB
    rig.swap_out("a")
    assert rig.names() == ["1 SwapInCancelled", "1 SwapOutCompleted"]
    event = rig.events[0][1]
    assert isinstance(event, SwapInCancelled)
    assert event.trace.num_bytes == 5 * GB
    rig.until(10)
    assert rig.names(2) == ["2.5 SwapInCompleted"]  # the link went on with b
    rig.swap_in("a")
    rig.until(20)
    assert rig.names(3) == ["11 SwapInCompleted"]


def test_two_swap_ins_that_do_not_fit_are_a_fault() -> None:
    rig = Rig("a", "b", "c")
    rig.swap_in("a")
    rig.swap_in("b")
    with pytest.raises(SimulationFault, match="over-commits"):
        rig.swap_in("c")


def test_repeated_commands_are_answered_again_and_old_ones_rejected() -> None:
    rig = resident("a")
    rig.swap_in("a")
    assert rig.names(1) == ["10 SwapInCompleted"]
    rig.load("a")
    assert rig.names(2) == ["10 ModelLoaded"]
    rig._generation = 0
    rig.swap_out("a")  # the generation of the first command of all
    event = rig.events[-1][1]
    assert isinstance(event, CommandRejected)
    assert rig.replica("a").state == "resident"


def test_a_dead_worker_loses_all_but_its_requests() -> None:
    rig = resident("a")
    rig.request("r", "a", 400, 101)
    rig.until(11)
    rig.gpu.kill_worker()
    assert rig.names(2) == ["11 WorkerDied", "11 AgentStatus"]
    assert rig.world.num_queued == 1
    rig.until(20)
    rig.load("a")
    rig.until(40)
    rig.swap_in("a")
    rig.until(60)
    assert rig.names(4) == [
        "13 AgentStatus",
        "30 ModelLoaded",
        "41.5 SwapInCompleted",
        "41.5 RequestStarted",
        "43 RequestEnded",
    ]


def test_a_dead_agent_comes_back_and_knows_nothing() -> None:
    rig = resident("a")
    rig.request("r", "a", 400, 101)
    rig.until(11)
    rig.gpu.die()
    rig.swap_out("a")  # to nobody
    rig.until(15)
    assert rig.names(2) == ["14 AgentStarted", "14 AgentStatus"]
    status = rig.events[-1][1]
    assert isinstance(status, AgentStatus)
    assert (status.replicas, status.instance) == ((), "gpu0-2")
    assert rig.world.num_queued == 0
    rig.until(16)
    assert rig.world.num_queued == 1
    rig.load("a")
    assert isinstance(rig.events[-1][1], CommandRejected)
    rig.register("a")
    rig.until(17)
    assert isinstance(rig.events[-2][1], ModelRegistered)


def test_without_a_size_kv_limits_nothing() -> None:
    rig = Rig("a", cost=msgspec.structs.replace(COST, kv_bytes_per_token=0))
    rig.swap_in("a")
    rig.until(10)
    for name in "rst":
        rig.request(name, "a", 10**6, 1)
    assert len(rig.replica("a").rows) == 3


def test_a_prompt_is_read_while_weights_arrive_but_for_its_tail() -> None:
    rig = Rig("a", cost=msgspec.structs.replace(COST, prefill_tail=0.2))
    rig.swap_in("a")
    rig.request("r", "a", 400, 1)  # 0.5 s, of which 0.1 s must come after the 1.5 s of the swap
    rig.until(10)
    assert rig.ended() == {"r": pytest.approx(1.6)}


def test_what_came_late_has_more_left_to_read() -> None:
    rig = Rig("a", cost=msgspec.structs.replace(COST, prefill_tail=0.2))
    rig.swap_in("a")
    rig.until(1.3)
    rig.request("r", "a", 400, 1)
    rig.until(10)
    assert rig.ended() == {"r": pytest.approx(1.3 + 0.5)}


def test_nothing_is_read_while_others_compute() -> None:
    rig = Rig("a", "b", cost=msgspec.structs.replace(COST, prefill_tail=0.2))
    rig.swap_in("a")
    rig.until(10)
    rig.request("r", "a", 400, 101)  # 0.5 s and 1 s
    rig.swap_in("b")
    rig.request("s", "b", 400, 1)
    rig.until(20)
    assert rig.ended()["r"] == pytest.approx(11.5)
    assert rig.ended()["s"] == pytest.approx(12.0)  # until 11.5 r computed, then b had arrived


def test_swaps_wait_for_the_engines_step() -> None:
    rig = Rig("a", "b", "c", cost=msgspec.structs.replace(COST, swaps_wait=True))
    for model in ("a", "b"):
        rig.swap_in(model)
    rig.until(10)
    rig.request("r", "a", 400, 101)  # its prompt is one step, until 10.5
    rig.until(10.2)
    rig.swap_out("b")
    rig.until(10.7)  # in a step again: of 0.01 s, half of which is to come
    assert [name for name in rig.names() if name.endswith("SwapOutCompleted")] == []
    rig.until(10.8)
    assert "10.75 SwapOutCompleted" in rig.names()
    rig.swap_in("c")
    rig.until(20)
    assert "12.305 SwapInCompleted" in rig.names()
