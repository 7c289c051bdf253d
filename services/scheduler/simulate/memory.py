"""The device memory of one simulated GPU: the independent count of `decide`'s promises.

::

    |<------------------------- budget_bytes -------------------------->|
    | footprints (weights + KV reserve)  | leftovers of others | unused |
    |<-------- used_bytes -------------->|  oldest ... newest  |        |

What a model leaves on the device when it is swapped out stays until the pages are taken, from the
model that left first. KV of running requests may use all that weights leave over.
"""

from services.scheduler.simulate.errors import SimulationFault
from services.scheduler.simulate.workload import ModelSize


class DeviceMemory:
    """Who holds which bytes."""

    __slots__ = (
        "_leftover_bytes",
        "_leftovers",
        "budget_bytes",
        "kv_bytes_per_token",
        "kv_tokens",
        "used_bytes",
        "weight_bytes",
    )

    def __init__(self, budget_bytes: int, kv_bytes_per_token: int) -> None:
        self.budget_bytes = budget_bytes
        self.kv_bytes_per_token = kv_bytes_per_token
        self.clear()

    def clear(self) -> None:
        """Whoever held all this is dead."""
        self.used_bytes = 0
        self.weight_bytes = 0
        self.kv_tokens = 0  # of running requests, when they end
        self._leftovers: dict[str, int] = {}
        self._leftover_bytes = 0

    def cached_bytes(self, model: str) -> int:
        """What of a swapped-out model's weights is still there."""
        return self._leftovers.get(model, 0)

    def fits(self, num_tokens: int) -> bool:
        """Whether another request that needs so many KV positions may run."""
        need = (self.kv_tokens + num_tokens) * self.kv_bytes_per_token
        return need <= self.budget_bytes - self.weight_bytes

    def take(self, model: str, size: ModelSize) -> int:
        """Make room for ``model``. Returns the bytes of its weights that are there already.

        Raises SimulationFault if the budget does not allow it.
        """
        footprint = size.weight_bytes + size.kv_bytes
        if self.used_bytes + footprint > self.budget_bytes:
            raise SimulationFault(
                f"{model} ({footprint} bytes) over-commits a GPU: {self.used_bytes} of "
                f"{self.budget_bytes} bytes are in use"
            )
        self.used_bytes += footprint
        self.weight_bytes += size.weight_bytes
        kept = self._leftovers.pop(model, 0)
        self._leftover_bytes -= kept
        excess = self.used_bytes + self._leftover_bytes - self.budget_bytes
        while excess > 0:
            oldest = next(iter(self._leftovers))
            taken = min(excess, self._leftovers[oldest])
            self._leftovers[oldest] -= taken
            self._leftover_bytes -= taken
            excess -= taken
            if not self._leftovers[oldest]:
                del self._leftovers[oldest]
        return kept

    def leave(self, model: str, size: ModelSize, there_bytes: int) -> None:
        """``model`` holds nothing any more; so many bytes of its weights had arrived."""
        self.used_bytes -= size.weight_bytes + size.kv_bytes
        self.weight_bytes -= size.weight_bytes
        if there_bytes:
            self._leftovers[model] = there_bytes
            self._leftover_bytes += there_bytes
