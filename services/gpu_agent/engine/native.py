"""The native engine: transformers models on the agent's own pages.

It owns the page pool, every registered model, and one `Batch` per model on the device. All calls
come from one thread, except that the jobs of its `Library` are run elsewhere.

    register ──> load ──> swap_in ──> (arriving) ──> resident ──> swap_out ──> swap_in ──> ...
                                          submit, cancel, step ...

A swap-in takes its time in threads of its own. Requests may be submitted as soon as it has begun:
their forward waits, group by group, for the weights that it needs. `poll` ends the swap-ins that
are over; nothing that was computed from a model leaves before that, because its weights are
checked last.

Operations answer with messages for control: what was done, or OpFailed with a reason that
a person can act on. None of them raises for what a model or a request does.
"""

import time
from collections.abc import Callable
from typing import Final

from schemas.requests import GenerateRequest
from schemas.stream import ErrorCode
from services.gpu_agent.checksums import Corruption
from services.gpu_agent.engine.batch import DEFAULT_CHUNK_TOKENS, Batch
from services.gpu_agent.engine.kv import KVStore
from services.gpu_agent.engine.library import (
    EngineOptions,
    Library,
    failed,
    not_registered,
)
from services.gpu_agent.hosted import HostedModel, never, nothing
from services.gpu_agent.ipc import (
    Arriving,
    Broke,
    Corrupted,
    Done,
    FromWorker,
    OpFailed,
    Produced,
    SwapInCancelled,
    SwappedIn,
    SwappedOut,
    Verified,
)
from services.gpu_agent.pages import OutOfPages, PagePool

# While a model arrives its first layer is there long before its last: a prompt in several chunks
# would send each of them, but for the first, through layers that have long been waiting.
ARRIVING_CHUNK_TOKENS: Final = 4096


class NativeEngine(Library):
    """See the module's text.

    ``interrupted()``: asked while a forward waits for weights; True gives it up, to be run again
    by a later step. ``on_swap_in_over()`` is called in another thread: `poll` has something.
    """

    def __init__(
        self,
        pool: PagePool,
        options: EngineOptions | None = None,
        interrupted: Callable[[], bool] = never,
        on_swap_in_over: Callable[[], None] = nothing,
    ) -> None:
        super().__init__(pool, options or EngineOptions())
        self._interrupted = interrupted
        self._on_swap_in_over = on_swap_in_over
        self._batches: dict[str, Batch] = {}
        self._owner: dict[str, str] = {}  # request id -> model; only of requests not ended
        self._turn: list[str] = []  # models on the device, the next one to step first

    @property
    def is_busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._owner)

    def is_resident(self, model: str) -> bool:
        """Whether requests for ``model`` need to wait for nothing."""
        hosted = self._models.get(model)
        return hosted is not None and hosted.state == "resident"

    # -- swapping --------------------------------------------------------------------------

    def swap_in(self, model: str) -> Arriving | OpFailed:
        """Begin to bring the host image onto device pages; there is a batch from now on.

        `poll` tells how it ended.
        """
        hosted = self._models.get(model)
        if hosted is None:
            return OpFailed(model, "swap_in", not_registered(model))
        if hosted.state != "host":
            cause = "is not loaded yet" if hosted.state == "cold" else f"is {hosted.state} already"
            return OpFailed(model, "swap_in", f"model {model!r} {cause}")
        try:
            text = self._text_of(hosted)
            hosted.begin_swap_in(self._interrupted, self._on_swap_in_over)
        except OutOfPages as error:
            return OpFailed(model, "swap_in", f"model {model!r} does not fit now: {error}")
        except Exception as error:
            return failed(model, "swap_in", error)
        try:
            self._batches[model] = Batch(
                hosted.module,
                KVStore(self._pool, hosted.geometry, hosted.kv_pages),
                text,
                max_model_len=hosted.facts.max_model_len,
                max_batch=hosted.facts.max_batch,
                chunk_tokens=ARRIVING_CHUNK_TOKENS,
            )
        except Exception as error:
            hosted.call_off_swap_in()
            return failed(model, "swap_in", error)
        self._tier.touch(model)
        self._turn.append(model)
        return Arriving(model)

    def poll(self) -> list[FromWorker]:
        """End the swap-ins that are over: SwappedIn, or what went wrong."""
        over = [name for name in self._turn if self._models[name].is_swap_in_over]
        return [message for name in over for message in self.end_swap_in(name)]

    def end_swap_in(self, model: str) -> list[FromWorker]:
        """Wait until ``model`` has arrived, and say how it went."""
        hosted, batch = self._models[model], self._batches[model]
        try:
            trace = hosted.end_swap_in()
        except Exception as error:
            return self._swap_in_failed(hosted, error)
        batch.chunk_tokens = DEFAULT_CHUNK_TOKENS
        return [SwappedIn(model, trace, self.memory())]

    def _swap_in_failed(self, hosted: HostedModel, error: Exception) -> list[FromWorker]:
        answer = failed(hosted.spec.name, "swap_in", error)
        out: list[FromWorker] = []
        if isinstance(error, Corruption):
            out += self._corrupted(hosted, error)
        return [*out, answer, *self._drop_batch(hosted.spec.name, answer.reason)]

    def swap_out(self, model: str) -> list[FromWorker]:
        """Drop ``model``'s pages, or call its swap-in off. Refused while requests run: control
        drains first.
        """
        hosted, batch = self._models.get(model), self._batches.get(model)
        if hosted is None:
            return [OpFailed(model, "swap_out", not_registered(model))]
        if batch is None:
            return [OpFailed(model, "swap_out", f"model {model!r} is not resident")]
        if batch.num_requests:
            reason = (
                f"model {model!r} still has {batch.num_requests} requests: drain or cancel them "
                "before swapping it out"
            )
            return [OpFailed(model, "swap_out", reason)]
        out: list[FromWorker] = []
        try:
            if hosted.state == "arriving":
                trace = hosted.call_off_swap_in()
                out.append(SwapInCancelled(model, trace))
            else:
                trace = hosted.swap_out()
        except Corruption as error:  # the swap-in had failed before it was called off
            refusal = OpFailed(model, "swap_out", f"model {model!r} is not resident")
            return [*self._swap_in_failed(hosted, error), refusal]
        except Exception as error:
            return [failed(model, "swap_out", error)]
        self._drop_batch(model, "")
        self._tier.touch(model)
        return [*out, SwappedOut(model, trace, self.memory())]

    def verify(self, model: str) -> list[FromWorker]:
        """Check every page of ``model``. Takes long where it is large."""
        hosted = self._models.get(model)
        if hosted is None:
            return [OpFailed(model, "verify", not_registered(model))]
        if hosted.state not in ("host", "resident"):
            reason = f"model {model!r} is {hosted.state}: there is nothing to check"
            return [OpFailed(model, "verify", reason)]
        began = time.perf_counter()
        try:
            num_pages = hosted.verify()
        except Corruption as error:
            out = self._corrupted(hosted, error)
            return [*out, *self._drop_batch(model, str(error))]
        except Exception as error:
            return [failed(model, "verify", error)]
        took = time.perf_counter() - began
        return [Verified(model, num_pages, hosted.layout.num_bytes, took)]

    def _corrupted(self, hosted: HostedModel, error: Corruption) -> list[FromWorker]:
        self._tier.release(hosted.spec.name)
        return [Corrupted(hosted.spec.name, error.check, str(error), self.memory())]

    def _drop_batch(self, model: str, reason: str) -> list[FromWorker]:
        """Forget the batch; requests that are in it end here, and control queues them again."""
        batch = self._batches.pop(model, None)
        if batch is None:
            return []
        self._turn.remove(model)
        return self._settle(batch.abort("model_unavailable", reason))

    # -- requests --------------------------------------------------------------------------

    def submit(self, request: GenerateRequest) -> list[FromWorker]:
        """Hand ``request`` to its model's batch; Broke where that model is not resident."""
        out: list[FromWorker] = []
        model = self._owner.get(request.request_id)
        if model is not None and model != request.model:
            out += self.cancel(request.request_id)
        batch = self._batches.get(request.model)
        if batch is None:
            known = self._models.get(request.model)
            cause = f"is {known.state}" if known else "is not registered"
            message = f"model {request.model!r} {cause} on this GPU, not resident"
            return [*out, Broke(request.request_id, "model_unavailable", message)]
        out += self._settle(batch.submit(request))
        if batch.has(request.request_id):
            self._owner[request.request_id] = request.model
        return out

    def cancel(self, request_id: str) -> list[FromWorker]:
        """End a request now, if it is here."""
        model = self._owner.get(request_id)
        return self._settle(self._batches[model].cancel(request_id)) if model is not None else []

    def abort(self, code: ErrorCode, message: str) -> list[FromWorker]:
        """End every request with the same error."""
        ended = [out for batch in self._batches.values() for out in batch.abort(code, message)]
        return self._settle(ended)

    def step(self) -> list[FromWorker]:
        """One step of one busy model; models take turns.

        One that is still arriving computes only while no other has anything to do, because its
        forward waits.
        """
        busy = [model for model in self._turn if self._batches[model].num_requests]
        here = [model for model in busy if self._models[model].state == "resident"]
        if not busy:
            return []
        model = (here or busy)[0]
        self._turn.remove(model)
        self._turn.append(model)
        return self._settle(self._batches[model].step()) if here else self._step_arriving(model)

    def _step_arriving(self, model: str) -> list[FromWorker]:
        """A step whose forward waits for weights. Its tokens leave after they were checked."""
        hosted, batch = self._models[model], self._batches[model]
        if hosted.wants_canary:
            try:
                hosted.run_canary()
            except Exception:  # it did not arrive, or the model can not compute: the end will tell
                return []
        out = self._settle(batch.step())
        if not any(isinstance(message, Produced | Done) for message in out):
            return out
        told = self.end_swap_in(model)
        if any(isinstance(message, OpFailed) for message in told):
            ended = [m.request_id for m in out if isinstance(m, Done)]
            told += [
                Broke(name, "model_unavailable", "its weights failed a check") for name in ended
            ]
            return told + [message for message in out if isinstance(message, Broke)]
        return told + out

    def _settle(self, out: list[FromWorker]) -> list[FromWorker]:
        """Forget the requests that ``out`` ends."""
        for message in out:
            if isinstance(message, Done | Broke):
                self._owner.pop(message.request_id, None)
        return out
