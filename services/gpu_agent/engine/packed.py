"""Several prompts in one forward pass, end to end as one row: what they share is the weights.

    tokens    a0 a1 a2 | b3 b4        b goes on where a chunk before this one ended
    columns   a0 a1 a2 | b0 b1 b2 b3 b4
    mask      1  .  .  | .  .  .  .  .      each token sees its own row, up to itself
              1  1  .  | .  .  .  .  .
              1  1  1  | .  .  .  .  .
              .  .  .  | 1  1  1  1  .
              .  .  .  | 1  1  1  1  1

A forward reads (and, for some kernels, rearranges) every weight, however few tokens it is for. No
token is padding here, as there would be in a batch of rows of different lengths.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from transformers import Cache

from services.gpu_agent.engine.kv import KVStore, Span
from services.gpu_agent.engine.prefix import are_prefixes_shareable


def can_pack(module: Any, store: KVStore) -> bool:
    """Whether one ready-made mask tells ``module`` all about what a token may look at: no bias by
    distance, and the same window in all layers. And nothing else may depend on the other rows.
    """
    has_bias = bool(getattr(module.config.get_text_config(), "alibi", False))
    is_uniform = len(set(store.geometry.sliding_windows)) == 1
    return is_uniform and not has_bias and are_prefixes_shareable(module.config)


class PackedView(Cache):  # type: ignore[misc]  # transformers is untyped
    """The cache for one forward pass over ``spans``, seen as one row.

    ``last``: int64 (spans,), where each one's last token is. ``attention_mask``: bool
    (1, 1, new tokens, columns). ``position_ids``: int64 (1, new tokens).
    """

    def __init__(self, store: KVStore, spans: Sequence[Span]) -> None:
        super().__init__(layers=[])
        device = store.device
        new = [np.arange(span.start, span.end) for span in spans]
        held = [np.arange(span.end) for span in spans]
        write = np.concatenate([span.places[span.start : span.end] for span in spans])
        read = np.concatenate([span.places[: span.end] for span in spans])
        self._planes = store.planes
        self._write_at = torch.from_numpy(write).to(device)
        self._num_columns = len(read)
        self._read_at: torch.Tensor | None = None  # nothing cached before: nothing to read
        if len(read) > len(write):
            self._read_at = torch.from_numpy(read).to(device)
        ends = np.cumsum([len(one) for one in new]) - 1
        self.last: Final = torch.from_numpy(ends).to(device)
        positions = np.concatenate(new)
        self.position_ids: Final = torch.from_numpy(positions)[None].to(device)
        window = store.geometry.sliding_windows[0]
        mask = _mask(new, held, window)
        self.attention_mask: Final = torch.from_numpy(mask)[None, None].to(device)

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new K and V (1, heads, new, dim); give all (1, heads, columns, dim)."""
        heads, dim = key.shape[1], key.shape[3]
        both = []
        for number, fresh in ((2 * layer_idx, key), (2 * layer_idx + 1, value)):
            plane = self._planes[number]
            rows = fresh[0].transpose(0, 1).reshape(-1, heads * dim)
            plane.index_copy_(0, self._write_at, rows)
            if self._read_at is None:
                both.append(fresh)
            else:
                rows = plane.index_select(0, self._read_at)
                both.append(rows.view(1, self._num_columns, heads, dim).transpose(1, 2))
        return both[0], both[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._num_columns - len(self._write_at)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._num_columns, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1


def _mask(
    new: Sequence[np.ndarray[Any, Any]], held: Sequence[np.ndarray[Any, Any]], window: int | None
) -> np.ndarray[Any, Any]:
    """bool (new tokens, columns)."""
    mask = np.zeros((sum(map(len, new)), sum(map(len, held))), dtype=np.bool_)
    row = column = 0
    for queries, keys in zip(new, held, strict=True):
        distance = queries[:, None] - keys[None, :]
        seen = distance >= 0
        if window is not None:
            seen &= distance < window
        mask[row : row + len(queries), column : column + len(keys)] = seen
        row, column = row + len(queries), column + len(keys)
    return mask
