"""The machinery of a trial run without values: what is cached, what is used when, and by whom.

See probe.py, which runs it and reads it.
"""

from collections.abc import Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicCache

# What a module's own dictionary holds that does not tell its kind.
_NO_SETTING: Final = frozenset({*vars(nn.Module()), "layer_idx", "_is_hf_initialized"})
_PLAIN: Final = (int, float, str, type(None), torch.dtype)  # a bool is an int


class RecordingCache(DynamicCache):  # type: ignore[misc]
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


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation, and notes when guards begin and weights are first used, in ticks.

    Weights are known by their storage, which views and ``.data`` share with them.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages = frozenset(map(storage_of, tensors))
        self._now = 0
        self.begins: dict[str, int] = {"": 0}  # dotted name of a module
        self.uses: dict[int, int] = {}  # storage of a weight
        self.used: set[int] = set()  # storages used since somebody emptied this

    def begin(self, name: str) -> None:
        self._now += 1
        self.begins.setdefault(name, self._now)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self._now += 1
        self._note(args)
        self._note((kwargs or {}).values())
        return func(*args, **(kwargs or {}))

    def _note(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, torch.Tensor):
                if (storage := storage_of(value)) in self._storages:
                    self.uses.setdefault(storage, self._now)
                    self.used.add(storage)
            elif isinstance(value, list | tuple):
                self._note(value)


class Twins:
    """Layers of one kind that are called alike: the first one runs, the others repeat it.

    A layer is repeated only if it caches K and V for itself alone or not at all, uses weights of
    its own only and leaves its arguments as they were.
    """

    def __init__(self, config: Any, cache: RecordingCache, watch: Watch) -> None:
        self._cache = cache
        self._watch = watch
        # What the config lists per layer: sliding or full attention, for example.
        self._per_layer = [
            value
            for value in vars(config.get_text_config()).values()
            if isinstance(value, list | tuple) and len(value) == len(cache.layers)
        ]
        self._kinds: dict[Hashable, int] = {}  # numbered: they are long
        self._answers: dict[Hashable, tuple[Any, ...]] = {}

    @contextmanager
    def joined(self, layer: nn.Module, index: int) -> Iterator[None]:
        """Let ``layer``, number ``index`` of the model, be repeated or repeat another one."""
        kind = self._kinds.setdefault(self._kind(layer, index), len(self._kinds))
        forward, seen = layer.forward, self._cache.seen

        def answer(*args: Any, **kwargs: Any) -> Any:
            given = _outline((args, kwargs))
            if known := self._answers.get((kind, given)):
                output, cached, _ = known
                if cached is not None:
                    seen[index] = cached
                return output
            others = set(seen)
            self._watch.used.clear()
            output = forward(*args, **kwargs)
            own = {storage_of(tensor) for _, tensor in stored_tensors(layer)}
            alone = seen.keys() - others <= {index} and self._watch.used <= own
            if alone and _outline((args, kwargs)) == given:
                # Keeping the arguments keeps their ids, which `given` may hold, theirs.
                self._answers[kind, given] = (output, seen.get(index), (args, kwargs))
            return output

        vars(layer)["forward"] = answer
        try:
            yield
        finally:
            del vars(layer)["forward"]
            if forward != layer.forward:  # it was an attribute of this very object
                vars(layer)["forward"] = forward

    def _kind(self, layer: nn.Module, index: int) -> Hashable:
        """Equal for layers that compute alike."""
        return tuple(_outline(listed[index]) for listed in self._per_layer), _settings(layer)


def _settings(part: nn.Module) -> Hashable:
    """Classes, settings and shapes of ``part``, all the way down."""
    return (
        type(part),
        tuple([(key, _outline(v)) for key, v in vars(part).items() if key not in _NO_SETTING]),
        tuple([(leaf, _outline(v)) for leaf, v in part._parameters.items()]),
        tuple([(leaf, _outline(v)) for leaf, v in part._buffers.items()]),
        tuple([(name, None if m is None else _settings(m)) for name, m in part._modules.items()]),
    )


def _outline(value: Any) -> Hashable:
    """Equal for values that a forward without values can not tell apart."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, value.device
    if isinstance(value, list | tuple):
        return type(value), *map(_outline, value)
    if isinstance(value, dict):
        return dict, *((key, _outline(item)) for key, item in value.items())
    if isinstance(value, partial):
        return partial, *map(_outline, (value.func, value.args, value.keywords))
    return object, id(value)


@contextmanager
def without_values(module: nn.Module, config: Any) -> Iterator[None]:
    """Let nothing ask for values, which do not exist on the meta device.

    Mixtures of experts have one way to run that asks for none and takes any dtype. Dynamic rope
    asks for the largest position, to leave its tables alone up to max_position_embeddings.
    """
    with ExitStack() as stack:
        experts = getattr(config, "_experts_implementation", None)
        if experts is not None:
            config._experts_implementation = "batched_mm"
            stack.callback(setattr, config, "_experts_implementation", experts)
        for part in module.modules():
            if vars(part).get("rope_type") == "dynamic":
                vars(part)["rope_type"] = "default"
                stack.callback(setattr, part, "rope_type", "dynamic")
        yield


def stored_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers: what a checkpoint holds. Tied ones once per name."""
    for prefix, part in module.named_modules(remove_duplicate=False):
        dot = "." if prefix else ""
        for leaf, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None and leaf not in part._non_persistent_buffers_set:
                yield f"{prefix}{dot}{leaf}", tensor


def storage_of(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
