"""A model without its weights: the transformers module, built and made ready for them.

The module is built on torch's meta device (shapes only), then made usable in two steps:

    build -> examine -> make_buffers_real -> bind
             |          |                    `- parameters become views over the device region,
             |          |                       once; they survive every swap
             |          `- rotary tables and the like: small, computed, never swapped
             `- see probe.py
"""

import inspect
import logging
import math
import re
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from schemas.state import ModelSpec, Runner
from services.gpu_agent.attention import use_grouped
from services.gpu_agent.checkpoint import BadCheckpoint
from services.gpu_agent.host_image import Layout
from services.gpu_agent.probe import KVGeometry
from services.gpu_agent.trial import stored_tensors

__all__ = ["KVGeometry", "bind", "build", "choose_dtype", "make_buffers_real", "read_config"]

logger = logging.getLogger(__name__)

_DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_PARTS_OF_EVERY_MODULE: Final = vars(nn.Module()).keys()


# -- building ----------------------------------------------------------------------------


def read_config(folder: Path, spec: ModelSpec) -> Any:
    """The transformers config of ``folder``. Raises BadCheckpoint."""
    if not (folder / "config.json").is_file():
        raise BadCheckpoint(f"{folder} holds no config.json: is it a model's folder?")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
    except Exception as error:  # transformers and remote code raise whatever they like
        raise BadCheckpoint(f"{folder / 'config.json'} can not be used: {error}") from error
    quantized: Any = getattr(config, "quantization_config", None)
    if quantized is not None:
        settings = quantized if isinstance(quantized, dict) else vars(quantized)
        raise BadCheckpoint(
            f"{folder} is quantized ({settings.get('quant_method', 'in some way')}), which is "
            "not supported yet: use the unquantized checkpoint"
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


def build(
    config: Any, spec: ModelSpec, dtype: torch.dtype, runner: Runner = "generate"
) -> nn.Module:
    """The module on the meta device, in eval mode; without a head where it is to embed.

    Raises BadCheckpoint.
    """
    try:
        module = _from_config(config, spec, dtype, runner)
    except Exception as error:  # any modelling code may run here
        raise BadCheckpoint(
            f"model {spec.name!r}: {type(config).__name__} can not be built as "
            f"{'an encoder' if runner == 'embed' else 'a causal language model'}: {error}"
        ) from error
    if runner == "embed":
        _drop_pooler(module)
    use_grouped(module)
    _keep_in_float32(module, dtype)
    return module.eval()


def _drop_pooler(module: nn.Module) -> None:
    """Of Bert and its kin: a layer over the first token, for classifying. Many files lack it."""
    if "add_pooling_layer" in inspect.signature(type(module).__init__).parameters:
        module._modules["pooler"] = None


def _from_config(config: Any, spec: ModelSpec, dtype: torch.dtype, runner: Runner) -> nn.Module:
    auto = AutoModel if runner == "embed" else AutoModelForCausalLM
    options = {"dtype": dtype, "trust_remote_code": spec.trust_remote_code}
    with torch.device("meta"), _no_first_values():
        try:
            module = auto.from_config(config, attn_implementation="sdpa", **options)
        except ValueError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            logger.warning("%s has no sdpa attention: using eager attention", spec.name)
            module = auto.from_config(config, attn_implementation="eager", **options)
    return cast(nn.Module, module)


@contextmanager
def _no_first_values() -> Iterator[None]:
    """Keep linear layers from drawing first values: on the meta device a third of all the time."""
    draw = nn.Linear.reset_parameters
    nn.Linear.reset_parameters = lambda _: None  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Linear.reset_parameters = draw  # type: ignore[method-assign]


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
    made: dict[str, torch.Tensor] = {}
    owners: list[str] = []
    for owner, part in module.named_modules():
        if not part._non_persistent_buffers_set:
            continue
        owners.append(owner)
        real_of: dict[Hashable, torch.Tensor] = {}
        for leaf in sorted(part._non_persistent_buffers_set):
            buffer = part._buffers[leaf]
            if buffer is not None and buffer.is_meta:
                real = torch.empty_like(buffer, device=device)
                if (mark := _mark_of(real)) is not None:
                    real.fill_(mark)  # shows what nobody sets
                part._buffers[leaf] = real
                real_of[_place(buffer)] = real
                made[f"{owner}.{leaf}"] = real
        for name, value in vars(part).items():  # plain attributes that are the buffer as well
            if isinstance(value, torch.Tensor) and value.is_meta and _place(value) in real_of:
                vars(part)[name] = real_of[_place(value)]
    unset = _set_buffers(module, owners, made)
    if unset:
        raise BadCheckpoint(
            f"model {spec.name!r}: {type(module).__name__} does not set its buffer {unset[0]!r} in "
            "_init_weights, so it can not be built without its weights"
        )


def _set_buffers(module: nn.Module, owners: list[str], made: dict[str, torch.Tensor]) -> list[str]:
    """Have the modelling code compute the buffers ``made``; returns the names of those it left.

    The parts that own buffers and those around them are asked first, because asking hundreds
    of linear layers takes longer. All are asked where that leaves a mark, or could not show one.
    """
    near = {owner[:end] for owner in owners for end in (0, len(owner), *_dots(owner))}
    shows = all(_mark_of(buffer) is not None for buffer in made.values())
    unset: list[str] = []
    for asked in [near, None] if shows else [None]:
        for name, part in module.named_modules():
            vars(part)["_is_hf_initialized"] = asked is not None and name not in asked
        cast(Any, module).initialize_weights()
        unset = [name for name, buffer in made.items() if _has_mark(buffer)]
        if not unset:
            break
    return unset


def _mark_of(buffer: torch.Tensor) -> float | None:
    """What no buffer holds once it is set; None where every value may be meant."""
    if buffer.is_floating_point():
        return math.nan
    return None if buffer.dtype in (torch.bool, torch.uint8) else torch.iinfo(buffer.dtype).min


def _has_mark(buffer: torch.Tensor) -> bool:
    if buffer.is_floating_point():
        return bool(buffer.isnan().any())
    mark = _mark_of(buffer)
    return mark is not None and bool((buffer == mark).any())


def _dots(name: str) -> list[int]:
    return [at for at, letter in enumerate(name) if letter == "."]


def _place(tensor: torch.Tensor) -> Hashable:
    """Equal for tensors that are the same memory seen in the same way."""
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def bind(module: nn.Module, layout: Layout, memory: torch.Tensor) -> None:
    """Make every weight a view over ``memory`` (uint8, layout.num_bytes or more); reads nothing.

    Parameters are made anew, without gradients. Raises BadCheckpoint when anything is left on
    the meta device.
    """
    parts = dict(module.named_modules(remove_duplicate=False))
    for slot in layout:
        parameter = nn.Parameter(slot.view(memory), requires_grad=False)
        for name in (slot.weight.name, *slot.weight.aliases):
            owner, _, leaf = name.rpartition(".")
            part = parts[owner]
            if leaf in part._buffers:
                part._buffers[leaf] = parameter.data
            else:
                part._parameters[leaf] = parameter
    for owner, part in parts.items():
        own = {leaf: vars(part)[leaf] for leaf in vars(part).keys() - _PARTS_OF_EVERY_MODULE}
        for held in (own, part._parameters, part._buffers):
            for leaf, value in held.items():
                if isinstance(value, torch.Tensor) and value.is_meta:
                    raise BadCheckpoint(
                        f"{type(module).__name__} keeps {f'{owner}.{leaf}'!r} where it can not be "
                        "loaded"
                    )
