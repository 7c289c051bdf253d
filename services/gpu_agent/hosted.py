"""One model on this agent: registered once, loaded once, swapped in and out at will.

      cold ---- load ----> host ---- swap_in ----> resident
           <--- unload ---      <--- swap_out ---

What stays through all of it: the module object, its parameters (views over a reserved address
range) and its small computed buffers. ``host`` adds the host image. ``resident`` adds pages:
those of the weights mapped into the range, and those of the KV reserve at home in the pool.
Swap-out copies nothing, because weights are immutable and the host image still holds them.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torch import nn

from schemas.state import ModelFacts, ModelSpec, SwapTrace
from services.gpu_agent import checkpoint, loader, probe, skeleton, transfer
from services.gpu_agent.checkpoint import BadCheckpoint
from services.gpu_agent.host_image import HostImage, Layout, plan_layout
from services.gpu_agent.pages import PagePool, Region
from services.gpu_agent.probe import KVGeometry

__all__ = ["BadCheckpoint", "HostedModel", "KVGeometry"]

logger = logging.getLogger(__name__)


class HostedModel:
    """See the module's picture. Made by ``inspect``.

    ``kv_pages``: page indices of the KV reserve, () unless resident. The engine loop calls
    everything but ``load``, which may run in a thread of its own.
    """

    def __init__(
        self,
        spec: ModelSpec,
        pool: PagePool,
        facts: ModelFacts,
        geometry: KVGeometry,
        module: nn.Module,
        config: Any,
        plan: loader.LoadPlan,
        region: Region,
    ) -> None:
        self.spec = spec
        self.facts = facts
        self.geometry = geometry
        self.module = module
        self.config = config
        self.folder: Path = plan.checkpoint.folder
        self.state: Literal["cold", "host", "resident"] = "cold"
        self.kv_pages: tuple[int, ...] = ()
        self._pool = pool
        self._plan = plan
        self._region = region
        self._image: HostImage | None = None

    @property
    def layout(self) -> Layout:
        """How the weights are packed, on host and device alike."""
        return self._plan.layout

    @classmethod
    def inspect(cls, spec: ModelSpec, pool: PagePool) -> "HostedModel":
        """Find and check ``spec``'s files and build the module, without reading weights.

        Works for models larger than the pool: ``facts`` tell. Raises BadCheckpoint.
        """
        found = checkpoint.read(checkpoint.find(spec))
        config = skeleton.read_config(found.folder, spec)
        stored = (tensor.dtype for tensor in found.tensors.values())
        dtype = skeleton.choose_dtype(config, spec, stored)
        module = skeleton.build(config, spec, dtype)
        examined = probe.examine(module, config, spec)
        layout = plan_layout(examined.weights)
        max_model_len = _max_model_len(spec, config)
        facts = ModelFacts(
            architecture=type(module).__name__,
            dtype=str(dtype).removeprefix("torch."),
            num_parameters=examined.num_parameters,
            weight_bytes=pool.pages_for(layout.num_bytes) * pool.page_bytes,
            kv_bytes=_kv_pages(spec, examined.geometry, max_model_len, pool) * pool.page_bytes,
            max_model_len=max_model_len,
            max_batch=spec.max_batch,
        )
        plan = loader.plan_load(spec, found, layout, module, dtype)
        region = pool.reserve(layout.num_bytes)
        try:
            skeleton.make_buffers_real(module, pool.torch_device, spec)
            skeleton.bind(module, layout, region.tensor)
        except BaseException:
            region.release()
            raise
        return cls(spec, pool, facts, examined.geometry, module, config, plan, region)

    def load(self, on_progress: Callable[[int, int], None]) -> int:
        """Read the files into a new host image; returns its bytes. Does nothing if there is one.

        Safe in a thread while other models compute. ``on_progress(done, total)`` in bytes,
        called in this thread. Raises BadCheckpoint and leaves the model cold.
        """
        if self._image is not None:
            on_progress(self.layout.num_bytes, self.layout.num_bytes)
            return self.layout.num_bytes
        image = HostImage(self.layout)
        try:
            loader.load(self._plan, image, on_progress)
            image.pin(self._pool)
        except BaseException:
            image.free()
            raise
        self._image = image
        self.state = "host"
        return self.layout.num_bytes

    def unload(self) -> None:
        """Drop the host image. Does nothing when cold; ValueError while resident."""
        if self.state == "resident":
            raise ValueError(f"model {self.spec.name!r} is resident: swap it out before unloading")
        if self._image is not None:
            self._image.free()
        self._image, self.state = None, "cold"

    def swap_in(self) -> SwapTrace:
        """Take pages for weights and KV reserve together, map, copy. Parameters work after it.

        OutOfPages and DeviceError change nothing; ValueError unless the state is ``host``.
        """
        image = self._image
        if self.state != "host" or image is None:
            raise ValueError(
                f"model {self.spec.name!r} is {self.state}: only a host image swaps in"
            )
        trace_at, began = time.time(), time.perf_counter()
        num_weight_pages = self.facts.weight_bytes // self._pool.page_bytes
        pages = self._pool.take(self.facts.footprint_bytes // self._pool.page_bytes)
        try:
            self._region.map(pages[:num_weight_pages])
            map_s = time.perf_counter() - began
            report = transfer.copy_in(self._pool, self._region, image)
        except BaseException:
            if self._region.is_mapped:
                self._region.unmap()
            self._pool.give(pages)
            raise
        self.kv_pages = pages[num_weight_pages:]
        self.state = "resident"
        return SwapTrace(
            started_at=trace_at,
            map_s=map_s,
            copy_s=report.copy_s,
            total_s=time.perf_counter() - began,
            num_bytes=report.num_bytes,
            layers=report.layers,
        )

    def swap_out(self) -> SwapTrace:
        """Give back all pages; from here on any use of the parameters faults. Copies nothing.

        ValueError unless resident.
        """
        if self.state != "resident":
            raise ValueError(f"model {self.spec.name!r} is {self.state}, not resident")
        trace_at, began = time.time(), time.perf_counter()
        weight_pages = self._region.unmap()
        map_s = time.perf_counter() - began
        self._pool.give((*weight_pages, *self.kv_pages))
        self.kv_pages, self.state = (), "host"
        return SwapTrace(started_at=trace_at, map_s=map_s, total_s=time.perf_counter() - began)

    def close(self) -> None:
        """Give back everything, the address range included. The module must not be used again."""
        if self.state == "resident":
            self.swap_out()
        self.unload()
        self._region.release()


def _max_model_len(spec: ModelSpec, config: Any) -> int:
    """The context length, in tokens: the lesser of what was asked and what was trained."""
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len")
    trained = next((n for name in names if isinstance(n := getattr(text, name, None), int)), None)
    asked = spec.max_model_len
    if asked is not None and asked < 1:
        raise BadCheckpoint(f"model {spec.name!r}: max_model_len = {asked} is not positive")
    if asked is None and trained is None:
        raise BadCheckpoint(
            f"model {spec.name!r}: its config.json gives no context length: set max_model_len"
        )
    if asked is not None and trained is not None and asked > trained:
        raise BadCheckpoint(
            f"model {spec.name!r}: max_model_len = {asked} is more than the {trained} tokens "
            "of its config.json: lower it or leave it out"
        )
    return min(n for n in (asked, trained) if n is not None)


def _kv_pages(spec: ModelSpec, geometry: KVGeometry, max_model_len: int, pool: PagePool) -> int:
    """Pages of the KV reserve. A page holds K and V of all layers for its tokens."""
    tokens_per_page = pool.page_bytes // geometry.bytes_per_token
    if tokens_per_page < 1:
        raise BadCheckpoint(
            f"model {spec.name!r}: one token's K and V take {geometry.bytes_per_token} bytes, more "
            f"than a page of {pool.page_bytes}: use larger pages"
        )
    kv_tokens = max_model_len if spec.kv_tokens is None else spec.kv_tokens
    if kv_tokens < 1:
        raise BadCheckpoint(f"model {spec.name!r}: kv_tokens = {kv_tokens} is not positive")
    return -(-kv_tokens // tokens_per_page)
