"""Embeddings through an agent's control process: a request like any other."""

import time

from schemas.events import FirstTokenSent, RequestEnded
from schemas.requests import EmbedRequest
from schemas.stream import Chunk, Finished, Started, Vectors
from services.bus import Message
from tests.integration.agent_kit import Agent, Log


async def test_vectors_then_one_end(agent: Agent) -> None:
    await agent.bring_in("m")
    api = agent._buses["api"]
    chunks = Log()

    async def on_chunk(message: Message[Chunk]) -> None:
        await chunks.add(message.body)

    reply_to = f"{api.inbox}.r.e1"
    await api.subscribe(reply_to, Chunk, on_chunk)
    await api.flush()
    now = time.time()
    request = EmbedRequest(
        "e1", "m", "interactive", ("hello", (1, 2)), reply_to, now, now + 60, dimensions=2
    )
    await agent.queue.enqueue(request)
    await chunks.until(Finished)
    kinds = [type(chunk) for chunk in chunks.items]
    assert kinds == [Started, Vectors, Vectors, Finished]
    assert [chunk.index for chunk in chunks.all(Vectors)] == [0, 1]
    (end,) = chunks.all(Finished)
    assert (end.prompt_tokens, end.completion_tokens, end.finish_reason) == (5, 0, "stop")
    await agent.ended()
    (told,) = agent.events.all(RequestEnded)
    assert (told.outcome, told.prompt_tokens) == ("stop", 5)
    assert len(agent.events.all(FirstTokenSent)) == 1
    await agent.queue_is_empty()
