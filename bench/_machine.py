"""What a benchmark ran on, so that its figures can be read later: machine, load, copy ceiling."""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from bench._stats import Samples
from services.memcpy import COPY_BYTES, RawCopy, with_tuned_memory


class Environment(msgspec.Struct, frozen=True):
    """The machine and the versions that matter for speed."""

    cores: int  # that this process may use
    cpu: str
    memory_bytes: int
    kernel: str
    python: str
    torch: str


class CopyCeiling(msgspec.Struct, frozen=True):
    """Raw copy rates between two touched buffers, GB/s (10^9 bytes copied per second)."""

    memcpy: Samples  # libc, one thread
    torch_copy: Samples  # Tensor.copy_, torch's own threads
    num_bytes: int


def environment() -> Environment:
    """What this process runs on."""
    return Environment(
        cores=len(os.sched_getaffinity(0)),
        cpu=cpu_model(Path("/proc/cpuinfo").read_text()),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        kernel=platform.release(),
        python=platform.python_version(),
        torch=importlib.metadata.version("torch"),
    )


def cpu_model(cpuinfo: str) -> str:
    """The processor's name in ``/proc/cpuinfo`` (Arm kernels give none: the architecture)."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()


def load_average() -> float:
    """Processes that wanted a core, averaged over the last minute."""
    return os.getloadavg()[0]


def copy_ceiling(rounds: int, num_bytes: int = COPY_BYTES) -> CopyCeiling:
    """Measure both copy rates, interleaved."""
    raw = RawCopy(num_bytes)
    taken = [raw.once() for _ in range(rounds)]
    return CopyCeiling(
        Samples(tuple(r.memcpy for r in taken)),
        Samples(tuple(r.torch_copy for r in taken)),
        num_bytes,
    )


def restart_with_tuned_memory(module: str, argv: Sequence[str]) -> None:
    """Run ``python -m module`` in this process's place where its memory is not tuned as the engine
    worker's is: that is read only when a process starts.
    """
    tuned = with_tuned_memory(os.environ)
    if tuned != os.environ:
        os.execve(sys.executable, [sys.executable, "-m", module, *argv], tuned)
