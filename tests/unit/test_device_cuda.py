"""The CUDA pool against a recording stand-in for the driver. No GPU is involved."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from schemas.state import ModelSpec
from services.gpu_agent import device, device_cpu
from services.gpu_agent.device_cuda import CudaPool
from services.gpu_agent.hosted import HostedModel
from services.gpu_agent.pages import DeviceError
from services.gpu_agent.transfer import Verify
from tests.unit import tiny_models
from tests.unit.fake_driver import GRANULARITY, FakeDriver, Result
from tests.unit.swap_kit import InStep, load

PAGE = 2 * GRANULARITY
OpenPool = Callable[..., CudaPool]


@pytest.fixture
def driver() -> Iterator[FakeDriver]:
    fake = FakeDriver(64 * PAGE)
    yield fake
    fake.close()


@pytest.fixture
def open_pool(driver: FakeDriver) -> OpenPool:
    def mapped_tensor_at(address: int, num_bytes: int) -> torch.Tensor:
        """As torch does, refuse an address that the driver knows no device for."""
        assert driver.mappings[address].accessible
        return device_cpu._tensor_at(address, num_bytes)

    def make(num_pages: int = 8, page_bytes: int = PAGE) -> CudaPool:
        return CudaPool(
            driver,
            num_pages,
            page_bytes,
            0,
            device_name="fake",
            torch_device=torch.device("cpu"),
            compute_stream=lambda: 9,
            tensor_at=mapped_tensor_at,
        )

    return make


def scribble(pool: CudaPool) -> None:
    """Somebody else uses all free pages."""
    pages = pool.free.take(pool.free.num_free)
    for page in pages:
        size = pool.page_bytes
        pool.identity(torch.uint8)[page * size : (page + 1) * size] = 0xAB
    pool.free.give(pages)


def test_every_page_is_created_once_and_mapped_in_the_identity_view(
    driver: FakeDriver, open_pool: OpenPool
) -> None:
    pool = open_pool()
    assert driver.count("cuMemCreate") == 8
    assert driver.count("cuMemMap") == 8
    assert driver.count("cuMemSetAccess") == 1
    reserve = next(arguments for name, arguments in driver.calls if name == "cuMemAddressReserve")
    assert reserve == (8 * PAGE, 0, 0, 0)
    pool.identity(torch.float32)[3 * PAGE // 4] = 2.0
    pool.close()
    assert (driver.pages, driver.ranges, driver.mappings, driver.contexts) == ({}, {}, {}, 0)
    assert driver.count("cuMemCreate") == driver.count("cuMemRelease")


def test_a_region_is_a_second_view_of_the_same_pages(
    driver: FakeDriver, open_pool: OpenPool
) -> None:
    pool = open_pool()
    region = pool.reserve(3 * PAGE - 1)
    driver.calls.clear()
    region.map((6, 1, 2))
    assert driver.names() == [
        *["cuMemMap"] * 3,
        "cuMemSetAccess",
        "cuEventRecord",  # copies wait for what computes
        "cuStreamWaitEvent",
    ]
    assert driver.calls[4][1][1] == 9  # recorded on the compute stream
    assert driver.calls[5][1][0] == 5  # the copy stream waits
    region.tensor[PAGE] = 7
    assert int(pool.identity(torch.uint8)[PAGE]) == 7
    driver.calls.clear()
    assert region.unmap() == (6, 1, 2)
    assert driver.names() == ["cuStreamSynchronize", "cuMemUnmap"]
    assert driver.calls[0][1][0] == 9
    region.release()
    pool.close()
    assert (driver.ranges, driver.events) == ({}, 0)


def test_a_hosted_model_runs_over_it(
    driver: FakeDriver, open_pool: OpenPool, tmp_path: Path
) -> None:
    pool = open_pool()
    model = HostedModel.inspect(
        ModelSpec("m", str(tiny_models.write(tmp_path / "m", "llama"))), pool
    )
    model.load(lambda _done, _total: None)
    assert sorted(driver.pinned.values()) == sorted([PAGE, model.layout.num_bytes])
    ids = tiny_models.prompt()
    expected = tiny_models.logits(tiny_models.reference(model.folder), ids)
    for _ in range(3):
        trace = model.swap_in()
        assert torch.equal(tiny_models.logits(model.module, ids), expected)
        assert [layer.copy_s for layer in trace.layers] == [0.0025] * len(model.layout.groups)
        model.swap_out()
        scribble(pool)
    assert len(driver.pinned) == 2
    model.close()
    pool.close()
    assert (driver.pinned, driver.mappings, driver.ranges) == ({}, {}, {})


@pytest.mark.parametrize(
    ("call", "story"),
    [
        ("cuInit", r"cuInit \(start\)"),
        ("cuDevicePrimaryCtxRetain", r"cuDevicePrimaryCtxRetain \(GPU 0\)"),
        ("cuMemCreate", rf"cuMemCreate \(page 1 of 8, {PAGE} bytes\).*lower the budget"),
        ("cuMemAddressReserve", rf"cuMemAddressReserve \({8 * PAGE} bytes\)"),
        ("cuMemMap", rf"cuMemMap \(page 1 at byte {PAGE} of {8 * PAGE}, {PAGE} bytes\)"),
        ("cuMemSetAccess", rf"cuMemSetAccess \({8 * PAGE} bytes\)"),
        ("cuStreamCreate", r"cuStreamCreate \(copy stream\)"),
    ],
)
def test_a_failure_at_start_is_named_and_leaves_nothing(
    driver: FakeDriver, open_pool: OpenPool, call: str, story: str
) -> None:
    nth = 2 if call in {"cuMemCreate", "cuMemMap"} else 1
    driver.fail[call] = (nth, Result.CUDA_ERROR_OUT_OF_MEMORY)
    with pytest.raises(DeviceError, match=story) as caught:
        open_pool()
    assert "CUDA_ERROR_OUT_OF_MEMORY (out of memory)" in str(caught.value)
    assert (driver.pages, driver.ranges, driver.mappings, driver.contexts) == ({}, {}, {}, 0)


def test_a_failed_map_unmaps_what_was_mapped(driver: FakeDriver, open_pool: OpenPool) -> None:
    pool = open_pool()
    region = pool.reserve(3 * PAGE)
    before = dict(driver.mappings)
    driver.fail["cuMemMap"] = (driver.count("cuMemMap") + 3, Result.CUDA_ERROR_INVALID_VALUE)
    with pytest.raises(DeviceError, match=rf"cuMemMap \(page 5 at byte {2 * PAGE} of {3 * PAGE}"):
        region.map((3, 4, 5))
    assert driver.mappings == before
    assert not region.is_mapped
    region.map((3, 4, 5))
    region.unmap()
    pool.close()


def test_a_failed_copy_gives_all_pages_back(
    driver: FakeDriver, open_pool: OpenPool, tmp_path: Path
) -> None:
    pool = open_pool()
    model = HostedModel.inspect(
        ModelSpec("m", str(tiny_models.write(tmp_path / "m", "llama"))), pool
    )
    model.load(lambda _done, _total: None)
    driver.fail["cuMemcpyHtoDAsync"] = (3, Result.CUDA_ERROR_INVALID_CONTEXT)
    with pytest.raises(DeviceError, match=r"cuMemcpyHtoDAsync \(\d+ bytes to byte \d+ of \d+\)"):
        model.swap_in()
    assert (pool.free.num_free, model.state, model.kv_pages) == (8, "host", ())
    model.swap_in()
    model.close()
    pool.close()


# What a swap may call: nothing that creates, reserves, pins or destroys.
ON_THE_SWAP_PATH = {
    "cuCtxSetCurrent",
    "cuEventElapsedTime",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuMemMap",
    "cuMemSetAccess",
    "cuMemUnmap",
    "cuMemcpyDtoHAsync",
    "cuMemcpyHtoDAsync",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
}


@pytest.mark.parametrize(("verify", "num_reads"), [("off", 0), ("sampled", 10), ("all", 10)])
def test_swaps_create_nothing_and_read_back_only_to_check(
    driver: FakeDriver, open_pool: OpenPool, tmp_path: Path, verify: Verify, num_reads: int
) -> None:
    pool = open_pool()
    models = [load(tmp_path, pool, family, verify) for family in ("llama", "mistral")]
    spare = set(pool.spare_events)
    driver.calls.clear()
    for number in range(10):
        model = models[number % 2]
        model.begin_swap_in()
        tiny_models.logits(model.module, tiny_models.prompt())
        model.end_swap_in()
        model.swap_out()
        with pool.link:
            model.begin_swap_in()
            model.call_off_swap_in()
        if number % 3:
            scribble(pool)
    assert set(driver.names()) <= ON_THE_SWAP_PATH
    assert driver.count("cuMemcpyDtoHAsync") == num_reads
    assert driver.count("cuMemUnmap") == 20
    for thread in threading.enumerate():
        if thread.name == "swap-in":
            thread.join()
    assert set(pool.spare_events) == spare  # none lost, none given back twice
    assert len(pool.spare_events) == len(spare)
    for model in models:
        model.close()
    pool.close()


@pytest.mark.parametrize("family", ["llama", "falcon_40b", "gemma_2"])
def test_a_forward_during_the_arrival_waits_for_recorded_events_only(
    driver: FakeDriver,
    open_pool: OpenPool,
    tmp_path: Path,
    family: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = open_pool()
    model = load(tmp_path, pool, family)
    ids = tiny_models.prompt()
    expected = tiny_models.logits(tiny_models.reference(model.folder), ids)
    scribble(pool)
    step = InStep(monkeypatch, pool)
    driver.calls.clear()
    model.begin_swap_in(step.interrupted)
    found = tiny_models.logits(model.module, ids)
    step.let_go()
    model.end_swap_in()
    assert torch.equal(found, expected)
    num_groups = len(model.layout.groups)
    assert step.num_waits >= num_groups - 1
    # Every wait of the compute stream is for an event of the copy stream's that was recorded
    # after the copy, and before the wait.
    recorded: dict[int, int] = {}  # event -> how many copies were before it
    waited: list[int] = []
    num_copies = 0
    for name, arguments in list(driver.calls):
        if name == "cuMemcpyHtoDAsync":
            num_copies += 1
        if name == "cuEventRecord" and arguments[1] == pool.copy_stream:
            recorded[arguments[0]] = num_copies
        if name == "cuStreamWaitEvent" and arguments[0] == 9:
            waited.append(recorded[arguments[1]])
    assert num_copies == num_groups
    assert waited == sorted(waited)
    assert set(range(1, num_groups)) <= set(waited)
    model.close()
    pool.close()


def test_a_region_that_can_not_be_made_leaves_no_range(
    driver: FakeDriver, open_pool: OpenPool
) -> None:
    pool = open_pool()
    before = dict(driver.ranges)
    driver.fail["cuMemSetAccess"] = (2, Result.CUDA_ERROR_INVALID_VALUE)
    with pytest.raises(DeviceError, match=rf"cuMemSetAccess \({PAGE} bytes\)"):
        pool.reserve(2 * PAGE)
    assert driver.ranges == before
    pool.close()


def test_page_sizes_must_fit_the_granularity(driver: FakeDriver, open_pool: OpenPool) -> None:
    with pytest.raises(DeviceError, match="set page_bytes to a multiple"):
        open_pool(page_bytes=GRANULARITY // 2)
    assert driver.contexts == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where it is missing")
def test_without_a_gpu_the_reason_is_given() -> None:
    assert device.why_no_cuda(0)
    with pytest.raises(DeviceError, match='device "cuda" was asked for, but'):
        device.open_pool("cuda", PAGE)
