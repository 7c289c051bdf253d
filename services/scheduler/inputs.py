"""Everything `decide` may be told, as one union.

Three kinds of news reach the scheduler:

- **events** (`schemas.events.Event`) as agents and apis publish them: at least once, in no
  promised order. The generation they echo says which command they answer.
- **statuses** (`schemas.state.AgentStatus`): an agent's own account of itself. Lost ones are
  replaced by the next; those of one agent arrive in the order in which it sent them.
- what only the scheduler's service can tell: the structs below.

Times are unix seconds. The same list of ``(input, now)`` gives the same commands, so all of
these are plain values that encode to JSON and back (`Input` is a tagged union).
"""

from typing import TypeAlias

import msgspec

from schemas.admin import Ask
from schemas.events import Event
from schemas.names import RequestClass
from schemas.state import AgentStatus, ModelSpec


class DeploymentAdded(msgspec.Struct, frozen=True, tag="hotswap.scheduler.v1.deployment_added"):
    """This model is to be served. Saying it twice changes nothing.

    Other settings under a known name are taken at once. Where an agent has to know them
    (`ModelSpec.for_agents`), replicas are drained, unloaded and registered anew.
    """

    spec: ModelSpec


class DeploymentRemoved(msgspec.Struct, frozen=True, tag="hotswap.scheduler.v1.deployment_removed"):
    """This model is not to be served any more: nobody waits for it from now on.

    ``end_requests``: why running requests are ended, with an error; empty: they may end.
    """

    model: str
    end_requests: str = ""


class DeploymentsKnown(msgspec.Struct, frozen=True, tag="hotswap.scheduler.v1.deployments_known"):
    """All deployments that there are have been told: what agents hold besides is unloaded."""


class Asked(msgspec.Struct, frozen=True, tag="hotswap.scheduler.v1.asked"):
    """An operator wants something done. The verdict is in `ClusterState.verdicts`."""

    number: int  # of the question, to tell its verdict by
    ask: Ask


class Demand(msgspec.Struct, frozen=True, tag="hotswap.scheduler.v1.demand"):
    """A request entered the model's work queue (its header, republished by the stream).

    ``at`` is when it entered the queue, best read from the stream's own time stamp.
    """

    request_id: str
    model: str
    klass: RequestClass
    at: float
    tenant: str = ""
    window_s: float = 0.0  # how long it may stay in the queue; 0: nobody told


class QueueDepths(msgspec.Struct, frozen=True, tag="hotswap.scheduler.v1.queue_depths"):
    """How many requests the work queue of one class held at ``at``, those in flight at agents
    included.

    Complete: a model that is not named has none. Take ``at`` before asking the stream, on the
    clock that `Demand.at` is read from: waiters younger than it are left alone.
    """

    depths: dict[str, int]
    at: float
    klass: RequestClass = "interactive"


class AgentLost(msgspec.Struct, frozen=True, tag="hotswap.scheduler.v1.agent_lost"):
    """The agent's lease expired. It may be dead or cut off; its next status brings it back."""

    gpu: str


class Tick(msgspec.Struct, frozen=True, tag="hotswap.scheduler.v1.tick"):
    """Time passed. Run quanta, retries and resends are looked at; send one every 0.1-0.25 s."""


Input: TypeAlias = (
    Event
    | AgentStatus
    | DeploymentAdded
    | DeploymentRemoved
    | DeploymentsKnown
    | Asked
    | Demand
    | QueueDepths
    | AgentLost
    | Tick
)


class Entry(msgspec.Struct, frozen=True):
    """One line of a recorded input log: what `decide` was told, and when."""

    now: float
    event: Input
