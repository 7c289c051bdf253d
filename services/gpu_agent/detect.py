"""What GPUs this machine has, by NVML alone: cheap enough for every command line."""

from services.settings import GpuSettings


def count_gpus() -> int:
    """NVIDIA GPUs that NVML finds; 0 where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    try:
        return int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()


def detect_gpus() -> list[GpuSettings]:
    """One entry per GPU; without any, the CPU as a device."""
    found = [
        GpuSettings(name=f"gpu{index}", device="cuda", index=index) for index in range(count_gpus())
    ]
    return found or [GpuSettings(name="cpu0", device="cpu")]
