"""The byte budget of host images: more models than host memory, the least recently used go.

    disk (all models)  --load-->  host tier (budget)  --swap-in-->  device

A model that is on the device, on its way there, or being loaded keeps its image: a swap-out
copies nothing back, so it needs it.
"""

from collections.abc import Callable
from typing import Final


class OutOfHostMemory(Exception):
    """A host image does not fit into the budget, whoever may leave. Nothing was dropped."""


class HostTier:
    """Who holds how many bytes. Only the engine's thread calls it; bytes are counted from the
    moment a load begins.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes: Final = budget_bytes
        self._held: dict[str, int] = {}  # model -> bytes, least recently used first

    @property
    def used_bytes(self) -> int:
        return sum(self._held.values())

    def victims_for(
        self,
        model: str,
        num_bytes: int,
        may_leave: Callable[[str], bool],
        is_wanted: Callable[[str], bool] = lambda _: False,
    ) -> list[str]:
        """Who has to leave before ``model`` may hold ``num_bytes``: the fewest, oldest first, those
        who are wanted back after all others. Raises OutOfHostMemory.
        """
        victims: list[str] = []
        missing = num_bytes + self.used_bytes - self._held.get(model, 0) - self.budget_bytes
        for name in sorted(self._held, key=is_wanted):
            if missing <= 0:
                break
            if name != model and may_leave(name):
                victims.append(name)
                missing -= self._held[name]
        if missing > 0:
            kept = self.used_bytes - sum(self._held[name] for name in victims)
            raise OutOfHostMemory(
                f"the host image of model {model!r} takes {num_bytes} bytes, but of the host "
                f"memory budget of {self.budget_bytes} bytes {kept} are held by models that are on "
                "the device or being loaded: raise host_memory of this GPU, or serve fewer models"
            )
        return victims

    def hold(self, model: str, num_bytes: int) -> None:
        """``model`` holds as many bytes from now on, and was used just now."""
        self._held.pop(model, None)
        self._held[model] = num_bytes

    def touch(self, model: str) -> None:
        """``model`` was used just now."""
        if model in self._held:
            self._held[model] = self._held.pop(model)

    def release(self, model: str) -> None:
        """``model`` holds nothing any more."""
        self._held.pop(model, None)
