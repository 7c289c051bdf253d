"""Sharing host images between worker processes, some of which are killed."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from services.gpu_agent.checksums import Checksums
from services.gpu_agent.host_image import HostImage, Weight, plan_layout
from services.gpu_agent.shared_images import ImageExchange

LAYOUT: Final = plan_layout([Weight("w", "embed", (8 * 2**20 + 100,), torch.uint8)])
PAGE_BYTES: Final = 2 * 2**20
KEY, OTHER_KEY = (sha256(name).hexdigest() for name in (b"one", b"other"))
PATIENCE_S: Final = 60.0

# Processes of their own, without each of them importing torch anew.
PROCESSES: Final = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])


@dataclass(frozen=True)
class Held:
    """What a process sees of an image that it holds."""

    values: list[int]
    checksums: Checksums | None
    inode: int
    pss_bytes: int  # its share of the memory: each page divided by the number of its users


def held(image: HostImage) -> Held:
    values = torch.bincount(image.tensor).nonzero().flatten().tolist()  # maps every page
    address = f"{image.tensor.data_ptr():x}-"
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    head = next(line for line in lines if line.startswith(address))
    pss = next(line for line in lines if line.startswith("Pss:"))
    return Held(values, image.checksums, int(head.split()[4]), int(pss.split()[1]) * 1024)


def work(folder: Path, pipe: Connection) -> None:
    """A worker process: does what comes down the pipe. Filling asks for the value to write."""
    exchange = ImageExchange(folder)
    images: dict[str, HostImage] = {}

    def fill(image: HostImage) -> None:
        image.tensor[: image.tensor.numel() // 2] = 99
        pipe.send("filling")
        image.tensor.fill_(pipe.recv())
        image.checksums = Checksums.of(image.tensor, PAGE_BYTES)

    while True:
        command, key = pipe.recv()
        if command == "obtain":
            images[key] = exchange.obtain(key, LAYOUT, fill)
        elif command == "write":
            images[key].tensor[0] = 1
        pipe.send(held(images[key]))


class Worker:
    def __init__(self, folder: Path) -> None:
        self.pipe, theirs = PROCESSES.Pipe()
        self.process = PROCESSES.Process(target=work, args=(folder, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def hear(self) -> Any:
        assert self.pipe.poll(PATIENCE_S)
        return self.pipe.recv()

    def fill(self, key: str, value: int) -> Held:
        self.pipe.send(("obtain", key))
        assert self.hear() == "filling"
        return self.go_on(value)

    def go_on(self, value: int) -> Held:
        self.pipe.send(value)
        return self.look()

    def borrow(self, key: str) -> Held:
        self.pipe.send(("obtain", key))
        return self.look()

    def look(self, key: str | None = None) -> Held:
        if key is not None:
            self.pipe.send(("look", key))
        seen = self.hear()
        assert isinstance(seen, Held)
        return seen

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "images"


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[[], Worker]]:
    workers: list[Worker] = []

    def begin() -> Worker:
        workers.append(Worker(folder))
        return workers[-1]

    yield begin
    for worker in workers:
        worker.kill()
        worker.process.close()
        worker.pipe.close()


def test_two_at_once_fill_once_and_share_the_memory(start: Callable[[], Worker]) -> None:
    one, two = start(), start()
    for worker in (one, two):
        worker.pipe.send(("obtain", KEY))
    ready = wait([one.pipe, two.pipe], PATIENCE_S)
    filler, borrower = (one, two) if one.pipe in ready else (two, one)
    assert filler.hear() == "filling"
    assert filler.go_on(5).values == [5]
    assert borrower.look().values == [5]
    seen = [worker.look(KEY) for worker in (one, two)]
    assert seen[0].inode == seen[1].inode
    assert seen[0].checksums == seen[1].checksums
    assert seen[0].checksums is not None
    assert LAYOUT.num_bytes <= sum(each.pss_bytes for each in seen) <= 1.01 * LAYOUT.num_bytes


def test_another_takes_over_from_a_killed_filler(start: Callable[[], Worker]) -> None:
    first, second = start(), start()
    first.pipe.send(("obtain", KEY))
    assert first.hear() == "filling"
    second.pipe.send(("obtain", KEY))
    assert not second.pipe.poll(0)
    first.kill()
    assert second.hear() == "filling"
    assert second.go_on(6).values == [6]


def test_an_image_outlives_its_filler(start: Callable[[], Worker]) -> None:
    first, second, third = start(), start(), start()
    inode = first.fill(KEY, 7).inode
    second.borrow(KEY)
    first.kill()
    assert second.look(KEY).values == [7]
    seen = third.borrow(KEY)
    assert (seen.values, seen.inode) == ([7], inode)


def test_who_writes_dies_and_harms_nobody(start: Callable[[], Worker]) -> None:
    first, second = start(), start()
    first.fill(KEY, 8)
    second.borrow(KEY)
    first.pipe.send(("write", KEY))  # not even the one that filled it
    first.process.join(PATIENCE_S)
    assert first.process.exitcode == -signal.SIGSEGV
    assert second.look(KEY).values == [8]


def test_other_images_are_other_memory(start: Callable[[], Worker]) -> None:
    first, second = start(), start()
    assert first.fill(KEY, 1).inode != second.fill(OTHER_KEY, 2).inode
    assert second.borrow(KEY).values == [1]
    assert second.look(OTHER_KEY).values == [2]


def test_the_next_start_cleans_up_after_killed_workers(
    start: Callable[[], Worker], folder: Path
) -> None:
    first, second = start(), start()
    first.fill(KEY, 1)
    second.pipe.send(("obtain", OTHER_KEY))
    assert second.hear() == "filling"
    first.kill()
    second.kill()
    assert sorted(path.suffix for path in folder.iterdir()) == [".lock", ".sock", ".sock"]
    ImageExchange(folder).close()
    assert list(folder.iterdir()) == []
