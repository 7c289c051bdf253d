"""The machine's raw copy rate: the ceiling that every swap-in is compared with.

Both buffers are touched beforehand and ask for huge pages, as the page pool and the host
images do; a plain ``malloc`` would be a lower and so a flattering ceiling.
"""

import ctypes
import mmap
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

COPY_BYTES = 256 * 2**20

# Other C libraries and processors ignore these.
_TUNABLES = {
    # Copies from 256 KiB on go past the cache. By default glibc does that only for those larger
    # than most of the cache, and a swap-in's pieces, copied in layer order, are smaller: they
    # would first read what they are about to overwrite.
    "glibc.cpu.x86_non_temporal_threshold": 2**18,
    # A forward's temporaries keep their memory from layer to layer. By default those of more than
    # a few hundred KiB are mapped anew each time, and touching a fresh page costs more than the
    # work on it: decode steps took a sixth longer.
    "glibc.malloc.mmap_threshold": 2**25,
    "glibc.malloc.trim_threshold": 2**28,
}


def with_tuned_memory(environment: Mapping[str, str]) -> dict[str, str]:
    """``environment`` for a process that swaps and runs models; its own tunables stay."""
    tunables = environment.get("GLIBC_TUNABLES", "")
    ours = [f"{name}={value:#x}" for name, value in _TUNABLES.items() if name not in tunables]
    return {**environment, "GLIBC_TUNABLES": ":".join(filter(None, [tunables, *ours]))}


@dataclass(frozen=True)
class CopyRates:
    """One round's rates in GB/s (10^9 bytes copied per second)."""

    memcpy: float  # libc's memmove, one thread
    torch_copy: float  # Tensor.copy_, torch's own threads


class RawCopy:
    """Two buffers of ``num_bytes``; `once` copies one to the other, both ways."""

    def __init__(self, num_bytes: int = COPY_BYTES) -> None:
        import torch  # seconds to import: only whoever measures pays

        self.num_bytes = num_bytes
        self._maps = [mmap.mmap(-1, num_bytes) for _ in range(2)]
        for area in self._maps:
            area.madvise(mmap.MADV_HUGEPAGE)
        source, target = (torch.frombuffer(area, dtype=torch.uint8) for area in self._maps)
        source.fill_(1)
        target.fill_(2)  # the first write to a fresh page costs several times the copy
        self._source, self._target = source, target

    def once(self) -> CopyRates:
        src, dst = self._source.data_ptr(), self._target.data_ptr()
        return CopyRates(
            memcpy=self._rate(lambda: ctypes.memmove(dst, src, self.num_bytes)),
            torch_copy=self._rate(lambda: self._target.copy_(self._source)),
        )

    def _rate(self, copy: Callable[[], object]) -> float:
        started = time.perf_counter()
        copy()
        return self.num_bytes / (time.perf_counter() - started) / 1e9


def ceiling(rounds: list[CopyRates]) -> float:
    """The median rate of the better of the two ways, GB/s."""
    return max(
        statistics.median(r.memcpy for r in rounds), statistics.median(r.torch_copy for r in rounds)
    )
