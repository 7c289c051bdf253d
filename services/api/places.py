"""Which of a deployment's replicas would answer first."""

from collections.abc import Mapping
from typing import Final, get_args

from schemas.state import ReplicaState

_NEAREST: Final[tuple[ReplicaState, ...]] = (
    "resident",
    "swapping_in",
    "host",
    "draining",
    "swapping_out",
    "loading",
    "cold",
    "failed",
)
assert set(_NEAREST) == set(get_args(ReplicaState))


def nearest(gpus: Mapping[str, ReplicaState]) -> ReplicaState:
    """The state of the replica that would answer first."""
    return min(gpus.values(), key=_NEAREST.index, default="cold")
