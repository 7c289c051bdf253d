"""The supervisor over real processes."""

import asyncio
import signal
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from services.ops.supervisor import Child, Supervisor

PATIENCE_S = 10.0

# Notes its pid and waits; with "stubborn" it ignores SIGTERM; a "grandchild" dies with it.
SLEEPER = """
    import ctypes, pathlib, signal, subprocess, sys, time
    name, *how = sys.argv[2:]
    if "stubborn" in how:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "tied" in how:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if "parent" in how:
        subprocess.Popen([sys.executable, sys.argv[0], sys.argv[1], "grandchild", "tied"])
    with (pathlib.Path(sys.argv[1]) / "pids").open("a") as out:
        out.write(f"{name} {__import__('os').getpid()}\\n")
    time.sleep(60)
"""

# A supervisor as a process of its own, which may be killed.
STACK = """
    import asyncio, sys
    from services.ops.supervisor import Child, Supervisor
    async def main():
        supervisor = Supervisor()
        for name in ("one", "parent"):
            command = [sys.executable, sys.argv[1], sys.argv[2], name, name]
            await supervisor.start(Child(name, command))
        await asyncio.sleep(60)
    asyncio.run(main())
"""


class Yard:
    """A folder in which children note that they live."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.script = folder / "sleeper.py"
        self.script.write_text(textwrap.dedent(SLEEPER))

    def child(self, name: str, *how: str, grace_s: float = 5.0) -> Child:
        return Child(
            name, [sys.executable, str(self.script), str(self.folder), name, *how], grace_s
        )

    def born(self) -> list[tuple[str, int]]:
        file = self.folder / "pids"
        lines = file.read_text().splitlines() if file.exists() else []
        return [(line.split()[0], int(line.split()[1])) for line in lines]

    async def until_born(self, count: int) -> list[tuple[str, int]]:
        await until(lambda: len(self.born()) >= count, f"{count} births, not {self.born()}")
        return self.born()


async def until(condition: Callable[[], bool], what: str) -> None:
    give_up_at = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up_at, f"waited for {what}"
        await asyncio.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def yard(tmp_path: Path) -> Yard:
    return Yard(tmp_path)


@pytest.fixture
async def supervisor(yard: Yard) -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(log_folder=yard.folder / "logs")
    yield supervisor
    await supervisor.stop()
    assert not [pid for _, pid in yard.born() if is_alive(pid)]


async def test_a_child_that_dies_is_started_again(supervisor: Supervisor, yard: Yard) -> None:
    child = yard.child("one")
    await supervisor.start(child)
    ((_, first),) = await yard.until_born(1)
    psutil.Process(first).kill()
    _, (_, second) = await yard.until_born(2)
    assert child.pid == second
    assert child.num_starts == 2


async def test_pauses_grow(
    supervisor: Supervisor, yard: Yard, caplog: pytest.LogCaptureFixture
) -> None:
    script = "print('no', flush=True); raise SystemExit(3)"
    child = Child("flapping", [sys.executable, "-c", script])
    await supervisor.start(child)
    await until(lambda: child.num_starts == 4, "the fourth start")
    said = [record.getMessage() for record in caplog.records][:3]
    assert said == [
        f"flapping ended with exit status 3; restarting it in {pause} s"
        for pause in ("0.1", "0.2", "0.4")
    ]
    assert (yard.folder / "logs" / "flapping.log").read_text().startswith("no\nno\n")


async def test_what_can_not_be_started_at_all(supervisor: Supervisor) -> None:
    with pytest.raises(FileNotFoundError):
        await supervisor.start(Child("ghost", ["/nowhere/ghost"]))
    assert supervisor.children == []


async def test_what_can_not_be_started_again_is_tried_again(
    supervisor: Supervisor, yard: Yard, caplog: pytest.LogCaptureFixture
) -> None:
    """Its binary is being replaced, say."""
    program = yard.folder / "program"
    away = yard.folder / "away"
    program.write_text(f"#!/bin/sh\nexec {sys.executable} {yard.script} {yard.folder} one\n")
    program.chmod(0o755)
    child = Child("one", [str(program)])
    await supervisor.start(child)
    ((_, pid),) = await yard.until_born(1)
    program.rename(away)
    psutil.Process(pid).kill()
    await until(lambda: "can not be started" in caplog.text, "a failed start")
    away.rename(program)
    await yard.until_born(2)


async def test_stop_goes_in_reverse_and_kills_the_stubborn(
    supervisor: Supervisor, yard: Yard
) -> None:
    first, second = yard.child("first"), yard.child("second", "stubborn", grace_s=0.2)
    await supervisor.start(first)
    await yard.until_born(1)
    await supervisor.start(second)
    await yard.until_born(2)
    assert first.process
    assert second.process
    stopping = asyncio.create_task(supervisor.stop())
    assert await second.process.wait() == -signal.SIGKILL
    assert first.process.returncode is None
    await stopping
    assert first.process.returncode == -signal.SIGTERM


async def test_stop_while_a_child_is_between_two_lives(supervisor: Supervisor, yard: Yard) -> None:
    """Nobody is started after `stop`, whenever it comes."""
    flapping = Child("flapping", [sys.executable, "-c", "raise SystemExit(1)"])
    await supervisor.start(flapping)
    await until(lambda: flapping.num_starts == 2, "a restart")
    await supervisor.stop()
    num_starts = flapping.num_starts
    assert not is_alive(flapping.pid)
    assert flapping._keeper
    assert flapping._keeper.done()
    assert flapping.num_starts == num_starts


async def test_stop_at_once_after_start(supervisor: Supervisor, yard: Yard) -> None:
    child = yard.child("one")
    await supervisor.start(child)
    await supervisor.stop()
    assert child.process
    assert child.process.returncode is not None


async def test_a_killed_supervisor_takes_all_along(yard: Yard) -> None:
    """Its children by the signal of the parent's death, theirs likewise."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(STACK), str(yard.script), str(yard.folder)
    )
    family = await yard.until_born(3)
    assert {name for name, _ in family} == {"one", "parent", "grandchild"}
    process.kill()
    await process.wait()
    await until(lambda: not any(is_alive(pid) for _, pid in family), "the end of all")
