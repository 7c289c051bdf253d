"""Paged KV cache: the keys and values of one model's requests, on the pool's pages.

A page is cut into blocks of a few tokens, and a block is contiguous, so that it is copied to host
memory and back as one piece. One block, for a model with L layers whose K (or V) takes W elements
per token and layer, and T tokens per block:

    | layer 0 K: T x W | layer 0 V: T x W | layer 1 K: T x W | ... | layer L-1 V: T x W |

Which blocks a request has is somebody else's concern (kv_manager.py). Here: where their bytes
are, and `CacheView`, which is what one forward pass sees: a transformers `Cache` that writes the
new tokens' K and V into their places and gathers what each row has so far.

Rows of different length are aligned at the right, as a left-padded batch is:

    row 0     a0 a1 a2 a3 a4 q      q: this step's token
    row 1      -  -  - b0 b1 q      -: padding, masked

So "how far back" is the same column distance in every row, and every model builds its own
masks (causal, sliding window per layer, alibi) from the ordinary 2-D padding mask: nothing
here knows an architecture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Cache

from services.gpu_agent.pages import PagePool
from services.gpu_agent.skeleton import KVGeometry

MAX_BLOCK_TOKENS: Final = 16


@dataclass(frozen=True)
class Span:
    """One row of a forward pass: tokens ``start`` (inclusive) to ``end`` are computed now.

    ``places``: int64, where each token of the row is (`KVStore.places`).
    """

    places: NDArray[np.int64]
    start: int
    end: int


class KVStore:
    """Where one model's KV blocks are on ``pool``. It owns nothing; block b is number
    ``b % blocks_per_page`` of page ``b // blocks_per_page``.

    Raises ValueError where one token does not fit in one page.
    """

    def __init__(self, pool: PagePool, geometry: KVGeometry) -> None:
        per_page = pool.page_bytes // geometry.bytes_per_token
        if per_page < 1:
            raise ValueError(
                f"one token's KV takes {geometry.bytes_per_token} bytes and a page has "
                f"{pool.page_bytes}: start the agent with larger pages"
            )
        self.geometry: Final = geometry
        self.device: Final = pool.torch_device
        # A divisor, so that no token of a page is lost and the reserve holds what it is for.
        self.block_tokens: Final = next(
            size for size in range(MAX_BLOCK_TOKENS, 0, -1) if per_page % size == 0
        )
        self.blocks_per_page: Final = per_page // self.block_tokens
        self.block_bytes: Final = self.block_tokens * geometry.bytes_per_token
        self._page_bytes: Final = pool.page_bytes
        self._bytes: Final = pool.identity(torch.uint8)
        self._cut(pool)

    def _cut(self, pool: PagePool) -> None:
        """Make the views that layers write and read through: one plane for each layer's K and V.

        One index per token, because `index_select` and `index_copy_` move whole rows and are
        several times faster than indexing by page and token. A single row stride that reaches
        every token of every page is the greatest common divisor of page and row: rows of a plane
        overlap in general, those of tokens never do. Only blocks in use are ever touched.
        """
        flat = pool.identity(self.geometry.dtype)
        width = self.geometry.num_kv_heads * self.geometry.head_dim
        page = pool.page_bytes // self.geometry.dtype.itemsize
        block = self.block_bytes // self.geometry.dtype.itemsize
        stride = gcd(page, width)
        self._page_rows = page // stride
        self._block_rows = block // stride
        self._token_rows = np.arange(self.block_tokens, dtype=np.int64) * (width // stride)
        self.planes: list[torch.Tensor] = []  # [2 * layer] is K, [2 * layer + 1] is V
        for number in range(2 * self.geometry.num_layers):
            start = number * self.block_tokens * width
            rows = (flat.numel() - start - width) // stride + 1
            offset = flat.storage_offset() + start
            self.planes.append(flat.as_strided((rows, width), (stride, 1), offset))

    def places(self, block: int) -> NDArray[np.int64]:
        """Index of each token of ``block`` into the planes."""
        page, number = divmod(block, self.blocks_per_page)
        return page * self._page_rows + number * self._block_rows + self._token_rows

    def block_view(self, block: int) -> torch.Tensor:
        """All bytes of ``block``: uint8 (block_bytes,), on the device."""
        page, number = divmod(block, self.blocks_per_page)
        start = page * self._page_bytes + number * self.block_bytes
        return self._bytes[start : start + self.block_bytes]

    # -- one forward pass ------------------------------------------------------------------

    def view(self, spans: Sequence[Span]) -> "CacheView":
        """The cache for one forward pass over ``spans``, all of the same number of new tokens.

        A row with padding must have its first token in the cache already: padding reads
        that one, since memory never written may hold NaN, which no mask removes.
        """
        num_new = spans[0].end - spans[0].start
        length = max(span.end for span in spans)
        if any(span.end - span.start != num_new for span in spans):
            raise ValueError("rows of one forward pass have different numbers of new tokens")
        if any(span.end < length and span.start == 0 for span in spans):
            raise ValueError("a row without cached tokens cannot be padded")
        read = np.empty((len(spans), length), dtype=np.int64)
        for row, span in zip(read, spans, strict=True):
            row[: length - span.end] = span.places[0]
            row[length - span.end :] = span.places[: span.end]
        return CacheView(self, torch.from_numpy(read), num_new, [span.end for span in spans])


class PagedCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """What a forward pass sees of the planes: ``rows`` rows of ``columns`` tokens, the last
    ``num_new`` of them computed now.

    Answers what transformers 5.17 asks of a cache in a decoder-only model: `update`, and the sizes
    from which the model makes its masks and the alibi bias.

    ``write_at``: int64 (rows * num_new), ``read_at``: int64 (rows * columns), on the device; None
    where nothing was cached before.
    """

    def __init__(
        self,
        store: KVStore,
        write_at: torch.Tensor,
        read_at: torch.Tensor | None,
        rows: int,
        columns: int,
        num_new: int,
    ) -> None:
        super().__init__(layers=[])
        self.write_at: Final = write_at
        self.read_at: Final = read_at
        self._planes = store.planes
        self._shape = (rows, columns)
        self._num_new = num_new

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new K and V (rows, heads, new, dim); give all (rows, heads, columns, dim)."""
        return self._exchange(2 * layer_idx, key), self._exchange(2 * layer_idx + 1, value)

    def _exchange(self, number: int, fresh: torch.Tensor) -> torch.Tensor:
        heads, dim = fresh.shape[1], fresh.shape[3]
        plane = self._planes[number]
        plane.index_copy_(0, self.write_at, fresh.transpose(1, 2).reshape(-1, heads * dim))
        if self.read_at is None:
            return fresh
        return plane.index_select(0, self.read_at).view(*self._shape, heads, dim).transpose(1, 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns before this pass's tokens; the same for every layer."""
        return self._shape[1] - self._num_new

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(columns, first column): all of them also where a layer's window is shorter."""
        return self._shape[1], 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1


class CacheView(PagedCache):
    """KV of the rows of one forward pass, aligned right; a new one for each pass.

    ``places``: int64 (rows, length), host. ``ends``: tokens of each row after this pass.
    """

    def __init__(
        self, store: KVStore, places: torch.Tensor, num_new: int, ends: Sequence[int]
    ) -> None:
        rows, length = places.shape
        write_at = places[:, length - num_new :].reshape(-1).to(store.device)
        read_at = places.reshape(-1).to(store.device) if length > num_new else None
        super().__init__(store, write_at, read_at, rows, length, num_new)
        last = torch.tensor(list(ends))[:, None]
        self.position_ids: Final = (last - num_new + torch.arange(num_new)).to(store.device)
        self.attention_mask: Final = _padding_mask(last, length, store.device)


def _padding_mask(last: torch.Tensor, length: int, device: torch.device) -> torch.Tensor | None:
    """int64 (rows, length): 1 where a token is. None without padding: faster kernels."""
    if bool((last == length).all()):
        return None
    column = torch.arange(length)[None, :]
    return (column >= length - last).to(torch.int64).to(device)
