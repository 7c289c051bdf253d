"""What the parts of a GPU run work on: host images that stay, one pool, one pair of models.

images   llama | mistral | falcon     made at first use, pinned by a pool that outlives the rest
pool     1.3 x the larger of a pair   so one of a pair fits, and a switch is a switch
"""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import torch

from bench._gpu_models import MemoryModel, Planned, Shape, make_image, plan, shapes
from bench._gpu_report import Part
from services.gpu_agent import ceiling
from services.gpu_agent.device_cuda import CudaPool
from services.gpu_agent.host_image import HostImage
from services.gpu_agent.pages import PagePool
from services.gpu_agent.transfer import Verify

OpenPool: TypeAlias = Callable[[int, int], PagePool]  # (num_pages, page_bytes)

MIB: Final = 2**20
OF_THE_LARGER: Final = 1.3


@dataclass(frozen=True)
class Sizes:
    """How much of everything: a GPU's worth, or a dry run's."""

    page_bytes: int = 32 * MIB
    sweep: tuple[int, ...] = (16 * MIB, 32 * MIB, 64 * MIB)
    prompts: tuple[int, ...] = (128, 2048)
    rounds: int = 5
    decode_tokens: int = 64
    decode_rounds: int = 3
    num_graph_swaps: int = 100
    num_random_swaps: int = 30


DRY: Final = Sizes(
    page_bytes=2 * MIB,
    sweep=(2 * MIB, 4 * MIB),
    prompts=(16, 48),
    rounds=2,
    decode_tokens=3,
    decode_rounds=1,
    num_graph_swaps=6,
    num_random_swaps=4,
)


# -- counting the driver's calls -------------------------------------------------------------


@dataclass
class Calls:
    """The driver's calls inside one `Counting.window`."""

    num: Counter[str] = field(default_factory=Counter)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    copied: Counter[str] = field(default_factory=Counter)  # bytes

    def add(self, more: "Calls") -> None:
        self.num.update(more.num)
        self.copied.update(more.copied)
        for name, seconds in more.seconds.items():
            self.seconds[name] += seconds

    def matching(self, *words: str) -> int:
        """Calls whose name holds one of ``words``."""
        return sum(n for name, n in self.num.items() if any(word in name for word in words))


class Counting:
    """A driver module that counts its calls; everything else is passed through."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._lock = threading.Lock()
        self._windows: list[Calls] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._driver, name)
        if not (name.startswith("cu") and callable(found)):
            self.__dict__[name] = found
            return found

        def counted(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return found(*arguments)
            finally:
                took = time.perf_counter() - began
                with self._lock:
                    for calls in self._windows:
                        calls.num[name] += 1
                        calls.seconds[name] += took
                        if name.startswith("cuMemcpy"):
                            calls.copied[name] += arguments[2]

        self.__dict__[name] = counted
        return counted

    @contextmanager
    def window(self) -> Iterator[Calls]:
        """Count the calls of all threads while open."""
        calls = Calls()
        with self._lock:
            self._windows.append(calls)
        try:
            yield calls
        finally:
            with self._lock:
                self._windows.remove(calls)


# -- the stage -------------------------------------------------------------------------------


class Stage:
    """See the module's picture. Call `pair` (or `alone`) first, then use ``pool``."""

    def __init__(self, open_pool: OpenPool, sizes: Sizes, *, tiny: bool) -> None:
        self.sizes = sizes
        self.shapes = shapes(tiny=tiny)
        self._open_pool = open_pool
        self._kept: PagePool | None = None
        self._images: dict[str, HostImage] = {}
        self._pool: PagePool | None = None
        self._counting: Counting | None = None
        self._models: dict[str, MemoryModel] = {}
        self._page_bytes = 0
        self._ceiling_gb_per_s = 0.0

    @property
    def pool(self) -> PagePool:
        assert self._pool is not None
        return self._pool

    @property
    def _keeper(self) -> PagePool:
        """The pool that pins all images; of one page, and open until the end."""
        self._kept = self._kept or self._open_pool(1, self.sizes.page_bytes)
        return self._kept

    @property
    def is_on_gpu(self) -> bool:
        return self._keeper.torch_device.type == "cuda"

    def image(self, shape: Shape, planned: Planned, part: Part) -> HostImage:
        """Made at first use; stays until `close`."""
        if shape.name not in self._images:
            self._images[shape.name] = make_image(
                shape, planned.layout, self._keeper, self.sizes.page_bytes, part
            )
        return self._images[shape.name]

    def pair(self, part: Part, *names: str) -> list[MemoryModel]:
        """These models, swapped out, on a pool of their own that holds one of them."""
        return self._set(part, names, self.sizes.page_bytes, "sampled")

    def alone(self, part: Part, name: str, page_bytes: int) -> MemoryModel:
        """One model, on pages of that size. Nothing is checked: its checksums are of others."""
        return self._set(part, (name,), page_bytes, "off")[0]

    def _set(
        self, part: Part, names: tuple[str, ...], page_bytes: int, verify: Verify
    ) -> list[MemoryModel]:
        if list(self._models) != list(names) or self._page_bytes != page_bytes:
            self._drop()
            planned = [plan(self.shapes[name]) for name in names]
            images = [self.image(one.shape, one, part) for one in planned]
            most = max(one.num_pages(page_bytes) for one in planned)
            began = time.perf_counter()
            self._pool = self._open_pool(int(OF_THE_LARGER * most), page_bytes)
            part.value("page", page_bytes / MIB, "MiB")
            part.value("open the pool", time.perf_counter() - began, "s")
            part.value("pool", self._pool.budget_bytes / 1e9, "GB")
            if isinstance(self._pool, CudaPool):
                self._counting = Counting(self._pool.call.names)
                self._pool.call.names = self._counting
            self._ceiling_gb_per_s = self._ceiling_gb_per_s or ceiling.measure(self._pool)
            self._pool.ceiling_gb_per_s = self._ceiling_gb_per_s
            self._page_bytes = page_bytes
            for one, image in zip(planned, images, strict=True):
                self._models[one.shape.name] = MemoryModel.make(one, self._pool, image, verify)
        self.only_host()
        return list(self._models.values())

    def _drop(self) -> None:
        if self._pool is not None:
            self.synchronize()
        for model in self._models.values():
            model.close()
        self._models = {}
        if self._pool is not None:
            self._pool.close()
        self._pool = self._counting = None

    def reset(self) -> None:
        """After an error: let go of models and pool, whatever state they are in."""
        for held in (*self._models.values(), self._pool):
            with suppress(Exception):
                if held is not None:
                    held.close()
        self._models, self._pool, self._counting = {}, None, None

    def close(self) -> None:
        self._drop()
        for image in self._images.values():
            image.free()
        self._images = {}
        if self._kept is not None:
            self._kept.close()

    # -- bringing things about -----------------------------------------------------------------

    def only_host(self) -> None:
        """Swap everything out."""
        for model in self._models.values():
            if model.state == "arriving":
                model.call_off_swap_in()
            if model.state == "resident":
                model.swap_out()

    def keep(self, model: MemoryModel, share: float) -> None:
        """All swapped out, with the first ``share`` of ``model`` on the device and no more."""
        self.only_host()
        if share:
            model.swap_in()
            model.swap_out()
        self.keep_pages(int(share * self.pool.pages_for(model.layout.num_bytes)))

    def keep_pages(self, num_pages: int) -> None:
        """Free pages forget what they held, all but those that are worth most."""
        free = self.pool.free
        free.give(free.take(free.num_free - num_pages))

    @contextmanager
    def calls(self) -> Iterator[Calls]:
        """The driver's calls inside; none where there is no driver."""
        if self._counting is None:
            yield Calls()
        else:
            with self._counting.window() as calls:
                yield calls

    def synchronize(self) -> None:
        if self.is_on_gpu:
            torch.cuda.synchronize()

    def logits(self, model: MemoryModel, num_tokens: int, seed: int = 0) -> torch.Tensor:
        """Of a prompt, at its last token, as bytes on the host: equal means bit for bit."""
        ids = prompt(model, num_tokens, seed)
        device = self._keeper.torch_device
        with torch.inference_mode():
            given: torch.Tensor = model.module(
                input_ids=torch.tensor([ids], device=device), use_cache=False, logits_to_keep=1
            ).logits
        return given.contiguous().view(torch.uint8).cpu()


def prompt(model: MemoryModel, num_tokens: int, seed: int = 0) -> tuple[int, ...]:
    """Token ids that differ with ``seed``."""
    vocab_size = int(model.config.vocab_size)
    return tuple((7919 * (i + 1) + 104729 * seed) % vocab_size for i in range(num_tokens))
