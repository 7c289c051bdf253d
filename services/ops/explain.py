"""`hotswap explain`: where a model is, who waits for it, and what the scheduler decided about it.

Decisions are read from the event stream: those about the model, and those in which it had to leave
for another.
"""

import json
import logging
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from schemas import names
from schemas.decisions import Candidate, Victim
from schemas.events import DecisionMade
from schemas.state import PredictedWait, ReplicaStatus
from services.bus import Bus, BusOptions, Message, history
from services.ops import status

log = logging.getLogger(__name__)

# Looked at one after the other, until there are enough decisions: the last is all that is kept.
_WINDOWS_S = (600.0, 6 * 3600.0, 8 * 24 * 3600.0)
_INDENT = 14  # of all but the first line of a decision, which begins with the time


@dataclass
class Story:
    """What is known about ``model``. ``decisions``: oldest first."""

    model: str
    snapshot: status.Snapshot
    wait: PredictedWait | None
    decisions: list[DecisionMade] = field(default_factory=list)


async def run(options: BusOptions, model: str, last: int, as_json: bool) -> None:
    """Print the story. Raises BusError, and click's exception for a model that does not exist."""
    story = await take(options, model, last)
    if model not in story.snapshot.deployments:
        known = ", ".join(sorted(story.snapshot.deployments)) or "none"
        raise click.ClickException(f"there is no model {model!r}; there are: {known}")
    if as_json:
        print(json.dumps(_as_json(story), indent=2))
    else:
        show(story, Console())


async def take(options: BusOptions, model: str, last: int) -> Story:
    """One look at ``model`` with its ``last`` decisions. Raises BusError."""
    bus = await Bus.connect(options, service="explain", patience_s=5)
    waits: dict[str, PredictedWait] = {}

    async def on_wait(message: Message[PredictedWait]) -> None:
        waits[message.body.model] = message.body

    try:
        await bus.subscribe(names.wait_subject(model), PredictedWait, on_wait)
        snapshot = await status.take(options)  # listens for a while
        decisions = await read_decisions(bus, model, last, time.time())
    finally:
        await bus.close()
    return Story(model, snapshot, waits.get(model), decisions)


async def read_decisions(bus: Bus, model: str, last: int, now: float) -> list[DecisionMade]:
    """The ``last`` decisions in which ``model`` was brought in, or had to leave; oldest first."""
    subject = names.events_subject("decision_made")
    decoder = msgspec.json.Decoder(DecisionMade)
    found: list[DecisionMade] = []
    for window_s in _WINDOWS_S:
        found = []
        async for raw in history.read(bus, names.STREAM_EVENTS, subject, now - window_s):
            try:
                decision = decoder.decode(raw.data)
            except msgspec.DecodeError as error:
                log.warning("a decision can not be read: %s", error)
                continue
            if decision.model == model or _victim(decision, model):
                found.append(decision)
        if len(found) >= last:
            break
    return found[-last:]


def _victim(decision: DecisionMade, model: str) -> Victim | None:
    return next((victim for victim in decision.victims if victim.model == model), None)


def _as_json(story: Story) -> dict[str, Any]:
    agents = story.snapshot.agents.items()
    return {
        "model": story.model,
        "deployment": msgspec.to_builtins(story.snapshot.deployments[story.model]),
        "replicas": {
            gpu: msgspec.to_builtins(replica)
            for gpu, agent in sorted(agents)
            for replica in agent.replicas
            if replica.model == story.model
        },
        "waits": msgspec.to_builtins(story.wait),
        "decisions": msgspec.to_builtins(story.decisions),
    }


# -- as text -------------------------------------------------------------------------------


def show(story: Story, console: Console) -> None:
    """Print all of it, the newest decision last."""

    def line(text: str, indent: int = 0) -> None:
        """``text`` at ``indent``; what does not fit continues where the texts of decisions are."""
        first, rest = " " * indent, " " * (indent or _INDENT)
        wrapped = textwrap.fill(
            text, max(console.width, 60), initial_indent=first, subsequent_indent=rest
        )
        console.print(wrapped, markup=False, highlight=False, soft_wrap=True)

    record = story.snapshot.deployments[story.model]
    line(f"{story.model}  {record.status}{': ' + record.reason if record.reason else ''}")
    line(f"now    {where(story)}")
    line(f"waits  {who_waits(story.wait, time.time())}")
    console.print()
    if not story.decisions:
        line("no decision about it yet: nobody has asked for it while a scheduler led")
        return
    for decision in story.decisions:
        _show_decision(decision, story.model, line, console)


def where(story: Story) -> str:
    """Each GPU where something of the model is."""
    told = [
        f"{replica.state} on {gpu}{_requests(replica)}"
        for gpu, agent in sorted(story.snapshot.agents.items())
        for replica in agent.replicas
        if replica.model == story.model
    ]
    return ", ".join(told) or "nowhere: no agent answered"


def _requests(replica: ReplicaStatus) -> str:
    if not replica.in_flight:
        return ""
    return f" ({replica.in_flight} {'suspended' if replica.state == 'host' else 'running'})"


def who_waits(wait: PredictedWait | None, now: float) -> str:
    """Who waits for the model to come in, and for how long."""
    if wait is None:
        return "nobody waits for it to come in"
    num = wait.num_waiters
    words = [f"{num} request{'s' * (num > 1)}"] if num else []
    words += [f"{wait.num_suspended} suspended"] if wait.num_suspended else []
    place = f"number {wait.place} in line" if wait.place else "it is on its way in"
    return (
        f"{' and '.join(words)}, for {max(now - wait.since, 0.0):.1f} s; {place}; "
        f"{_expected(wait.wait_s)}"
    )


def _show_decision(
    decision: DecisionMade, model: str, line: Callable[[str, int], None], console: Console
) -> None:
    at = datetime.fromtimestamp(decision.at).strftime("%H:%M:%S.%f")[:-3]
    if decision.model != model and (victim := _victim(decision, model)):
        why = f"had to leave {decision.gpu} for {decision.model} ({describe(victim)})"
        line(f"{at}  {why}; {decision.model}: {decision.reason}", 0)
        return
    line(f"{at}  {decision.action} on {decision.gpu}: {decision.reason}", 0)
    if decision.urgency != "unasked":
        line(_for_whom(decision), _INDENT)
    if decision.victims:
        line(
            "victims: " + ", ".join(f"{v.model} ({describe(v)})" for v in decision.victims), _INDENT
        )
    if decision.candidates:
        console.print(Padding(_table(decision.candidates), (0, 0, 0, _INDENT), expand=False))
        if (more := decision.num_candidates - len(decision.candidates)) > 0:
            line(f"and {more} more GPUs", _INDENT)


def _for_whom(decision: DecisionMade) -> str:
    words = [decision.request_id or "suspended requests", f"waited {decision.waited_s:.2f} s"]
    urgency = {"in_time": "in time", "late": "late", "starving": "late, and starving"}
    due_s = decision.due_at - decision.at
    when = f"due in {due_s:.2f} s" if due_s > 0 else f"was due {-due_s:.2f} s before"
    words.append(f"{urgency[decision.urgency]} ({when})")
    if decision.priority:
        words.append(f"priority {decision.priority}")
    words.append(f"{decision.num_waiters} in the queue")
    if decision.num_suspended:
        words.append(f"{decision.num_suspended} suspended")
    words.append(_expected(decision.predicted_wait_s))
    return ", ".join(words)


def _expected(wait_s: float | None) -> str:
    return "nobody knows when it is there" if wait_s is None else f"expected in {wait_s:.2f} s"


def describe(victim: Victim) -> str:
    """Why this one: ``idle for 3.2 s``, ``preempted with slack 4.0 s``."""
    if victim.how == "idle":
        return "idle" if victim.idle_s is None else f"idle for {victim.idle_s:.1f} s"
    slack = "" if victim.slack_s is None else f" with slack {victim.slack_s:.1f} s"
    return f"{victim.how}{slack}"


def _table(candidates: tuple[Candidate, ...]) -> Table:
    table = Table("GPU", "action", "rank", "cost", "to copy", "victims", box=None, pad_edge=False)
    for candidate in candidates:
        table.add_row(
            escape(candidate.gpu),
            candidate.action,
            str(candidate.rank),
            f"{candidate.cost_s:.3f} s",
            f"{candidate.missing_bytes / 2**20:,.0f} MiB",
            escape(", ".join(candidate.victims)) or "-",
        )
    return table
