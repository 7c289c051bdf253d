"""What a module does, found out by running one token through it without weights.

Config arithmetic can not tell it: how many KV heads of what size each layer really caches
differs by architecture (Falcon 40B caches its 8 KV heads broadcast to 128), and so does the
order in which weights are used. A forward on torch's meta device computes shapes only, so it
costs milliseconds at any size.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from schemas.state import ModelSpec
from services.gpu_agent.checkpoint import BadCheckpoint
from services.gpu_agent.host_image import Weight


@dataclass(frozen=True)
class KVGeometry:
    """What one token of context keeps, per layer: K and V of (num_kv_heads, head_dim) each."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    sliding_windows: tuple[int | None, ...]  # per layer; None: attends to all that is kept

    @property
    def bytes_per_token(self) -> int:
        """K and V of all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class Examined:
    """What the meta module told. ``weights`` are in execution order."""

    geometry: KVGeometry
    weights: tuple[Weight, ...]
    num_parameters: int


class _RecordingCache(DynamicCache):  # type: ignore[misc]
    """Keeps nothing but the shapes that every layer would cache."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen[layer_idx] = (key_states, value_states)
        return key_states, value_states


def examine(module: nn.Module, config: Any, spec: ModelSpec) -> Examined:
    """Push one token through the meta module and see what it does. Raises BadCheckpoint."""
    ran: dict[str, int] = {}  # module name -> when it first ran

    def note(name: str) -> None:
        ran.setdefault(name, len(ran))

    hooks = [
        part.register_forward_pre_hook(lambda _part, _args, name=name: note(name))
        for name, part in module.named_modules()
    ]
    try:
        cache = _RecordingCache(config)
        with torch.no_grad(), torch.device("meta"), _experts_without_values(config):
            module(
                input_ids=torch.zeros((1, 1), dtype=torch.long),
                past_key_values=cache,
                use_cache=True,
            )
        geometry = _geometry(cache, spec)
    except BadCheckpoint:
        raise
    except Exception as error:  # any modelling code may run here
        raise BadCheckpoint(
            f"model {spec.name!r}: {type(module).__name__} is not supported: a trial run without "
            f"weights failed: {type(error).__name__}: {error}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    weights = _in_order(module, ran)
    num_parameters = sum(parameter.numel() for parameter in module.parameters())
    return Examined(geometry, weights, num_parameters)


@contextmanager
def _experts_without_values(config: Any) -> Iterator[None]:
    """Run mixtures of experts in the one way that asks for no values and takes any dtype."""
    chosen = getattr(config, "_experts_implementation", None)
    if chosen is None:
        yield
        return
    config._experts_implementation = "batched_mm"
    try:
        yield
    finally:
        config._experts_implementation = chosen


def _geometry(cache: _RecordingCache, spec: ModelSpec) -> KVGeometry:
    shapes = {
        (k.shape[1], k.shape[3], v.shape[1], v.shape[3], k.dtype) for k, v in cache.seen.values()
    }
    if sorted(cache.seen) != list(range(len(cache.layers))) or len(shapes) != 1:
        raise BadCheckpoint(
            f"model {spec.name!r}: {len(cache.layers)} layers cache {len(shapes)} kinds of K and V "
            f"in layers {sorted(cache.seen)}: only models whose layers all cache the same are "
            "supported"
        )
    k_heads, k_dim, v_heads, v_dim, dtype = shapes.pop()
    if (k_heads, k_dim) != (v_heads, v_dim):
        raise BadCheckpoint(
            f"model {spec.name!r}: K of {k_heads}x{k_dim} and V of {v_heads}x{v_dim} differ, which "
            "is not supported"
        )
    windows = tuple(
        int(layer.sliding_window) if getattr(layer, "is_sliding", False) else None
        for layer in cache.layers
    )
    return KVGeometry(len(windows), k_heads, k_dim, dtype, windows)


def _in_order(module: nn.Module, ran: dict[str, int]) -> tuple[Weight, ...]:
    """All weights by the first use of their group; inside a group as the module lists them."""
    head = getattr(module, "get_output_embeddings", lambda: None)()
    first_layer = min((at for name, at in ran.items() if _layer_of(name)), default=math.inf)

    def used_at(owner: str) -> float:
        return ran.get(owner, math.inf)

    def group_of(name: str, owner: str) -> str:
        if layer := _layer_of(name):
            return layer
        if used_at(owner) < first_layer:
            return "embed"
        return "head" if module.get_submodule(owner) is head else "norm"

    places: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for name, tensor in stored_tensors(module):
        places.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    found: list[tuple[str, Weight]] = []
    for key, (name, *aliases) in places.items():
        owner = name.rpartition(".")[0]
        tensor = tensors[key]
        group = group_of(name, owner)
        found.append(
            (owner, Weight(name, group, tuple(tensor.shape), tensor.dtype, tuple(aliases)))
        )
    begins: dict[str, float] = {}
    for owner, weight in found:
        begins[weight.group] = min(begins.get(weight.group, math.inf), used_at(owner))
    # The sort is stable; the group's name keeps groups together that never ran.
    found.sort(key=lambda item: (begins[item[1].group], item[1].group))
    return tuple(weight for _, weight in found)


def _layer_of(name: str) -> str:
    """Name the group: "layer.3" for "model.layers.3.mlp.up_proj"; "" for what is in no layer."""
    number = next((part for part in name.split(".") if part.isdecimal()), None)
    return "" if number is None else f"layer.{number}"


def stored_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers: what a checkpoint holds. Tied ones once per name."""
    yield from module.named_parameters(remove_duplicate=False)
    for name, buffer in module.named_buffers(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        if leaf not in module.get_submodule(owner)._non_persistent_buffers_set:
            yield name, buffer
