"""Whether a host image finds room, and who has to leave the device for it: pure choices.

Past its budget an agent drops host images itself, the least recently used one first, but never
one whose model is on the device or on its way there::

    |<------------------------------- host_budget_bytes --------------------------------->|
    | loading, on the device | host, ahead | host, suspended | host, idle or behind | free |
    |                                                        |<-- may be dropped -->|      |

An image whose model is ahead in line is left alone, or two models that both wait would drop each
other's images for ever, and neither come in. So is one whose requests are suspended: they would
start over, and could be preempted and start over for ever.
"""

from services.scheduler.lifecycle import LEAVING_STATES
from services.scheduler.replica import Agent, Replica
from services.scheduler.state import ClusterState


def fits_unasked(agent: Agent, replica: Replica) -> bool:
    """Whether the image can be loaded without dropping another.

    What the agent says is used counts as well as what we believe: either may know more.
    """
    if not agent.host_budget_bytes:
        return True
    used_bytes = max(agent.image_bytes, agent.host_used_bytes)
    return used_bytes + replica.weight_bytes <= agent.host_budget_bytes


def may_ever_fit(agent: Agent, replica: Replica) -> bool:
    """Whether the image is no larger than the whole budget."""
    return not agent.host_budget_bytes or replica.weight_bytes <= agent.host_budget_bytes


def shortage(state: ClusterState, agent: Agent, replica: Replica) -> int:
    """Bytes missing for the image of the waiting ``replica`` even if all were dropped that may be.

    Zero or less: it may be loaded. By our own belief alone, so that the room which is made by
    swapping out is seen to be made, whatever else the agent may count. An image larger than the
    whole budget counts as fitting: its load fails, and the agent's reason gives the numbers.
    """
    if not agent.host_budget_bytes or not may_ever_fit(agent, replica):
        return 0
    droppable_bytes = sum(
        r.image_bytes
        for r in agent.replicas.values()
        if r.state == "host" and not r.is_suspended and not _is_ahead(state, r.model, replica.model)
    )
    kept_bytes = agent.image_bytes - droppable_bytes
    return kept_bytes + replica.weight_bytes - agent.host_budget_bytes


def is_dropping(agent: Agent) -> bool:
    """A load is under way that others make room for. Which ones only the agent knows: until it
    tells, a swap-in may find its image gone.
    """
    return bool(agent.loading) and 0 < agent.host_budget_bytes < agent.image_bytes


def leaving_bytes(agent: Agent) -> int:
    """Bytes of images that may be dropped as soon as their models have left the device."""
    return sum(
        r.image_bytes
        for r in agent.device.values()
        if r.state in LEAVING_STATES and not r.is_suspending
    )


def suspended_images(agent: Agent) -> list[Replica]:
    """Images that may be dropped once their suspended requests have gone on and ended."""
    suspending = [r for r in agent.device.values() if r.is_suspending]
    return [*agent.suspended.values(), *suspending]


def _is_ahead(state: ClusterState, model: str, of: str) -> bool:
    if model not in state.waiting:
        return False
    if of not in state.waiting:  # who waits goes before what is only wished for
        return True
    return state.waiting[model].order < state.waiting[of].order
