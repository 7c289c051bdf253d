"""`hotswap status`: what the tables say about requests that run, and about suspended ones."""

import io

import pytest
from rich.console import Console

from schemas.state import AgentStatus, DeploymentRecord, ModelSpec, ReplicaStatus
from services.ops.status import Snapshot, _gpu_table, _model_table


def shown(*replicas: ReplicaStatus) -> str:
    status = AgentStatus("gpu0", "i1", 7, "cpu", "cpu", 2**30, 0, 1, replicas)
    records = {r.model: DeploymentRecord(ModelSpec(r.model, "/m"), "ready") for r in replicas}
    snapshot = Snapshot({"gpu0": status}, records)
    out = io.StringIO()
    console = Console(file=out, width=200)
    console.print(_gpu_table(snapshot), _model_table(snapshot))
    return out.getvalue()


@pytest.mark.parametrize(
    ("replica", "in_flight", "state"),
    [
        (ReplicaStatus("a", "resident", 1, 2), " 2 ", "resident on gpu0 "),
        (ReplicaStatus("a", "host", 1, 2), " 0 + 2 suspended ", "host on gpu0 (2 suspended)"),
        (
            ReplicaStatus("a", "host", 1, 2, cached_bytes=2**20),
            " 0 + 2 suspended ",
            "host on gpu0 (2 suspended, 1 MiB kept)",
        ),
        (ReplicaStatus("a", "host", 1, cached_bytes=2**20), " 0 ", "host on gpu0 (1 MiB kept)"),
    ],
)
def test_suspended_requests_are_shown_apart(
    replica: ReplicaStatus, in_flight: str, state: str
) -> None:
    text = shown(replica)
    assert in_flight in text
    assert state in text


def test_the_queue_of_class_batch_is_shown_where_it_holds_something() -> None:
    out = io.StringIO()
    Console(file=out, width=200).print(_model_table(Snapshot(batch_queue={"b": 3, "a": 12})))
    assert "requests of class batch in the queue: 12 for a, 3 for b" in out.getvalue()
    assert "batch" not in shown()
