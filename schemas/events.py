"""What happened, past tense. Published once each, kept in the HS_EVENTS stream.

`kind_of` gives the subject token of an event: the last part of its tag.
"""

from typing import Literal, TypeAlias, get_args

import msgspec

from schemas.decisions import Candidate, DecisionAction, Urgency, Victim
from schemas.names import RequestClass
from schemas.state import ModelFacts, SwapTrace
from schemas.stream import ErrorCode, RequestTiming

ChangeAction: TypeAlias = Literal["created", "updated", "deleted", "swap_in", "swap_out", "move"]


class AgentStarted(msgspec.Struct, frozen=True, tag="hotswap.agent.v1.agent_started"):
    gpu: str
    instance: str
    at: float
    device: str
    device_name: str
    budget_bytes: int


class AgentStopped(msgspec.Struct, frozen=True, tag="hotswap.agent.v1.agent_stopped"):
    gpu: str
    instance: str
    at: float


class WorkerDied(msgspec.Struct, frozen=True, tag="hotswap.agent.v1.worker_died"):
    """The engine worker process ended; every replica of this gpu is cold again."""

    gpu: str
    at: float
    reason: str


class ModelRegistered(msgspec.Struct, frozen=True, tag="hotswap.agent.v1.model_registered"):
    gpu: str
    model: str
    generation: int
    at: float
    facts: ModelFacts


class ModelLoaded(msgspec.Struct, frozen=True, tag="hotswap.agent.v1.model_loaded"):
    gpu: str
    model: str
    generation: int
    at: float
    num_bytes: int
    load_s: float


class ModelUnloaded(msgspec.Struct, frozen=True, tag="hotswap.agent.v1.model_unloaded"):
    """Its host image made room for another model's, and the next use loads it again; or that was
    commanded.
    """

    gpu: str
    model: str
    generation: int
    at: float
    num_bytes: int


class LoadProgressed(msgspec.Struct, frozen=True, tag="hotswap.agent.v1.load_progressed"):
    gpu: str
    model: str
    at: float
    done_bytes: int
    total_bytes: int
    gb_per_s: float = 0.0  # since the load began


class SwapInCompleted(msgspec.Struct, frozen=True, tag="hotswap.agent.v1.swap_in_completed"):
    gpu: str
    model: str
    generation: int
    at: float
    trace: SwapTrace


class SwapInCancelled(msgspec.Struct, frozen=True, tag="hotswap.agent.v1.swap_in_cancelled"):
    """Called off before its end; its SwapOutCompleted follows.

    What had arrived stays on the device until the pages are needed.
    """

    gpu: str
    model: str
    generation: int
    at: float
    trace: SwapTrace


class FirstTokenSent(msgspec.Struct, frozen=True, tag="hotswap.agent.v1.first_token_sent"):
    """The first token after a swap-in left; times count from the begin of the swap-in."""

    gpu: str
    model: str
    generation: int
    at: float
    request_id: str
    prompt_tokens: int
    first_token_s: float
    swap_s: float  # until all weights were there


class SwapOutCompleted(msgspec.Struct, frozen=True, tag="hotswap.agent.v1.swap_out_completed"):
    gpu: str
    model: str
    generation: int
    at: float
    trace: SwapTrace
    num_suspended: int = 0  # requests that wait at this agent for the model's next swap-in


class VerificationFailed(msgspec.Struct, frozen=True, tag="hotswap.agent.v1.verification_failed"):
    """Weights are not what was loaded.

    The host image is dropped, no token computed from it leaves, and its requests go back to the
    queue; the replica is cold until it is loaded again, or failed where this keeps happening.
    Where a swap-in was under way, its CommandRejected (CommandFailed) follows.
    """

    gpu: str
    model: str
    generation: int
    at: float
    check: Literal["page", "canary"]
    reason: str


class ModelVerified(msgspec.Struct, frozen=True, tag="hotswap.agent.v1.model_verified"):
    """Every page was checked on demand, and is what was loaded."""

    gpu: str
    model: str
    at: float
    num_pages: int
    num_bytes: int
    verify_s: float


class CommandFailed(msgspec.Struct, frozen=True, tag="hotswap.agent.v1.command_failed"):
    """The agent could not do it; ``reason`` names the cause and, where known, the remedy."""

    gpu: str
    model: str
    generation: int
    at: float
    command: Literal["register", "load", "swap_in", "swap_out", "unload"]
    reason: str


class CommandRejected(msgspec.Struct, frozen=True, tag="hotswap.agent.v1.command_rejected"):
    """The command was not tried: stale epoch, or the replica is in the wrong state."""

    gpu: str
    model: str
    generation: int
    at: float
    command: Literal["register", "load", "swap_in", "swap_out", "unload"]
    reason: str


class RequestStarted(msgspec.Struct, frozen=True, tag="hotswap.request.v1.started"):
    gpu: str
    model: str
    request_id: str
    at: float
    attempt: int
    queue_wait_s: float
    tenant: str = ""
    klass: RequestClass = "interactive"


class RequestEnded(msgspec.Struct, frozen=True, tag="hotswap.request.v1.ended"):
    """The one terminal event of an admitted request that reached an agent."""

    gpu: str
    model: str
    request_id: str
    at: float
    outcome: Literal["stop", "length", "cancelled", "failed"]
    prompt_tokens: int
    completion_tokens: int
    timing: RequestTiming
    error: ErrorCode | None = None
    tenant: str = ""
    prefix_tokens: int = 0  # of completion_tokens, those that an earlier attempt computed
    klass: RequestClass = "interactive"


class RequestWithdrawn(msgspec.Struct, frozen=True, tag="hotswap.request.v1.withdrawn"):
    """The one terminal event of a request that the api took back from the queue."""

    model: str
    request_id: str
    at: float
    # choice_failed: another choice of the same answer did, or found no room in the queue
    reason: Literal["client_left", "deadline", "model_failed", "shutdown", "choice_failed"]


class LeaderElected(msgspec.Struct, frozen=True, tag="hotswap.scheduler.v1.leader_elected"):
    holder: str
    epoch: int
    at: float


class DeploymentFailed(msgspec.Struct, frozen=True, tag="hotswap.scheduler.v1.deployment_failed"):
    """No GPU can serve the model; ``reason`` says why and what to do. It may heal."""

    model: str
    at: float
    reason: str


class DeploymentChanged(msgspec.Struct, frozen=True, tag="hotswap.scheduler.v1.deployment_changed"):
    """Somebody changed what is deployed, or told a model to move: for the records."""

    model: str
    at: float
    action: ChangeAction
    who: str  # as the api was told; "hotswap.toml" where that file was changed
    detail: str = ""
    revision: int = 0  # 0: nothing was written


class DecisionMade(msgspec.Struct, frozen=True, tag="hotswap.scheduler.v1.decision_made"):
    """What the scheduler decided for ``model``, and why, for people.

    Told once: a decision that is only made again is not an event. ``predicted_wait_s``: until the
    model is expected to be resident; None where that is not known, or not what was decided.
    """

    model: str
    gpu: str
    action: DecisionAction
    at: float
    reason: str
    request_id: str = ""  # the waiter due first; empty: suspended requests, or nobody waits
    waited_s: float = 0.0
    due_at: float = 0.0  # unix seconds; 0: nobody waits
    urgency: Urgency = "unasked"
    priority: int = 0
    num_waiters: int = 0
    num_suspended: int = 0  # requests that can go on only on this GPU
    predicted_wait_s: float | None = None
    victims: tuple[Victim, ...] = ()
    candidates: tuple[Candidate, ...] = ()  # the best ones, the one that was taken first
    num_candidates: int = 0


AgentEvent: TypeAlias = (
    AgentStarted
    | AgentStopped
    | WorkerDied
    | ModelRegistered
    | ModelLoaded
    | ModelUnloaded
    | LoadProgressed
    | SwapInCompleted
    | SwapInCancelled
    | FirstTokenSent
    | SwapOutCompleted
    | VerificationFailed
    | ModelVerified
    | CommandFailed
    | CommandRejected
    | RequestStarted
    | RequestEnded
)
SchedulerEvent: TypeAlias = LeaderElected | DeploymentFailed | DecisionMade | DeploymentChanged
Event: TypeAlias = AgentEvent | RequestWithdrawn | SchedulerEvent


def kind_of(event: Event) -> str:
    """The subject token of ``event``: the last part of its tag.

    Request events keep their noun (``request_started``): their tags end in a bare verb.
    """
    tag = str(type(event).__struct_config__.tag)
    _, noun, _, verb = tag.split(".")
    return f"request_{verb}" if noun == "request" else verb


def event_types() -> tuple[type[msgspec.Struct], ...]:
    return (*get_args(AgentEvent), RequestWithdrawn, *get_args(SchedulerEvent))
