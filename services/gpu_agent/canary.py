"""A short forward whose output has to come out the same every time, bit for bit."""

import inspect
from typing import Any, Final

import torch
from torch import nn

from services.gpu_agent.checksums import Corruption

_NUM_TOKENS: Final = 8


class Canary:
    """The canary of one model: the first run says what every later one has to give."""

    def __init__(self, module: nn.Module, config: Any, device: torch.device) -> None:
        self._module = module
        self._vocab_size: int = config.get_text_config().vocab_size
        self._device = device
        caches = "use_cache" in inspect.signature(module.forward).parameters
        self._options = {"use_cache": False} if caches else {}
        self._known: torch.Tensor | None = None
        self.is_new = True  # no whole model has repeated it yet

    @property
    def has_run(self) -> bool:
        return self._known is not None

    def forget(self) -> None:
        """The weights are read anew: what was known may be of bad ones."""
        self._known, self.is_new = None, True

    def run(self) -> None:
        """Run and remember. Raises whatever the forward does."""
        self._known = self._forward()

    def check(self, model: str) -> None:
        """Run again and compare, where there is something to compare with. Raises Corruption."""
        found = self._forward()
        if self._known is not None and not torch.equal(self._known, found):
            raise Corruption(
                "canary",
                f"model {model!r}: the same forward gave another output than before: faulty memory "
                "or device; the model is loaded from its files again",
            )
        self._known, self.is_new = found, False

    def _forward(self) -> torch.Tensor:
        """Logits, or hidden states where it embeds, as bytes: so NaN equals NaN."""
        ids = torch.arange(_NUM_TOKENS, device=self._device)[None] % self._vocab_size
        with torch.inference_mode():
            output: torch.Tensor = self._module(input_ids=ids, **self._options)[0]
        return output.contiguous().view(torch.uint8).cpu()
