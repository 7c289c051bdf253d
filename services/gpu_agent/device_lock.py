"""One engine worker per GPU on this machine, also after control was killed with -9.

A file under the state folder, locked with flock(2) and inherited by the worker: the lock is
free again once control *and* its worker are gone. The kernel gives a process's memory back
before it closes its files, so whoever gets the lock finds the old worker's memory free.
"""

import asyncio
import fcntl
import os
import time
from pathlib import Path

_POLL_S = 0.05


class DeviceLock:
    """The lock of one GPU name. ``fd`` is to be inherited by the worker."""

    def __init__(self, folder: Path, gpu: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"agent-{gpu}.lock"
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def try_take(self) -> bool:
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    async def take(self, patience_s: float) -> bool:
        """Wait for the lock; False where somebody holds it for all of ``patience_s`` seconds."""
        give_up_at = time.monotonic() + patience_s
        while not self.try_take():
            if time.monotonic() > give_up_at:
                return False
            await asyncio.sleep(_POLL_S)
        return True

    def close(self) -> None:
        """Let go of it; the worker, if it still lives, goes on holding it."""
        os.close(self.fd)
