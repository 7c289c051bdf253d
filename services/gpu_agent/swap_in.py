"""One swap-in, from the claim of its pages until all bytes are there, or until it is called off.

    claim pages ─> map ─> guards on ─> copy (threads) ─> check ─> guards off ─> SwapTrace
                                        │   forwards may run, each group as it arrives
                                        `─ call_off: stop at the next piece, unmap, give back

Given back, a page that is complete stays the model's until someone needs it, and one that nobody
has written to yet is still its former owner's: a swap-in that was called off costs nobody a copy.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import accumulate

from torch import nn

from schemas.state import SwapTrace
from services.gpu_agent.arrival import Arrival, cut, guarded
from services.gpu_agent.host_image import HostImage
from services.gpu_agent.pages import PagePool, Region
from services.gpu_agent.transfer import PIECE_BYTES, Transfer, Verify


class SwapIn:
    """See the module. The copy runs from the moment it is made.

    ``guards``: module name -> end of the image bytes that it needs. ``interrupted()``: whether a
    forward that waits for bytes is to be given up. ``on_over()`` is called in another thread once
    nobody copies any more; then `finish`. Raises OutOfPages and DeviceError, and has then changed
    nothing.
    """

    def __init__(
        self,
        pool: PagePool,
        region: Region,
        image: HostImage,
        module: nn.Module,
        guards: dict[str, int],
        num_kv_pages: int,
        verify: Verify,
        interrupted: Callable[[], bool],
        on_over: Callable[[], None],
    ) -> None:
        self._pool = pool
        self._region = region
        self._image = image
        self._started_at, self._began = time.time(), time.perf_counter()
        num_bytes = image.layout.num_bytes
        self._num_pages = pool.pages_for(num_bytes)
        self._claim = pool.free.claim(image.key, self._num_pages, num_kv_pages)
        self._hooks = ExitStack()
        try:
            region.map(self._claim.weights)
            self._map_s = time.perf_counter() - self._began
            pieces = cut(image.layout, self._claim.is_kept, pool.page_bytes, PIECE_BYTES[pool.kind])
            self.arrival = Arrival(pieces, num_bytes, interrupted)
            self._transfer = Transfer(pool, region, image, self.arrival, verify, on_over)
            self._transfer.start()
        except BaseException:
            if region.is_mapped:
                region.unmap()
            nothing = self._claim.is_kept & False
            pool.free.unclaim(self._claim, image.key, nothing, nothing)
            raise
        # While the first bytes are on their way: no forward begins before this returns.
        self._hooks.enter_context(guarded(module, guards, self.arrival.wait_for))

    @property
    def kv_pages(self) -> tuple[int, ...]:
        return self._claim.rest

    def finish(self) -> SwapTrace:
        """Wait for the end, take the guards off. Raises what went wrong (Corruption, DeviceError);
        all pages are given back then, and hold nothing of worth.
        """
        self.arrival.wait_until_over()
        self._hooks.close()
        if self.arrival.error is not None:
            self.discard()
            raise self.arrival.error
        return self._trace()

    def call_off(self) -> SwapTrace:
        """Stop at the next piece and give all pages back; tells what was copied."""
        self.arrival.call_off()
        self.arrival.wait_until_over()
        self._hooks.close()
        complete, written = self.arrival.fate_of_pages(self._num_pages, self._pool.page_bytes)
        self._region.unmap()
        if self.arrival.error is not None:
            complete[:] = False
        self._pool.free.unclaim(self._claim, self._image.key, complete, written)
        return self._trace()

    def discard(self) -> None:
        """Unmap and give back everything; nothing of it may be used again."""
        self._region.unmap()
        self._pool.free.give((*self._claim.weights, *self._claim.rest))

    def _trace(self) -> SwapTrace:
        report = self._transfer.report()
        ends = accumulate(layer.copy_s for layer in report.layers)
        first_layer_s = next(
            (
                self._map_s + end
                for layer, end in zip(report.layers, ends, strict=True)
                if layer.name.startswith("layer.")
            ),
            0.0,
        )
        return SwapTrace(
            started_at=self._started_at,
            map_s=self._map_s,
            copy_s=report.copy_s,
            verify_s=report.verify_s,
            total_s=self.arrival.ended_at - self._began,
            num_bytes=report.num_bytes,
            kept_bytes=self.arrival.num_bytes - self.arrival.bytes_to_copy,
            layers=report.layers,
            first_layer_s=first_layer_s,
            ceiling_gb_per_s=self._pool.ceiling_gb_per_s,
            link=report.link,
        )
