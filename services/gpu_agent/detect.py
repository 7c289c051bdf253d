"""What NVML tells of this machine's GPUs: cheap enough for every command line."""

import logging
from collections.abc import Callable
from typing import Any

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
        # Some boards and virtual machines do not tell all of it.
        generation = self._ask(pynvml.nvmlDeviceGetCurrPcieLinkGeneration)
        width = self._ask(pynvml.nvmlDeviceGetCurrPcieLinkWidth)
        if generation is None or width is None:
            return None
        return PcieLink(generation, width, self._ask(pynvml.nvmlDeviceGetPcieReplayCounter))

    def _ask(self, question: Callable[[Any], Any]) -> int | None:
        try:
            return int(question(self._device))
        except pynvml.NVMLError:
            return None
