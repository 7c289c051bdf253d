"""What NVML tells of this machine's GPUs: cheap enough for every command line."""

import logging

import pynvml

from schemas.state import PcieLink
from services.settings import GpuSettings

logger = logging.getLogger(__name__)


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


class PcieProbe:
    """Reads the PCIe link of the GPU with this PCI bus id ("0000:1B:00.0").

    NVML stays open, because opening it takes longer than reading.
    """

    def __init__(self, bus_id: str) -> None:
        self._device = None
        try:
            pynvml.nvmlInit()
            self._device = pynvml.nvmlDeviceGetHandleByPciBusId(bus_id)
        except pynvml.NVMLError as error:
            logger.warning("no PCIe figures for GPU %s: %s", bus_id, error)

    def read(self) -> PcieLink | None:
        """The link now; None where NVML does not tell. Safe in any thread."""
        if self._device is None:
            return None
        try:
            return PcieLink(
                generation=int(pynvml.nvmlDeviceGetCurrPcieLinkGeneration(self._device)),
                width=int(pynvml.nvmlDeviceGetCurrPcieLinkWidth(self._device)),
                replays=int(pynvml.nvmlDeviceGetPcieReplayCounter(self._device)),
            )
        except pynvml.NVMLError:
            return None  # some are not supported on some boards, in virtual machines for example
