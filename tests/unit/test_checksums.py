"""Checksums of host images: taken while files are loaded, and what they find later."""

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig

from schemas.state import ModelSpec
from services.gpu_agent import checkpoint, loader, probe, reading, skeleton
from services.gpu_agent.checkpoint import BadCheckpoint
from services.gpu_agent.checksums import Checksums, Corruption
from services.gpu_agent.host_image import HostImage, plan_layout
from tests.unit import tiny_models

PAGE_BYTES = 10_000  # no multiple of a tensor's alignment, and smaller than most tensors


def no_progress(_done: int, _total: int) -> None:
    pass


def planned(folder: Path, **settings: object) -> loader.LoadPlan:
    spec = ModelSpec("m", str(folder), **settings)  # type: ignore[arg-type]
    found = checkpoint.read(checkpoint.find(spec))
    config = skeleton.read_config(found.folder, spec)
    dtype = skeleton.choose_dtype(config, spec, (t.dtype for t in found.tensors.values()))
    module = skeleton.build(config, spec, dtype)
    layout = plan_layout(probe.examine(module, config, spec).weights)
    return loader.plan_load(spec, found, layout, module, dtype)


def loaded(plan: loader.LoadPlan) -> HostImage:
    image = HostImage(plan.layout)
    loader.load(plan, image, PAGE_BYTES, no_progress)
    return image


def assert_right(image: HostImage) -> None:
    """Each checksum is that of the final bytes."""
    assert image.checksums == Checksums.of(image.tensor, PAGE_BYTES)
    assert len(set(image.checksums.values)) > 2


@pytest.mark.parametrize("page_bytes", [100, 4096, 2 * 2**20])
def test_they_are_those_of_the_final_bytes(tmp_path: Path, page_bytes: int) -> None:
    plan = planned(tiny_models.write(tmp_path / "m", "llama"))
    image = HostImage(plan.layout)
    loader.load(plan, image, page_bytes, no_progress)
    assert image.checksums == Checksums.of(image.tensor, page_bytes)


@pytest.mark.parametrize("chunk_bytes", [1000, 4 * 2**20])
def test_small_and_large_reads_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(reading, "CHUNK_BYTES", chunk_bytes)
    folder = tiny_models.write(tmp_path / "m", "llama_tied")
    held = load_file(folder / "model.safetensors")
    plan = planned(folder)
    image = loaded(plan)
    assert_right(image)
    for read in plan.reads:
        assert torch.equal(read.slot.view(image.tensor), held[read.stored.name])
    assert_right(loaded(planned(folder, dtype="float16")))


def test_a_tied_weight_that_is_stored_twice(tmp_path: Path) -> None:
    folder = tiny_models.write(tmp_path / "m", "llama_tied")
    file = folder / "model.safetensors"
    held = dict(load_file(file))
    save_file(
        {**held, "lm_head.weight": held["model.embed_tokens.weight"].clone()},
        file,
        {"format": "pt"},
    )
    plan = planned(folder)
    assert any(read.also for read in plan.reads)
    assert_right(loaded(plan))


def test_a_converted_checkpoint(tmp_path: Path) -> None:
    config = MixtralConfig(**tiny_models.LLAMA_LIKE, num_local_experts=3)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    plan = planned(tmp_path)
    assert not plan.reads
    assert_right(loaded(plan))


def test_a_flipped_bit_is_found_on_its_page(tmp_path: Path) -> None:
    image = loaded(planned(tiny_models.write(tmp_path / "m", "llama")))
    assert image.checksums is not None
    assert image.checksums.check_all(image.tensor, "here") == image.checksums.num_pages
    image.tensor[3 * PAGE_BYTES + 17] ^= 1
    with pytest.raises(Corruption, match=r"page 3 \(bytes 30000 to 40000\) here has checksum"):
        image.checksums.check_all(image.tensor, "here")
    with pytest.raises(Corruption):
        image.checksums.check_all(image.tensor, "here", [2, 3])
    assert image.checksums.check_all(image.tensor, "here", [0, 2]) == 2


def test_a_file_that_is_cut_in_the_middle_of_a_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "CHUNK_BYTES", 4000)
    folder = tiny_models.write(tmp_path / "m", "llama")
    plan = planned(folder)
    image = HostImage(plan.layout)
    read = reading.OpenFile.read
    num_reads = 0

    def read_and_cut(*args: object) -> None:
        nonlocal num_reads
        num_reads += 1
        if num_reads == 5:
            with (folder / "model.safetensors").open("r+b") as stream:
                stream.truncate(50_000)
        read(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(reading.OpenFile, "read", read_and_cut)
    # Which one it is depends on how far the other reader has come by then.
    with pytest.raises(BadCheckpoint, match=r"model\.safetensors was (cut short while|changed)"):
        loader.load(plan, image, PAGE_BYTES, no_progress)
    assert image.checksums is None


def test_progress_is_told_while_a_disk_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No byte arrives before progress was told twice; it only grows, and ends at the total."""
    plan = planned(tiny_models.write(tmp_path / "m", "llama"))
    monkeypatch.setattr(loader, "_PROGRESS_S", 0.001)
    seen: list[int] = []
    told = threading.Event()
    read = reading.OpenFile.read

    def slow(*args: object) -> None:
        assert told.wait(10.0)
        read(*args)  # type: ignore[arg-type]

    def progress(done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == 3:
            told.set()
        assert total == sum(slot.weight.num_bytes for slot in plan.layout)

    monkeypatch.setattr(reading.OpenFile, "read", slow)
    loader.load(plan, HostImage(plan.layout), PAGE_BYTES, progress)
    assert seen[:3] == [0, 0, 0]
    assert seen == sorted(seen)
    assert seen[-1] == sum(slot.weight.num_bytes for slot in plan.layout)
