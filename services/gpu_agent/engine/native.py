"""The native engine: transformers models on the agent's own pages.

It owns the page pool, every registered model, and one `Batch` per model that was on the device.
All calls come from one thread, except that the jobs of its `Library` are run elsewhere.

    register ──> load ──> swap_in ──> (arriving) ──> resident ──> swap_out ──> swap_in ──> ...
                                          submit, cancel, step ...

A swap-in takes its time in threads of its own. Requests may be submitted as soon as it has begun:
their forward waits, group by group, for the weights that it needs. `poll` ends the swap-ins that
are over; nothing that was computed from a model leaves before that, because its weights are
checked last.

A swap-out may suspend the requests that run: they stay in the model's batch, their KV in host
memory, and go on by themselves after its next swap-in.

KV blocks beyond a model's reserve are borrowed pages of the pool. They come back when a swap-in
needs them, so whoever counts weights and reserves counts enough.

Operations answer with messages for control: what was done, or OpFailed with a reason that
a person can act on. None of them raises for what a model or a request does.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from schemas.requests import EmbedRequest, GenerateRequest, Request
from schemas.state import ModelSpec
from schemas.stream import ErrorCode
from services.gpu_agent.checksums import Corruption
from services.gpu_agent.engine.assembly import make_batch
from services.gpu_agent.engine.batch import Batch
from services.gpu_agent.engine.embedding import Embedder
from services.gpu_agent.engine.kv_host import HostKV
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
    Embedded,
    Forgotten,
    FromWorker,
    OpFailed,
    Produced,
    Registered,
    SwapInCancelled,
    SwappedIn,
    SwappedOut,
    Verified,
)
from services.gpu_agent.pages import OutOfPages, PagePool


class NativeEngine(Library):
    """See the module's text.

    ``interrupted()``: asked while a forward waits for weights; True gives it up, to be run again
    by a later step. ``on_swap_in_over()`` is called in another thread: `poll` has something.
    ``on_ready()`` likewise: `step` has something, where it had nothing before.
    """

    def __init__(
        self,
        pool: PagePool,
        options: EngineOptions | None = None,
        interrupted: Callable[[], bool] = never,
        on_swap_in_over: Callable[[], None] = nothing,
        on_ready: Callable[[], None] = nothing,
    ) -> None:
        super().__init__(pool, options or EngineOptions())
        self._interrupted = interrupted
        self._on_swap_in_over = on_swap_in_over
        self._on_ready = on_ready
        self._host_kv = HostKV(self._options.host_kv_bytes, pinned=pool.kind == "cuda")
        self._batches: dict[str, Batch | Embedder] = {}  # of models that are on the device, or were
        self._late: list[FromWorker] = []  # to be told by the next step
        self._owner: dict[str, str] = {}  # request id -> model; only of requests not ended
        self._turn: list[str] = []  # models on the device, the next one to step first

    @property
    def is_busy(self) -> bool:
        """Whether `step` has anything to do now."""
        return bool(self._late) or any(self._batches[m].is_busy for m in self._turn)

    @property
    def next_deadline(self) -> float:
        """Of suspended requests, which `step` ends when it is over: unix seconds, or infinite."""
        return min((batch.next_deadline for batch in self._suspended()), default=math.inf)

    def _suspended(self) -> list[Batch | Embedder]:
        return [batch for model, batch in self._batches.items() if model not in self._turn]

    def _is_wanted(self, model: str) -> bool:
        batch = self._batches.get(model)
        return batch is not None and batch.num_requests > 0

    def is_resident(self, model: str) -> bool:
        """Whether requests for ``model`` need to wait for nothing."""
        hosted = self._models.get(model)
        return hosted is not None and hosted.state == "resident"

    def register(self, spec: ModelSpec, folder: Path | None = None) -> Registered | OpFailed:
        """As the library does. A model that was read anew has new weights: what was computed
        from the old ones is forgotten, and suspended requests end with the next `step`.
        """
        before = self._models.get(spec.name)
        answer = super().register(spec, folder)
        if before is not None and self._models[spec.name] is not before:
            self._late += self._drop_batch(spec.name, f"model {spec.name!r} was registered anew")
        return answer

    def forget(self, model: str) -> Forgotten | OpFailed:
        """As the library does. Suspended requests end with the next `step`."""
        answer = super().forget(model)
        if isinstance(answer, Forgotten):
            self._late += self._drop_batch(model, f"model {model!r} was unloaded")
        return answer

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
            self._make_room(hosted)
            hosted.begin_swap_in(self._interrupted, self._on_swap_in_over)
        except OutOfPages as error:
            return OpFailed(model, "swap_in", f"model {model!r} does not fit now: {error}")
        except Exception as error:
            return failed(model, "swap_in", error)
        try:
            batch = self._batch_of(hosted)
            batch.attach(hosted.kv_pages)
        except Exception as error:
            hosted.call_off_swap_in()
            return failed(model, "swap_in", error)
        self._tier.touch(model)
        self._turn.append(model)
        return Arriving(model)

    def _make_room(self, hosted: HostedModel) -> None:
        """Have borrowed pages returned where the pool is short of what ``hosted`` needs."""
        wanted = hosted.facts.footprint_bytes // self._pool.page_bytes
        for model in self._turn:
            short = wanted - self._pool.free.num_free
            if short > 0:
                self._batches[model].give_back(short)

    def _batch_of(self, hosted: HostedModel) -> Batch | Embedder:
        """The model's batch, made where there is none yet, with all that is kept for it."""
        name = hosted.spec.name
        batch = self._batches.get(name)
        if batch is None:
            text, recorder = self._text_of(hosted), self._options.recorder
            what = (hosted, self._pool, text, self._host_kv)
            batch = make_batch(*what, recorder, self._on_ready)
            self._batches[name] = batch
        return batch

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
        batch.arrived()
        return [SwappedIn(model, trace, self.memory())]

    def _swap_in_failed(self, hosted: HostedModel, error: Exception) -> list[FromWorker]:
        answer = failed(hosted.spec.name, "swap_in", error)
        out: list[FromWorker] = []
        if isinstance(error, Corruption):
            out += self._corrupted(hosted, error)
        return [*out, answer, *self._drop_batch(hosted.spec.name, answer.reason)]

    def swap_out(self, model: str, preempt: bool = False) -> list[FromWorker]:
        """Drop ``model``'s pages, or call its swap-in off. With ``preempt`` its requests are
        suspended; without, it is refused while there are any: control drains first.
        """
        hosted = self._models.get(model)
        if hosted is None:
            return [OpFailed(model, "swap_out", not_registered(model))]
        if model not in self._turn:
            return [OpFailed(model, "swap_out", f"model {model!r} is not resident")]
        batch = self._batches[model]
        if batch.num_requests and not preempt:
            reason = (
                f"model {model!r} still has {batch.num_requests} requests: drain, cancel or "
                "preempt them to swap it out"
            )
            return [OpFailed(model, "swap_out", reason)]
        out: list[FromWorker] = []
        began = time.perf_counter()
        kv_bytes = batch.suspend()
        suspend_s = time.perf_counter() - began
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
            batch.attach(hosted.kv_pages)
            batch.arrived()
            return [failed(model, "swap_out", error)]
        self._turn.remove(model)
        self._tier.touch(model)
        trace = msgspec.structs.replace(
            trace, suspend_s=suspend_s, kv_bytes=kv_bytes, total_s=trace.total_s + suspend_s
        )
        return [*out, SwappedOut(model, trace, self.memory(), batch.num_requests)]

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
        """Forget the batch and all that was computed; requests that are in it end here, and
        control queues them again.
        """
        batch = self._batches.pop(model, None)
        if batch is None:
            return []
        out = self._settle(batch.abort("model_unavailable", reason))
        batch.suspend()
        batch.forget()
        if model in self._turn:
            self._turn.remove(model)
        return out

    # -- requests --------------------------------------------------------------------------

    def submit(self, request: Request) -> list[FromWorker]:
        """Hand ``request`` to its model's batch; Broke where that model is not resident."""
        out: list[FromWorker] = []
        model = self._owner.get(request.request_id)
        if model is not None and model != request.model:
            out += self.cancel(request.request_id)
        if request.model not in self._turn:
            known = self._models.get(request.model)
            cause = f"is {known.state}" if known else "is not registered"
            message = f"model {request.model!r} {cause} on this GPU, not resident"
            return [*out, Broke(request.request_id, "model_unavailable", message)]
        batch = self._batches[request.model]
        match batch, request:
            case Batch(), GenerateRequest():
                out += self._settle(batch.submit(request))
            case Embedder(), EmbedRequest():
                out += self._settle(batch.submit(request))
            case _:
                does = "generates no text" if isinstance(batch, Embedder) else "makes no embeddings"
                message = f"model {request.model!r} {does}"
                out.append(Broke(request.request_id, "model_not_supported", message))
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
        """One step of one busy model; models take turns. Also ends suspended requests whose
        deadline is over.

        One that is still arriving computes only while no other has anything to do, because its
        forward waits.
        """
        out, self._late = self._late, []
        out += self._settle([end for batch in self._suspended() for end in batch.expire()])
        busy = [model for model in self._turn if self._batches[model].is_busy]
        here = [model for model in busy if self._models[model].state == "resident"]
        if not busy:
            return out
        model = (here or busy)[0]
        self._turn.remove(model)
        self._turn.append(model)
        if not here:
            return out + self._step_arriving(model)
        return out + self._settle(self._batches[model].step())

    def _step_arriving(self, model: str) -> list[FromWorker]:
        """A step whose forward waits for weights. Its tokens leave after they were checked."""
        hosted, batch = self._models[model], self._batches[model]
        if hosted.wants_canary:
            try:
                hosted.run_canary()
            except Exception:  # it did not arrive, or the model can not compute: the end will tell
                return []
        out = self._settle(batch.step())
        if not any(isinstance(message, Produced | Embedded | Done) for message in out):
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

    def validate(self) -> None:
        """Raise AssertionError where the books do not balance."""
        for batch in self._batches.values():
            batch.validate()
        self._host_kv.validate()
        self._pool.free.validate()
