"""`hotswap explain`: what is printed of a model and of the decisions about it."""

import io

from rich.console import Console

from schemas.decisions import Candidate, Victim
from schemas.events import DecisionMade
from schemas.state import AgentStatus, DeploymentRecord, ModelSpec, PredictedWait, ReplicaStatus
from services.ops.explain import Story, describe, show, where, who_waits
from services.ops.status import Snapshot

EVICT = DecisionMade(
    model="b",
    gpu="gpu0",
    action="evict",
    at=1767225600.5,
    reason="idle on gpu0, and first to leave: a; the best of 9 GPUs",
    request_id="r1",
    waited_s=0.25,
    due_at=1767225599.5,
    urgency="late",
    priority=-7,
    num_waiters=3,
    predicted_wait_s=0.5,
    victims=(Victim("a", "idle", idle_s=3.25), Victim("[c]", "preempted", slack_s=4.0)),
    candidates=(Candidate("gpu0", "evict", 3, 0.75, 2**24, ("a", "[c]")),),
    num_candidates=9,
)


def story(model: str, *decisions: DecisionMade, wait: PredictedWait | None = None) -> Story:
    replicas = (ReplicaStatus("a", "host", 1, 1), ReplicaStatus("b", "resident", 1, in_flight=2))
    agents = {"gpu0": AgentStatus("gpu0", "i1", 7, "cpu", "cpu", 2**30, 0, 1, replicas)}
    records = {name: DeploymentRecord(ModelSpec(name, "/m"), "ready") for name in ("a", "b", "[c]")}
    return Story(model, Snapshot(agents, records), wait, list(decisions))


def shown(one: Story, width: int = 200) -> list[str]:
    out = io.StringIO()
    show(one, Console(file=out, width=width))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_a_decision_with_its_candidates_and_victims() -> None:
    head, now, waits, empty, first, *rest = shown(story("b", EVICT))
    assert (head, now) == ("b  ready", "now    resident on gpu0 (2 running)")
    assert (waits, empty) == ("waits  nobody waits for it to come in", "")
    assert first[12:] == "  evict on gpu0: idle on gpu0, and first to leave: a; the best of 9 GPUs"
    assert [line.strip() for line in rest] == [
        "r1, waited 0.25 s, late (was due 1.00 s before), priority -7, 3 in the queue, "
        "expected in 0.50 s",
        "victims: a (idle for 3.2 s), [c] (preempted with slack 4.0 s)",
        "GPU   action  rank  cost     to copy  victims",
        "gpu0  evict   3     0.750 s  16 MiB   a, [c]",
        "and 8 more GPUs",
    ]
    assert all(line.startswith(" " * 14) for line in rest)


def test_a_decision_in_which_it_was_the_victim() -> None:
    *_, line = shown(story("[c]", EVICT))
    assert line[12:] == (
        "  had to leave gpu0 for b (preempted with slack 4.0 s); b: idle on gpu0, and first to "
        "leave: a; the best of 9 GPUs"
    )


def test_long_lines_continue_below_their_text() -> None:
    lines = shown(story("[c]", EVICT), width=70)
    assert len(lines) == 6
    assert all(len(line) <= 70 for line in lines)
    assert lines[-1].startswith(" " * 14)


def test_no_decision_yet() -> None:
    assert shown(story("a"))[-1].startswith("no decision about it yet")


def test_where_it_is_and_who_waits() -> None:
    assert where(story("a")) == "host on gpu0 (1 suspended)"
    assert where(story("[c]")) == "nowhere: no agent answered"
    wait = PredictedWait("a", 100.0, 1.5, 3, 2, 97.0, 2)
    assert who_waits(wait, 100.5) == (
        "3 requests and 2 suspended, for 3.5 s; number 2 in line; expected in 1.50 s"
    )
    unknown = PredictedWait("a", 100.0, None, 1, 0, 99.0, 0)
    assert who_waits(unknown, 100.0) == (
        "1 request, for 1.0 s; it is on its way in; nobody knows when it is there"
    )


def test_why_this_victim() -> None:
    assert describe(Victim("a", "idle")) == "idle"
    assert describe(Victim("a", "idle", idle_s=2.0)) == "idle for 2.0 s"
    assert describe(Victim("a", "drained", slack_s=-0.5)) == "drained with slack -0.5 s"
