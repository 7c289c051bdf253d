"""The CUDA driver's calls with their results checked, and torch tensors over raw device memory."""

from typing import Any

import torch

from services.gpu_agent.pages import DeviceError


class Driver:
    """Calls into the driver: every result is checked, and an error names call and sizes."""

    def __init__(self, driver: Any) -> None:
        self.names = driver

    def __call__(self, call: str, *arguments: Any, about: str) -> Any:
        """What ``call`` returns after its status: nothing, one value, or a tuple."""
        status, *values = getattr(self.names, call)(*arguments)
        if status != self.names.CUresult.CUDA_SUCCESS:
            remedy = ""
            if status == self.names.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
                remedy = ": the GPU's memory is taken, lower the budget or stop who else uses it"
            _, text = self.names.cuGetErrorString(status)
            text = text.decode() if isinstance(text, bytes) else text
            what = f"{getattr(status, 'name', status)} ({text})"
            raise DeviceError(f"{call} ({about}) failed: {what}{remedy}")
        return values[0] if len(values) == 1 else tuple(values)


class _DeviceMemory:
    """Raw device memory as ``torch.as_tensor`` understands it."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def tensor_at(address: int, num_bytes: int) -> torch.Tensor:
    return torch.as_tensor(_DeviceMemory(address, num_bytes), device="cuda")
