"""One model on this agent: registered once, loaded once, swapped in and out at will.

      cold ---- load ----> host ---- begin_swap_in ----> arriving ---- end_swap_in ----> resident
           <--- unload ---   ^ <--- call_off_swap_in -------'                                |
                             `--------------------------- swap_out --------------------------'

What stays through all of it: the module object, its parameters (views over a reserved address
range) and its small computed buffers. ``host`` adds the host image. ``arriving`` adds pages: those
of the weights mapped into the range, and those of the KV reserve at home in the pool; forwards
run already, each group of weights waited for. Swap-out copies nothing, because weights are
immutable and the host image still holds them; its pages keep them too, until somebody needs them.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal

from schemas.state import ModelSpec, SwapTrace
from services.gpu_agent import loader
from services.gpu_agent.canary import Canary
from services.gpu_agent.checkpoint import BadCheckpoint
from services.gpu_agent.checksums import Corruption
from services.gpu_agent.host_image import HostImage, Layout
from services.gpu_agent.pages import PagePool
from services.gpu_agent.probe import KVGeometry
from services.gpu_agent.registration import Registration, register
from services.gpu_agent.shared_images import ImageExchange, image_key
from services.gpu_agent.swap_in import SwapIn
from services.gpu_agent.transfer import Verify, check_pages

__all__ = ["BadCheckpoint", "HostedModel", "KVGeometry"]


def never() -> bool:
    """Nobody interrupts."""
    return False


def nothing() -> None:
    """Nobody wants to be told."""


class HostedModel:
    """See the module's picture. Made by ``inspect``.

    ``kv_pages``: page indices of the KV reserve, () unless resident. The engine loop calls
    everything but ``load``, which may run in a thread of its own.
    """

    def __init__(self, known: Registration, pool: PagePool, verify: Verify) -> None:
        self.spec = known.spec
        self.facts = known.facts
        self.geometry = known.geometry
        self.pooling = known.pooling
        self.module = known.module
        self.config = known.config
        self.folder: Path = known.plan.checkpoint.folder
        self.state: Literal["cold", "host", "arriving", "resident"] = "cold"
        self.kv_pages: tuple[int, ...] = ()
        self._pool = pool
        self._plan = known.plan
        self._region = known.region
        self._guards = known.guards
        self._verify: Verify = verify
        self._image: HostImage | None = None
        self._swap_in: SwapIn | None = None
        self._canary = Canary(known.module, known.config, pool.torch_device)

    @property
    def layout(self) -> Layout:
        """How the weights are packed, on host and device alike."""
        return self._plan.layout

    @classmethod
    def inspect(cls, spec: ModelSpec, pool: PagePool, verify: Verify = "sampled") -> "HostedModel":
        """Register ``spec`` (see registration.py). Raises BadCheckpoint."""
        return cls(register(spec, pool), pool, verify)

    @property
    def is_current(self) -> bool:
        """Whether the files are still those that were looked at."""
        try:
            self._plan.checkpoint.check_unchanged()
        except BadCheckpoint:
            return False
        return True

    def load(
        self, on_progress: Callable[[int, int], None], exchange: ImageExchange | None = None
    ) -> int:
        """Read the files into a new host image; returns its bytes. Does nothing if there is one.

        With an ``exchange``, the image is shared with other workers: whoever is first fills it.
        Safe in a thread while other models compute. ``on_progress(done, total)`` in bytes,
        called in this thread. Raises BadCheckpoint or OSError and leaves the model cold.
        """
        if self._image is None:
            image = self._filled(on_progress, exchange)
            try:
                image.pin(self._pool)
            except BaseException:
                image.free()
                raise
            self._image = image
            self.state = "host"
        on_progress(self.layout.num_bytes, self.layout.num_bytes)
        return self.layout.num_bytes

    def _filled(
        self, on_progress: Callable[[int, int], None], exchange: ImageExchange | None
    ) -> HostImage:
        page_bytes = self._pool.page_bytes

        def fill(image: HostImage) -> None:
            loader.load(self._plan, image, page_bytes, on_progress)

        if exchange is not None:
            key = image_key(self._plan.checkpoint, self.layout, page_bytes)
            return exchange.obtain(key, self.layout, fill)
        image = HostImage(self.layout)
        try:
            fill(image)
        except BaseException:
            image.free()
            raise
        return image

    def unload(self) -> None:
        """Drop the host image. Does nothing when cold; ValueError while on the device."""
        if self.state in ("arriving", "resident"):
            raise ValueError(f"model {self.spec.name!r} is {self.state}: swap it out first")
        if self._image is not None:
            self._pool.free.forget(self._image.key)
            self._image.free()
        # It may have run on bytes that turned out to be wrong.
        self._canary.forget()
        self._image, self.state = None, "cold"

    @property
    def cached_bytes(self) -> int:
        """Of a swapped-out model's weights, those that are still on the device."""
        held = self._pool.free.num_held(self._image.key) if self._image else 0
        return held * self._pool.page_bytes

    # -- swap-in ---------------------------------------------------------------------------

    def swap_in(self) -> SwapTrace:
        """`begin_swap_in` and `end_swap_in`, waiting in between."""
        self.begin_swap_in()
        return self.end_swap_in()

    def begin_swap_in(
        self,
        interrupted: Callable[[], bool] = never,
        on_over: Callable[[], None] = nothing,
    ) -> None:
        """Take pages for weights and KV reserve together, map, start to copy what is missing.

        Forwards may run from here on; they wait for their weights, and raise NotArrived where
        ``interrupted()`` says that they should not or the copy came to nothing. ``on_over()`` is
        called in another thread when `end_swap_in` will not wait. OutOfPages and DeviceError
        change nothing; ValueError unless the state is ``host``.
        """
        if self.state != "host" or self._image is None:
            raise ValueError(
                f"model {self.spec.name!r} is {self.state}: only a host image swaps in"
            )
        self._swap_in = SwapIn(
            self._pool,
            self._region,
            self._image,
            self.module,
            self._guards,
            self.facts.kv_bytes // self._pool.page_bytes,
            self._verify,
            interrupted,
            on_over,
        )
        self.kv_pages = self._swap_in.kv_pages
        self.state = "arriving"

    @property
    def is_swap_in_over(self) -> bool:
        """Whether `end_swap_in` would not wait."""
        return self._swap_in is not None and self._swap_in.arrival.is_over

    def end_swap_in(self) -> SwapTrace:
        """Wait until all bytes are there and checked. ValueError unless arriving.

        Corruption unloads the model, so that the next load reads its files again; DeviceError
        leaves its host image. All pages are given back then.
        """
        swap_in = self._arriving()
        try:
            trace = swap_in.finish()
            try:
                if self._verify == "all" or (self._verify == "sampled" and self._canary.is_new):
                    self._canary.check(self.spec.name)
            except BaseException:
                swap_in.discard()
                raise
        except BaseException as error:
            self._swap_in, self.kv_pages, self.state = None, (), "host"
            if isinstance(error, Corruption):
                self.unload()
            raise
        self._swap_in, self.state = None, "resident"
        return trace

    def call_off_swap_in(self) -> SwapTrace:
        """Stop copying; what had arrived stays on the device while nobody needs the pages.

        ValueError unless arriving. Corruption that was found meanwhile unloads the model.
        """
        swap_in = self._arriving()
        trace = swap_in.call_off()
        self._swap_in, self.kv_pages, self.state = None, (), "host"
        if isinstance(swap_in.arrival.error, Corruption):
            self.unload()
            raise swap_in.arrival.error
        return trace

    def _arriving(self) -> SwapIn:
        if self.state != "arriving" or self._swap_in is None:
            raise ValueError(f"model {self.spec.name!r} is {self.state}, not arriving")
        return self._swap_in

    # -- checks ----------------------------------------------------------------------------

    @property
    def wants_canary(self) -> bool:
        """Whether a canary forward during the arrival would prove something new."""
        return self.state == "arriving" and self._verify != "off" and not self._canary.has_run

    def run_canary(self) -> None:
        """A first forward while the weights arrive, to be repeated once they are there.

        It shows that each of them was waited for. Raises NotArrived.
        """
        self._canary.run()

    def verify(self) -> int:
        """Check every page, on the device where the model is resident, else of the host image.

        Returns how many. Raises Corruption, and has then swapped out and unloaded the model;
        ValueError when there is nothing to check.
        """
        image = self._image
        if self.state not in ("host", "resident") or image is None or image.checksums is None:
            raise ValueError(f"model {self.spec.name!r} is {self.state}: there is nothing to check")
        try:
            if self.state == "host":
                return image.checksums.check_all(image.tensor, "of the host image")
            with self._pool.link:
                return check_pages(self._region, image)
        except Corruption:
            if self.state == "resident":
                self.swap_out()
            self.unload()
            raise

    # -- swap-out --------------------------------------------------------------------------

    def swap_out(self) -> SwapTrace:
        """Give back all pages; from here on any use of the parameters faults. Copies nothing.

        ValueError unless resident.
        """
        if self.state != "resident" or self._image is None:
            raise ValueError(f"model {self.spec.name!r} is {self.state}, not resident")
        trace_at, began = time.time(), time.perf_counter()
        weight_pages = self._region.unmap()
        map_s = time.perf_counter() - began
        self._pool.free.give_image(weight_pages, self._image.key)
        self._pool.free.give(self.kv_pages)
        self.kv_pages, self.state = (), "host"
        return SwapTrace(started_at=trace_at, map_s=map_s, total_s=time.perf_counter() - began)

    def close(self) -> None:
        """Give back everything, the address range included. The module must not be used again."""
        if self.state == "arriving":
            with suppress(Corruption):
                self.call_off_swap_in()
        if self.state == "resident":
            self.swap_out()
        self.unload()
        self._region.release()
