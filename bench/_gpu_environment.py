"""What a GPU run ran on: the GPU, its link, its driver, the versions, the host's memory."""

import importlib
import importlib.metadata
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import psutil
import pynvml
import torch

_PACKAGES: Final = ("torch", "transformers", "cuda-bindings", "nvidia-ml-py", "msgspec", "numpy")
_HUGE: Final = Path("/sys/kernel/mm/transparent_hugepage")


def describe(index: int, *, on_gpu: bool) -> dict[str, Any]:
    """As JSON has it; where something can not be told, why not."""
    found: dict[str, Any] = {
        "packages": {name: _told(partial(importlib.metadata.version, name)) for name in _PACKAGES},
        "host": {
            "memory_bytes": psutil.virtual_memory().total,
            "available_bytes": psutil.virtual_memory().available,
            "torch_threads": torch.get_num_threads(),
            **{file: _told(partial(_huge, file)) for file in ("enabled", "shmem_enabled")},
        },
    }
    if on_gpu:
        pynvml.nvmlInit()
        found["gpu"] = _gpu(index)
        found["link"] = _link(index)
        found["attributes"] = _attributes(index)
    return found


def _link(index: int) -> dict[str, Any]:
    """The PCIe link now, figure by figure: some are not told everywhere. NVML must be open."""
    device = pynvml.nvmlDeviceGetHandleByIndex(index)
    asked: dict[str, Callable[[], Any]] = {
        "generation": lambda: pynvml.nvmlDeviceGetCurrPcieLinkGeneration(device),
        "most generation": lambda: pynvml.nvmlDeviceGetMaxPcieLinkGeneration(device),
        "width": lambda: pynvml.nvmlDeviceGetCurrPcieLinkWidth(device),
        "most width": lambda: pynvml.nvmlDeviceGetMaxPcieLinkWidth(device),
        "replays": lambda: pynvml.nvmlDeviceGetPcieReplayCounter(device),
        "bus id": lambda: str(pynvml.nvmlDeviceGetPciInfo(device).busId),
    }
    return {name: _told(call) for name, call in asked.items()}


def _gpu(index: int) -> dict[str, Any]:
    properties: Any = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return {
        "name": properties.name,
        "driver": _told(pynvml.nvmlSystemGetDriverVersion),
        "cuda": torch.version.cuda,
        "memory_bytes": total,
        "free_bytes": free,
        "multiprocessors": properties.multi_processor_count,
    }


def _attributes(index: int) -> dict[str, Any]:
    """What of this GPU decides how memory can be pinned and mapped."""
    driver = importlib.import_module("cuda.bindings.driver")
    names = driver.CUdevice_attribute
    wanted = ("HOST_REGISTER", "VIRTUAL_MEMORY", "PAGEABLE", "ASYNC_ENGINE", "HOST_POINTER")
    return {
        attribute.name.removeprefix("CU_DEVICE_ATTRIBUTE_"): _told(
            partial(driver.cuDeviceGetAttribute, attribute, index)
        )
        for attribute in names
        if any(word in attribute.name for word in wanted)
    }


def _told(call: Callable[[], Any]) -> Any:
    try:
        told = call()
        return int(told[1]) if isinstance(told, tuple) else told  # (status, value)
    except Exception as error:  # a figure that is not told must not cost the others
        return f"{type(error).__name__}: {error}"


def _huge(file: str) -> str:
    return (_HUGE / file).read_text().strip()
