"""A nats-server of its own and `hotswap scheduler` processes on it, for benchmarks."""

import asyncio
import contextlib
import socket
import sys
import tempfile
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncIterator
from pathlib import Path

from schemas import names
from schemas.commands import Command
from schemas.events import Event, LeaderElected
from schemas.state import AgentStatus, ModelFacts, ReplicaStatus
from services.bus import Bus, Message, declare
from services.bus.topology import MAX_QUEUED_PER_MODEL
from services.ops.nats_server import NatsPlan, free_port, write_config
from services.settings import Settings, dump

PAGE = 4096
FACTS = ModelFacts("Fake", "float32", 1, PAGE, PAGE, max_model_len=512, max_batch=8)
HEARTBEAT_S = 1.0
PATIENCE_S = 60.0


class Seen:
    """Messages with the time of their arrival (monotonic), and waiting for one of them."""

    def __init__(self) -> None:
        self.items: list[tuple[float, object]] = []
        self._grown = asyncio.Condition()

    async def add(self, item: object) -> None:
        now = time.monotonic()
        async with self._grown:
            self.items.append((now, item))
            self._grown.notify_all()

    async def until(self, kind: type, after: float = 0.0, **wanted: object) -> tuple[float, object]:
        """The first ``kind`` with these attributes that arrived later than ``after``."""

        def find() -> tuple[float, object] | None:
            for at, item in self.items:
                if at <= after or not isinstance(item, kind):
                    continue
                if all(getattr(item, name) == value for name, value in wanted.items()):
                    return at, item
            return None

        try:
            async with asyncio.timeout(PATIENCE_S), self._grown:
                await self._grown.wait_for(find)
        except TimeoutError:
            raise AssertionError(f"waited {PATIENCE_S:g} s for {kind.__name__} {wanted}") from None
        found = find()
        assert found
        return found


class Service:
    """One process of the system, and its log."""

    def __init__(self, process: Process, log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def pid(self) -> int:
        return self.process.pid

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    async def says(self, words: str) -> None:
        give_up_at = time.monotonic() + PATIENCE_S
        while words not in self.log():
            if self.process.returncode is not None or time.monotonic() > give_up_at:
                raise AssertionError(f"waited for {words!r}:\n{self.log()[-4000:]}")
            await asyncio.sleep(0.01)

    async def kill(self) -> None:
        """kill -9."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL."""
        if self.process.returncode is None:
            self.process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.process.wait(), 20)
        await self.kill()


class Rig:
    """A server, an operator's view of the bus, and services to start and to kill."""

    def __init__(self, plan: NatsPlan, bus: Bus, folder: Path) -> None:
        self.plan = plan
        self.bus = bus
        self.folder = folder
        self.seen = Seen()
        self.services: list[Service] = []

    async def watch(self) -> None:
        async def on_event(message: Message[Event]) -> None:
            await self.seen.add(message.body)

        async def on_command(message: Message[Command]) -> None:
            await self.seen.add(message.body)

        await self.bus.subscribe(names.events_subject("leader_elected"), Event, on_event)
        await self.bus.subscribe(f"{names.PREFIX}.agent.*.command", Command, on_command)
        await self.bus.flush()

    async def start(self, name: str, settings: Settings, *python: str) -> Service:
        """``name``: scheduler, agent or api. ``python``: for the interpreter, as a profiler."""
        config = self.folder / "hotswap.toml"
        config.write_text(dump(settings))
        creds = str(self.plan.credential_files[name])
        command = ["services.cli", name, "--config", str(config), "--creds", creds]
        path = self.folder / f"{name}{len(self.services)}.log"
        with path.open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable, *(python or ("-m",)), *command, stdout=log, stderr=log
            )
        self.services.append(Service(process, path))
        return self.services[-1]

    async def end(self) -> None:
        for service in reversed(self.services):
            await service.stop()


@contextlib.asynccontextmanager
async def open_rig(max_queued_per_model: int = MAX_QUEUED_PER_MODEL) -> AsyncIterator[Rig]:
    """Start a nats-server on free ports, and stop all in the end."""
    with tempfile.TemporaryDirectory(prefix="hotswap-bench-") as name:
        folder = Path(name)
        plan = write_config(folder / "nats", port=free_port(0), http_port=free_port(0))
        server = await asyncio.create_subprocess_exec(
            *plan.command(), stdout=DEVNULL, stderr=DEVNULL
        )
        try:
            bus = await Bus.connect(plan.credentials["admin"], service="bench")
            await declare(bus, max_queued_per_model)
            rig = Rig(plan, bus, folder)
            try:
                await rig.watch()
                yield rig
            except AssertionError as error:
                logs = "\n".join(service.log()[-3000:] for service in rig.services)
                raise AssertionError(f"{error}\n{logs}") from error
            finally:
                await rig.end()
                await bus.close()
        finally:
            server.terminate()
            await server.wait()


class FakeAgents:
    """Agents that say what they hold, every second and to every new leader, and obey nothing."""

    def __init__(self, bus: Bus, statuses: list[AgentStatus]) -> None:
        self._bus = bus
        self._statuses = statuses

    async def start(self) -> None:
        async def on_leader(_: Message[LeaderElected]) -> None:
            await self.tell()

        subject = names.events_subject("leader_elected")
        await self._bus.subscribe(subject, LeaderElected, on_leader)
        self._beating = asyncio.create_task(self._beat())

    async def tell(self) -> None:
        for status in self._statuses:
            await self._bus.publish(names.status_subject(status.gpu), status)

    async def _beat(self) -> None:
        while True:
            await self.tell()
            await asyncio.sleep(HEARTBEAT_S)

    async def end(self) -> None:
        self._beating.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._beating


def status_of(
    gpu: str, resident: list[str], host: list[str], cold: list[str], num_free: int = 0
) -> AgentStatus:
    """An agent that knows these models, with room for ``num_free`` more."""
    states = dict.fromkeys(cold, "cold") | dict.fromkeys(host, "host")
    states |= dict.fromkeys(resident, "resident")
    replicas = [ReplicaStatus(model, state, 1, 0, FACTS) for model, state in states.items()]  # type: ignore[arg-type]
    used = 2 * PAGE * len(resident)
    budget = used + 2 * PAGE * num_free
    return AgentStatus(gpu, "i1", 1, "cpu", "fake", budget, used, PAGE, tuple(replicas))


class RawPublisher:
    """Publishes bytes that are ready to be sent: the benchmark must not be the slow one."""

    def __init__(self, plan: NatsPlan) -> None:
        options = plan.credentials["admin"]
        host, port = options.url.removeprefix("nats://").split(":")
        self._socket = socket.create_connection((host, int(port)))
        self._socket.recv(65536)  # INFO
        login = f'"user":"{options.user}","pass":"{options.password}"'
        words = f'CONNECT {{{login},"verbose":false,"headers":true}}\r\nPING\r\n'
        self._socket.sendall(words.encode())
        while b"PONG" not in self._socket.recv(65536):
            pass

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def close(self) -> None:
        self._socket.close()


def headed(subject: str, headers: dict[str, str]) -> bytes:
    """One message with headers and no body, as the request stream republishes it."""
    block = "NATS/1.0\r\n" + "".join(f"{k}: {v}\r\n" for k, v in headers.items()) + "\r\n"
    data = block.encode()
    return f"HPUB {subject} {len(data)} {len(data)}\r\n".encode() + data + b"\r\n"


def plain(subject: str, body: bytes) -> bytes:
    return f"PUB {subject} {len(body)}\r\n".encode() + body + b"\r\n"
