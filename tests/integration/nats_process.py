"""A real nats-server that tests may kill and start again."""

import socket
import subprocess
import time
from pathlib import Path

from services.bus import BusOptions
from services.ops.nats_server import NatsPlan, ServerTls, free_port, write_config

START_S = 10.0


class NatsServer:
    """A real nats-server in a folder of its own, on free ports, which tests may kill."""

    def __init__(self, folder: Path, tls: ServerTls | None = None) -> None:
        self.folder = folder
        port = http_port = free_port(0)
        while http_port == port:  # nobody holds the first one yet
            http_port = free_port(0)
        self.plan: NatsPlan = write_config(folder, port=port, http_port=http_port, tls=tls)
        self.log_file = folder / "nats-server.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def credentials(self) -> dict[str, BusOptions]:
        """Connection options by user: admin, api, scheduler, agent."""
        return self.plan.credentials

    @property
    def pid(self) -> int:
        assert self._process, "the server does not run"
        return self._process.pid

    def start(self) -> None:
        """Start it, and wait until it accepts connections."""
        assert self._process is None, "the server runs already"
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(self.plan.command(), stdout=log, stderr=log)
        host, port = self.credentials["admin"].url.rpartition("/")[2].split(":")
        give_up_at = time.monotonic() + START_S
        while True:
            try:
                socket.create_connection((host, int(port)), timeout=1).close()
                return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > give_up_at:
                    raise AssertionError(
                        f"nats-server did not start:\n{self.log_file.read_text()}"
                    ) from None
                time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL: memory streams are lost, file streams and buckets stay."""
        self._end("kill")

    def stop(self) -> None:
        self._end("terminate")

    def restart(self) -> None:
        """SIGKILL, then start again on the same port with the same files."""
        self.kill()
        self.start()

    def _end(self, how: str) -> None:
        if self._process is None:
            return
        getattr(self._process, how)()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        self._process = None
