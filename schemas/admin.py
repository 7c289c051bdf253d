"""api -> leading scheduler: changes of what is deployed, and what is to be done now.

Requests over core NATS (`names.admin_subject`), each answered with one `AdminAnswer`. What was
accepted finishes later, and shows in HS_MODELS, HS_RESIDENCY and events. ``who``: for the records.
"""

from typing import Literal, TypeAlias, get_args

import msgspec

from schemas.state import ModelSpec


class PutDeployment(msgspec.Struct, frozen=True, tag="hotswap.admin.v1.put"):
    """Create or replace. Saying what is so already changes nothing."""

    spec: ModelSpec
    who: str = ""
    if_match: tuple[int, ...] | None = None  # only where this is the revision; (): any
    must_be_new: bool = False

    @property
    def model(self) -> str:
        return self.spec.name


class DeleteDeployment(msgspec.Struct, frozen=True, tag="hotswap.admin.v1.delete"):
    """Take no more requests, swap out and unload everywhere."""

    model: str
    who: str = ""
    if_match: tuple[int, ...] | None = None
    drain: bool = True  # let running requests end; else they end with an error


class SwapInDeployment(msgspec.Struct, frozen=True, tag="hotswap.admin.v1.swap_in"):
    """Bring it in though nobody waits, if that hurts nobody until ``until`` (unix seconds)."""

    model: str
    until: float
    who: str = ""
    gpu: str = ""  # empty: any


class SwapOutDeployment(msgspec.Struct, frozen=True, tag="hotswap.admin.v1.swap_out"):
    """Let running requests end, and leave the device; the next request brings it back."""

    model: str
    who: str = ""
    gpu: str = ""  # empty: every one


class MoveDeployment(msgspec.Struct, frozen=True, tag="hotswap.admin.v1.move"):
    """Be resident on ``gpu`` first, then leave ``source``, as `SwapInDeployment` and
    `SwapOutDeployment` do.
    """

    model: str
    source: str
    gpu: str
    until: float
    who: str = ""


class AdminAnswer(msgspec.Struct, frozen=True, tag="hotswap.admin.v1.answer"):
    """``reason``: why it was refused; of what was accepted, what it waits for, if anything."""

    outcome: Literal[
        "done", "accepted", "invalid", "not_found", "precondition_failed", "conflict", "unavailable"
    ]
    reason: str = ""
    revision: int = 0  # of the deployment now
    created: bool = False


Ask: TypeAlias = SwapInDeployment | SwapOutDeployment | MoveDeployment
AdminRequest: TypeAlias = PutDeployment | DeleteDeployment | Ask


def action_of(request: AdminRequest) -> str:
    """The subject token of ``request``: the last part of its tag."""
    return str(type(request).__struct_config__.tag).rsplit(".", 1)[1]


def message_types() -> tuple[type[msgspec.Struct], ...]:
    return (PutDeployment, DeleteDeployment, *get_args(Ask))
