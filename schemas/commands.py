"""scheduler -> agent: commands, imperative and idempotent.

Every command carries the leader's fencing ``epoch`` (an agent rejects one older than
the newest it has seen) and a per-replica ``generation`` that the agent echoes in its
events, so that an answer to an old command is never taken for an answer to a new one.
"""

from typing import TypeAlias

import msgspec

from schemas.state import ModelSpec


class Register(msgspec.Struct, frozen=True, tag="hotswap.agent.v1.register"):
    """Look at the model's files (no weights are read) and report what it will need."""

    gpu: str
    model: str
    epoch: int
    generation: int
    spec: ModelSpec
    settings: str = ""  # fingerprint of ``spec``, to be told in statuses


class Load(msgspec.Struct, frozen=True, tag="hotswap.agent.v1.load"):
    """Disk -> host image."""

    gpu: str
    model: str
    epoch: int
    generation: int
    request_id: str = ""  # the waiter this is done for, if any


class SwapIn(msgspec.Struct, frozen=True, tag="hotswap.agent.v1.swap_in"):
    """Host image -> device memory; requests are pulled while it arrives."""

    gpu: str
    model: str
    epoch: int
    generation: int
    request_id: str = ""
    # Unix seconds; 0: nobody waits any more.
    waiting_since: float = 0.0  # when the earliest waiter entered the queue
    decided_at: float = 0.0  # when the first command for its switch was given


class SwapOut(msgspec.Struct, frozen=True, tag="hotswap.agent.v1.swap_out"):
    """Stop pulling, let what is in flight end, drop the device memory.

    During a swap-in that nobody waits for any more, it calls the swap-in off.

    With ``preempt`` nothing is waited for: what is in flight is suspended, and goes on after the
    next SwapIn on this GPU. A model whose settings say ``preemption = "drain"`` is drained all
    the same. During a drain it cuts the drain short.
    """

    gpu: str
    model: str
    epoch: int
    generation: int
    request_id: str = ""
    preempt: bool = False  # suspend its requests at their next token, rather than wait for them
    end_requests: str = ""  # why its requests are ended at once, with an error; empty: they are not


class Unload(msgspec.Struct, frozen=True, tag="hotswap.agent.v1.unload"):
    """Drop the host image and forget the model, which is not on the device.

    Answered by ModelUnloaded. Requests that are suspended go back to the queue, or end with
    ``end_requests`` as their error.
    """

    gpu: str
    model: str
    epoch: int
    generation: int
    end_requests: str = ""


Command: TypeAlias = Register | Load | SwapIn | SwapOut | Unload
