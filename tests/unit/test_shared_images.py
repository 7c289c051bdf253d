"""Sharing host images: what is sealed, cleaned up, refused and passed over. In one process."""

import mmap
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Final

import pytest
import torch

from services.gpu_agent import shared_images
from services.gpu_agent.checkpoint import Checkpoint, FileStamp
from services.gpu_agent.checksums import Checksums
from services.gpu_agent.host_image import HostImage, Weight, plan_layout
from services.gpu_agent.shared_images import ImageExchange, image_key

LAYOUT: Final = plan_layout([Weight("w", "embed", (8 * 2**20 + 100,), torch.uint8)])
PAGE_BYTES: Final = 2 * 2**20
KEY: Final = sha256(b"one").hexdigest()


def write(image: HostImage, value: int) -> None:
    image.tensor.fill_(value)
    image.checksums = Checksums.of(image.tensor, PAGE_BYTES)


def never(_image: HostImage) -> None:
    pytest.fail("somebody has this image already")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / ("long " * 24)  # a socket's own name has 107 bytes at most


@pytest.fixture
def exchanges(folder: Path) -> Iterator[list[ImageExchange]]:
    """Three of them in this process, as if in three."""
    with ExitStack() as stack:
        made = [ImageExchange(folder) for _ in range(3)]
        for exchange in made:
            stack.callback(exchange.close)
        yield made
    assert list(folder.iterdir()) == []


def files_of_memory() -> int:
    """Descriptors and mappings of memory files in this process."""
    opened = [str(e.readlink()) for e in Path("/proc/self/fd").iterdir() if e.is_symlink()]
    mapped = Path("/proc/self/maps").read_text().splitlines()
    return sum("hotswap-" in line for line in [*opened, *mapped])


def test_nothing_is_left_when_all_let_go(exchanges: list[ImageExchange]) -> None:
    images = [exchanges[0].obtain(KEY, LAYOUT, lambda image: write(image, 3))]
    images += [exchange.obtain(KEY, LAYOUT, never) for exchange in (*exchanges, exchanges[0])]
    files = [file for exchange in exchanges for file in exchange._offers[KEY]]
    assert len(files) == len(images)
    assert len({os.fstat(file).st_ino for file in files}) == 1
    images.pop(0).free()
    assert exchanges[2].obtain(KEY, LAYOUT, never).tensor[0] == 3  # dropped, but not freed
    exchanges[2].close()
    for image in images:
        image.free()
        image.free()
    assert files_of_memory() == 0
    exchanges[0].obtain(KEY, LAYOUT, lambda image: write(image, 4)).free()


def test_a_filled_file_is_sealed(exchanges: list[ImageExchange]) -> None:
    images = [exchanges[0].obtain(KEY, LAYOUT, lambda image: write(image, 3))]
    images.append(exchanges[1].obtain(KEY, LAYOUT, never))
    assert [image.is_read_only for image in images] == [True, True]
    (file,) = exchanges[1]._offers[KEY]  # came through the socket
    assert not os.get_inheritable(file)
    for attempt in (
        lambda: os.pwrite(file, b"x", 0),
        lambda: os.ftruncate(file, 10),
        lambda: os.ftruncate(file, 2 * LAYOUT.num_bytes),
        lambda: mmap.mmap(file, 0),
    ):
        with pytest.raises(PermissionError):
            attempt()
    for image in images:
        image.free()


def test_a_failed_fill_is_the_next_ones_turn(exchanges: list[ImageExchange]) -> None:
    def fail(_image: HostImage) -> None:
        raise ValueError("no such file")

    with pytest.raises(ValueError, match="no such file"):
        exchanges[0].obtain(KEY, LAYOUT, fail)
    assert files_of_memory() == 0
    exchanges[1].obtain(KEY, LAYOUT, lambda image: write(image, 3)).free()


def test_damaged_images_are_not_passed_on(
    exchanges: list[ImageExchange], caplog: pytest.LogCaptureFixture
) -> None:
    def damage(image: HostImage) -> None:
        write(image, 3)
        image.tensor[5 * 2**20] = 7

    images = [exchanges[0].obtain(KEY, LAYOUT, damage)]
    images.append(exchanges[1].obtain(KEY, LAYOUT, lambda image: write(image, 3)))
    assert "page 2" in caplog.text
    images.append(exchanges[2].obtain(KEY, LAYOUT, never))
    assert all(bool((image.tensor == 3).all()) for image in images[1:])
    for image in images:
        image.free()


def test_what_is_no_sealed_image_is_refused(
    exchanges: list[ImageExchange], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    large = os.memfd_create("writable")
    os.ftruncate(large, LAYOUT.num_bytes)
    for file in (large, os.open(tmp_path, os.O_RDONLY)):
        exchanges[0]._offers[KEY] = [file]
        exchanges[1].obtain(KEY, LAYOUT, lambda image: write(image, 3)).free()
        os.close(file)
    exchanges[0]._offers.clear()
    assert caplog.text.count("offers no host image") == 2


def test_a_hung_peer_is_passed_over(
    exchanges: list[ImageExchange],
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shared_images, "_ASK_S", 0.05)
    path = folder / "0.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as hung:
        with shared_images._address(path) as address:
            hung.bind(address)
        hung.listen(0)
        exchanges[0].obtain(KEY, LAYOUT, lambda image: write(image, 3)).free()
        ImageExchange(folder).close()
        assert path.exists()
    assert "timed out" in caplog.text
    exchanges[0].obtain(KEY, LAYOUT, lambda image: write(image, 3)).free()  # it refuses now
    ImageExchange(folder).close()
    assert not path.exists()


def test_a_lock_held_for_too_long_costs_a_copy(
    exchanges: list[ImageExchange],
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shared_images, "_LOAD_S", 0.01)
    with shared_images._locked(folder / f"{KEY}.lock", 0.0) as is_ours:
        assert is_ours
        exchanges[0].obtain(KEY, LAYOUT, lambda image: write(image, 3)).free()
    assert "copy of its own" in caplog.text


def test_a_folder_that_others_can_use_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(PermissionError, match="share_images = false"):
        ImageExchange(tmp_path)


def test_the_key_tells_files_packing_and_pages_apart() -> None:
    file = Path("m/model.safetensors")
    checkpoint = Checkpoint(Path("m"), {}, {file: FileStamp(10, 20)})
    changed = replace(checkpoint, files={file: FileStamp(10, 21)})
    other = plan_layout([Weight("w", "embed", (4,), torch.int8)])
    keys = [
        image_key(checkpoint, LAYOUT, PAGE_BYTES),
        image_key(changed, LAYOUT, PAGE_BYTES),
        image_key(checkpoint, other, PAGE_BYTES),
        image_key(checkpoint, LAYOUT, 2 * PAGE_BYTES),
    ]
    assert len(set(keys)) == 4
    assert keys[0] == image_key(replace(checkpoint), replace(LAYOUT), PAGE_BYTES)
    assert {len(key) for key in keys} == {64}
