"""Paged KV cache: the keys and values of all requests of one resident model, on its pages.

One page, for a model with L layers whose K (or V) takes W elements per token and layer,
and T tokens per page:

    | layer 0 K: T x W | layer 0 V: T x W | layer 1 K: T x W | ... | layer L-1 V: T x W | rest |

A page is cut into blocks of a few tokens (all layers of a block are in the same page), and
a request owns a list of blocks. So a large page does not limit how many requests run.

`KVStore` hands out blocks. `CacheView` is what one forward pass sees: a transformers `Cache`
that writes the new tokens' K and V into their places and gathers what each row has so far.

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

import torch
from transformers import Cache

from services.gpu_agent.pages import PagePool
from services.gpu_agent.skeleton import KVGeometry

MAX_BLOCK_TOKENS: Final = 16


class OutOfBlocks(Exception):
    """Fewer blocks are free than a request needs. Nothing was taken."""


@dataclass(frozen=True)
class Blocks:
    """What one request owns. ``slots`` (int64, on the host): token i lives in slot slots[i]."""

    ids: tuple[int, ...]
    slots: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return self.slots.numel()


@dataclass(frozen=True)
class Span:
    """One row of a forward pass: tokens ``start`` (inclusive) to ``end`` are computed now."""

    blocks: Blocks
    start: int
    end: int


class KVStore:
    """The KV reserve of one resident model: ``pages`` of ``pool``, owned until swap-out.

    Raises ValueError where one token does not fit in one page.
    """

    def __init__(self, pool: PagePool, geometry: KVGeometry, pages: Sequence[int]) -> None:
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
        self._tokens_per_page: Final = per_page
        self._pages: Final = torch.tensor(list(pages), dtype=torch.int64)
        self._free: Final = list(range(len(pages) * self._blocks_per_page))[::-1]
        self._cut(pool)

    def _cut(self, pool: PagePool) -> None:
        """Make the views that layers write through and read through.

        Writing: (page, token in page, W), indexed by two tensors. Reading: one index per
        token, because `index_select` copies whole rows and is several times faster than
        two-tensor indexing. A single row stride that reaches every token of every page is
        the greatest common divisor of page and row; those views overlap themselves, which
        is fine for reading and only for that. Only owned pages are ever touched.
        """
        flat = pool.identity(self.geometry.dtype)
        self._page_elements = pool.page_bytes // self.geometry.dtype.itemsize
        self._width = self.geometry.num_kv_heads * self.geometry.head_dim
        self._stride = gcd(self._page_elements, self._width)
        plane = self._tokens_per_page * self._width
        self.write_views: list[torch.Tensor] = []  # [2 * layer] is K, [2 * layer + 1] is V
        self.read_views: list[torch.Tensor] = []
        for number in range(2 * self.geometry.num_layers):
            offset = flat.storage_offset() + number * plane
            self.write_views.append(
                flat.as_strided(
                    (pool.num_pages, self._tokens_per_page, self._width),
                    (self._page_elements, self._width, 1),
                    offset,
                )
            )
            rows = (flat.numel() - number * plane - self._width) // self._stride + 1
            self.read_views.append(flat.as_strided((rows, self._width), (self._stride, 1), offset))

    @property
    def _blocks_per_page(self) -> int:
        return self._tokens_per_page // self.block_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens that fit when nothing else is there: the longest possible request."""
        return self._pages.numel() * self._tokens_per_page

    @property
    def num_free_tokens(self) -> int:
        return len(self._free) * self.block_tokens

    def can_take(self, num_tokens: int) -> bool:
        return self._blocks_for(num_tokens) <= len(self._free)

    def take(self, num_tokens: int) -> Blocks:
        """Blocks for ``num_tokens`` tokens (rounded up). OutOfBlocks takes nothing."""
        count = self._blocks_for(num_tokens)
        if count > len(self._free):
            raise OutOfBlocks(
                f"{num_tokens} tokens of KV cache wanted, {self.num_free_tokens} free "
                f"of {self.num_tokens}"
            )
        return self._blocks(tuple(self._free.pop() for _ in range(count)))

    def extend(self, blocks: Blocks, num_tokens: int) -> Blocks:
        """``blocks`` and as many more as ``num_tokens`` tokens need. OutOfBlocks takes nothing."""
        short = num_tokens - blocks.num_tokens
        if short <= 0:
            return blocks
        return self._blocks(blocks.ids + self.take(short).ids)

    def _blocks(self, ids: tuple[int, ...]) -> Blocks:
        first = torch.tensor(ids, dtype=torch.int64) * self.block_tokens
        slots = (first[:, None] + torch.arange(self.block_tokens)).flatten()
        return Blocks(ids, slots)

    def give(self, blocks: Blocks) -> None:
        """Back to the free list. ValueError where any of them is free already."""
        if twice := set(blocks.ids) & set(self._free):
            raise ValueError(f"KV blocks given twice: {sorted(twice)}")
        self._free.extend(reversed(blocks.ids))

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

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
        read = torch.stack(
            [
                torch.cat(
                    (
                        span.blocks.slots[:1].expand(length - span.end),
                        span.blocks.slots[: span.end],
                    )
                )
                for span in spans
            ]
        )
        return CacheView(self, read, num_new, [span.end for span in spans])

    def locate(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Page number and token in page of each slot."""
        return self._pages[slots // self._tokens_per_page], slots % self._tokens_per_page

    def rows(self, slots: torch.Tensor) -> torch.Tensor:
        """Index of each slot into the read views."""
        page, token = self.locate(slots)
        return (page * self._page_elements + token * self._width) // self._stride


class CacheView(Cache):  # type: ignore[misc]  # transformers is untyped
    """KV of the rows of one forward pass; a new one for each pass.

    Answers what transformers 5.17 asks of a cache in a decoder-only model: `update`, and
    the sizes from which the model makes its masks and the alibi bias.

    ``slots``: int64 (rows, length), host. ``ends``: tokens of each row after this pass.
    """

    def __init__(
        self, store: KVStore, slots: torch.Tensor, num_new: int, ends: Sequence[int]
    ) -> None:
        super().__init__(layers=[])
        self._store = store
        self._num_rows, self._length = slots.shape
        self._num_new = num_new
        new = slots[:, self._length - num_new :].reshape(-1)
        page, token = store.locate(new)
        self._write_at = (page.to(store.device), token.to(store.device))
        self._read_at: torch.Tensor | None = None  # nothing cached before: nothing to read
        if self._length > num_new:
            self._read_at = store.rows(slots.reshape(-1)).to(store.device)
        last = torch.tensor(list(ends))[:, None]
        self.position_ids: Final = (last - num_new + torch.arange(num_new)).to(store.device)
        self.attention_mask: Final = self._padding_mask(last)

    def _padding_mask(self, last: torch.Tensor) -> torch.Tensor | None:
        """int64 (rows, length): 1 where a token is. None without padding: faster kernels."""
        if bool((last == self._length).all()):
            return None
        column = torch.arange(self._length)[None, :]
        return (column >= self._length - last).to(torch.int64).to(self._store.device)

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new K and V (rows, heads, new, dim); give all (rows, heads, length, dim)."""
        store = self._store
        for number, fresh in ((2 * layer_idx, key), (2 * layer_idx + 1, value)):
            rows = fresh.transpose(1, 2).reshape(self._num_rows * self._num_new, -1)
            store.write_views[number][self._write_at] = rows
        if self._read_at is None:
            return key, value
        return self._gather(2 * layer_idx, key), self._gather(2 * layer_idx + 1, value)

    def _gather(self, number: int, like: torch.Tensor) -> torch.Tensor:
        assert self._read_at is not None
        rows = self._store.read_views[number].index_select(0, self._read_at)
        heads, dim = like.shape[1], like.shape[3]
        return rows.view(self._num_rows, self._length, heads, dim).transpose(1, 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns before this pass's tokens; the same for every layer."""
        return self._length - self._num_new

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(columns, first column): all of them also where a layer's window is shorter."""
        return self._length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1
