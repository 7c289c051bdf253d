"""A model without its weights: the transformers module, its KV geometry, its order of use.

The module is built on torch's meta device (shapes only), then made usable in two steps:

    build -> examine -> make_buffers_real -> bind
             |          |                    `- parameters become views over the device region,
             |          |                       once; they survive every swap
             |          `- rotary tables and the like: small, computed, never swapped
             `- one token through the meta module tells what config arithmetic can not: how many
                KV heads of what size each layer really caches, and which layer runs when
"""

import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from schemas.state import ModelSpec
from services.gpu_agent.checkpoint import BadCheckpoint
from services.gpu_agent.host_image import Layout, Weight

logger = logging.getLogger(__name__)

_DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


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


# -- building ----------------------------------------------------------------------------


def read_config(folder: Path, spec: ModelSpec) -> Any:
    """The transformers config of ``folder``. Raises BadCheckpoint."""
    if not (folder / "config.json").is_file():
        raise BadCheckpoint(f"{folder} holds no config.json: is it a model's folder?")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
    except Exception as error:  # transformers and remote code raise whatever they like
        raise BadCheckpoint(f"{folder / 'config.json'} can not be used: {error}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise BadCheckpoint(
            f"{folder} is quantized, which is not supported yet: use the unquantized checkpoint"
        )
    return config


def choose_dtype(config: Any, spec: ModelSpec, stored: Iterator[torch.dtype]) -> torch.dtype:
    """The dtype to run in: ``spec.dtype``, or for "auto" the config's, or the files'."""
    if spec.dtype != "auto":
        return _DTYPES[spec.dtype]
    named = getattr(config, "dtype", None)
    if isinstance(named, str):
        named = getattr(torch, named.removeprefix("torch."), None)
    if isinstance(named, torch.dtype) and named.is_floating_point:
        return named
    return next((dtype for dtype in stored if dtype.is_floating_point), torch.float32)


def build(config: Any, spec: ModelSpec, dtype: torch.dtype) -> nn.Module:
    """The module on the meta device, in eval mode, without gradients. Raises BadCheckpoint."""
    try:
        module = _from_config(config, spec, dtype)
    except Exception as error:  # any modelling code may run here
        raise BadCheckpoint(
            f"model {spec.name!r}: {type(config).__name__} can not be built as a causal language "
            f"model: {error}"
        ) from error
    _keep_in_float32(module, dtype)
    return module.eval().requires_grad_(False)


def _from_config(config: Any, spec: ModelSpec, dtype: torch.dtype) -> nn.Module:
    options = {"dtype": dtype, "trust_remote_code": spec.trust_remote_code}
    with torch.device("meta"):
        try:
            module = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", **options)
        except ValueError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            logger.warning("%s has no sdpa attention: using eager attention", spec.name)
            module = AutoModelForCausalLM.from_config(
                config, attn_implementation="eager", **options
            )
    return cast(nn.Module, module)


def _keep_in_float32(module: nn.Module, dtype: torch.dtype) -> None:
    """Some architectures keep a few tensors in float32 whatever is asked; so does a load."""
    plan: dict[str, torch.dtype] = getattr(module, "_get_dtype_plan", lambda _: {})(dtype)
    for pattern, kept in plan.items():
        matcher = re.compile(rf"(^|\.){pattern}($|\.)".replace("*", r"\w+"))
        for name, parameter in module.named_parameters():
            if matcher.search(name):
                parameter.data = parameter.data.to(kept)


# -- examining ---------------------------------------------------------------------------


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
    for name, tensor in _stored_tensors(module):
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


def _stored_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers: what a checkpoint holds. Tied ones once per name."""
    yield from module.named_parameters(remove_duplicate=False)
    for name, buffer in module.named_buffers(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        if leaf not in module.get_submodule(owner)._non_persistent_buffers_set:
            yield name, buffer


# -- making it real ----------------------------------------------------------------------


def make_buffers_real(module: nn.Module, device: torch.device, spec: ModelSpec) -> None:
    """Compute all non-persistent buffers on ``device``, as ``from_pretrained`` does.

    Raises BadCheckpoint where the modelling code leaves one unset.
    """
    for _, tensor in _stored_tensors(module):
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # leave weights alone
    made: list[tuple[str, torch.Tensor]] = []
    for owner, part in module.named_modules():
        part.__dict__.pop("_is_hf_initialized", None)
        for leaf in sorted(part._non_persistent_buffers_set):
            buffer = part._buffers[leaf]
            if buffer is not None and buffer.is_meta:
                real = torch.empty_like(buffer, device=device)
                if real.is_floating_point():
                    real.fill_(math.nan)  # shows what nobody sets
                part._buffers[leaf] = real
                made.append((f"{owner}.{leaf}", real))
    cast(Any, module).initialize_weights()
    unset = [name for name, buffer in made if buffer.is_floating_point() and buffer.isnan().any()]
    if unset:
        raise BadCheckpoint(
            f"model {spec.name!r}: {type(module).__name__} does not set its buffer {unset[0]!r} in "
            "_init_weights, so it can not be built without its weights"
        )


def bind(module: nn.Module, layout: Layout, memory: torch.Tensor) -> None:
    """Make every weight a view over ``memory`` (uint8, layout.num_bytes or more); reads nothing.

    Raises BadCheckpoint when anything is left on the meta device.
    """
    for slot in layout:
        parameter = nn.Parameter(slot.view(memory), requires_grad=False)
        for name in (slot.weight.name, *slot.weight.aliases):
            owner, _, leaf = name.rpartition(".")
            part = module.get_submodule(owner)
            if leaf in part._buffers:
                part._buffers[leaf] = parameter.data
            else:
                part._parameters[leaf] = parameter
    left = [
        f"{owner}.{leaf}"
        for owner, part in module.named_modules()
        for leaf, value in (*vars(part).items(), *part._parameters.items(), *part._buffers.items())
        if isinstance(value, torch.Tensor) and value.is_meta
    ]
    if left:
        raise BadCheckpoint(f"{type(module).__name__} keeps {left[0]!r} where it can not be loaded")
