"""A bucket's present values, followed.

After a reconnect every present value comes again, and what did not come is gone (it was deleted,
or has expired, while nobody could tell us). Until then the last known values stay.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

from services.bus import Bucket, Bus, Entry
from services.bus.connection import Hook

T = TypeVar("T")


class Mirror(Generic[T]):
    """A bucket's present values by key. ``changed(key, value)``; value None: it is gone."""

    def __init__(
        self, bus: Bus, bucket: str, kind: type[T], changed: Callable[[str, T | None], None]
    ) -> None:
        self._bus = bus
        self._bucket = Bucket(bus, bucket, kind)
        self._changed = changed
        self._seen: set[str] = set()
        self.values: dict[str, T] = {}

    async def start(self) -> list[Callable[[], object]]:
        """Watch; returns the undoing of its reconnect hooks and of the watch."""
        before = self._bus.on_reconnect(self._forget_seen)
        stop: Hook = await self._bucket.watch(self._on_entry)
        after = self._bus.on_reconnect(self._drop_unseen)  # hooks run in this order
        return [before, stop, after]

    async def _on_entry(self, entry: Entry[T]) -> None:
        self._seen.add(entry.key)
        if entry.value is None:
            self.values.pop(entry.key, None)
        else:
            self.values[entry.key] = entry.value
        self._changed(entry.key, entry.value)

    async def _forget_seen(self) -> None:
        self._seen.clear()

    async def _drop_unseen(self) -> None:
        for key in [key for key in self.values if key not in self._seen]:
            del self.values[key]
            self._changed(key, None)
