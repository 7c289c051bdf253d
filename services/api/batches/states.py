"""The life of a batch, as one table.

    validating --> in_progress --> finalizing --> completed
        |  |           |   |           '--------> expired      its window was over before its end
        |  |           |   '--> failed                         its input is gone
        |  '--> failed |                                       its input is wrong
        '-----------> cancelling --> cancelled

The statuses are OpenAI's. In ``finalizing`` and ``cancelling`` results are written out; whoever
takes over in the middle of it does so again from the beginning.
"""

import msgspec

from schemas.batches import BatchRecord, BatchStatus

NEXT: dict[BatchStatus, tuple[BatchStatus, ...]] = {
    "validating": ("in_progress", "failed", "cancelling"),
    "in_progress": ("finalizing", "failed", "cancelling"),
    "finalizing": ("completed", "expired"),
    "cancelling": ("cancelled",),
    "completed": (),
    "expired": (),
    "cancelled": (),
    "failed": (),
}


class InvalidMove(Exception):
    """There is no way from the one status to the other."""


def has_ended(record: BatchRecord) -> bool:
    return not NEXT[record.status]


def can_be_cancelled(record: BatchRecord) -> bool:
    return "cancelling" in NEXT[record.status]


def moved(record: BatchRecord, status: BatchStatus, now: float) -> BatchRecord:
    """``record`` in ``status``, reached at ``now`` (unix seconds). Raises InvalidMove."""
    if status not in NEXT[record.status]:
        raise InvalidMove(f"batch {record.batch} can not go from {record.status} to {status}")
    reached = {**record.reached, status: int(now)}
    return msgspec.structs.replace(record, status=status, reached=reached)
