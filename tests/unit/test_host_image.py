"""The packing: order, alignment, and how little it wastes."""

import mmap
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from schemas.state import ModelSpec
from services.gpu_agent import probe, skeleton
from services.gpu_agent.checksums import Checksums
from services.gpu_agent.host_image import (
    ALIGN_BYTES,
    Group,
    HostImage,
    Weight,
    fill_file,
    is_sealed,
    plan_layout,
)
from tests.unit import tiny_models

SMALL = st.tuples(
    st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
    st.integers(0, 2),
)


@given(st.lists(SMALL, min_size=1, max_size=12))
def test_slots_are_aligned_disjoint_and_in_order(
    shapes: list[tuple[tuple[int, ...], torch.dtype, int]],
) -> None:
    shapes.sort(key=lambda item: item[2])
    weights = [Weight(f"w{i}", f"g{g}", s, d) for i, (s, d, g) in enumerate(shapes)]
    layout = plan_layout(weights)
    end = 0
    for slot, weight in zip(layout, weights, strict=True):
        assert slot.weight is weight
        assert slot.offset % ALIGN_BYTES == 0
        assert end <= slot.offset < end + ALIGN_BYTES
        end = slot.offset + weight.num_bytes
    assert layout.num_bytes == end
    covered = [w for g in layout.groups for w in range(g.offset, g.offset + g.num_bytes)]
    assert len(covered) == len(set(covered))
    for slot in layout:
        assert any(
            g.name == slot.weight.group
            and g.offset <= slot.offset
            and slot.offset + slot.weight.num_bytes <= g.offset + g.num_bytes
            for g in layout.groups
        )


def test_views_share_the_image() -> None:
    layout = plan_layout(
        [
            Weight("a", "embed", (2, 3), torch.float32),
            Weight("b", "layer.0", (5,), torch.bfloat16),
            Weight("c", "layer.0", (), torch.float32),
        ]
    )
    assert layout.groups == (Group("embed", 0, 24), Group("layer.0", 256, 260))
    image = HostImage(layout)
    for number, (_, view) in enumerate(image.views()):
        view.fill_(number + 1)
    assert image.tensor[:24].view(torch.float32).tolist() == [1.0] * 6
    assert image.tensor[256:266].view(torch.bfloat16).tolist() == [2.0] * 5
    assert bytes(image.writable[512:516]) == b"\x00\x00\x40\x40"
    image.free()


def test_memory_lives_as_long_as_somebody_looks_at_it() -> None:
    layout = plan_layout([Weight("a", "embed", (3,), torch.uint8)])
    freed: list[str] = []
    memory = mmap.mmap(-1, layout.num_bytes)
    image = HostImage(layout, memory, lambda: freed.append("a"))
    del memory
    image.tensor.fill_(7)
    (_, view), *_ = image.views()
    image.free()
    image.free()
    assert (view.tolist(), image.tensor.numel(), freed) == ([7, 7, 7], 0, ["a"])


@pytest.mark.parametrize("count", [1, 5])
def test_a_file_gives_back_what_was_filled(count: int) -> None:
    layout = plan_layout([Weight("a", "embed", (count,), torch.float32)])

    def fill(image: HostImage) -> None:
        image.writable[: 4 * count] = bytes(range(4 * count))
        image.checksums = Checksums.of(image.tensor, 8)

    file = fill_file("test", layout, fill)
    assert is_sealed(file, layout)
    image = HostImage.over(file, layout, lambda: os.close(file))
    assert image.tensor.tolist() == list(range(4 * count))
    assert image.checksums == Checksums.of(image.tensor, 8)
    assert image.is_read_only
    with pytest.raises(ValueError, match="sealed"):
        _ = image.writable
    image.free()
    file = fill_file("test", layout, lambda _image: None)
    image = HostImage.over(file, layout, lambda: os.close(file))
    assert image.checksums is None
    image.free()


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_an_image_costs_hardly_more_memory_than_its_weights(family: str) -> None:
    dtype, make_config = tiny_models.FAMILIES[family]  # tied and not
    spec, config = ModelSpec("m", "x"), make_config()
    module = skeleton.build(config, spec, dtype)
    examined = probe.examine(module, config, spec)
    image = HostImage(plan_layout(examined.weights))
    parameters = sum(parameter.numel() for parameter in set(module.parameters()))
    assert image.num_bytes <= 1.02 * parameters * dtype.itemsize
    image.free()


def test_a_realistic_model_wastes_less_than_two_percent() -> None:
    spec = ModelSpec("m", "x")
    config = LlamaConfig(
        vocab_size=32000, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16
    )
    module = skeleton.build(config, spec, torch.bfloat16)
    examined = probe.examine(module, config, spec)
    layout = plan_layout(examined.weights)
    assert layout.num_bytes <= 1.02 * 2 * examined.num_parameters
    layers = [f"layer.{n}" for n in range(24)]
    assert [g.name for g in layout.groups] == ["embed", *layers, "norm", "head"]
