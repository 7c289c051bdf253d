"""What it costs to bring a model's files into a host image, against the ordinary ways.

    cold   page cache dropped     load      against   one reader, front to back, large reads
    warm   all in the page cache  load      against   load_file, then a copy of every tensor

A load here is what the engine worker does before it pins: a fresh image, filled, with its
checksums. The files must lie on a disk: what lies in memory can not be dropped from there.
"""

import ctypes
import mmap
import os
import time
from pathlib import Path
from typing import Final

import numpy as np
from safetensors.torch import load_file

from bench.harness import Bench
from schemas.state import ModelSpec
from services.gpu_agent import checkpoint, loader, probe, skeleton
from services.gpu_agent.host_image import HostImage, plan_layout
from services.memcpy import RawCopy

OF_RAW_READ_AT_MOST: Final = 1.15
OVER_LOAD_FILE_AT_LEAST: Final = 8.0

_READ_BYTES: Final = 16 * 2**20
_MAX_LEFT: Final = 0.01  # of a file's pages that may stay cached in a cold read

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


def measure(bench: Bench, spec: ModelSpec, page_bytes: int) -> None:
    """Record all figures of loading ``spec`` with a checksum for every ``page_bytes``."""
    rig = _Rig(spec, page_bytes)
    name = spec.name
    _measure_cold(bench, rig, name)
    _measure_warm(bench, rig, name)


def _measure_warm(bench: Bench, rig: "_Rig", name: str) -> None:
    copier = RawCopy(rig.num_bytes)
    warm = bench.round_robin(
        {
            f"{name}: load, warm": rig.load_warm,
            f"{name}: load_file + pack": rig.pack_warm,
            f"{name}: memcpy between touched buffers": lambda: (
                rig.num_bytes / copier.once().memcpy / 1e9
            ),
        }
    )
    ours, theirs, memcpy = warm.values()
    # Whoever loads copies the bytes once, into memory that is fresh: this bounds the target.
    most = theirs.over(memcpy).median
    bench.value(f"{name}: load_file + pack over one memcpy of the same bytes", most, "x")
    ratio = theirs.over(ours).median
    bench.target(
        f"{name}: load over load_file, warm", ratio, at_least=OVER_LOAD_FILE_AT_LEAST, unit="x"
    )
    bench.value(f"{name}: load, warm", rig.num_bytes / ours.median / 1e9, "GB/s")


def _measure_cold(bench: Bench, rig: "_Rig", name: str) -> None:
    if not rig.drop():
        bench.value(f"{name}: load, cold (its files' page cache can not be dropped)", float("nan"))
        return
    cold = bench.round_robin(
        {f"{name}: load, cold": rig.load_cold, f"{name}: raw read, cold": rig.raw_read_cold}
    )
    ours, raw = cold.values()
    ratio = ours.over(raw).median
    bench.target(f"{name}: load of raw read, cold", ratio, at_most=OF_RAW_READ_AT_MOST, unit="x")
    bench.value(f"{name}: load, cold", rig.num_bytes / ours.median / 1e9, "GB/s")


class _Rig:
    """One model's files. Every timed method first brings about what it needs, untimed."""

    def __init__(self, spec: ModelSpec, page_bytes: int) -> None:
        found = checkpoint.read(checkpoint.find(spec))
        config = skeleton.read_config(found.folder, spec)
        dtype = skeleton.choose_dtype(config, spec, (t.dtype for t in found.tensors.values()))
        module = skeleton.build(config, spec, dtype)
        layout = plan_layout(probe.examine(module, config, spec).weights)
        self._plan = loader.plan_load(spec, found, layout, module, dtype)
        self._page_bytes = page_bytes
        self._buffer = mmap.mmap(-1, _READ_BYTES)
        self._buffer.madvise(mmap.MADV_HUGEPAGE)
        self._buffer[:] = bytes(_READ_BYTES)  # touched: the raw read pays for no fresh memory
        self.num_bytes = layout.num_bytes

    def load_warm(self) -> float:
        """Seconds of one load from the page cache."""
        self._read()
        return self._load()

    def load_cold(self) -> float:
        """Seconds of one load from the disk."""
        self._must_drop()
        return self._load()

    def raw_read_cold(self) -> float:
        """Seconds of reading the files front to back into one buffer."""
        self._must_drop()
        began = time.perf_counter()
        self._read()
        return time.perf_counter() - began

    def pack_warm(self) -> float:
        """Seconds of ``load_file`` and of copying, and converting, each tensor to its place."""
        self._read()
        began = time.perf_counter()
        held = {}
        for file in self._plan.checkpoint.files:
            held.update(load_file(file))
        image = HostImage(self._plan.layout)
        for read in self._plan.reads:
            read.slot.view(image.tensor).copy_(held[read.stored.name])
        return time.perf_counter() - began

    def drop(self) -> bool:
        """Take the files out of the page cache. False where that does not work."""
        left = [_drop(file) for file in self._plan.checkpoint.files]
        return max(left) <= _MAX_LEFT

    def _must_drop(self) -> None:
        if not self.drop():
            raise RuntimeError(
                f"{self._plan.checkpoint.folder}: somebody else keeps its files in the page cache"
            )

    def _load(self) -> float:
        began = time.perf_counter()
        image = HostImage(self._plan.layout)
        loader.load(self._plan, image, self._page_bytes, lambda _done, _total: None)
        return time.perf_counter() - began

    def _read(self) -> None:
        for file in self._plan.checkpoint.files:
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(self._buffer):
                    pass


def _drop(file: Path) -> float:
    """Drop ``file`` from the page cache; returns the share of its pages that are there still."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())  # pages that are not written yet can not be dropped
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as area:
            num_pages = -(-len(area) // mmap.PAGESIZE)
            cached = np.empty(num_pages, dtype=np.uint8)
            address = np.frombuffer(area, dtype=np.uint8).ctypes.data
            if _libc.mincore(address, len(area), cached.ctypes.data):
                raise OSError(ctypes.get_errno(), "mincore failed", str(file))
    return float((cached & 1).mean())
