"""Probes of a live system that has nothing else to do: one request, or a few, at a time."""

import asyncio
import statistics
import time

from bench._live_cost import Samples, Switch, Warm
from bench._live_rig import MAX_BATCH, Live
from schemas.commands import SwapIn, SwapOut
from schemas.events import FirstTokenSent, SwapInCompleted, SwapOutCompleted

PROMPTS = (24, 96, 384)  # tokens
_FEW = 8  # tokens of an answer that nothing is asked of but its first one
_LONG = 100  # tokens of one that is to be interrupted

_AHEAD_S = 0.5  # later these are so far ahead of their target that they may be interrupted


async def calibrate(live: Live, rounds: int) -> Samples:
    """``rounds`` of each probe."""
    samples = Samples()
    for _ in range(rounds):
        for num_tokens in PROMPTS:
            await _warm(live, samples, num_tokens)
        await _rows(live, samples)
        for number, num_tokens in enumerate(PROMPTS):
            await _switch(live, samples, num_tokens, returns=number % 2 == 1)
    return samples


async def _warm(live: Live, samples: Samples, num_tokens: int) -> None:
    model = live.resident()[0]
    answer = await live.ask(model, num_tokens, 2 * _FEW)
    await live.ended(answer)
    samples.warm.append(
        Warm(num_tokens, live.ends()[answer.request_id].timing.prefill_s, answer.ttft_s)
    )
    samples.rounds.append((1, statistics.median(answer.gaps_s)))


async def _rows(live: Live, samples: Samples) -> None:
    """As many as run together."""
    model = live.resident()[0]
    asked = (live.ask(model, PROMPTS[0], 3 * _FEW) for _ in range(MAX_BATCH))
    answers = await asyncio.gather(*asked)
    samples.rounds += [(MAX_BATCH, statistics.median(answer.gaps_s)) for answer in answers]
    await live.ended(*answers)


async def _switch(live: Live, samples: Samples, num_tokens: int, *, returns: bool) -> None:
    """A request for the model that was away for longest; with ``returns`` for the one that left
    last, of which something is on the device still.
    """
    left = [out.model for _, out in live.of(SwapOutCompleted, 0.0)]
    away = [model for model in live.models if model not in live.resident()]
    away.sort(key=lambda model: len(left) - left[::-1].index(model) if model in left else 0)
    model = away[-1 if returns else 0]
    began = time.time()
    answer = await live.ask(model, num_tokens, _FEW)
    await live.ended(answer)
    if not live.of(SwapOut, began):
        return  # there was room: it is full from now on
    out_at, _ = live.of(SwapOut, began)[0]
    gone_at, _ = live.of(SwapOutCompleted, began)[0]
    in_at, _ = live.of(SwapIn, began)[0]
    _, there = live.of(SwapInCompleted, began)[0]
    _, first = live.of(FirstTokenSent, began)[0]
    samples.switches.append(
        Switch(
            num_tokens=num_tokens,
            num_bytes=there.trace.num_bytes,
            swap_out_s=gone_at - out_at,
            reaction_s=in_at - gone_at,
            swap_in_s=there.trace.started_at + there.trace.total_s - in_at,
            tail_s=first.first_token_s - first.swap_s,
            ttft_s=answer.ttft_s,
        )
    )


async def interruption(live: Live) -> list[float]:
    """All of the device is busy with long answers when somebody asks for another model: seconds
    until requests of one were suspended.
    """
    began = time.time()
    busy = live.resident()
    (other, *_) = (model for model in live.models if model not in busy)
    asked = [asyncio.create_task(live.ask(model, PROMPTS[0], _LONG)) for model in busy]
    await asyncio.sleep(_AHEAD_S)
    asked.append(asyncio.create_task(live.ask(other, PROMPTS[0], _FEW)))
    await live.ended(*await asyncio.gather(*asked))
    commands = live.of(SwapOut, began)
    return [
        at - max(told_at for told_at, one in commands if one.model == out.model and told_at < at)
        for at, out in live.of(SwapOutCompleted, began)
        if out.num_suspended
    ]
