"""What GPUs this machine has, by NVML alone: cheap enough for every command line."""

import pynvml

from services.settings import GpuSettings


def count_gpus() -> int:
    """NVIDIA GPUs that NVML finds. Raises NVMLError where there is no driver."""
    pynvml.nvmlInit()
    try:
        return int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()


def detect_gpus() -> list[GpuSettings]:
    """One entry per GPU; without any, the CPU as a device."""
    try:
        count = count_gpus()
    except pynvml.NVMLError:
        count = 0
    found = [GpuSettings(name=f"gpu{i}", device="cuda", index=i) for i in range(count)]
    return found or [GpuSettings(name="cpu0", device="cpu")]
