"""Why it was decided so, in words and numbers: `schemas.events.DecisionMade` from what was weighed.

Called by `decide` where it decides, before its commands move the belief; nothing here changes what
is decided. Events are small, whatever the cluster: of many candidates and victims the first ones
are told.
"""

from collections.abc import Sequence

from schemas.decisions import Candidate, DecisionAction, Urgency, Victim
from schemas.events import DecisionMade
from services.scheduler import batches, policy, waits
from services.scheduler.replica import Replica
from services.scheduler.state import ClusterState
from services.scheduler.turns import Turn
from services.scheduler.victims import may_preempt, quantum_s, takes_turns

MOST_CANDIDATES = 8
MOST_VICTIMS = 64
_MOST_NAMES = 8  # of victims of a candidate, and in a sentence


def note_choice(
    state: ClusterState, turn: Turn, options: list[policy.Option], best: policy.Option, now: float
) -> None:
    """``best`` of ``options`` is about to be done for ``turn``."""
    action, gpu = best.placement.action, best.placement.gpu
    gives_commands = bool(best.placement.victims) or action in ("swap_in", "load")
    key = (turn.model, turn.gpu)
    if not gives_commands and not state.decisions.is_news(key, turn.since, action, gpu):
        return
    if action == "swap_in":
        state.decisions.wait_ended(key)
    agent = state.agents[gpu]
    replica = agent.replicas[turn.model]
    num_ahead = 0 if gives_commands or action == "wait" else waits.place_in_line(state, turn, now)
    victims = [agent.replicas[model] for model in best.placement.victims[:MOST_VICTIMS]]
    order = "by_memory" if state.config.placement == "memory" else "by_load"
    others = [option for option in options if option is not best]
    shown = [best, *sorted(others, key=lambda option: getattr(option, order))]
    _note(
        state,
        turn,
        gpu,
        action,
        _why(state, turn, best, len(options), now),
        now,
        predicted_wait_s=waits.on_gpu(state, replica, turn.since, now, num_ahead),
        victims=tuple(_victim(state, r, action == "evict", now) for r in victims),
        candidates=tuple(_candidate(option) for option in shown[:MOST_CANDIDATES]),
        num_candidates=len(options),
    )


def note_plan(
    state: ClusterState, turn: Turn | None, replica: Replica, action: DecisionAction, now: float
) -> None:
    """What was begun for ``replica`` goes on (``swap_in``), or is given up (``call_off``).

    ``turn``: the one that its bytes were freed for, if it still waits.
    """
    gpu = replica.gpu
    key = (turn.model, turn.gpu) if turn else (replica.model, "")
    predicted_wait_s = None
    if action == "swap_in":
        words = f"the bytes that it waited for on {gpu} are there"
        predicted_wait_s = waits.on_gpu(state, replica, now, now)
        state.decisions.wait_ended(key)
    elif turn is None:
        gone = "it is served elsewhere" if replica.model in state.waiting else "nobody waits for it"
        words = f"{gone} by now: no bytes of {gpu} are kept for it"
        state.decisions.wait_ended(key)
    else:
        words = f"{gpu} can not take it now: back in line, by its own turn"
        if not state.decisions.is_news(key, turn.since, action, gpu):
            return
    turn = turn or _nobody(replica.model)
    _note(state, turn, gpu, action, words, now, predicted_wait_s=predicted_wait_s)


def note_call_off(state: ClusterState, replica: Replica, now: float) -> None:
    """Its swap-in is under way, and all who waited have left."""
    words = "nobody waits for it any more: its swap-in is called off"
    _note(state, _nobody(replica.model), replica.gpu, "call_off", words, now)


def note_cut_drain(state: ClusterState, victim: Replica, now: float) -> None:
    """``victim`` should have ended its requests by now, and is preempted."""
    model = next(iter(victim.agent.planned))  # the first one that its bytes are freed for
    told_at = victim.pending.sent_at if victim.pending else now
    words = (
        f"{victim.model} took a request after it was told to leave, and still runs it "
        f"{now - told_at:.1f} s later: it is preempted"
    )
    told = Victim(victim.model, "preempted", slack_s=round(state.slack_s(victim, now), 3))
    line = state.line.of(model)
    turn = line[0] if line else _nobody(model)
    _note(state, turn, victim.gpu, "cut_drain", words, now, victims=(told,))


def note_ttl(state: ClusterState, replica: Replica, now: float) -> None:
    """Nobody wanted ``replica`` for the time that its settings name."""
    if state.deployments[replica.model].drained:
        words = "it is drained, and the last of its requests has ended"
        _note(state, _nobody(replica.model), replica.gpu, "swap_out", words, now)
        return
    idle_s = now - max(replica.last_used, replica.resident_since)
    words = f"nobody wanted it for {idle_s:.1f} s (ttl_s = {state.with_ttl[replica.model]:g})"
    _note(state, _nobody(replica.model), replica.gpu, "swap_out", words, now)


def note_must_leave(state: ClusterState, replica: Replica, why: str, now: float) -> None:
    """It is told to leave for no other model's sake."""
    _note(state, _nobody(replica.model), replica.gpu, "swap_out", why, now)


def note_prefetch(state: ClusterState, replica: Replica, now: float) -> None:
    """It is brought in on a guess."""
    per_min = 60 * state.tempo(replica.model).asked_per_s(now)
    words = (
        f"nobody waits, there is room on {replica.gpu}, and it was asked for {per_min:.1f} times a "
        "minute lately: prefetched"
    )
    _note(state, _nobody(replica.model), replica.gpu, "swap_in", words, now)


def note_gave_way(state: ClusterState, replica: Replica, model: str, now: float) -> None:
    """It was on its way in on a guess, and ``model`` is wanted there."""
    words = f"it was prefetched, nobody has asked for it, and {model} is wanted on {replica.gpu}"
    _note(state, _nobody(replica.model), replica.gpu, "call_off", words, now)


def note_moved(state: ClusterState, source: Replica, gpu: str, now: float) -> None:
    """``source`` drains: its model serves on ``gpu`` now."""
    words = f"it moved to {gpu}: here it takes no more requests, and leaves when these have ended"
    _note(state, _nobody(source.model), source.gpu, "swap_out", words, now)


def note_preload(state: ClusterState, replica: Replica, now: float) -> None:
    """Its host image is filled before anybody asks."""
    words = f"nobody asked: its image fits into the host memory of {replica.gpu} (preload)"
    if replica.is_broken:
        words = "its last load failed: tried again, as nobody asks for a failed model"
    _note(state, _nobody(replica.model), replica.gpu, "load", words, now)


def _note(
    state: ClusterState,
    turn: Turn,
    gpu: str,
    action: DecisionAction,
    reason: str,
    now: float,
    *,
    predicted_wait_s: float | None = None,
    victims: tuple[Victim, ...] = (),
    candidates: tuple[Candidate, ...] = (),
    num_candidates: int = 0,
) -> None:
    if predicted_wait_s is not None:
        predicted_wait_s = round(predicted_wait_s, 3)
    line = state.waiting.get(turn.model)
    replica = state.find_replica(turn.gpu, turn.model) if turn.gpu else None
    state.decisions.note(
        DecisionMade(
            model=turn.model,
            gpu=gpu,
            action=action,
            at=now,
            reason=reason,
            request_id=turn.request_id,
            waited_s=0.0 if turn.is_extra else round(max(0.0, now - turn.since), 3),
            due_at=0.0 if turn.is_extra else turn.due_at,
            urgency=_urgency(state, turn, now),
            priority=turn.priority,
            num_waiters=len(line) if line else 0,
            num_suspended=replica.in_flight if replica and replica.is_suspended else 0,
            predicted_wait_s=predicted_wait_s,
            victims=victims,
            candidates=candidates,
            num_candidates=num_candidates,
        )
    )


def _nobody(model: str) -> Turn:
    return Turn(model, "", 0.0, "", is_extra=True)


def _urgency(state: ClusterState, turn: Turn, now: float) -> Urgency:
    if turn.is_extra:
        return "unasked"
    if turn.due_at > now:
        return "in_time"
    return "starving" if now - turn.since > state.config.starvation_s else "late"


def _victim(state: ClusterState, replica: Replica, is_evicted: bool, now: float) -> Victim:
    if state.is_idle(replica):
        used_at = max(replica.last_used, replica.resident_since)
        return Victim(replica.model, "idle", idle_s=round(now - used_at, 3) if used_at else None)
    slack_s = round(state.slack_s(replica, now), 3)
    preempt = is_evicted and may_preempt(state, replica)
    return Victim(replica.model, "preempted" if preempt else "drained", slack_s=slack_s)


def _candidate(option: policy.Option) -> Candidate:
    placement = option.placement
    return Candidate(
        gpu=placement.gpu,
        action=placement.action,
        rank=option.rank,
        cost_s=round(option.cost_s, 4),
        missing_bytes=option.missing_bytes,
        victims=placement.victims[:_MOST_NAMES],
    )


def _why(state: ClusterState, turn: Turn, best: policy.Option, num_options: int, now: float) -> str:
    """One sentence, without its full stop: who asks, what is there, and against how many."""
    gpu = best.placement.gpu
    words = _what_is_there(state, turn, best, now)
    if turn.is_extra:
        words = f"{_why_unasked(state, turn.model)}; {words}"
    elif turn.gpu:
        words = f"its suspended requests can go on only on {gpu}; {words}"
    if num_options > 1:
        words += f"; the best of {num_options} GPUs"
    return words


def _why_unasked(state: ClusterState, model: str) -> str:
    if state.is_pinned(model):
        return "it is pinned"
    if model in state.wishes:
        return "an operator asked for it"
    if (move := state.moves.get(model)) and move.until:
        return f"an operator moves it off {move.source}"
    if move:
        return f"it moves off {move.source}, where too much runs to meet its targets"
    first_s, crowd = state.tempo(model).first_s, state.config.crowd
    return f"each of its replicas runs {crowd} requests or more, first tokens take {first_s:.2f} s"


def _what_is_there(state: ClusterState, turn: Turn, best: policy.Option, now: float) -> str:
    gpu, names = best.placement.gpu, _list(best.placement.victims)
    match best.rank:
        case 1:
            return f"there is room on {gpu}"
        case 2:
            return f"on {gpu} it fits as soon as those have left that are on their way out"
        case 3:
            return f"idle on {gpu}, and first to leave: {names}"
        case 4 | 6:
            where = "room is there" if best.rank == 4 else "by then there may be room"
            return f"it has no host image: {gpu} reads its files first, {where}"
        case 5:
            return f"{names} must give way on {gpu}: {_why_busy(state, turn, best, now)}"
        case 7:
            return f"nobody on {gpu} can leave yet: what is freed there is kept for it"
        case _:
            if not best.placement.victims:
                return f"no host image on {gpu} can be dropped yet: nobody else comes in there"
            return f"host memory of {gpu} is full: {names} must leave so that images can be dropped"


def _why_busy(state: ClusterState, turn: Turn, best: policy.Option, now: float) -> str:
    """Of the victims that are busy, the one with the least slack says which rule it was."""
    agent = state.agents[best.placement.gpu]
    victims = [agent.replicas[model] for model in best.placement.victims]
    busy = [victim for victim in victims if not state.is_idle(victim)]
    tightest = min(busy or victims, key=lambda victim: state.slack_s(victim, now))
    slack_s = state.slack_s(tightest, now)
    if batches.is_batch_only(state, tightest):
        return f"{tightest.model} serves only requests of class batch"
    if slack_s < state.config.run_quantum_s and state.yields(tightest):
        return f"{tightest.model} serves only who has had more than a fair share lately"
    if slack_s < state.config.run_quantum_s:
        if takes_turns(state, agent.replicas[turn.model], tightest):
            stayed_s = quantum_s(state, tightest)
            return f"it had {stayed_s:.1f} s there, and swaps are so quick that models take turns"
        return f"it waits for {now - turn.since:.1f} s, too long to ask for slack"
    return (
        f"it had {quantum_s(state, tightest):.1f} s there, and its answers can wait {slack_s:.1f} s"
    )


def _list(models: Sequence[str]) -> str:
    shown = ", ".join(models[:_MOST_NAMES])
    more = len(models) - _MOST_NAMES
    return f"{shown} and {more} more" if more > 0 else shown
