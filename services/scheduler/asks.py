"""What operators ask for now: swap in, swap out, move. Each gets its verdict at once.

Refused is what can not be done whoever becomes idle: pinned models in the way, a GPU that it may
not use. What only has to wait for busy models is accepted: it is a turn behind everybody who waits,
hurts nobody, and is given up after a while (`services.scheduler.waiting.Wish`, `Move`).
"""

from schemas.admin import (
    AdminAnswer,
    Ask,
    MoveDeployment,
    SwapInDeployment,
    SwapOutDeployment,
)
from schemas.commands import Command
from services.scheduler import eviction, reasons
from services.scheduler.housekeeping import command
from services.scheduler.replica import Agent, Replica
from services.scheduler.state import ClusterState
from services.scheduler.waiting import Move, Verdict, Wish

_MIB = 2**20


class _Refused(Exception):
    def __init__(self, answer: AdminAnswer) -> None:
        super().__init__(answer.reason)
        self.answer = answer


def take(state: ClusterState, number: int, ask: Ask, now: float) -> list[Command]:
    """Begin with ``ask``, or refuse it. The verdict is noted on ``state``."""
    commands: list[Command] = []
    try:
        if ask.model not in state.deployments:
            raise _Refused(AdminAnswer("not_found", f"there is no deployment {ask.model!r}"))
        match ask:
            case SwapInDeployment():
                answer = _swap_in(state, ask, now)
            case SwapOutDeployment():
                answer, commands = _swap_out(state, ask, now)
            case MoveDeployment():
                answer = _move(state, ask, now)
    except _Refused as refused:
        answer = refused.answer
    state.verdicts.append(Verdict(number, answer))
    return commands


def _swap_in(state: ClusterState, ask: SwapInDeployment, now: float) -> AdminAnswer:
    _refuse_unservable(state, ask.model)
    agents = _allowed(state, ask.model, ask.gpu)
    device = state.index.of(ask.model).device
    if any(a.gpu in device and device[a.gpu].state == "resident" for a in agents):
        return AdminAnswer("done", f"{ask.model} is resident already")
    waits_for = _refuse_without_room(state, ask.model, agents)
    state.add_wish(Wish(ask.model, ask.gpu, now, ask.until))
    return AdminAnswer("accepted", waits_for)


def _swap_out(
    state: ClusterState, ask: SwapOutDeployment, now: float
) -> tuple[AdminAnswer, list[Command]]:
    if state.is_pinned(ask.model):
        words = f"{ask.model} is pinned, so it would come back at once: unpin it first"
        raise _Refused(AdminAnswer("conflict", words))
    if ask.gpu and ask.gpu not in state.agents:
        raise _unknown_gpu(state, ask.gpu)
    device = state.index.of(ask.model).device
    there = [r for r in device.values() if ask.gpu in ("", r.gpu)]
    if stuck := [r for r in there if r.serves and not _may_leave(r)]:
        words = f"{ask.model} is busy on {stuck[0].gpu} with what it was told before; try again"
        raise _Refused(AdminAnswer("conflict", words))
    state.drop_wish(ask.model)
    if ask.model in state.moves:
        state.drop_move(ask.model)
    if ask.model in state.plans and ask.gpu in ("", state.plans[ask.model].gpu):
        state.drop_plan(ask.model)
    commands = []
    for replica in there:
        if replica.serves:
            reasons.note_must_leave(state, replica, "an operator asked for it", now)
            eviction.note_eviction(state, replica)
            commands.append(command(state, replica, "swap_out", now))
    if not there:
        return AdminAnswer("done", f"{ask.model} is not on {ask.gpu or 'any GPU'}"), []
    running = sum(r.in_flight for r in there)
    words = f"{running} running requests end first" if running else ""
    return AdminAnswer("accepted", words), commands


def _may_leave(replica: Replica) -> bool:
    pending = replica.pending
    return replica.is_settled or (pending is not None and pending.kind == "swap_in")


def _move(state: ClusterState, ask: MoveDeployment, now: float) -> AdminAnswer:
    model = ask.model
    if ask.source == ask.gpu:
        raise _Refused(AdminAnswer("invalid", f"from and to are both {ask.gpu!r}"))
    if ask.source not in state.agents:
        raise _unknown_gpu(state, ask.source)
    _refuse_unservable(state, model)
    target = _allowed(state, model, ask.gpu)[0]
    device = state.index.of(model).device
    source = device.get(ask.source)
    if source is None or source.state != "resident" or not source.agent.is_usable:
        where = ", ".join(r.gpu for r in device.values() if r.state == "resident") or "no GPU"
        words = f"{model} is not resident on {ask.source}, but on {where}"
        raise _Refused(AdminAnswer("conflict", words))
    waits_for = ""
    if ask.gpu not in device:
        waits_for = _refuse_without_room(state, model, [target])
    state.drop_wish(model)
    state.add_move(Move(model, ask.source, ask.gpu, now, ask.until))
    return AdminAnswer("accepted", waits_for)


# -- why not -------------------------------------------------------------------------------


def _unknown_gpu(state: ClusterState, gpu: str) -> _Refused:
    known = ", ".join(state.agents) or "none"
    return _Refused(AdminAnswer("invalid", f"there is no GPU {gpu!r}; there are: {known}"))


def _refuse_unservable(state: ClusterState, model: str) -> None:
    if state.deployments[model].drained:
        words = f"{model} is drained: undrain it first"
        raise _Refused(AdminAnswer("conflict", words))
    view = state.deployment_view(model)
    if view.status == "failed":
        raise _Refused(AdminAnswer("conflict", f"{model} can not be served: {view.reason}"))


def _allowed(state: ClusterState, model: str, gpu: str) -> list[Agent]:
    """The usable agents of the GPUs that ``model`` may be on, or of ``gpu`` alone."""
    spec = state.deployments[model]
    if gpu and gpu not in state.agents:
        raise _unknown_gpu(state, gpu)
    if gpu and spec.gpus and gpu not in spec.gpus:
        words = f"{model} may only be on {', '.join(spec.gpus)}, by its setting gpus"
        raise _Refused(AdminAnswer("conflict", words))
    usable = state.index.usable
    wanted = [gpu] if gpu else [name for name in usable if not spec.gpus or name in spec.gpus]
    agents = [usable[name] for name in wanted if name in usable]
    if not agents:
        where = gpu or ", ".join(spec.gpus) or "any GPU"
        raise _Refused(AdminAnswer("unavailable", f"no agent is up for {where}"))
    return agents


def _refuse_without_room(state: ClusterState, model: str, agents: list[Agent]) -> str:
    """What it will have to wait for, in words, if for anything."""
    reasons_why = []
    busy: list[str] = []
    for agent in agents:
        replica = agent.replica(model)
        why, in_use = _obstacles(state, agent, replica)
        if not why and not in_use:
            return ""
        if why:
            reasons_why.append(f"{agent.gpu}: {why}")
        busy += in_use
    if len(reasons_why) == len(agents):
        raise _Refused(AdminAnswer("conflict", f"no room for {model}: {'; '.join(reasons_why)}"))
    return f"it waits for room: busy are {', '.join(dict.fromkeys(busy))}"


def _obstacles(state: ClusterState, agent: Agent, replica: Replica) -> tuple[str, list[str]]:
    """Why it can not come in whoever becomes idle; and the busy models that are in its way."""
    size, budget = replica.footprint_bytes, agent.budget_bytes
    if size > budget:
        return f"it needs {size // _MIB} MiB, the whole GPU has {budget // _MIB} MiB", []
    others = [r for r in agent.device.values() if r is not replica]
    group = state.group(replica.model)
    pinned = [r for r in others if state.is_pinned(r.model)]
    if rivals := [r.model for r in pinned if group and state.group(r.model) == group]:
        return f"{rivals[0]} of the same exclusive group is pinned there", []
    pinned_bytes = sum(r.footprint_bytes for r in pinned)
    if size + pinned_bytes > budget:
        names = ", ".join(r.model for r in pinned)
        words = f"it needs {size // _MIB} of {budget // _MIB} MiB, and pinned models ({names}) hold"
        return f"{words} {pinned_bytes // _MIB} MiB", []
    busy = [r for r in others if r not in pinned and not state.is_idle(r)]
    busy_bytes = sum(r.footprint_bytes for r in busy)
    in_the_way = size + pinned_bytes + busy_bytes > budget
    return "", [r.model for r in busy] if in_the_way else []
