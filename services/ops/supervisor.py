"""Starts child processes in order, restarts those that end, stops them in reverse order.

Children live in their own sessions, so Ctrl-C reaches the supervisor alone and the order of
shutdown holds; a parent-death signal takes them along if the supervisor itself is killed, and
whatever they started in turn is theirs to end (an agent's worker has such a signal too).
"""

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_STABLE_S = 10.0  # a child that lived this long starts afresh with the shortest pause

_libc = ctypes.CDLL(None, use_errno=True)


def die_with(parent_pid: int) -> None:
    """In a child, before exec: SIGTERM when the parent dies (prctl(2), PR_SET_PDEATHSIG)."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent_pid:  # it died before we asked to be told
        os._exit(1)


@dataclass
class Child:
    """One supervised process. ``grace_s``: from SIGTERM to SIGKILL."""

    name: str
    command: list[str]
    grace_s: float = 15.0
    process: asyncio.subprocess.Process | None = None
    num_starts: int = 0
    _keeper: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def pid(self) -> int:
        return self.process.pid if self.process else 0


class Supervisor:
    """``log_folder``: children write <name>.log there; None: to our own output."""

    def __init__(self, log_folder: Path | None = None) -> None:
        self.children: list[Child] = []
        self._log_folder = log_folder

    async def start(self, child: Child) -> None:
        """Start ``child`` and keep it running until `stop`. Raises OSError where it can not be.

        Later starts that fail are tried again, like a child that ends.
        """
        await self._spawn(child)
        self.children.append(child)
        child._keeper = asyncio.create_task(self._keep(child))

    async def stop(self) -> None:
        """SIGTERM to each child, last started first; SIGKILL to one that does not end."""
        # First of all no more restarts. (Cancelled in the middle of a start, asyncio kills what
        # it had started: each child is then one known process, or none.)
        for child in self.children:
            if child._keeper:
                child._keeper.cancel()
        keepers = [child._keeper for child in self.children if child._keeper]
        await asyncio.gather(*keepers, return_exceptions=True)
        for child in reversed(self.children):
            await self._stop_child(child)

    async def _spawn(self, child: Child) -> None:
        output: IO[bytes] | None = None
        if self._log_folder:
            self._log_folder.mkdir(parents=True, exist_ok=True)
            output = (self._log_folder / f"{child.name}.log").open("ab")
        parent_pid = os.getpid()
        try:
            child.process = await asyncio.create_subprocess_exec(
                *child.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=lambda: die_with(parent_pid),
            )
        finally:
            if output:
                output.close()
        child.num_starts += 1

    async def _keep(self, child: Child) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            assert child.process
            started_at = time.monotonic()
            how = _how(await child.process.wait())
            if time.monotonic() - started_at > _STABLE_S:
                pause_s = _FIRST_PAUSE_S
            started = False
            while not started:
                log.warning("%s %s; restarting it in %.1f s", child.name, how, pause_s)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                try:
                    await self._spawn(child)
                    started = True
                except OSError as error:
                    how = f"can not be started: {error}"

    async def _stop_child(self, child: Child) -> None:
        if not child.process:
            return
        with contextlib.suppress(ProcessLookupError):
            child.process.terminate()
        try:
            await asyncio.wait_for(child.process.wait(), child.grace_s)
        except TimeoutError:
            log.warning("%s did not stop within %g s; killing it", child.name, child.grace_s)
            with contextlib.suppress(ProcessLookupError):
                child.process.kill()
            await child.process.wait()


def stop_on_signals() -> asyncio.Event:
    """An event that SIGINT or SIGTERM sets, however often. Call inside the running loop."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    on_signal: Callable[[], None] = stop.set
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    return stop


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with exit status {code}"
    return f"was killed by {signal.Signals(-code).name}"
