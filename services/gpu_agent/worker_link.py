"""The control process's end of the engine worker: spawn it, talk to it, notice its death.

`WorkerLink` is one worker process; `WorkerKeeper` has one running at all times. Messages sent
before a worker has started wait here, then in the socket: no caller has to know whether the
worker is up yet.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from services.gpu_agent import ipc
from services.memcpy import with_tuned_memory
from services.settings import GpuSettings, parse_bytes

log = logging.getLogger(__name__)

STOP_GRACE_S = 5.0
_EXIT_S = 1.0  # from closing its socket to its end; then it is killed
_RESTART_PAUSE_S = 2.0  # before a new worker where the last one died within this time

OnMessage = Callable[[ipc.FromWorker], Awaitable[None]]
OnDeath = Callable[[str], Awaitable[None]]


class WorkerLink:
    """One engine worker process. Use once: a new worker is a new link.

    ``lock_fd``: see `device_lock`; the worker inherits it, and so holds the lock until its end.
    ``images``: folder by which workers share host images, if they do.
    """

    def __init__(
        self, gpu: GpuSettings, lock_fd: int | None, images: Path | None, on_message: OnMessage
    ) -> None:
        self.pid = 0
        self._gpu = gpu
        self._images = images
        self._lock_fd = lock_fd
        self._on_message = on_message
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._early: list[bytes] = []  # sent before it has started

    async def run(self) -> str:
        """Start the worker, hand on its messages in order; returns why it ended.

        Cancelled, it kills the worker and waits for its end.
        """
        try:
            reader = await self._spawn()
        except OSError as error:
            return f"the engine worker can not be started: {error}"
        assert self._process
        assert self._writer
        fault = ""
        try:
            fault = await self._read(reader)
            if not fault:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._process.wait(), _EXIT_S)
        finally:
            self._writer.close()
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()  # without its socket it is useless
            code = await self._process.wait()
        return fault or _describe_exit(code)

    def send(self, message: ipc.ToWorker) -> None:
        """Queue ``message``. After the worker's death it goes nowhere: `run` says so."""
        if self._writer is None:
            self._early.append(ipc.frame(message))
        elif not self._writer.is_closing():
            self._writer.write(ipc.frame(message))

    async def _spawn(self) -> asyncio.StreamReader:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        inherited = [theirs.fileno()] + ([] if self._lock_fd is None else [self._lock_fd])
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=inherited,
                env=with_tuned_memory(os.environ),
                start_new_session=True,  # Ctrl-C is for control, which stops us in order
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self.pid = self._process.pid
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._writer.writelines(self._early)
        self._early.clear()
        return reader

    def _command(self, descriptor: int) -> list[str]:
        command = [sys.executable, "-m", "services.gpu_agent.worker", "--fd", str(descriptor)]
        command += ["--device", self._gpu.device, "--index", str(self._gpu.index)]
        if self._gpu.memory != "auto":
            command += ["--budget-bytes", str(parse_bytes(self._gpu.memory))]
        if self._gpu.page != "auto":
            command += ["--page-bytes", str(parse_bytes(self._gpu.page))]
        if self._gpu.threads:
            command += ["--threads", str(self._gpu.threads)]
        if self._gpu.host_memory != "auto":
            command += ["--host-bytes", str(parse_bytes(self._gpu.host_memory))]
        if self._gpu.host_kv_memory != "auto":
            command += ["--host-kv-bytes", str(parse_bytes(self._gpu.host_kv_memory))]
        command += ["--verify", self._gpu.verify, "--link-gb-per-s", str(self._gpu.link_gb_per_s)]
        if not self._gpu.cuda_graphs:
            command.append("--no-graphs")
        if self._images:
            command += ["--share-images", str(self._images)]
        return command

    async def _read(self, reader: asyncio.StreamReader) -> str:
        """Hand on messages until the socket closes. Returns what was wrong with them, if so."""
        frames = ipc.FrameReader()
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                try:
                    messages = [ipc.from_worker_decoder.decode(body) for body in frames.feed(data)]
                except (ValueError, msgspec.DecodeError) as error:
                    return f"the engine worker sent what nobody can read: {error}"
                for message in messages:
                    try:
                        await self._on_message(message)
                    except Exception:  # one bad message must not end the reading of all others
                        log.exception("handling %s of the engine worker failed", message)
        return ""


class WorkerKeeper:
    """Has an engine worker running until `stop`.

    ``greeting`` is what each worker is told first. When one ends, its successor's link takes
    `send` from that moment on, then ``on_death`` is called with the reason, then it starts.
    """

    def __init__(
        self,
        gpu: GpuSettings,
        lock_fd: int | None,
        images: Path | None,
        greeting: Callable[[], list[ipc.ToWorker]],
        on_message: OnMessage,
        on_death: OnDeath,
    ) -> None:
        self._gpu = gpu
        self._lock_fd = lock_fd
        self._images = images
        self._greeting = greeting
        self._on_message = on_message
        self._on_death = on_death
        self._link = self._new_link()
        self._task: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def pid(self) -> int:
        """The worker's process id; 0 where none was started."""
        return self._link.pid

    def send(self, message: ipc.ToWorker) -> None:
        self._link.send(message)

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """Ask the worker to end; kill it if it does not within ``grace_s`` seconds."""
        self._stopping = True
        if not self._task:
            return
        self.send(ipc.Shutdown())
        await asyncio.wait((self._task,), timeout=grace_s)
        if not self._task.done() and grace_s:
            log.warning("engine worker %d does not stop; killing it", self.pid)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def _new_link(self) -> WorkerLink:
        link = WorkerLink(self._gpu, self._lock_fd, self._images, self._on_message)
        for message in self._greeting():
            link.send(message)
        return link

    async def _run(self) -> None:
        while True:
            started_at = time.monotonic()
            reason = await self._link.run()
            if self._stopping:
                return
            log.error("%s; starting a new one", reason)
            self._link = self._new_link()
            try:
                await self._on_death(reason)
            except Exception:  # a GPU without a worker would be the greater harm
                log.exception("handling the death of the engine worker failed")
            if time.monotonic() - started_at < _RESTART_PAUSE_S:
                await asyncio.sleep(_RESTART_PAUSE_S)


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"the engine worker ended with exit status {code}"
    hint = " (out of host memory?)" if -code == 9 else ""
    with contextlib.suppress(ValueError):
        return f"the engine worker was killed by {signal.Signals(-code).name}{hint}"
    return f"the engine worker was killed by signal {-code}"
