"""`hotswap status`: every GPU and where each model is, read from the bus."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from schemas import names
from schemas.state import AgentStatus, DeploymentRecord, ReplicaStatus
from services.bus import Bucket, Bus, BusOptions, Message, WorkQueue

_LISTEN_S = 1.3  # a little over the agents' heartbeat


@dataclass
class Snapshot:
    """What the bus said: agents by gpu, deployments by model.

    ``batch_queue``: requests of class batch that are not answered yet, by model.
    """

    agents: dict[str, AgentStatus] = field(default_factory=dict)
    deployments: dict[str, DeploymentRecord] = field(default_factory=dict)
    batch_queue: dict[str, int] = field(default_factory=dict)


async def take(options: BusOptions) -> Snapshot:
    """One look at the system. Raises BusUnavailable."""
    bus = await Bus.connect(options, service="status", patience_s=5)
    snapshot = Snapshot()

    async def on_status(message: Message[AgentStatus]) -> None:
        snapshot.agents[message.body.gpu] = message.body

    try:
        await bus.subscribe(names.status_subject(), AgentStatus, on_status)
        snapshot.batch_queue, _ = await WorkQueue(bus).depths("batch")
        records = await Bucket(bus, names.BUCKET_MODELS, DeploymentRecord).items()
        snapshot.deployments = {record.spec.name: record for record in records.values()}
        await asyncio.sleep(_LISTEN_S)
    finally:
        await bus.close()
    return snapshot


async def run(options: BusOptions, as_json: bool) -> None:
    """Print the snapshot as tables, or as one JSON object."""
    snapshot = await take(options)
    if as_json:
        parts: dict[str, Any] = {
            "agents": msgspec.to_builtins(snapshot.agents),
            "deployments": msgspec.to_builtins(snapshot.deployments),
            "batch_queue": snapshot.batch_queue,
        }
        print(json.dumps(parts, indent=2))
        return
    console = Console()
    console.print(_gpu_table(snapshot))
    console.print(_model_table(snapshot))


def _gpu_table(snapshot: Snapshot) -> Table:
    table = Table(
        "GPU", "device", "used", "budget", "host images", "resident", "in flight", title="GPUs"
    )
    for gpu, status in sorted(snapshot.agents.items()):
        resident = [r.model for r in status.replicas if r.state == "resident"]
        table.add_row(
            gpu,
            f"{status.device} ({status.device_name})" if status.worker_pid else "worker starting",
            _mib(status.used_bytes),
            _mib(status.budget_bytes),
            f"{_mib(status.host_used_bytes)} of {_mib(status.host_budget_bytes)}",
            ", ".join(resident) or "-",
            _requests(status.replicas),
        )
    if not snapshot.agents:
        table.caption = "no agent answered: is `hotswap up` running?"
    return table


def _model_table(snapshot: Snapshot) -> Table:
    table = Table("model", "status", "state", "weights", "KV reserve", "context", title="Models")
    for model, record in sorted(snapshot.deployments.items()):
        states = [
            f"{r.state} on {gpu}{_details(r)}"
            for gpu, status in sorted(snapshot.agents.items())
            for r in status.replicas
            if r.model == model
        ]
        facts = record.facts
        table.add_row(
            model,
            f"{record.status}: {record.reason}" if record.reason else record.status,
            ", ".join(states) or "-",
            _mib(facts.weight_bytes) if facts else "-",
            _mib(facts.kv_bytes) if facts else "-",
            str(facts.max_model_len) if facts else "-",
        )
    if snapshot.batch_queue:
        queued = [f"{num} for {model}" for model, num in sorted(snapshot.batch_queue.items())]
        table.caption = f"requests of class batch in the queue: {', '.join(queued)}"
    return table


def _requests(replicas: Sequence[ReplicaStatus]) -> str:
    suspended = sum(r.in_flight for r in replicas if r.state == "host")
    running = sum(r.in_flight for r in replicas) - suspended
    return f"{running} + {suspended} suspended" if suspended else str(running)


def _details(replica: ReplicaStatus) -> str:
    """What waits at a replica that is not on the device, and what it left there."""
    words = []
    if replica.state == "host" and replica.in_flight:
        words.append(f"{replica.in_flight} suspended")
    if replica.cached_bytes:
        words.append(f"{_mib(replica.cached_bytes)} kept")
    return f" ({', '.join(words)})" if words else ""


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"
