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

from services.gpu_agent.engine.kv import KVStore, PagedCache, Span
from services.gpu_agent.engine.prefix import are_prefixes_shareable


def can_pack(module: Any, store: KVStore) -> bool:
    """Whether one ready-made mask tells ``module`` all about what a token may look at: no bias by
    distance, and the same window in all layers. And nothing else may depend on the other rows.
    """
    is_uniform = len(set(store.geometry.sliding_windows)) == 1
    return is_uniform and not has_bias(module) and are_prefixes_shareable(module.config)


def has_bias(module: Any) -> bool:
    """Whether attention depends on how far back a token is, besides the mask (alibi)."""
    return bool(getattr(module.config.get_text_config(), "alibi", False))


class PackedView(PagedCache):
    """The cache for one forward pass over ``spans``, seen as one row.

    ``last``: int64 (spans,), where each one's last token is. ``attention_mask``: bool
    (1, 1, new tokens, columns). ``position_ids``: int64 (1, new tokens).
    """

    def __init__(self, store: KVStore, spans: Sequence[Span]) -> None:
        device = store.device
        new = [np.arange(span.start, span.end) for span in spans]
        held = [np.arange(span.end) for span in spans]
        write = np.concatenate([span.places[span.start : span.end] for span in spans])
        read = np.concatenate([span.places[: span.end] for span in spans])
        read_at = torch.from_numpy(read).to(device) if len(read) > len(write) else None
        write_at = torch.from_numpy(write).to(device)
        super().__init__(store, write_at, read_at, 1, len(read), len(write))
        ends = np.cumsum([len(one) for one in new]) - 1
        self.last: Final = torch.from_numpy(ends).to(device)
        self.position_ids: Final = torch.from_numpy(np.concatenate(new))[None].to(device)
        mask = _mask(new, held, store.geometry.sliding_windows[0])
        self.attention_mask: Final = torch.from_numpy(mask)[None, None].to(device)


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
