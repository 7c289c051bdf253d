"""Runs of a request against a queue whose own answer comes late."""

from typing import Any, cast

from schemas.requests import GenerateRequest, SamplingParams, TextPrompt
from schemas.stream import Finished, RequestTiming
from services.api.call import Background, Call, ClientLeft
from services.api.runs import Runs

REQUEST = GenerateRequest(
    "id", "m", "interactive", TextPrompt("x"), SamplingParams(seed=1), "reply", 0.0, 60.0
)


class Stage:
    """A queue, and the taking back of requests. ``meanwhile``: before the queue answers."""

    def __init__(self, meanwhile: Any) -> None:
        self.withdrawn: list[str] = []
        self._meanwhile = meanwhile
        stage = cast(Any, self)
        self.runs = Runs(stage, stage, Background(), stage, lambda call, why: None)

    async def enqueue_once(self, request: GenerateRequest) -> tuple[int, bool]:
        self._meanwhile()
        return 7, True

    async def withdraw(self, call: Call, run: str) -> None:
        self.withdrawn.append(run)


async def test_a_run_that_is_complete_before_the_queue_answers_is_not_taken_back() -> None:
    call = Call(REQUEST)

    def complete() -> None:
        call.end(Finished("id", 1, "stop", 1, 1, RequestTiming()))
        call.runs.pop("id")  # as the relay does

    stage = Stage(complete)
    assert await stage.runs.enqueue(call, "id")
    assert (stage.withdrawn, call.runs) == ([], {})


async def test_a_run_that_was_given_up_before_the_queue_answers_is_taken_back() -> None:
    call = Call(REQUEST)
    stage = Stage(lambda: call.end(ClientLeft()))
    assert await stage.runs.enqueue(call, "id")
    assert (stage.withdrawn, call.runs) == (["id"], {"id": 7})
