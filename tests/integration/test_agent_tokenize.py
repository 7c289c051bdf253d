"""Questions about tokens, over a real nats-server and a scripted engine worker."""

import asyncio
import os
import signal

import pytest

from schemas.events import ModelRegistered, WorkerDied
from schemas.names import tokenize_subject
from schemas.requests import TextPrompt
from schemas.tokenize import (
    DetokenizeRequest,
    TokenizeAnswer,
    TokenizeAsk,
    Tokenized,
    TokenizeFailed,
    TokenizeRequest,
)
from services.bus import NoResponder
from services.gpu_agent import tokenizing
from tests.integration.agent_kit import Agent, eventually

TEXT = TextPrompt("x")


async def ask(agent: Agent, question: TokenizeAsk) -> TokenizeAnswer:
    answer: TokenizeAnswer = await agent._buses["api"].request(
        tokenize_subject(question.model), question, TokenizeAnswer, 10.0
    )
    return answer


async def registered(agent: Agent, model: str) -> None:
    await agent.register(model)
    await agent.events.until(ModelRegistered, model=model)
    await agent._buses["agent"].flush()  # its subscription is known


async def one_waits(agent: Agent) -> None:
    async def check() -> bool:
        return len(agent.control.tokenizing._waiting) == 1

    await eventually(check, "a question to reach the agent")


async def test_a_model_that_is_nowhere_near_a_gpu_is_asked(agent: Agent) -> None:
    with pytest.raises(NoResponder):
        await ask(agent, TokenizeRequest("Qwen/Qwen2.5", TEXT))
    await registered(agent, "Qwen/Qwen2.5")
    answer = await ask(agent, TokenizeRequest("Qwen/Qwen2.5", TEXT))
    assert answer == Tokenized((1, 2), 512, ("Qwen/Qwen2.5",))
    assert agent.control.replicas["Qwen/Qwen2.5"].state == "cold"
    with pytest.raises(NoResponder):
        await ask(agent, TokenizeRequest("other", TEXT))


async def test_a_worker_that_dies_leaves_no_question_without_an_answer(agent: Agent) -> None:
    await registered(agent, "m")
    asking = asyncio.create_task(ask(agent, DetokenizeRequest("m", (1,))))
    await one_waits(agent)
    os.kill(agent.control.worker.pid, signal.SIGKILL)
    answer = await asking
    assert isinstance(answer, TokenizeFailed)
    assert answer.code == "model_unavailable"
    assert "SIGKILL" in answer.message
    # Its successor is asked like before.
    await agent.events.until(WorkerDied)
    assert isinstance(await ask(agent, TokenizeRequest("m", TEXT)), Tokenized)


async def test_more_questions_than_may_wait_are_turned_away(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "MAX_WAITING", 1)
    await registered(agent, "m")
    first = asyncio.create_task(ask(agent, DetokenizeRequest("m", (1,))))
    await one_waits(agent)
    second = await ask(agent, TokenizeRequest("m", TEXT))
    assert isinstance(second, TokenizeFailed)
    assert "1 questions about tokens wait already" in second.message
    await agent.control.tokenizing.close()  # as the agent does at its end
    answer = await first
    assert isinstance(answer, TokenizeFailed)
    assert "shutting down" in answer.message
    with pytest.raises(NoResponder):
        await ask(agent, TokenizeRequest("m", TEXT))
