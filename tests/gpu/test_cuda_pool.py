"""The CUDA pool on a real GPU: what the stand-in for the driver can not show."""

from collections.abc import Iterator

import pytest
import torch

from bench._gpu_exact import capture, decode_step
from bench._gpu_models import MemoryModel, checksums_of, fill, plan, shapes
from services.gpu_agent import ceiling
from services.gpu_agent.device import MIB, open_pool
from services.gpu_agent.host_image import HostImage
from services.gpu_agent.pages import PagePool

PAGE = 2 * MIB
NUM_PAGES = 64


@pytest.fixture
def pool() -> Iterator[PagePool]:
    opened = open_pool("cuda", NUM_PAGES * PAGE, PAGE)
    yield opened
    opened.close()


@pytest.fixture
def models(pool: PagePool) -> Iterator[list[MemoryModel]]:
    """Two tiny models with pinned images, swapped out."""
    made: list[MemoryModel] = []
    for name in ("llama", "falcon"):
        shape = shapes(tiny=True)[name]
        planned = plan(shape)
        image = HostImage(planned.layout)
        fill(image, shape.seed, pool.torch_device)
        image.checksums = checksums_of(image, pool.page_bytes)
        image.pin(pool)
        made.append(MemoryModel.make(planned, pool, image, "all"))
    yield made
    for model in made:
        model.close()
        model.image.free()


def scribble(pool: PagePool) -> None:
    """Somebody else uses all free pages."""
    pages = pool.free.take(pool.free.num_free)
    for page in pages:
        pool.identity(torch.uint8)[page * PAGE : (page + 1) * PAGE] = 0xAB
    torch.cuda.synchronize()
    pool.free.give(pages)


def logits(model: MemoryModel, num_tokens: int = 24) -> torch.Tensor:
    ids = torch.arange(num_tokens, device="cuda")[None]
    with torch.inference_mode():
        given: torch.Tensor = model.module(input_ids=ids, use_cache=False).logits
    return given.view(torch.uint8).cpu()


def test_pages_keep_their_bytes_through_home_and_region(pool: PagePool) -> None:
    region = pool.reserve(3 * PAGE)
    pages = (5, 1, 9)
    assert pool.free.take(10) == tuple(range(10))
    source = torch.arange(3 * PAGE, dtype=torch.int64).to(torch.uint8)
    region.map(pages)
    region.copy_in(0, source)
    stamp = pool.stamp()
    stamp.wait()
    assert torch.equal(region.tensor.cpu(), source)
    assert torch.equal(region.read(PAGE, PAGE), source[PAGE : 2 * PAGE])
    assert region.unmap() == pages
    home = pool.identity(torch.uint8)
    assert torch.equal(home[9 * PAGE : 10 * PAGE].cpu(), source[2 * PAGE :])
    region.release()


def test_swaps_change_no_bit_and_no_address(pool: PagePool, models: list[MemoryModel]) -> None:
    expected: dict[str, torch.Tensor] = {}
    addresses = [[p.data_ptr() for p in model.module.parameters()] for model in models]
    for _ in range(5):
        for model in models:
            model.swap_in()
            found = logits(model)
            assert torch.equal(found, expected.setdefault(model.spec.name, found))
            model.swap_out()
            scribble(pool)
    assert addresses == [[p.data_ptr() for p in model.module.parameters()] for model in models]
    pool.free.validate()


def test_a_forward_waits_for_each_layer(pool: PagePool, models: list[MemoryModel]) -> None:
    for model in models:
        model.swap_in()
        expected = logits(model)
        for _ in range(5):
            model.swap_out()
            scribble(pool)
            model.begin_swap_in()
            assert torch.equal(logits(model), expected)
            model.end_swap_in()
        model.swap_out()


def test_a_swap_in_that_is_called_off_leaves_good_pages(
    pool: PagePool, models: list[MemoryModel]
) -> None:
    model = models[0]
    model.swap_in()
    expected = logits(model)
    model.swap_out()
    for _ in range(5):
        scribble(pool)
        model.begin_swap_in()
        model.call_off_swap_in()
        kept = model.cached_bytes
        assert model.swap_in().kept_bytes >= kept - PAGE
        assert torch.equal(logits(model), expected)
        model.swap_out()


def test_a_graph_survives_swaps(pool: PagePool, models: list[MemoryModel]) -> None:
    model, other = models
    model.swap_in()
    replay = capture(decode_step(model, pool.torch_device))
    expected = replay().clone()
    for _ in range(10):
        model.swap_out()
        scribble(pool)
        other.swap_in()
        other.swap_out()
        model.swap_in()
        assert torch.equal(replay(), expected)


def test_the_ceiling_is_measured_and_leaves_nothing(pool: PagePool) -> None:
    assert ceiling.measure(pool) > 0
    assert pool.free.num_free == NUM_PAGES
