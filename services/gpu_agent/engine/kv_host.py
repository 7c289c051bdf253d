"""KV blocks in host memory: what is kept of requests and prompts while their model is not on the
device, or when the device has no room for them.

    HostKV           one per worker: a budget in bytes, least recently used first to go
      `- HostBlocks  one model's entries, by key

An entry that is *held* stays: a suspended request comes back to it. Everything else is a cache.
Copies are given to the compute stream, from or to pinned memory on CUDA, so an entry may be read
by a later copy at once; the host itself never looks inside.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

import torch


@dataclass
class _Entry:
    buffer: torch.Tensor  # uint8
    num_holds: int = 0


class HostKV:
    """All models' blocks within ``budget_bytes``. ``pinned``: fit for a GPU's copies."""

    def __init__(self, budget_bytes: int, pinned: bool = False) -> None:
        self.budget_bytes: Final = budget_bytes
        self.used_bytes = 0
        self._pinned = pinned
        self._entries: OrderedDict[tuple[int, bytes], _Entry] = OrderedDict()  # oldest first
        self._num_opened = 0

    def open(self, block_bytes: int) -> "HostBlocks":
        """A place for one model's blocks, each of ``block_bytes``."""
        self._num_opened += 1
        return HostBlocks(self, self._num_opened, block_bytes)

    def _add(self, name: tuple[int, bytes], num_bytes: int) -> torch.Tensor | None:
        buffer = self._make_room(num_bytes)
        if self.used_bytes + num_bytes > self.budget_bytes:
            return None
        if buffer is None:
            with torch.inference_mode(False):  # else nobody else might write to it
                buffer = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._pinned)
        self._entries[name] = _Entry(buffer)
        self.used_bytes += num_bytes
        return buffer

    def _make_room(self, num_bytes: int) -> torch.Tensor | None:
        """Drop what was not used for longest; one buffer of it where it has the right size."""
        spare: torch.Tensor | None = None
        over = self.used_bytes + num_bytes - self.budget_bytes
        if over <= 0:
            return None
        victims = []
        for name, entry in self._entries.items():
            if over <= 0:
                break
            if not entry.num_holds:
                victims.append(name)
                over -= entry.buffer.numel()
        if over > 0:
            return None
        for name in victims:
            buffer = self._drop(name)
            spare = buffer if buffer.numel() == num_bytes else spare
        return spare

    def _drop(self, name: tuple[int, bytes]) -> torch.Tensor:
        buffer = self._entries.pop(name).buffer
        self.used_bytes -= buffer.numel()
        return buffer

    def validate(self) -> None:
        """Raise AssertionError where the books do not balance."""
        held = sum(entry.buffer.numel() for entry in self._entries.values())
        assert held == self.used_bytes <= self.budget_bytes, (held, self.used_bytes)
        assert all(entry.num_holds >= 0 for entry in self._entries.values()), "holds"


class HostBlocks:
    """One model's entries. Made by ``HostKV.open``."""

    def __init__(self, home: HostKV, number: int, block_bytes: int) -> None:
        self._home = home
        self._number = number
        self._block_bytes = block_bytes

    def has(self, key: bytes) -> bool:
        return (self._number, key) in self._home._entries

    def find(self, key: bytes) -> torch.Tensor | None:
        """The bytes kept as ``key``, which are in use now."""
        entry = self._home._entries.get((self._number, key))
        if entry is None:
            return None
        self._home._entries.move_to_end((self._number, key))
        return entry.buffer

    def add(self, key: bytes) -> torch.Tensor | None:
        """A place for ``key``'s bytes, to be filled; None where everything is held."""
        if self.has(key):
            return self.find(key)
        return self._home._add((self._number, key), self._block_bytes)

    def hold(self, key: bytes) -> None:
        """Keep it until `unhold`, once for each hold. KeyError where it is not there."""
        self._home._entries[(self._number, key)].num_holds += 1

    def unhold(self, key: bytes, drop: bool = False) -> None:
        """``drop``: nobody will want it again."""
        name = (self._number, key)
        entry = self._home._entries[name]
        entry.num_holds -= 1
        if drop and not entry.num_holds:
            self._home._drop(name)

    def clear(self) -> None:
        """Drop all; nothing of it is held any more."""
        for name in [name for name in self._home._entries if name[0] == self._number]:
            self._home._drop(name)

    @property
    def holds(self) -> dict[bytes, int]:
        """Held key -> how often."""
        entries = self._home._entries.items()
        mine = {name[1]: entry.num_holds for name, entry in entries if name[0] == self._number}
        return {key: count for key, count in mine.items() if count}
