"""What a decision of the scheduler is made of: what was done, whom it cost, what else there was.

The event that tells of it is `schemas.events.DecisionMade`.
"""

from typing import Literal, TypeAlias

import msgspec

# swap_in    there is room, or the bytes that were freed for it are there
# wait       bytes already on their way out will do
# evict      victims leave first
# load       there is no host image yet
# claim      nothing can be done yet: its bytes are kept from models behind it in line
# make_room  victims leave so that their host images may be dropped for this one's
# call_off   what was begun for it is given up
# cut_drain  a victim that was to end its requests is preempted after all
# swap_out   nobody wanted it for the time that its settings name, or it moved to another GPU
DecisionAction: TypeAlias = Literal[
    "swap_in",
    "wait",
    "evict",
    "load",
    "claim",
    "make_room",
    "call_off",
    "cut_drain",
    "swap_out",
]
# starving: late, and waiting for longer than `starvation_s`. unasked: nobody waits for it.
Urgency: TypeAlias = Literal["in_time", "late", "starving", "unasked"]


class Victim(msgspec.Struct, frozen=True):
    """A model that has to leave, and why this one.

    idle: nobody wanted it. preempted: its requests are suspended. drained: they end first.
    """

    model: str
    how: Literal["idle", "preempted", "drained"]
    idle_s: float | None = None  # since its last request; None: busy, or not known
    slack_s: float | None = None  # what its requests were ahead of their target; None: idle


class Candidate(msgspec.Struct, frozen=True):
    """One GPU that was looked at, and what could have been done there."""

    gpu: str
    action: DecisionAction
    rank: int  # number in the decision tree of `services.scheduler.policy.weigh`; lower is better
    cost_s: float  # what the ranks that hurt nobody are compared by
    missing_bytes: int  # of the weights, not on the device any more
    victims: tuple[str, ...] = ()  # the first ones
