"""The native engine: transformers models on the agent's own pages.

It owns the page pool, every registered model, and one `Batch` per resident model. All calls
come from one thread, except that the job that `load` or `find_files` gives is run elsewhere.

    register ──> load ──> swap_in ──> submit, cancel, step ... ──> swap_out ──> swap_in ──> ...

Operations answer with a message for control: what was done, or OpFailed with a reason that
a person can act on. None of them raises for what a model or a request does.
"""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal, TypeAlias

import msgspec

from schemas.requests import GenerateRequest
from schemas.state import ModelSpec
from schemas.stream import ErrorCode
from services.gpu_agent import checkpoint
from services.gpu_agent.checkpoint import BadCheckpoint
from services.gpu_agent.engine.batch import Batch
from services.gpu_agent.engine.kv import KVStore
from services.gpu_agent.engine.prompts import BadTokenizer, ModelText
from services.gpu_agent.hosted import HostedModel
from services.gpu_agent.ipc import (
    Broke,
    Done,
    FromWorker,
    Loaded,
    OpFailed,
    Registered,
    SwappedIn,
    SwappedOut,
)
from services.gpu_agent.pages import DeviceError, OutOfPages, PagePool

logger = logging.getLogger(__name__)

Op: TypeAlias = Literal["register", "load", "swap_in", "swap_out"]
OnProgress: TypeAlias = Callable[[int, int], None]  # (bytes done, bytes in all)

# Causes that a person can act on, with a message that says so; anything else is a fault of
# ours and gets a traceback in the log.
EXPECTED: Final = (BadCheckpoint, BadTokenizer, OutOfPages, DeviceError, MemoryError)


class NativeEngine:
    """See the module's text."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._models: dict[str, HostedModel] = {}
        self._texts: dict[str, ModelText] = {}
        self._texts_lock = threading.Lock()  # a loading thread reads tokenizers, too
        self._loading: set[str] = set()
        self._batches: dict[str, Batch] = {}
        self._owner: dict[str, str] = {}  # request id -> model; only of requests not ended
        self._turn: list[str] = []  # resident models, the next one to step first

    @property
    def is_busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._owner)

    # -- operations on models --------------------------------------------------------------

    def needs_files(self, spec: ModelSpec) -> bool:
        """Whether `find_files` may take long, because ``spec`` is to come from the hub."""
        known = self._models.get(spec.name)
        is_known = known is not None and known.spec == spec
        return not is_known and not Path(spec.source).expanduser().exists()

    def find_files(self, spec: ModelSpec) -> Path | OpFailed:
        """``spec``'s folder, downloaded if need be. May run in any thread."""
        try:
            return checkpoint.find(spec)
        except Exception as error:
            return _failed(spec.name, "register", error)

    def register(self, spec: ModelSpec, folder: Path | None = None) -> Registered | OpFailed:
        """Look at ``spec``'s files (in ``folder`` where `find_files` found them).

        The same spec again answers the same facts. Another spec replaces a cold model.
        """
        known = self._models.get(spec.name)
        if known is not None and known.spec == spec:
            return Registered(spec.name, known.facts)
        if known is not None and (known.state != "cold" or spec.name in self._loading):
            return OpFailed(
                spec.name,
                "register",
                f"model {spec.name!r} is already registered with other settings and is "
                f"{known.state}: restart the agent to change them",
            )
        try:
            local = spec if folder is None else msgspec.structs.replace(spec, source=str(folder))
            hosted = HostedModel.inspect(local, self._pool)
        except Exception as error:
            return _failed(spec.name, "register", error)
        hosted.spec = spec
        if known is not None:
            known.close()
        self._models[spec.name] = hosted
        with self._texts_lock:
            self._texts.pop(spec.name, None)
        return Registered(spec.name, hosted.facts)

    def load(self, model: str) -> Callable[[OnProgress], Loaded | OpFailed] | OpFailed:
        """The job that fills ``model``'s host image, to be run in any thread, or a refusal.

        Call `end_load` in the engine's thread once the job is over.
        """
        hosted = self._models.get(model)
        if hosted is None:
            return OpFailed(model, "load", _not_registered(model))
        if model in self._loading:
            return OpFailed(model, "load", f"model {model!r} is being loaded already")
        self._loading.add(model)

        def job(on_progress: OnProgress) -> Loaded | OpFailed:
            began = time.perf_counter()
            try:
                # The tokenizer first: without one nothing can be served, and it is quick
                # to find out. Reading it here also keeps it off the first request's path.
                self._text_of(hosted)
                num_bytes = hosted.load(on_progress)
            except Exception as error:
                return _failed(model, "load", error)
            return Loaded(model, num_bytes, time.perf_counter() - began)

        return job

    def end_load(self, model: str) -> None:
        self._loading.discard(model)

    def swap_in(self, model: str) -> SwappedIn | OpFailed:
        """Host image -> device pages, and an empty batch."""
        hosted = self._models.get(model)
        if hosted is None:
            return OpFailed(model, "swap_in", _not_registered(model))
        if hosted.state != "host":
            cause = "is resident already" if hosted.state == "resident" else "is not loaded yet"
            return OpFailed(model, "swap_in", f"model {model!r} {cause}")
        try:
            trace = hosted.swap_in()
        except OutOfPages as error:
            return OpFailed(model, "swap_in", f"model {model!r} does not fit now: {error}")
        except Exception as error:
            return _failed(model, "swap_in", error)
        try:
            self._batches[model] = Batch(
                hosted.module,
                KVStore(self._pool, hosted.geometry, hosted.kv_pages),
                self._text_of(hosted),
                max_model_len=hosted.facts.max_model_len,
                max_batch=hosted.facts.max_batch,
            )
        except Exception as error:
            hosted.swap_out()
            return _failed(model, "swap_in", error)
        self._turn.append(model)
        return SwappedIn(model, trace, self._pool.used_bytes)

    def swap_out(self, model: str) -> SwappedOut | OpFailed:
        """Drop ``model``'s pages. Refused while requests run: control drains first."""
        hosted, batch = self._models.get(model), self._batches.get(model)
        if hosted is None:
            return OpFailed(model, "swap_out", _not_registered(model))
        if batch is None:
            return OpFailed(model, "swap_out", f"model {model!r} is not resident")
        if batch.num_requests:
            return OpFailed(
                model,
                "swap_out",
                f"model {model!r} still has {batch.num_requests} requests: drain or cancel them "
                "before swapping it out",
            )
        try:
            trace = hosted.swap_out()
        except Exception as error:
            return _failed(model, "swap_out", error)
        del self._batches[model]
        self._turn.remove(model)
        return SwappedOut(model, trace, self._pool.used_bytes)

    def _text_of(self, hosted: HostedModel) -> ModelText:
        """The model's tokenizer, read at first use. Raises BadTokenizer."""
        spec = hosted.spec
        with self._texts_lock:
            text = self._texts.get(spec.name)
            if text is None:
                text = ModelText.read(
                    spec.name, hosted.folder, hosted.config, spec.trust_remote_code
                )
                self._texts[spec.name] = text
            return text

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
        """One step of one busy model; models take turns."""
        for model in list(self._turn):
            self._turn.remove(model)
            self._turn.append(model)
            batch = self._batches[model]
            if batch.num_requests:
                return self._settle(batch.step())
        return []

    def _settle(self, out: list[FromWorker]) -> list[FromWorker]:
        """Forget the requests that ``out`` ends."""
        for message in out:
            if isinstance(message, Done | Broke):
                self._owner.pop(message.request_id, None)
        return out


def _not_registered(model: str) -> str:
    return f"model {model!r} is not registered on this GPU: register it first"


def _failed(model: str, op: Op, error: Exception) -> OpFailed:
    if isinstance(error, EXPECTED):
        return OpFailed(model, op, str(error) or type(error).__name__)
    logger.error("model %s: %s failed", model, op, exc_info=error)
    return OpFailed(
        model, op, f"model {model!r}: {op} failed: {type(error).__name__}: {error} (see the log)"
    )
