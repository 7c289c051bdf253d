"""The models of one worker, as far as files and host memory go: registered, loaded, dropped.

Operations answer with messages for control: what was done, or OpFailed with a reason that a
person can act on. None of them raises for what a model does.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, TypeAlias

import msgspec

from schemas.state import ModelSpec
from services.gpu_agent import checkpoint
from services.gpu_agent.checkpoint import BadCheckpoint
from services.gpu_agent.checksums import Corruption
from services.gpu_agent.engine.decode_graph import Recorder
from services.gpu_agent.engine.prompts import BadTokenizer, ModelText
from services.gpu_agent.host_tier import HostTier, OutOfHostMemory
from services.gpu_agent.hosted import HostedModel
from services.gpu_agent.ipc import Forgotten, Loaded, Memory, OpFailed, Registered, Unloaded
from services.gpu_agent.pages import DeviceError, OutOfPages, PagePool
from services.gpu_agent.shared_images import ImageExchange
from services.gpu_agent.transfer import Verify

logger = logging.getLogger(__name__)

Op: TypeAlias = Literal["register", "load", "swap_in", "swap_out", "unload", "verify"]
OnProgress: TypeAlias = Callable[[int, int], None]  # (bytes done, bytes in all)

# Causes that a person can act on, with a message that says so; anything else is a fault of
# ours and gets a traceback in the log.
EXPECTED: Final = (
    BadCheckpoint,
    BadTokenizer,
    Corruption,
    OutOfPages,
    OutOfHostMemory,
    DeviceError,
    MemoryError,
)


_UNKNOWN: Final = Memory(0, 0, {})  # in a loading thread; `Library.end_load` fills it in


@dataclass(frozen=True)
class EngineOptions:
    """``host_budget_bytes``: for host images. ``exchange``: shares them with other workers.
    ``host_kv_bytes``: host memory for KV of suspended requests and of prompts seen before.
    ``recorder``: for decode steps, where the device has such (decode_graph.py).
    """

    host_budget_bytes: int = 2**62
    host_kv_bytes: int = 2**30
    verify: Verify = "sampled"
    exchange: ImageExchange | None = None
    recorder: Recorder | None = None


@dataclass(frozen=True)
class LoadJob:
    """``run`` it in any thread, then `Library.end_load`. ``first``: to be told before that."""

    run: Callable[[OnProgress], Loaded | OpFailed]
    first: list[Unloaded] = field(default_factory=list)


class Library:
    """All registered models. One thread calls it; others run the jobs that it gives."""

    def __init__(self, pool: PagePool, options: EngineOptions) -> None:
        self._pool = pool
        self._options = options
        self._tier = HostTier(options.host_budget_bytes)
        self._models: dict[str, HostedModel] = {}
        self._texts: dict[str, ModelText] = {}
        self._texts_lock = threading.Lock()  # a loading thread reads tokenizers, too
        self._loading: set[str] = set()

    def memory(self) -> Memory:
        """Bytes in use now."""
        return Memory(
            device_bytes=self._pool.used_bytes,
            host_bytes=self._tier.used_bytes,
            cached_bytes={
                name: cached
                for name, hosted in self._models.items()
                if hosted.state == "host" and (cached := hosted.cached_bytes)
            },
        )

    def registered(self, model: str) -> HostedModel:
        """Raises KeyError."""
        return self._models[model]

    # -- registering -----------------------------------------------------------------------

    def needs_files(self, spec: ModelSpec) -> bool:
        """Whether `find_files` may take long, because ``spec`` is to come from elsewhere.

        A cold model from an object store is looked for each time: it may have changed there.
        """
        known = self._models.get(spec.name)
        if known is not None and known.spec == spec:
            return checkpoint.is_remote(spec.source) and not self._is_in_use(known)
        return not Path(spec.source).expanduser().exists()

    def find_files(self, spec: ModelSpec) -> Path | OpFailed:
        """``spec``'s folder, downloaded if need be. May run in any thread."""
        try:
            return checkpoint.find(spec)
        except Exception as error:
            return failed(spec.name, "register", error)

    def register(self, spec: ModelSpec, folder: Path | None = None) -> Registered | OpFailed:
        """Look at ``spec``'s files (in ``folder`` where `find_files` found them).

        The same spec again answers the same facts. Another spec replaces a cold model.
        """
        known = self._models.get(spec.name)
        if known is not None and known.spec == spec and self._is_unchanged(known, folder):
            return Registered(spec.name, known.facts)
        if known is not None and self._is_in_use(known):
            return OpFailed(
                spec.name,
                "register",
                f"model {spec.name!r} is already registered with other settings and is "
                f"{known.state}: restart the agent to change them",
            )
        try:
            local = spec if folder is None else msgspec.structs.replace(spec, source=str(folder))
            hosted = HostedModel.inspect(local, self._pool, self._options.verify)
        except Exception as error:
            return failed(spec.name, "register", error)
        hosted.spec = spec
        if known is not None:
            known.close()
        self._models[spec.name] = hosted
        with self._texts_lock:
            self._texts.pop(spec.name, None)
        return Registered(spec.name, hosted.facts)

    def _is_unchanged(self, known: HostedModel, folder: Path | None) -> bool:
        """A cold model whose files were replaced (a download finished, say) is read anew.

        A ``folder`` that was just found tells it without asking an object store again.
        """
        if self._is_in_use(known):
            return True
        if checkpoint.is_remote(known.spec.source):
            return folder == known.folder
        return known.is_current

    def _is_in_use(self, known: HostedModel) -> bool:
        return known.state != "cold" or known.spec.name in self._loading

    # -- loading ---------------------------------------------------------------------------

    def load(self, model: str) -> LoadJob | OpFailed:
        """Make room for ``model``'s host image and give the job that fills it, or refuse."""
        hosted = self._models.get(model)
        if hosted is None:
            return OpFailed(model, "load", not_registered(model))
        if model in self._loading:
            return OpFailed(model, "load", f"model {model!r} is being loaded already")
        try:
            victims = self._tier.victims_for(
                model, hosted.layout.num_bytes, self._may_leave, self._is_wanted
            )
        except OutOfHostMemory as error:
            return failed(model, "load", error)
        unloaded = [self._unload(victim) for victim in victims]
        self._tier.hold(model, hosted.layout.num_bytes)
        self._loading.add(model)

        def job(on_progress: OnProgress) -> Loaded | OpFailed:
            began = time.perf_counter()
            try:
                # The tokenizer first: without one nothing can be served, and it is quick
                # to find out. Reading it here also keeps it off the first request's path.
                self._text_of(hosted)
                num_bytes = hosted.load(on_progress, self._options.exchange)
            except Exception as error:
                return failed(model, "load", error)
            return Loaded(model, num_bytes, time.perf_counter() - began, _UNKNOWN)

        return LoadJob(job, unloaded)

    def end_load(self, result: Loaded | OpFailed) -> Loaded | OpFailed:
        """The job is over, with ``result``; what to tell about it."""
        self._loading.discard(result.model)
        if self._models[result.model].state == "cold":
            self._tier.release(result.model)
        if isinstance(result, Loaded):
            self._tier.hold(result.model, result.num_bytes)
            return msgspec.structs.replace(result, memory=self.memory())
        return result

    # -- forgetting ------------------------------------------------------------------------

    def forget(self, model: str) -> Forgotten | OpFailed:
        """Drop ``model`` and its host image, if they are there. Refused while it is on the device
        or being loaded.
        """
        hosted = self._models.get(model)
        if hosted is None:
            return Forgotten(model, 0, self.memory())
        if hosted.state not in ("cold", "host") or model in self._loading:
            state = "being loaded" if model in self._loading else hosted.state
            return OpFailed(model, "unload", f"model {model!r} is {state}: it can not be unloaded")
        num_bytes = hosted.layout.num_bytes if hosted.state == "host" else 0
        hosted.close()
        self._tier.release(model)
        del self._models[model]
        with self._texts_lock:
            self._texts.pop(model, None)
        return Forgotten(model, num_bytes, self.memory())

    def _may_leave(self, model: str) -> bool:
        return self._models[model].state == "host" and model not in self._loading

    def _is_wanted(self, model: str) -> bool:
        """Whether somebody waits for it to be swapped in again."""
        return False

    def _unload(self, model: str) -> Unloaded:
        hosted = self._models[model]
        hosted.unload()
        self._tier.release(model)
        return Unloaded(model, hosted.layout.num_bytes)

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


def not_registered(model: str) -> str:
    return f"model {model!r} is not registered on this GPU: register it first"


def failed(model: str, op: Op, error: Exception) -> OpFailed:
    """``error`` as an answer; logged with its traceback where nobody expected it."""
    if isinstance(error, EXPECTED):
        return OpFailed(model, op, str(error) or type(error).__name__)
    logger.error("model %s: %s failed", model, op, exc_info=error)
    return OpFailed(
        model, op, f"model {model!r}: {op} failed: {type(error).__name__}: {error} (see the log)"
    )
