"""A model without its weights: the transformers module, built and made ready for them.

The module is built on torch's meta device (shapes only), then made usable in two steps:

    build -> examine -> make_buffers_real -> bind
             |          |                    `- parameters become views over the device region,
             |          |                       once; they survive every swap
             |          `- rotary tables and the like: small, computed, never swapped
             `- see probe.py
"""

import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from schemas.state import ModelSpec
from services.gpu_agent.checkpoint import BadCheckpoint
from services.gpu_agent.host_image import Layout
from services.gpu_agent.probe import KVGeometry, stored_tensors

__all__ = ["KVGeometry", "bind", "build", "choose_dtype", "make_buffers_real", "read_config"]

logger = logging.getLogger(__name__)

_DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


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


# -- making it real ----------------------------------------------------------------------


def make_buffers_real(module: nn.Module, device: torch.device, spec: ModelSpec) -> None:
    """Compute all non-persistent buffers on ``device``, as ``from_pretrained`` does.

    Raises BadCheckpoint where the modelling code leaves one unset.
    """
    for _, tensor in stored_tensors(module):
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
