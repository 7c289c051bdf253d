"""Last hidden states to one vector per input, as sentence-transformers does it."""

import torch
from torch.nn.functional import normalize

from services.gpu_agent.runner import Pooling, PoolingMode


def pool(hidden: torch.Tensor, lengths: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """Vectors (rows, width) in float32 of ``hidden`` (rows, tokens, width), of any dtype.

    ``lengths`` (rows,): tokens of each row, at least 1; what lies to their right is padding.
    """
    vectors = _pool(hidden.float(), lengths, pooling.mode)
    return normalize(vectors, dim=-1) if pooling.normalize else vectors


def shorten(vectors: torch.Tensor, dimensions: int, pooling: Pooling) -> torch.Tensor:
    """The first ``dimensions`` of each vector, of length 1 again where they had it."""
    short = vectors[:, :dimensions]
    return normalize(short, dim=-1) if pooling.normalize else short


def _pool(hidden: torch.Tensor, lengths: torch.Tensor, mode: PoolingMode) -> torch.Tensor:
    positions = torch.arange(hidden.shape[1], device=hidden.device)
    is_token = (positions < lengths[:, None])[..., None]  # (rows, tokens, 1)
    count = lengths[:, None].float()
    match mode:
        case "cls":
            return hidden[:, 0]
        case "lasttoken":
            return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
        case "max":
            return hidden.masked_fill(~is_token, -torch.inf).amax(dim=1)
    # Not a product with the mask: padding may hold NaN where a row of it attends to nothing.
    hidden = hidden.masked_fill(~is_token, 0.0)
    if mode == "weightedmean":  # the first token counts once, the second twice ...
        weights = is_token * (positions + 1.0)[:, None]
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1)
    total = hidden.sum(dim=1)
    return total / (count.sqrt() if mode == "mean_sqrt_len" else count)
