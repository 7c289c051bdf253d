"""The attention that models run with gives what transformers' own gives, bit for bit."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from services.gpu_agent.attention import GROUPED, grouped_attention, use_grouped
from tests.unit import tiny_models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("new", [1, 5, 40])
@pytest.mark.parametrize("mask", ["none", "causal", "padded"])
def test_shared_heads_give_the_same_bits(
    dtype: torch.dtype, kv_heads: int, new: int, mask: str
) -> None:
    torch.manual_seed(4)
    module = SimpleNamespace(num_key_value_groups=8 // kv_heads, is_causal=True)
    length = new if mask == "none" else new + 90
    query = torch.randn(3, 8, new, 32, dtype=dtype)
    # as the paged cache gives them: heads and positions swapped in memory
    key, value = (
        torch.randn(3, length, kv_heads, 32, dtype=dtype).transpose(1, 2) for _ in range(2)
    )
    allowed: torch.Tensor | None = None
    if mask != "none":
        row = torch.arange(length - new, length)[:, None] >= torch.arange(length)[None, :]
        allowed = row[None, None].expand(3, 1, new, length).clone()
        if mask == "padded":
            allowed[1, :, :, :17] = False
    ours, _ = grouped_attention(module, query, key, value, allowed, scaling=0.2)
    theirs, _ = sdpa_attention_forward(module, query, key, value, allowed, scaling=0.2)
    if new == 1 and dtype == torch.bfloat16:  # heads as tokens: another order of the same sum
        torch.testing.assert_close(ours, theirs)
    else:
        assert torch.equal(ours, theirs)
    assert ours.is_contiguous()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma", "gemma_3", "mixtral"])
def test_models_that_let_their_attention_be_chosen_use_it(family: str) -> None:
    module = build(family)
    use_grouped(module)
    assert module.config._attn_implementation == GROUPED
    ids = tiny_models.prompt(40)
    reference = build(family)
    reference.load_state_dict(module.state_dict())
    assert torch.equal(tiny_models.logits(module, ids), tiny_models.logits(reference, ids))


def test_falcon_keeps_its_own() -> None:
    module = build("falcon_40b")
    use_grouped(module)
    assert module.config._attn_implementation == "sdpa"


def build(family: str) -> Any:
    dtype, make_config = tiny_models.FAMILIES[family]
    return AutoModelForCausalLM.from_config(
        make_config(), dtype=dtype, attn_implementation="sdpa"
    ).eval()
