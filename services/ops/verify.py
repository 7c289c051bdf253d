"""`hotswap verify`: every page of a model's weights against what was loaded, on every GPU."""

import asyncio
import contextlib
from typing import TypeAlias

import click

from schemas import names
from schemas.events import Event, ModelVerified, VerificationFailed, kind_of
from schemas.requests import VerifyRequest
from services.bus import Bus, BusOptions, Message
from services.ops import status

Verdict: TypeAlias = ModelVerified | VerificationFailed


async def run(options: BusOptions, model: str, timeout_s: float) -> int:
    """Ask every agent that holds ``model``'s weights, and print what they find.

    Returns the exit status: 0 where all is well. Raises BusUnavailable, and click's exception
    where there is nothing to check.
    """
    snapshot = await status.take(options)
    if model not in snapshot.deployments:
        known = ", ".join(sorted(snapshot.deployments)) or "none"
        raise click.ClickException(f"there is no model {model!r}; there are: {known}")
    holders = [
        gpu
        for gpu, agent in sorted(snapshot.agents.items())
        for replica in agent.replicas
        if replica.model == model and replica.state in ("host", "resident")
    ]
    if not holders:
        raise click.ClickException(f"model {model!r} is in no agent's memory now")
    verdicts = await _ask(options, model, holders, timeout_s)
    for gpu in holders:
        click.echo(f"{gpu}: {_describe(verdicts.get(gpu), timeout_s)}")
    return 0 if all(isinstance(verdicts.get(gpu), ModelVerified) for gpu in holders) else 1


async def _ask(
    options: BusOptions, model: str, holders: list[str], timeout_s: float
) -> dict[str, Verdict]:
    bus = await Bus.connect(options, service="verify", patience_s=5)
    verdicts: dict[str, Verdict] = {}
    all_said = asyncio.Event()

    async def on_event(message: Message[Event]) -> None:
        event = message.body
        if isinstance(event, ModelVerified | VerificationFailed) and event.model == model:
            verdicts[event.gpu] = event
            if verdicts.keys() >= set(holders):
                all_said.set()

    try:
        await bus.subscribe(f"{names.PREFIX}.events.*.*.{names.escape(model)}", Event, on_event)
        await bus.flush()
        for gpu in holders:
            await bus.publish(names.verify_subject(gpu), VerifyRequest(model))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(all_said.wait(), timeout_s)
    finally:
        await bus.close()
    return verdicts


def _describe(verdict: Verdict | None, timeout_s: float) -> str:
    match verdict:
        case ModelVerified():
            rate = verdict.num_bytes / verdict.verify_s / 1e9 if verdict.verify_s else 0.0
            return f"{verdict.num_pages} pages are what was loaded ({rate:.1f} GB/s)"
        case VerificationFailed():
            return f"{kind_of(verdict)}: {verdict.reason}"
        case None:
            return f"no answer in {timeout_s:g} s: it may be swapping, try again"
