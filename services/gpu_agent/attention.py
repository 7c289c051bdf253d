"""The attention that models run with: torch's, called in the way that is best on the device.

Where K and V have fewer heads than Q, transformers copies them once for each query head before it
calls torch (unless there is no mask), although torch's kernel for the CPU reads shared heads by
itself, with a mask too, and gives the same bits. The copies were a fifth of a decode step.

For one new token in 16-bit types that kernel is slow, and much faster for several. So the query
heads that share one of K and V go in as if they were tokens, which is the same sum:

    (rows, heads, 1, dim)  ->  (rows, KV heads, heads / KV heads, dim)
"""

from typing import Any, Final

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

GROUPED: Final = "hotswap_grouped"


def grouped_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' ``sdpa``, without its copies on CPU.

    ``query`` (rows, heads, new, dim), ``key`` and ``value`` (rows, KV heads, length, dim); gives
    (rows, new, heads, dim).
    """
    groups = getattr(module, "num_key_value_groups", 1)
    is_ours = query.device.type == "cpu" and kwargs.get("position_bias") is None
    if is_ours and query.shape[2] == 1 and query.dtype.itemsize == 2 and _is_shared(attention_mask):
        return _one_token(query, key, value, attention_mask, groups, dropout, scaling), None
    if groups == 1 or not is_ours:
        result: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
        return result
    wants_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    output = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
        is_causal=bool(query.shape[2] > 1 and attention_mask is None and wants_causal),
        enable_gqa=True,
    )
    return output.transpose(1, 2).contiguous(), None


def _is_shared(mask: torch.Tensor | None) -> bool:
    """Whether all heads have the same mask."""
    return mask is None or mask.shape[1] == 1


def _one_token(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    groups: int,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    rows, heads, _, dim = query.shape
    # One head alone goes in twice: two tokens are still faster than one.
    as_tokens = query.view(rows, heads // groups, groups, dim)
    as_tokens = as_tokens.expand(-1, -1, 2, -1) if groups == 1 else as_tokens
    if mask is not None:
        mask = mask.expand(rows, 1, as_tokens.shape[2], mask.shape[3])
    output = scaled_dot_product_attention(
        as_tokens, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
    )
    return output[:, :, :groups].reshape(rows, 1, heads, dim).contiguous()


def use_grouped(module: Any) -> None:
    """Have ``module`` run with `grouped_attention`, if it lets its attention be chosen."""
    takes_any = getattr(module, "_supports_attention_backend", False)
    if takes_any and module.config._attn_implementation == "sdpa":
        module.set_attn_implementation(GROUPED)


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
