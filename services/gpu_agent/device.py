"""Which device: CUDA where there is one that can be used, else the CPU."""

import importlib
import logging
from typing import Final, Literal

import pynvml
import torch

from services.gpu_agent import device_cpu, device_cuda
from services.gpu_agent.detect import count_gpus
from services.gpu_agent.pages import DeviceError, PagePool

logger = logging.getLogger(__name__)

MIB: Final = 2**20


def open_pool(
    device: Literal["auto", "cpu", "cuda"],
    budget_bytes: int,
    page_bytes: int | None = None,
    index: int = 0,
) -> PagePool:
    """A page pool of ``budget_bytes``, rounded down to whole pages.

    ``device`` "auto" takes the CUDA device ``index`` where there is one, and says in the log why
    not otherwise. Raises DeviceError where the device asked for is not there or the memory is
    not, and ValueError for a budget under one page.
    """
    kind = device
    if device != "cpu":
        obstacle = why_no_cuda(index)
        if device == "cuda" and obstacle:
            raise DeviceError(f'device "cuda" was asked for, but {obstacle}; use "auto" or "cpu"')
        kind = "cpu" if obstacle else "cuda"
        if obstacle:
            logger.info("device: cpu, because %s", obstacle)
    default = device_cuda.PAGE_BYTES if kind == "cuda" else device_cpu.PAGE_BYTES
    size = default if page_bytes is None else page_bytes
    if size < 1 or size % device_cpu.PAGE_BYTES:
        raise ValueError(
            f"page_bytes = {size}: pages are a multiple of {device_cpu.PAGE_BYTES // MIB} MiB"
        )
    num_pages = budget_bytes // size
    if num_pages < 1:
        raise ValueError(
            f"a memory budget of {budget_bytes} bytes is less than one page of "
            f"{size} bytes: raise it"
        )
    if kind == "cuda":
        return device_cuda.open_cuda_pool(num_pages, size, index)
    return device_cpu.CpuPool(num_pages, size)


def why_no_cuda(index: int) -> str:
    """Why CUDA device ``index`` can not be used, as half a sentence; "" where it can."""
    try:
        count = count_gpus()
    except pynvml.NVMLError as error:
        return f"NVML finds no NVIDIA driver ({error})"
    if index >= count:
        return f"NVML finds {count} GPUs, so there is none with index {index}"
    if not torch.cuda.is_available():
        return f"this PyTorch ({torch.__version__}) can not use CUDA"
    try:
        importlib.import_module("cuda.bindings.driver")
    except Exception as error:  # a missing driver library is its own kind of error
        return f"cuda.bindings (package cuda-bindings) can not be imported ({error})"
    return ""
