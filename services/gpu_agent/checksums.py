"""One checksum per page of a host image, taken when the image was filled.

XXH3-64 (xxhash): it runs at the memory's speed, so it is no price on a load, and it tells
every single flipped bit. It guards against faults, not against forgery.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Literal

import torch
import xxhash


class Corruption(Exception):
    """Weights are not what was loaded. The message says what was found where.

    ``check``: "page" (a checksum) or "canary" (a forward that gave other logits than before).
    """

    def __init__(self, check: Literal["page", "canary"], message: str) -> None:
        super().__init__(message)
        self.check: Final = check


def checksum(data: torch.Tensor) -> int:
    """XXH3-64 of ``data`` (uint8, 1-D, contiguous, on the host)."""
    return xxhash.xxh3_64_intdigest(data.numpy().data)


@dataclass(frozen=True)
class Checksums:
    """``values[i]`` is of bytes ``i * page_bytes`` on; the last page may be shorter."""

    page_bytes: int
    num_bytes: int
    values: tuple[int, ...]

    @classmethod
    def of(cls, image: torch.Tensor, page_bytes: int) -> "Checksums":
        """Of a whole image (uint8, 1-D)."""
        starts = range(0, image.numel(), page_bytes)
        values = tuple(checksum(image[start : start + page_bytes]) for start in starts)
        return cls(page_bytes, image.numel(), values)

    @property
    def num_pages(self) -> int:
        return len(self.values)

    def span(self, page: int) -> tuple[int, int]:
        """(first byte, end) of ``page``."""
        return page * self.page_bytes, min((page + 1) * self.page_bytes, self.num_bytes)

    def check(self, page: int, content: torch.Tensor, where: str) -> None:
        """Raise Corruption unless ``content`` (uint8, host) is what ``page`` was at load.

        ``where``: whose copy it is, for the message.
        """
        found = checksum(content)
        if found != self.values[page]:
            start, end = self.span(page)
            raise Corruption(
                "page",
                f"page {page} (bytes {start} to {end}) {where} has checksum {found:#018x}, at load "
                f"it was {self.values[page]:#018x}: faulty memory or a stray write; the model is "
                "loaded from its files again",
            )

    def check_all(self, image: torch.Tensor, where: str, pages: Iterable[int] | None = None) -> int:
        """`check` ``pages`` (all, if None) of a host-side copy; returns how many."""
        return self.check_read(lambda start, end: image[start:end], where, pages)

    def check_read(
        self,
        read: Callable[[int, int], torch.Tensor],
        where: str,
        pages: Iterable[int] | None = None,
    ) -> int:
        """`check_all` of a copy that lies elsewhere: ``read(start, end)`` gives its bytes."""
        count = 0
        for page in range(self.num_pages) if pages is None else pages:
            start, end = self.span(page)
            self.check(page, read(start, end), where)
            count += 1
        return count
