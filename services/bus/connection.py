"""One NATS connection: typed publish and subscribe, JetStream calls, trace context.

    BusError
    |- BusUnavailable    no server answered in time, or it refused our credentials
    |  '- NoResponder    nobody is there who would answer such a request
    |- JetStreamError    the JetStream API refused a call; .code is its err_code

Messages are msgspec structs as JSON, so that ``nats sub 'hs.v1.>'`` reads well. Every
publish carries the caller's W3C trace context in its headers; every handler gets it back
as ``Message.context``. Beside `parser`, this is the only file that imports nats.
"""

import asyncio
import itertools
import logging
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import nats
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from opentelemetry import propagate
from opentelemetry.context import Context

from services.bus.parser import Listener, ListeningParser

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_PENDING_BYTES = 32 * 2**20  # what may wait in the client while the server is away


class BusError(Exception):
    pass


class BusUnavailable(BusError):
    pass


class NoResponder(BusUnavailable):
    pass


class JetStreamError(BusError):
    def __init__(self, subject: str, code: int, description: str) -> None:
        super().__init__(f"{subject}: {description} (err_code {code})")
        self.code = code

    @property
    def is_wrong_revision(self) -> bool:
        """A write was refused since the key is not as its writer knew it."""
        return self.code == 10071  # "wrong last sequence"


class BusOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the server is and who we are. Also the form of a credentials file (JSON)."""

    url: str = "nats://127.0.0.1:4222"
    user: str = ""
    password: str = ""
    inbox_prefix: str = "_INBOX"
    tls_ca: str = ""  # PEM file to check the server's certificate with; empty: the system's

    @classmethod
    def read(cls, path: Path, url: str | None = None, tls_ca: str = "") -> "BusOptions":
        """The credentials file at ``path``; ``url``, ``tls_ca`` over its own. Raises BusError."""
        try:
            options = msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, msgspec.DecodeError) as error:
            raise BusError(f"can not read NATS credentials from {path}: {error}") from error
        given = {key: value for key, value in (("url", url), ("tls_ca", tls_ca)) if value}
        return msgspec.structs.replace(options, **given)

    def tls(self) -> ssl.SSLContext | None:
        """How to check the server; None: no TLS. Raises BusError."""
        if not self.url.startswith(("tls://", "wss://")) and not self.tls_ca:
            return None
        try:
            return ssl.create_default_context(cafile=self.tls_ca or None)
        except OSError as error:  # SSLError is one
            why = error.strerror if isinstance(error, FileNotFoundError) else error
            raise BusError(f"nats: tls_ca = {self.tls_ca!r} can not be used: {why}") from error


@dataclass(frozen=True)
class Message(Generic[T]):
    """One received message, decoded."""

    subject: str
    body: T
    headers: Mapping[str, str]

    @property
    def context(self) -> Context:
        """The sender's trace context. Read only when asked for: it costs more than the body."""
        return propagate.extract(self.headers)


@dataclass(frozen=True)
class RawMessage:
    """One received message as it came; ``reply`` is where an answer or ack goes."""

    subject: str
    reply: str
    data: bytes
    headers: Mapping[str, str]


Handler = Callable[[Message[T]], Awaitable[None]]
RawHandler = Callable[[RawMessage], Awaitable[None]]
Hook = Callable[[], Awaitable[None]]


def header_of(block: bytes, name: bytes) -> str:
    """The value of one header of a block as `Bus.listen` gives it; empty where it is missing."""
    begin = block.find(b"\r\n" + name + b":")
    if begin < 0:
        return ""
    begin += len(name) + 3
    return block[begin : block.find(b"\r\n", begin)].strip().decode(errors="replace")


def headers_of(block: bytes) -> dict[str, str]:
    """All headers of a block as `Bus.listen` gives it."""
    lines = block.decode(errors="replace").split("\r\n")[1:]  # the first one is the version
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, colon, value in pairs if colon}


class _Client(Client):
    """nats-py's client with a short way for `Bus.listen`: no queue, no task, headers unread."""

    def __init__(self) -> None:
        super().__init__()
        self._ps = self.parser = ListeningParser(self)

    async def _process_msg(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None
    ) -> None:
        listener = self.parser.listeners.get(b"%d" % sid)
        if listener is None:
            await super()._process_msg(sid, subject, reply, data, headers)  # type: ignore[arg-type]
            return
        try:
            listener(subject.decode(), data, headers or b"", reply.decode())
        except Exception:
            log.exception("listener failed on %s", subject)


class Bus:
    """A connected client. Reconnects by itself for ever; see `on_reconnect`."""

    def __init__(self, options: BusOptions, service: str) -> None:
        self.options = options
        self.service = service
        self._client = _Client()
        self._encoder = msgspec.json.Encoder()
        self._hooks: dict[int, Hook] = {}
        self._ids = itertools.count()
        self._rearming: asyncio.Task[None] | None = None
        self.inbox = ""  # our private subject prefix; set once connected

    @classmethod
    async def connect(cls, options: BusOptions, *, service: str, patience_s: float = 15.0) -> "Bus":
        """Connect as ``service``, waiting up to ``patience_s`` for a server.

        Raises BusUnavailable, at once where the server refuses our credentials.
        """
        tls = options.tls()
        bus = cls(options, service)
        refused: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def on_error(error: Exception) -> None:
            # Permission denials arrive here, asynchronously: make them loud.
            # That a connection broke is told by `_disconnected`.
            if not isinstance(error, OSError | TimeoutError | nats.errors.UnexpectedEOF):
                log.error("nats (%s): %s", service, error)
                if "uthorization" in str(error) and not refused.done():
                    refused.set_result(str(error))
            # A certificate that is not good now will not be good in a moment.
            if isinstance(error, ssl.SSLCertVerificationError) and not refused.done():
                refused.set_result(f"its certificate is not to be trusted: {error.verify_message}")

        connecting = asyncio.ensure_future(
            bus._client.connect(
                options.url,
                name=f"hotswap-{service}",
                user=options.user or None,
                password=options.password or None,
                inbox_prefix=options.inbox_prefix,
                tls=tls,
                error_cb=on_error,
                disconnected_cb=bus._disconnected,
                reconnected_cb=bus._reconnected,
                max_reconnect_attempts=-1,
                reconnect_time_wait=0.25,  # type: ignore[arg-type]
                connect_timeout=2,
                ping_interval=5,
                max_outstanding_pings=2,
                pending_size=MAX_PENDING_BYTES,
            )
        )
        try:
            await asyncio.wait(
                (connecting, refused), timeout=patience_s, return_when=asyncio.FIRST_COMPLETED
            )
        except asyncio.CancelledError:  # or it would go on trying, and connect for nobody
            connecting.cancel()
            await bus._client.close()
            raise
        why = "no answer"
        if connecting.done() and not (error := connecting.exception()):
            bus.inbox = bus._client.new_inbox()
            return bus
        if refused.done():
            why = refused.result()
        elif connecting.done():
            why = str(error)
        connecting.cancel()
        await bus._client.close()
        raise BusUnavailable(
            f"no NATS connection to {options.url} within {patience_s:g} s: {why}. "
            "Is the server running, and are --nats and --creds right?"
        )

    async def close(self) -> None:
        """Flush what was published and disconnect."""
        if self._rearming:
            self._rearming.cancel()
        if not self._client.is_closed:
            try:
                await asyncio.wait_for(self._client.flush(), 2)
            except (TimeoutError, nats.errors.Error):
                log.warning("closing the bus with unsent messages: the server does not answer")
            try:
                await self._client.close()
            except OSError:  # the connection broke while it was being closed, and is still open
                if self._client._transport:
                    self._client._transport.close()  # type: ignore[no-untyped-call]

    @property
    def is_connected(self) -> bool:
        return self._client.is_connected

    @property
    def max_payload(self) -> int:
        """Largest message the server takes, in bytes."""
        return self._client.max_payload

    def new_inbox(self, purpose: str) -> str:
        """A subject prefix of ours that was never used before (object ids are used again)."""
        return f"{self.inbox}.{purpose}.{next(self._ids)}"

    def on_reconnect(self, hook: Hook) -> Callable[[], None]:
        """Run ``hook`` after every reconnect, in the order of registration. Returns its undo.

        A restarted server has lost its memory streams and every ephemeral consumer:
        hooks declare and re-arm them, and must be idempotent.
        """
        key = next(self._ids)
        self._hooks[key] = hook
        return lambda: self._hooks.pop(key, None) and None

    # -- core NATS -----------------------------------------------------------------------

    async def publish(
        self, subject: str, message: msgspec.Struct, *, reply: str = "", **headers: str
    ) -> None:
        """Publish at most once. Waits in memory while the server is away."""
        await self.publish_raw(
            subject, self._encoder.encode(message), reply=reply, headers=self.headers(**headers)
        )

    async def request(
        self, subject: str, message: msgspec.Struct, kind: Any, timeout_s: float = 5.0
    ) -> Any:
        """Publish, and wait for the one answer: a ``kind``, or one of a union of them.

        Raises NoResponder, BusUnavailable where no answer came in time, BusError for an answer
        that can not be read.
        """
        data, headers = self._encoder.encode(message), self.headers() or None
        try:
            msg = await self._client.request(subject, data, timeout=timeout_s, headers=headers)
        except nats.errors.NoRespondersError as error:
            raise NoResponder(f"nobody answers requests on {subject}") from error
        except TimeoutError as error:
            raise BusUnavailable(f"{subject}: no answer within {timeout_s:g} s") from error
        except nats.errors.Error as error:
            raise BusError(f"{subject}: {error}") from error
        try:
            return msgspec.json.decode(msg.data, type=kind)
        except msgspec.DecodeError as error:
            raise BusError(f"{subject}: unreadable answer: {error}") from error

    async def publish_raw(
        self, subject: str, data: bytes, *, reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        try:
            await self._client.publish(subject, data, reply=reply, headers=headers or None)
        except nats.errors.Error as error:
            raise BusError(f"publish to {subject}: {error}") from error

    def headers(self, **headers: str) -> dict[str, str]:
        """``headers`` plus the current trace context. Underscores become dashes."""
        out = {name.replace("_", "-"): value for name, value in headers.items()}
        propagate.inject(out)
        return out

    async def subscribe(self, subject: str, kind: Any, handler: Handler[Any]) -> Hook:
        """Call ``handler`` with each message on ``subject``, one at a time. Returns its undo.

        ``kind`` is the struct type (or tagged union) of the body. A message that does not
        decode is logged and dropped: one bad publisher must not stop a service.
        """
        decoder = msgspec.json.Decoder(kind)

        async def on_raw(raw: RawMessage) -> None:
            try:
                body = decoder.decode(raw.data)
            except msgspec.DecodeError as error:
                log.error("dropped a message on %s: %s", raw.subject, error)
                return
            await handler(Message(raw.subject, body, raw.headers))

        return await self.subscribe_raw(subject, on_raw)

    async def subscribe_raw(self, subject: str, handler: RawHandler, *, queue: str = "") -> Hook:
        """Like `subscribe`, undecoded (status messages included). Of those who subscribe with the
        same ``queue`` one gets each message.

        The undo lets the handler see whatever the server had sent before it took note.
        """

        async def on_msg(msg: Msg) -> None:
            try:
                await handler(RawMessage(msg.subject, msg.reply, msg.data, msg.headers or {}))
            except Exception:
                log.exception("handler of %s failed on %s", subject, msg.subject)

        subscription: Subscription = await self._client.subscribe(
            subject, queue, cb=on_msg, pending_msgs_limit=-1, pending_bytes_limit=-1
        )

        async def unsubscribe() -> None:
            try:
                if self._client.is_connected:
                    # The client's own drain does not wait until the server has taken note (see
                    # `flush`), and drops what arrives later.
                    await self._client._send_unsubscribe(subscription._id)
                    await self.flush()
                    await subscription.drain()  # type: ignore[no-untyped-call]
                elif not self._client.is_closed:
                    await subscription.unsubscribe()
            except nats.errors.Error as error:  # the connection went away meanwhile: so did it
                log.debug("unsubscribing from %s: %s", subject, error)

        return unsubscribe

    async def listen(self, subject: str, listener: Listener) -> Hook:
        """Call ``listener`` with each message on ``subject``, as it is read. Returns its undo.

        For many messages a second: a small part of the cost of `subscribe_raw`, because nothing
        is queued and headers stay bytes (`header_of`). It must be quick, and can not wait.
        """

        async def never(_: Msg) -> None:
            """The client insists on a handler that waits."""

        sid = self._client._sid + 1  # known before the server may answer
        self._client.parser.listeners[b"%d" % sid] = listener
        try:
            subscription: Subscription = await self._client.subscribe(subject, cb=never)
        except nats.errors.Error as error:
            del self._client.parser.listeners[b"%d" % sid]
            raise BusError(f"subscribing to {subject}: {error}") from error

        async def unsubscribe() -> None:
            try:
                if not self._client.is_closed:
                    await self._client._send_unsubscribe(sid)
                    if self._client.is_connected:
                        await self.flush()
                    await subscription.unsubscribe()
            except nats.errors.Error as error:  # the connection went away meanwhile: so did it
                log.debug("unsubscribing from %s: %s", subject, error)
            finally:
                self._client.parser.listeners.pop(b"%d" % sid, None)

        return unsubscribe

    async def flush(self) -> None:
        """Wait until the server has seen everything sent so far (subscriptions too)."""
        # The client writes its PING ahead of what still waits to be sent: the first answer says
        # that all of it is on its way, the second that it has arrived.
        await self._client.flush()
        await self._client.flush()

    # -- JetStream -----------------------------------------------------------------------

    async def jetstream(self, api: str, body: Any = None, timeout_s: float = 5.0) -> dict[str, Any]:
        """Call ``$JS.API.<api>``. Raises JetStreamError, BusUnavailable."""
        data = self._encoder.encode(body) if body is not None else b""
        return await self._js_request(f"$JS.API.{api}", data, None, timeout_s)

    async def store(
        self, subject: str, data: bytes, headers: dict[str, str], timeout_s: float = 5.0
    ) -> int:
        """Publish into the stream that owns ``subject``; returns its sequence number."""
        seq, _ = await self.store_once(subject, data, headers, timeout_s)
        return seq

    async def store_once(
        self, subject: str, data: bytes, headers: dict[str, str], timeout_s: float = 5.0
    ) -> tuple[int, bool]:
        """Likewise; also whether it is new: a known Nats-Msg-Id has the number that it had."""
        ack = await self._js_request(subject, data, headers, timeout_s)
        return int(ack["seq"]), not ack.get("duplicate", False)

    async def _js_request(
        self, subject: str, data: bytes, headers: dict[str, str] | None, timeout_s: float
    ) -> dict[str, Any]:
        try:
            msg = await self._client.request(subject, data, timeout=timeout_s, headers=headers)
        except nats.errors.NoRespondersError as error:
            raise JetStreamError(subject, 0, "no such stream, or JetStream is off") from error
        except nats.errors.MaxPayloadError as error:
            raise BusError(
                f"{subject}: {len(data)} bytes are more than the {self.max_payload} of a message"
            ) from error
        except (nats.errors.Error, TimeoutError) as error:
            raise BusUnavailable(f"{subject}: the NATS server did not answer: {error}") from error
        answer: dict[str, Any] = msgspec.json.decode(msg.data)
        if problem := answer.get("error"):
            code, words = problem.get("err_code", 0), problem.get("description", "refused")
            raise JetStreamError(subject, code, words)
        return answer

    # -- reconnects ----------------------------------------------------------------------

    async def _disconnected(self) -> None:
        if not self._client.is_closed:
            log.warning("%s lost its NATS connection; reconnecting", self.service)

    async def _reconnected(self) -> None:
        log.warning("%s is connected to NATS again", self.service)
        if self._rearming:
            self._rearming.cancel()
        self._rearming = asyncio.create_task(self._rearm())

    async def _rearm(self) -> None:
        for key, hook in list(self._hooks.items()):
            while key in self._hooks:  # it may be undone while we are at it
                try:
                    await hook()
                    break
                except (BusError, nats.errors.Error, TimeoutError) as error:
                    # The server may still be coming up.
                    log.warning("re-arming after a reconnect: %s; trying again", error)
                    await asyncio.sleep(0.25)
                except Exception:  # a fault of ours: loud, and no reason to leave out the others
                    log.exception("re-arming after a reconnect failed")
                    break
