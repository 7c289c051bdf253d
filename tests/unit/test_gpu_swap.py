"""The GPU benchmark without a GPU: its dry run, and its parts over a stand-in for the driver."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import _gpu_driver, gpu_swap
from bench._gpu_report import FILE, Part
from bench._gpu_stage import DRY, Stage
from services.gpu_agent import device_cpu
from services.gpu_agent.device_cuda import CudaPool
from services.gpu_agent.pages import PagePool
from tests.unit.fake_driver import GRANULARITY, FakeDriver


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny forwards gain nothing from threads, and lose much where cores are few and busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def driver() -> Iterator[FakeDriver]:
    fake = FakeDriver(2**40)
    fake.calls = _Recent()
    yield fake
    fake.close()


class _Recent(list[Any]):
    """The stand-in searches all its calls at every call: keep few of them."""

    def append(self, call: Any) -> None:
        if len(self) > 100:
            self.clear()
        super().append(call)


def fake_gpu(driver: FakeDriver, num_pages: int, page_bytes: int) -> PagePool:
    return CudaPool(
        driver,
        num_pages,
        page_bytes,
        0,
        device_name="fake",
        torch_device=torch.device("cpu"),
        compute_stream=lambda: 9,
        tensor_at=device_cpu._tensor_at,
    )


def run(folder: Path, open_pool: Any, parts: dict[str, gpu_swap.Work], **more: Any) -> Any:
    """What the file says after these parts."""
    dry = gpu_swap.Run(folder, open_pool, DRY, is_dry=True, environment={}, **more)
    dry.run(parts, budget_s=100.0)
    return json.loads((folder / FILE).read_bytes())


def missed(report: Any) -> list[Any]:
    return [
        (part["name"], target["name"], target["value"])
        for part in report["parts"]
        for target in part["targets"]
        if target["value"] < target["at_least"]
    ]


def test_the_dry_run_keeps_all_its_promises(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_swap.main([str(tmp_path), "--dry-run"]) == 0
    report = json.loads((tmp_path / FILE).read_bytes())
    assert [part["name"] for part in report["parts"]] == list(gpu_swap.PARTS)
    assert {part["outcome"] for part in report["parts"]} == {"done"}
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == report["verdict"]
    assert last.startswith("PASS ")


def test_the_cuda_pool_keeps_them_as_well(driver: FakeDriver, tmp_path: Path) -> None:
    """All parts but those in which the stand-in would only wait for the CPU to compute."""
    names = ("swap", "graph", "partial", "call-off", "read-only", "arrival", "pages")
    parts = {name: gpu_swap.PARTS[name] for name in names}
    report = run(tmp_path, lambda num, size: fake_gpu(driver, num, size), parts)
    assert [(part["name"], part["why"]) for part in report["parts"]] == [(n, "") for n in names]
    assert missed(report) == []
    swap = report["parts"][0]
    calls = swap["details"][f"llama: calls of {DRY.rounds} swap-ins"]
    num_bytes = round(swap["values"]["llama image: size"]["value"] * 1e9)
    assert calls["cuMemMap"]["calls"] == -(-num_bytes // DRY.page_bytes) * DRY.rounds
    assert calls["cuMemSetAccess"]["calls"] == DRY.rounds
    assert calls["cuMemcpyHtoDAsync"]["bytes"] == num_bytes * DRY.rounds
    assert (driver.pages, driver.ranges, driver.mappings, driver.pinned) == ({}, {}, {}, {})


class PatientDriver(FakeDriver):
    """Lets pages be unmapped while others are copied to, as long as they are others."""

    def _cuMemUnmap(self, address: int, size: int) -> tuple[()]:  # noqa: N802
        self._cuStreamSynchronize(0)
        return super()._cuMemUnmap(address, size)


def test_the_driver_is_asked_and_nothing_is_left() -> None:
    driver = PatientDriver(2**40)
    found = _gpu_driver.experiments(driver, GRANULARITY)
    assert all(isinstance(seconds, float) for seconds in found.pop("pages").values())
    assert all(isinstance(seconds, float) for seconds in found.values())
    assert (driver.pages, driver.ranges, driver.mappings, driver.pinned) == ({}, {}, {}, {})
    driver.close()


def test_a_part_that_breaks_costs_the_others_nothing(tmp_path: Path) -> None:
    def breaks(stage: Stage, part: Part) -> None:
        part.value("so far", 1.0)
        stage.pair(part, "llama", "mistral")[0].swap_in()
        raise RuntimeError("on purpose")

    def goes_on(stage: Stage, part: Part) -> None:
        stage.pair(part, "llama", "mistral")[0].swap_in()
        part.holds("it does", True)

    report = run(tmp_path, gpu_swap.open_cpu, {"breaks": breaks, "goes on": goes_on})
    broken, done = report["parts"]
    assert (broken["outcome"], broken["values"]["so far"]["value"]) == ("failed", 1.0)
    assert "RuntimeError: on purpose" in broken["why"]
    assert (done["outcome"], len(done["targets"])) == ("done", 1)
    assert report["verdict"].startswith("SHORT 1/2: breaks failed")


def test_what_would_begin_too_late_is_named(tmp_path: Path) -> None:
    now = 0.0

    def slow(stage: Stage, part: Part) -> None:
        nonlocal now
        now += 101.0

    parts: dict[str, gpu_swap.Work] = {"slow": slow, "late": slow}
    report = run(tmp_path, gpu_swap.open_cpu, parts, clock=lambda: now)
    assert [part["outcome"] for part in report["parts"]] == ["done", "skipped"]
    assert report["parts"][1]["why"] == "101 s of 100 s were used before it"
    assert report["verdict"] == "SHORT 0/1: late skipped=0 (target >= 1)"


def test_the_file_is_whole_before_each_part(tmp_path: Path) -> None:
    seen: list[Any] = []

    def looks(stage: Stage, part: Part) -> None:
        seen.append(json.loads((tmp_path / FILE).read_bytes()))

    run(tmp_path, gpu_swap.open_cpu, {"one": looks, "two": looks})
    assert [[part["outcome"] for part in report["parts"]] for report in seen] == [
        ["running"],
        ["done", "running"],
    ]


def test_an_unknown_part_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_swap.main([str(tmp_path), "--only", "swap,nothing"])
    assert "no part named nothing" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_swap, "why_no_cuda", lambda _: "there is none")
    assert gpu_swap.main([str(tmp_path / "out")]) == 2
    assert "this needs a GPU, but there is none" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
