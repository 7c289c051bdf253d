"""State records: heartbeats, KV entries, and the value types they share with events."""

import hashlib
from typing import Any, Literal, TypeAlias

import msgspec

ReplicaState: TypeAlias = Literal[
    "cold", "loading", "host", "swapping_in", "resident", "draining", "swapping_out", "failed"
]
DType: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]
# What a model is for: it continues text, or turns text into vectors.
Runner: TypeAlias = Literal["generate", "embed"]
# How a model writes calls of tools, as its chat template shows; "": it knows no tools.
#   hermes    <tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>, Qwen's too
#   llama     {"name": ..., "parameters": {...}}; several with "; " between
#   mistral   [TOOL_CALLS][{"name": ..., "arguments": {...}}]
#   mistral2  [TOOL_CALLS]name[ARGS]{...}, once for each
#   json      [{"name": ..., "arguments": {...}}]: the form is not known; this one is asked for
ToolFormat: TypeAlias = Literal["", "hermes", "llama", "mistral", "mistral2", "json"]
# What becomes of running requests when another model needs the memory: their KV is kept in host
# memory, or computed anew from their tokens, or they are never interrupted.
Preemption: TypeAlias = Literal["preserve", "recompute", "drain"]


class ModelSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """What `hotswap.toml` says about one model. ``source``: local folder or hub id."""

    name: str
    source: str
    dtype: DType = "auto"  # auto: as the checkpoint says
    max_model_len: int | None = None  # None: as the checkpoint says
    max_batch: int = 8  # requests decoded together
    kv_tokens: int | None = None  # KV reserve of a replica; None: one full context
    preload: bool = True  # fill the host image before the first request
    trust_remote_code: bool = False
    runner: Literal["auto", "generate", "embed"] = "auto"  # auto: as the files say
    preemption: Preemption = "preserve"
    prefix_caching: bool = True  # requests use the KV of others that began with the same tokens
    pinned: bool = False  # brought in unasked and never swapped out for another model
    gpus: tuple[str, ...] = ()  # names of the GPUs it may use; empty: any
    priority: int = 0  # of waiting models the higher one goes first; -100..100
    ttft_target_s: float | None = None  # time to first token aimed at; None: [scheduler]'s
    token_target_s: float | None = None  # time per output token aimed at; None: [scheduler]'s
    exclusive_group: str = ""  # of the models that name the same, one at most is on a GPU at a time
    ttl_s: float = 0.0  # swapped out after so many idle seconds; 0: stays until room is needed
    min_residency_s: float = 0.0  # what just came in leaves for no other model before this
    drained: bool = False  # takes no new requests, and leaves when those it has have ended
    aliases: tuple[str, ...] = ()  # other names that clients may call it by
    # Fields of request bodies: where the client leaves them out, and whatever it says.
    defaults: dict[str, Any] = {}
    overrides: dict[str, Any] = {}  # a null takes the field out

    def for_agents(self) -> "ModelSpec":
        """What an agent has to know: other settings change while a model is in memory.

        Whether its requests may be interrupted is up to the scheduler; an agent needs to know only
        how.
        """
        return ModelSpec(
            name=self.name,
            source=self.source,
            dtype=self.dtype,
            max_model_len=self.max_model_len,
            max_batch=self.max_batch,
            kv_tokens=self.kv_tokens,
            trust_remote_code=self.trust_remote_code,
            runner=self.runner,
            preemption="recompute" if self.preemption == "recompute" else "preserve",
            prefix_caching=self.prefix_caching,
        )

    def fingerprint(self) -> str:
        """Of `for_agents`: other settings there need the model to be registered anew."""
        return hashlib.sha256(msgspec.json.encode(self.for_agents())).hexdigest()[:16]


class ModelFacts(msgspec.Struct, frozen=True):
    """What an agent found in a model's files. All bytes are rounded up to whole pages."""

    architecture: str
    dtype: str
    num_parameters: int
    weight_bytes: int
    kv_bytes: int  # KV reserve while resident
    max_model_len: int
    max_batch: int
    runner: Runner = "generate"
    dimensions: int = 0  # of an embedding; 0: it generates
    tool_format: ToolFormat = ""

    @property
    def footprint_bytes(self) -> int:
        """Device bytes that one resident replica takes."""
        return self.weight_bytes + self.kv_bytes


class LayerCopy(msgspec.Struct, frozen=True):
    """One group of a swap-in's copy, in execution order."""

    name: str
    num_bytes: int
    copy_s: float


class PcieLink(msgspec.Struct, frozen=True):
    """A GPU's PCIe link as NVML reports it while bytes move; links slow down when idle."""

    generation: int
    width: int  # lanes
    replays: int | None = None  # packets sent again since the driver was loaded; None: not told


class SwapTrace(msgspec.Struct, frozen=True):
    """Where the time of one swap went. Times are seconds; times of day are unix seconds.

    A swap-in, in order: ``decision_s`` from the earliest waiter's demand to the first command
    for it, ``drain_s`` until the swap-in began (victims had to leave), then ``map_s``, then
    ``copy_s``, group by group. ``first_layer_s``: from its begin until the first group that
    computes (after the embeddings) had arrived.

    A swap-out that preempts: ``suspend_s`` until the KV of running requests was in host memory,
    ``kv_bytes`` of it copied in that time (the rest had been written behind).
    """

    started_at: float
    drain_s: float = 0.0
    map_s: float = 0.0
    copy_s: float = 0.0
    total_s: float = 0.0
    num_bytes: int = 0
    layers: tuple[LayerCopy, ...] = ()
    decision_s: float = 0.0
    first_layer_s: float = 0.0
    verify_s: float = 0.0  # checking pages, after the copy
    kept_bytes: int = 0  # still on the device from last time, not copied
    ceiling_gb_per_s: float = 0.0  # raw copy into the same memory, measured at agent start
    link: PcieLink | None = None
    suspend_s: float = 0.0
    kv_bytes: int = 0

    @property
    def gb_per_s(self) -> float:
        """Copy rate in GB/s (10^9 bytes), 0 where nothing was copied."""
        return self.num_bytes / self.copy_s / 1e9 if self.copy_s > 0 else 0.0

    @property
    def share_of_ceiling(self) -> float:
        """Copy rate over the raw copy's, 0 where either is unknown."""
        return self.gb_per_s / self.ceiling_gb_per_s if self.ceiling_gb_per_s > 0 else 0.0


class ReplicaStatus(msgspec.Struct, frozen=True):
    """``in_flight``: requests that the agent has taken and not ended. Those of a replica in state
    ``host`` are suspended: they wait there for its next swap-in, and only this GPU can go on.
    """

    model: str
    state: ReplicaState
    generation: int
    in_flight: int = 0
    facts: ModelFacts | None = None  # None until registered
    reason: str = ""  # why it failed
    cached_bytes: int = 0  # of its weights, still on the device though swapped out
    settings: str = ""  # fingerprint of what it was registered with; empty: not told
    batch_in_flight: int = 0  # of in_flight: those of class batch


class AgentStatus(msgspec.Struct, frozen=True, tag="hotswap.agent.v1.status"):
    """Heartbeat, and sent at once after every change."""

    gpu: str
    instance: str  # changes when the agent process restarts
    worker_pid: int  # 0 while the engine worker is down
    device: str  # "cpu" or "cuda"
    device_name: str
    budget_bytes: int
    used_bytes: int  # pages in use by weights and KV reserves
    page_bytes: int
    replicas: tuple[ReplicaStatus, ...] = ()
    # For host images; past it the least recently used one goes. 0: unknown, no worker is up.
    host_budget_bytes: int = 0
    host_used_bytes: int = 0


class PredictedWait(msgspec.Struct, frozen=True, tag="hotswap.scheduler.v1.predicted_wait"):
    """Sent about once a second for each model that somebody waits for; the next one replaces it."""

    model: str
    at: float
    wait_s: float | None  # until it is expected to be resident; None: not known
    num_waiters: int
    num_suspended: int
    since: float  # unix seconds: when the wait began
    place: int  # in line, from 1; 0: it is on its way in


Origin: TypeAlias = Literal["file", "api"]


class DesiredDeployment(
    msgspec.Struct, frozen=True, tag="hotswap.state.v1.desired_deployment", omit_defaults=True
):
    """HS_DEPLOYMENTS/<model>: what is wanted, written by the leading scheduler only.

    The entry's revision is the version that changes name to be safe from each other.
    """

    spec: ModelSpec
    # What hotswap.toml said when it was last taken over; None: made through the admin API.
    declared: ModelSpec | None = None
    removed: bool = False  # through the admin API, though hotswap.toml still names it
    created_at: int = 0  # unix seconds
    updated_at: float = 0.0
    updated_by: str = ""

    @property
    def origin(self) -> Origin:
        return "api" if self.declared is None else "file"


class DeploymentRecord(msgspec.Struct, frozen=True, tag="hotswap.state.v1.deployment"):
    """HS_MODELS/<model>: what is wanted and what came of it, written by the scheduler only."""

    spec: ModelSpec
    status: Literal["pending", "ready", "failed"]
    reason: str = ""
    facts: ModelFacts | None = None
    created_at: int = 0  # unix seconds
    revision: int = 0  # of its entry in HS_DEPLOYMENTS
    origin: Origin = "file"
    updated_at: float = 0.0  # unix seconds
    updated_by: str = ""


class PlacementRecord(msgspec.Struct, frozen=True, tag="hotswap.state.v1.placement"):
    """HS_PLACEMENT/<gpu>.<model>: what the scheduler wants. Written by the scheduler only."""

    gpu: str
    model: str
    desired: Literal["resident", "host", "cold"]
    generation: int
    epoch: int


class ResidencyRecord(msgspec.Struct, frozen=True, tag="hotswap.state.v1.residency"):
    """HS_RESIDENCY/<gpu>.<model>: what is. Written by that gpu's agent only."""

    gpu: str
    model: str
    state: ReplicaState
    generation: int
    changed_at: float
    reason: str = ""


class LeaseRecord(msgspec.Struct, frozen=True, tag="hotswap.state.v1.lease"):
    """HS_LEASES/<key>: the holder renews it; it expires by itself."""

    holder: str
    epoch: int = 0
