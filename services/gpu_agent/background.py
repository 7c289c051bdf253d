"""One thread for slow jobs of the engine worker, and how what came of them gets into its loop."""

import os
import queue
import threading
from collections.abc import Callable
from typing import TypeAlias

from services.gpu_agent import ipc

Outbox: TypeAlias = list[ipc.FromWorker]
# What a background job leaves to be done in the loop's thread.
Afterwards: TypeAlias = Callable[[], Outbox]


class Background:
    """One thread for slow jobs, and a pipe that wakes the loop when something came of them."""

    def __init__(self, name: str = "background") -> None:
        self._jobs: queue.SimpleQueue[Callable[[], Afterwards]] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Afterwards] = queue.SimpleQueue()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        # A daemon: a load that is under way must not hold up the end of the process.
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def fileno(self) -> int:
        """Readable when `collect` has something."""
        return self._wake_read

    def submit(self, job: Callable[[], Afterwards]) -> None:
        """Run ``job`` in the thread, and what it returns in `collect`. It must not raise."""
        self._jobs.put(job)

    def post(self, afterwards: Afterwards) -> None:
        """From inside a job: have ``afterwards`` run in `collect` soon."""
        self._results.put(afterwards)
        os.write(self._wake_write, b"\0")

    def collect(self) -> Outbox:
        """Run everything that was posted; for the loop's thread."""
        os.read(self._wake_read, 1 << 16)
        out: Outbox = []
        while not self._results.empty():
            out += self._results.get()()
        return out

    def _run(self) -> None:
        while True:
            self.post(self._jobs.get()())
