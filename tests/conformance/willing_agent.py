"""An agent that answers whatever is asked, at once: in a process of its own.

    python -m tests.conformance.willing_agent CREDS MAX_QUEUED

The scheduler that it speaks to is a real one, and its configuration has these deployments:

    CHAT     generates: up to ANSWER, token by token, with log probabilities where asked
    EMBEDS   makes vectors
    BROKEN   a deployment that has failed
    HELD     one whose requests nobody pulls: they wait
"""

import asyncio
import sys
from pathlib import Path

import msgspec

from schemas import names
from schemas.events import LeaderElected
from schemas.requests import EmbedRequest, GenerateRequest, TextPrompt
from schemas.state import AgentStatus, ReplicaStatus
from schemas.stream import TokenLogprob, TokenLogprobs
from schemas.tokenize import Detokenized, DetokenizeRequest, TokenizeAsk, Tokenized
from services.bus import Bus, BusOptions, Delivery, declare
from services.bus.connection import RawMessage
from tests.integration.scripted_agent import FACTS, GPU, ScriptedAgent

CHAT = "willing/chat"
EMBEDS = "willing/embeds"
BROKEN = "willing/broken"
HELD = "willing/held"
ANSWER = ("Good", " morning", ",", " \N{SUN}", "!")
DIMENSIONS = 4
EMBED_FACTS = msgspec.structs.replace(FACTS, runner="embed", dimensions=DIMENSIONS, kv_bytes=0)
ROOM = 256
HEARTBEAT_S = 1.0


def _status() -> AgentStatus:
    """What it holds. It obeys no command: this stays so."""
    replicas = (
        ReplicaStatus(CHAT, "resident", 1, facts=FACTS),
        ReplicaStatus(EMBEDS, "resident", 1, facts=EMBED_FACTS),
        ReplicaStatus(HELD, "resident", 1, facts=FACTS),
        ReplicaStatus(BROKEN, "failed", 1, reason="it has no weights"),
    )
    budget = 1 << 20
    used = 3 * (FACTS.weight_bytes + FACTS.kv_bytes)
    return AgentStatus(GPU, "i1", 1, "cpu", "willing", budget, used, FACTS.weight_bytes, replicas)


async def _tell(bus: Bus) -> None:
    """Heartbeats, and an answer to every new leader."""

    async def now(_: object = None) -> None:
        await bus.publish(names.status_subject(GPU), _status())

    await bus.subscribe(names.events_subject("leader_elected"), LeaderElected, now)
    while True:
        await now()
        await asyncio.sleep(HEARTBEAT_S)


def _logprobs(request: GenerateRequest, num_tokens: int) -> list[TokenLogprobs]:
    count = request.sampling.logprobs
    if count is None:
        return []
    told, offset = [], 0
    for i in range(num_tokens):
        chosen = TokenLogprob(100 + i, -0.25, ANSWER[i])
        others = [TokenLogprob(200 + k, -2.0 - k, f"other{k}") for k in range(count - 1)]
        told.append(TokenLogprobs(chosen, offset, (chosen, *others)[:count]))
        offset += len(ANSWER[i])
    return told


async def _answer(agent: ScriptedAgent, delivery: Delivery) -> None:
    request = delivery.request
    await agent.started(delivery)
    if isinstance(request, EmbedRequest):
        width = request.dimensions or DIMENSIONS
        for index in range(len(request.inputs)):
            await agent.vectors(delivery, (1.0,) + (0.0,) * (width - 1), index=index)
        await agent.finished(delivery, 0)
        return
    assert isinstance(request, GenerateRequest)
    num_tokens = min(request.sampling.max_tokens or len(ANSWER), len(ANSWER))
    reason = "length" if num_tokens == request.sampling.max_tokens else "stop"
    logprobs = _logprobs(request, num_tokens)
    await agent.tokens(delivery, *ANSWER[:num_tokens], logprobs=logprobs)
    await agent.finished(delivery, num_tokens, reason)  # type: ignore[arg-type]


async def _tokenize(bus: Bus) -> None:
    """One token for each character, and back."""
    decoder: msgspec.json.Decoder[TokenizeAsk] = msgspec.json.Decoder(TokenizeAsk)

    async def on_question(raw: RawMessage) -> None:
        ask = decoder.decode(raw.data)
        answer: msgspec.Struct
        if isinstance(ask, DetokenizeRequest):
            answer = Detokenized("".join("x" for _ in ask.token_ids))
        else:
            text = ask.prompt.text if isinstance(ask.prompt, TextPrompt) else "a chat"
            answer = Tokenized(tuple(map(ord, text)), FACTS.max_model_len, tuple(text))
        await bus.publish(raw.reply, answer)

    for model in (CHAT, EMBEDS):
        await bus.subscribe_raw(names.tokenize_subject(model), on_question)


async def main(options: BusOptions, max_queued: int) -> None:
    """Answer until terminated. Says "ready" once it does."""
    bus = await Bus.connect(options, service="agent")
    await declare(bus, max_queued)
    agent = ScriptedAgent(bus)
    await agent.start()
    telling = asyncio.create_task(_tell(bus))
    for model in (CHAT, EMBEDS, HELD):
        await agent.hold(model)
        if model != HELD:
            await agent.pull(model, ROOM)
            await agent.pull(model, ROOM, "batch")
    await _tokenize(bus)
    print("ready", flush=True)
    while not telling.done():
        delivery = await agent.deliveries.get()
        await _answer(agent, delivery)
        await agent.pullers[f"{delivery.request.klass}.{delivery.request.model}"].want(ROOM)
    telling.result()


if __name__ == "__main__":
    asyncio.run(main(BusOptions.read(Path(sys.argv[1])), int(sys.argv[2])))
