"""The control process's end of the engine worker: spawn it, talk to it, notice its death.

Messages sent before the worker has started wait here, then in the socket: no caller has to
know whether the worker is up yet.
"""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Awaitable, Callable

from services.gpu_agent import ipc
from services.settings import GpuSettings, parse_bytes

log = logging.getLogger(__name__)

_STOP_GRACE_S = 5.0

OnMessage = Callable[[ipc.FromWorker], Awaitable[None]]
OnDeath = Callable[[str], Awaitable[None]]


class WorkerLink:
    """One engine worker process. Use once: a new worker is a new link.

    ``on_message`` gets every message in order; ``on_death`` is called once, with the reason,
    when the worker ends without having been told to.
    """

    def __init__(self, gpu: GpuSettings, on_message: OnMessage, on_death: OnDeath) -> None:
        self.pid = 0
        self._gpu = gpu
        self._on_message = on_message
        self._on_death = on_death
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._early: list[bytes] = []  # sent before start

    async def start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C is for control, which stops us in order
            )
        finally:
            theirs.close()
        self.pid = self._process.pid
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._writer.writelines(self._early)
        self._early.clear()
        self._task = asyncio.create_task(self._read(reader))

    def _command(self, descriptor: int) -> list[str]:
        command = [sys.executable, "-m", "services.gpu_agent.worker", "--fd", str(descriptor)]
        command += ["--device", self._gpu.device, "--index", str(self._gpu.index)]
        if self._gpu.memory != "auto":
            command += ["--budget-bytes", str(parse_bytes(self._gpu.memory))]
        if self._gpu.page != "auto":
            command += ["--page-bytes", str(parse_bytes(self._gpu.page))]
        if self._gpu.threads:
            command += ["--threads", str(self._gpu.threads)]
        return command

    def send(self, message: ipc.ToWorker) -> None:
        """Queue ``message``. After the worker's death it goes nowhere: `on_death` says so."""
        if self._writer is None:
            self._early.append(ipc.frame(message))
        elif not self._writer.is_closing():
            self._writer.write(ipc.frame(message))

    async def stop(self) -> None:
        """Ask the worker to end; kill it if it does not within 5 s."""
        self._stopping = True
        self.send(ipc.Shutdown())
        if not self._process:
            return
        try:
            await asyncio.wait_for(self._process.wait(), _STOP_GRACE_S)
        except TimeoutError:
            log.warning("engine worker %d does not stop; killing it", self.pid)
            self._process.kill()
            await self._process.wait()
        if self._task:
            await self._task
        if self._writer:
            self._writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        frames = ipc.FrameReader()
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                for body in frames.feed(data):
                    try:
                        await self._on_message(ipc.from_worker_decoder.decode(body))
                    except Exception:
                        log.exception("handling a message of the engine worker failed")
        assert self._process
        if not self._stopping:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()  # it closed its socket: whatever is left of it is useless
        code = await self._process.wait()
        if not self._stopping:
            await self._on_death(_describe_exit(code))


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"the engine worker ended with exit status {code}"
    hint = " (out of host memory?)" if -code == 9 else ""
    with contextlib.suppress(ValueError):
        return f"the engine worker was killed by {signal.Signals(-code).name}{hint}"
    return f"the engine worker was killed by signal {-code}"
