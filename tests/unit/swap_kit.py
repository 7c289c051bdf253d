"""What the tests of swapping share: models of many pages, and copies in step with a forward."""

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from transformers import FalconConfig, LlamaConfig, Qwen2Config

from schemas.state import ModelSpec
from services.gpu_agent.arrival import Arrival
from services.gpu_agent.hosted import HostedModel
from services.gpu_agent.pages import PagePool
from services.gpu_agent.transfer import Transfer, Verify
from tests.unit import tiny_models

PATIENCE_S: Final = 60.0

_LLAMA_LIKE: Final = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1024,
    "max_position_embeddings": tiny_models.MAX_LEN,
}
_FALCON: Final = {
    "vocab_size": 6144,
    "hidden_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "max_position_embeddings": tiny_models.MAX_LEN,
    "multi_query": True,
    "alibi": False,
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Weights of 16, 12 and 11 pages of 2 MiB.
LARGER: Final[dict[str, tuple[torch.dtype, Callable[[], Any]]]] = {
    "large_llama": (torch.float32, lambda: LlamaConfig(**{**_LLAMA_LIKE, "num_hidden_layers": 6})),
    "large_falcon": (torch.bfloat16, lambda: FalconConfig(**_FALCON)),
    "large_qwen2": (torch.float32, lambda: Qwen2Config(**{**_LLAMA_LIKE, "vocab_size": 3000})),
}


# Weights of 8 pages, and the byte tokenizer's vocabulary.
DEEP: Final = "deep_llama"
_FAMILIES: Final = {
    **LARGER,
    DEEP: (torch.float32, lambda: LlamaConfig(**{**_LLAMA_LIKE, "vocab_size": 256})),
}


def no_progress(_done: int, _total: int) -> None:
    pass


def write(folder: Path, family: str) -> Path:
    """The checkpoint of a tiny or a larger ``family``."""
    with pytest.MonkeyPatch.context() as patch:
        for name, config in _FAMILIES.items():
            patch.setitem(tiny_models.FAMILIES, name, config)
        return tiny_models.write(folder / family, family)


def load(folder: Path, pool: PagePool, family: str, verify: Verify = "sampled") -> HostedModel:
    """``family``, registered and loaded."""
    model = HostedModel.inspect(ModelSpec(family, str(write(folder, family))), pool, verify)
    model.load(no_progress)
    return model


def scribble(pool: PagePool, pages: tuple[int, ...]) -> None:
    """Somebody else writes to ``pages``, which are taken."""
    memory = pool.identity(torch.uint8)
    for page in pages:
        memory[page * pool.page_bytes : (page + 1) * pool.page_bytes] = 0xAB


def leave_only(pool: PagePool, num_pages: int, chance: random.Random) -> list[int]:
    """Overwrite all free pages and let random ``num_pages`` be free; returns the others."""
    taken = pool.free.take(pool.free.num_free)
    scribble(pool, taken)
    pages = chance.sample(taken, len(taken))
    pool.free.give(pages[:num_pages])
    return pages[num_pages:]


class InStep:
    """Copies every piece only once a forward waits for it, so that all guards have to hold.

    Give ``interrupted`` to the swap-in; `let_go` copies the rest.
    """

    def __init__(self, patch: pytest.MonkeyPatch, pool: PagePool) -> None:
        pool.link_bytes_per_s = 1e15  # one thread, so the pieces are copied in order
        self.num_waits = 0  # guards that had to wait
        self._given = self._used = 0
        self._may_copy = threading.Semaphore(0)
        copy, wait_for = Transfer._copy_piece, Arrival.wait_for

        def copy_when_wanted(transfer: Transfer, number: int) -> int:
            assert self._may_copy.acquire(timeout=PATIENCE_S)
            self._used += 1
            return copy(transfer, number)

        def counting(arrival: Arrival, end: int) -> None:
            self.num_waits += arrival.watermark < end
            wait_for(arrival, end)

        patch.setattr(Transfer, "_copy_piece", copy_when_wanted)
        patch.setattr(Arrival, "wait_for", counting)

    def interrupted(self) -> bool:
        """Asked while a forward waits."""
        if self._given == self._used:
            self.one_more()
        return False

    def one_more(self) -> None:
        self._given += 1
        self._may_copy.release()

    def let_go(self) -> None:
        self._may_copy.release(10_000)


def noting(event: threading.Event) -> Callable[[], bool]:
    """An ``interrupted`` that never interrupts: ``event`` tells that it was asked."""

    def interrupted() -> bool:
        event.set()
        return False

    return interrupted


def num_hooks(module: torch.nn.Module) -> int:
    return sum(len(part._forward_pre_hooks) for part in module.modules())
