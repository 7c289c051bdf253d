"""What a module does, found out by running one token through it without weights.

Config arithmetic can not tell it: how many KV heads of what size each layer really caches
differs by architecture (Falcon 40B caches its 8 KV heads broadcast to 128), and so does the
order in which weights are used. A forward on torch's meta device computes shapes only, so it
costs milliseconds at any size. One layer of each kind runs; its twins answer as it did:

    embed -> layer.0 -> layer.1 -> ... -> layer.31 -> norm -> head
             runs       `- same kind, same inputs: returns and caches what layer.0 did
"""

import logging
import math
import re
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from schemas.state import ModelSpec, Runner
from services.gpu_agent.checkpoint import BadCheckpoint
from services.gpu_agent.host_image import Weight
from services.gpu_agent.trial import (
    RecordingCache,
    Twins,
    Watch,
    storage_of,
    stored_tensors,
    without_values,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KVGeometry:
    """What one token of context keeps, per layer: K and V of (num_kv_heads, head_dim) each.

    No layers where nothing is kept, as in a model that embeds.
    """

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
    """What the meta module told. ``weights`` are in execution order.

    ``guards``: the name of every weight -> the dotted name of the module whose forward begins
    before anything uses the weight. That is its layer; outside of layers the module that owns
    it; and the root module, "", where the trial run saw an earlier use.
    """

    geometry: KVGeometry
    weights: tuple[Weight, ...]
    num_parameters: int
    guards: dict[str, str]
    width: int = 0  # of the output's last dimension: the vocabulary, or a hidden state


def examine(
    module: nn.Module,
    config: Any,
    spec: ModelSpec,
    runner: Runner = "generate",
    *,
    shorten: bool = True,
) -> Examined:
    """Push one token through the meta module and see what it does. Raises BadCheckpoint.

    ``shorten``: run one layer of each kind, and all of them only where that fails.
    """
    if shorten:
        try:
            return _examine(module, config, spec, runner, shorten=True)
        except Exception as error:  # any modelling code may run here
            logger.debug("model %s: all layers must run: %r", spec.name, error)
    try:
        return _examine(module, config, spec, runner, shorten=False)
    except BadCheckpoint:
        raise
    except Exception as error:
        raise BadCheckpoint(
            f"model {spec.name!r}: {type(module).__name__} is not supported: a trial run without "
            f"weights failed: {type(error).__name__}: {error}"
        ) from error


def _examine(
    module: nn.Module, config: Any, spec: ModelSpec, runner: Runner, *, shorten: bool
) -> Examined:
    found = _find_stored(module)
    # A model that embeds forgets its keys and values within the forward, if it tells of them.
    cache = RecordingCache(config)
    caching = {"past_key_values": cache, "use_cache": True} if runner == "generate" else {}
    watch = Watch(stored.tensor for stored in found)
    twins = Twins(config, cache, watch)
    with ExitStack() as stack:
        for name in dict.fromkeys(guard for stored in found for guard in stored.guards):
            part = module.get_submodule(name)
            hook = part.register_forward_pre_hook(lambda *_, name=name: watch.begin(name))
            stack.callback(hook.remove)
            if shorten and _layer_of(name):
                stack.enter_context(twins.joined(part, int(name.rpartition(".")[2])))
        stack.enter_context(without_values(module, config))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.device("meta"))
        stack.enter_context(watch)
        output = module(input_ids=torch.zeros((1, 1), dtype=torch.long), **caching)
    weights, guards = _in_order(module, found, watch)
    num_parameters = sum(
        stored.tensor.numel() for stored in found if isinstance(stored.tensor, nn.Parameter)
    )
    geometry = _geometry(cache, spec) if caching else KVGeometry(0, 0, 0, torch.float32, ())
    return Examined(geometry, weights, num_parameters, guards, output[0].shape[-1])


# -- what it told ------------------------------------------------------------------------


def _geometry(cache: RecordingCache, spec: ModelSpec) -> KVGeometry:
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


@dataclass(frozen=True)
class _Stored:
    """One tensor that the module needs, its names, and for each name what might guard it."""

    tensor: torch.Tensor
    names: tuple[str, ...]
    guards: tuple[str, ...]


def _find_stored(module: nn.Module) -> list[_Stored]:
    names: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for name, tensor in stored_tensors(module):
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    return [
        _Stored(tensors[key], tuple(of_one), tuple(map(_guard_of, of_one)))
        for key, of_one in names.items()
    ]


def _in_order(
    module: nn.Module, found: list[_Stored], watch: Watch
) -> tuple[tuple[Weight, ...], dict[str, str]]:
    """All weights by the first use of their group, inside a group as listed; their guards."""
    head = getattr(module, "get_output_embeddings", lambda: None)()
    guards: dict[str, str] = {}
    begun: dict[str, float] = {}  # name of a weight -> when it was used, or its guard began
    for stored in found:
        use = watch.uses.get(storage_of(stored.tensor), math.inf)
        begin, guard = min((watch.begins.get(name, math.inf), name) for name in stored.guards)
        guards[stored.names[0]] = guard if begin < use else ""
        begun[stored.names[0]] = min(begin, use)
    first_layer = min(
        (begun[stored.names[0]] for stored in found if _layer_of(stored.guards[0])),
        default=math.inf,
    )

    def group_of(stored: _Stored) -> str:
        if layer := _layer_of(stored.guards[0]):
            return layer
        if begun[stored.names[0]] < first_layer:
            return "embed"
        return "head" if module.get_submodule(stored.guards[0]) is head else "norm"

    weights = [
        Weight(
            stored.names[0],
            group_of(stored),
            tuple(stored.tensor.shape),
            stored.tensor.dtype,
            stored.names[1:],
        )
        for stored in found
    ]
    group_begun: dict[str, float] = {}
    for weight in weights:
        group_begun[weight.group] = min(group_begun.get(weight.group, math.inf), begun[weight.name])
    # The sort is stable; the group's name keeps groups together that never ran.
    weights.sort(key=lambda weight: (group_begun[weight.group], weight.group))
    return tuple(weights), guards


def _guard_of(name: str) -> str:
    """Name "model.layers.3" for a weight of that layer; outside of layers the weight's owner."""
    owner = name.rpartition(".")[0]
    numbered = re.match(r"(.+?\.)?\d+(?=\.|$)", owner)
    return numbered.group() if numbered else owner


def _layer_of(guard: str) -> str:
    """Name the group: "layer.3" for the guard "model.layers.3"; "" for what is no layer."""
    number = guard.rpartition(".")[2]
    return f"layer.{number}" if number.isdecimal() else ""
