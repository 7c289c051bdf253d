"""What a model needs, in tokens, pages and bytes: from its spec, its config and the trial run."""

from typing import Any

from torch import nn

from schemas.state import ModelFacts, ModelSpec
from services.gpu_agent.checkpoint import BadCheckpoint
from services.gpu_agent.loader import LoadPlan
from services.gpu_agent.pages import PagePool
from services.gpu_agent.probe import Examined, KVGeometry
from services.gpu_agent.runner import Pooling
from services.gpu_agent.tool_format import find_tool_format


def find_facts(
    spec: ModelSpec,
    config: Any,
    module: nn.Module,
    examined: Examined,
    plan: LoadPlan,
    pool: PagePool,
    pooling: Pooling | None = None,
) -> ModelFacts:
    """All bytes are rounded up to whole pages of ``pool``. ``pooling``: None where it generates.

    Raises BadCheckpoint.
    """
    max_model_len = _max_model_len(spec, config, module, pooling)
    return ModelFacts(
        architecture=type(module).__name__,
        dtype=str(plan.dtype).removeprefix("torch."),
        num_parameters=examined.num_parameters,
        weight_bytes=pool.pages_for(plan.layout.num_bytes) * pool.page_bytes,
        kv_bytes=0
        if pooling
        else kv_pages(spec, examined.geometry, max_model_len, pool) * pool.page_bytes,
        max_model_len=max_model_len,
        max_batch=spec.max_batch,
        runner="embed" if pooling else "generate",
        dimensions=examined.width if pooling else 0,
        tool_format="" if pooling else find_tool_format(plan.checkpoint.folder),
    )


def _max_model_len(spec: ModelSpec, config: Any, module: nn.Module, pooling: Pooling | None) -> int:
    """The context length, in tokens: the lesser of what was asked and what was trained.

    What sentence-transformers would cut inputs to is taken for asked, where nothing else was.
    """
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len")
    trained = next((n for name in names if isinstance(n := getattr(text, name, None), int)), None)
    if trained is not None:
        trained -= _unused_positions(module)
    asked = spec.max_model_len
    if asked is None and pooling is not None and pooling.max_tokens is not None:
        asked = min(pooling.max_tokens, trained or pooling.max_tokens)
    if asked is not None and asked < 1:
        raise BadCheckpoint(f"model {spec.name!r}: max_model_len = {asked} is not positive")
    if asked is None and trained is None:
        raise BadCheckpoint(
            f"model {spec.name!r}: its config.json gives no context length: set max_model_len"
        )
    if asked is not None and trained is not None and asked > trained:
        raise BadCheckpoint(
            f"model {spec.name!r}: max_model_len = {asked} is more than the {trained} tokens "
            "of its config.json: lower it or leave it out"
        )
    return min(n for n in (asked, trained) if n is not None)


def _unused_positions(module: nn.Module) -> int:
    """Roberta and its kin count positions from after the padding's: two of theirs have no token."""
    for name, part in module.named_modules():
        padding: int | None = getattr(part, "padding_idx", None)
        if name.endswith("position_embeddings") and isinstance(part, nn.Embedding):
            return 0 if padding is None else padding + 1
    return 0


def kv_pages(spec: ModelSpec, geometry: KVGeometry, max_model_len: int, pool: PagePool) -> int:
    """Pages of the KV reserve. A page holds K and V of all layers for its tokens."""
    tokens_per_page = pool.page_bytes // geometry.bytes_per_token
    if tokens_per_page < 1:
        raise BadCheckpoint(
            f"model {spec.name!r}: one token's K and V take {geometry.bytes_per_token} bytes, more "
            f"than a page of {pool.page_bytes}: use larger pages"
        )
    kv_tokens = max_model_len if spec.kv_tokens is None else spec.kv_tokens
    if kv_tokens < 1:
        raise BadCheckpoint(f"model {spec.name!r}: kv_tokens = {kv_tokens} is not positive")
    return -(-kv_tokens // tokens_per_page)
