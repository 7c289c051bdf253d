"""Moving a model off a hot GPU: pure choices, and the steps of a move.

A GPU is *hot* when several models compute there and one of them misses its targets: its tokens or
first tokens are slower, on average. One of them moves to a GPU with room that hurts nobody::

    hot GPU    resident, serves =======================|drains, and pulls no more
    cool GPU            |an extra turn: swap-in -------'resident, serves =========

Requests never wait for a move: the model is served all the while. What runs on the hot GPU ends
there, as what was computed for a request is in the memory of that host. Two guards: a model moves
once in `_REST_S` at most, and only to a GPU that stays far cooler than the one it leaves.
"""

import math

import msgspec

from schemas.commands import Command
from services.scheduler import eviction, policy, reasons
from services.scheduler.housekeeping import command
from services.scheduler.replica import Agent, Replica
from services.scheduler.state import ClusterState
from services.scheduler.turns import Turn
from services.scheduler.victims import arrival_s, quantum_s
from services.scheduler.waiting import Move

_REST_S = 60.0  # a model that moved stays for so long
_GIVE_UP_S = 10.0  # a move whose swap-in has not begun by then is given up
_COOLER = 0.5  # of its memory: how much less busy the other GPU is, with the newcomer


class _Target(msgspec.Struct, frozen=True):
    gpu: str
    pressure: float


def go_on(state: ClusterState, now: float) -> list[Command]:
    """The next step of each move: drain where it was, once it is resident where it goes."""
    commands: list[Command] = []
    for move in list(state.moves.values()):
        source = state.find_replica(move.source, move.model)
        target = state.find_replica(move.gpu, move.model)
        if source is None or target is None or not source.serves or not target.agent.is_usable:
            state.drop_move(move.model)
        elif target.state == "resident":
            state.drop_move(move.model)
            if source.state == "resident" and source.is_settled:
                reasons.note_moved(state, source, move.gpu, now)
                eviction.note_eviction(state, source)
                commands.append(command(state, source, "swap_out", now))
        elif target.state != "swapping_in" and now > (move.until or move.at + _GIVE_UP_S):
            state.drop_move(move.model)
    return commands


def begin(state: ClusterState, now: float) -> None:
    """Of each hot GPU one model gets an extra turn on a cooler one, if there is any."""
    if not state.config.migrate or len(state.index.usable) < 2:
        return
    leaving = {move.source for move in state.moves.values()}
    for agent in state.index.usable.values():
        if agent.gpu in leaving or not is_hot(state, agent):
            continue
        movable = [r for r in agent.device.values() if _may_move(state, r, now)]
        for replica in sorted(movable, key=lambda r: (r.swap_in_s, r.model)):
            target = _target(state, replica, now)
            if target:
                state.add_move(Move(replica.model, agent.gpu, target.gpu, now))
                break


def is_hot(state: ClusterState, agent: Agent) -> bool:
    """So many models compute on ``agent`` that one of them misses its targets."""
    busy = [r for r in agent.device.values() if r.in_flight]
    return len(busy) > 1 and any(_is_slow(state, replica.model) for replica in busy)


def _is_slow(state: ClusterState, model: str) -> bool:
    tempo = state.tempos.get(model)
    if tempo is None:
        return False
    return tempo.token_s > state.token_target_s(model) or tempo.first_s > state.ttft_target_s(
        model, "interactive"
    )


def _may_move(state: ClusterState, replica: Replica, now: float) -> bool:
    """Busy, this its only replica, had its quantum, and did not move lately."""
    model = replica.model
    places = state.index.of(model)
    return (
        replica.state == "resident"
        and replica.is_settled
        and replica.in_flight > 0
        and len(places.device) == 1
        and not places.suspended
        and model not in state.plans
        and not state.is_pinned(model)
        and now - replica.resident_since >= quantum_s(state, replica)
        and now - state.moved_at.get(model, -math.inf) >= _REST_S
    )


def _target(state: ClusterState, replica: Replica, now: float) -> _Target | None:
    """The coolest GPU that can take it without hurting anybody, if its link is free."""
    turn = Turn(replica.model, "", now, "", math.inf, is_extra=True)
    home = policy.pressure(state, replica.agent)
    found = []
    for option in policy.weigh(state, turn, state.holds.claims, now, state.holds.closed):
        agent = state.agents[option.placement.gpu]
        share = replica.footprint_bytes / agent.budget_bytes
        pressure = policy.pressure(state, agent) + share
        if pressure + _COOLER <= home and not arrival_s(state, agent, now):
            found.append(_Target(agent.gpu, pressure))
    return min(found, key=lambda target: (target.pressure, target.gpu), default=None)
