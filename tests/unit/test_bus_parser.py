"""The wire is cut anywhere: every message arrives once, in order, by the short way or the long."""

from typing import Any, TypeAlias

from hypothesis import given
from hypothesis import strategies as st

from services.bus.parser import ListeningParser

Told: TypeAlias = tuple[str, bytes, bytes, bytes, bytes]  # by whom, subject, reply, headers, body

HEADERS = b"NATS/1.0\r\nA: b\r\n\r\n"
OTHERS = {b"PING": "ping", b"PONG": "pong", b"INFO": "info", b"-ERR": "error"}


class Client:
    """What nats-py's parser calls."""

    def __init__(self) -> None:
        self.told: list[Told] = []

    async def _process_msg(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None
    ) -> None:
        self.told.append((str(sid), subject, reply, headers or b"", data))

    async def _process_ping(self) -> None:
        self._note("ping")

    async def _process_pong(self) -> None:
        self._note("pong")

    async def _process_info(self, _: Any) -> None:
        self._note("info")

    async def _process_err(self, _: str) -> None:
        self._note("error")

    def _note(self, what: str) -> None:
        self.told.append((what, b"", b"", b"", b""))


@st.composite
def message(draw: st.DrawFn) -> tuple[bytes, Told]:
    """A message on the wire, and what is told of it: subscription 7 has a listener, 8 has none."""
    sid = draw(st.sampled_from([b"7", b"8"]))
    subject = draw(st.sampled_from([b"a.b", b"MSG.7.x"]))
    reply = draw(st.sampled_from([b"", b"_INBOX.r"]))
    body = draw(st.binary(max_size=40) | st.just(b"MSG a 7 3\r\nabc\r\n" * 4))
    headers = draw(st.sampled_from([b"", HEADERS]))
    sizes = b"%d" % len(body)
    if headers:
        sizes = b"%d %d" % (len(headers), len(headers) + len(body))
    words = [b"HMSG" if headers else b"MSG", subject, sid, *([reply] if reply else []), sizes]
    wire = b" ".join(words) + b"\r\n" + headers + body + b"\r\n"
    return wire, (sid.decode(), subject, reply, headers, body)


@st.composite
def other(draw: st.DrawFn) -> tuple[bytes, Told]:
    word = draw(st.sampled_from(list(OTHERS)))
    rest = {b"INFO": b" {}", b"-ERR": b" 'Permissions Violation for 7 7'"}.get(word, b"")
    return word + rest + b"\r\n", (OTHERS[word], b"", b"", b"", b"")


@given(st.lists(message() | other(), max_size=12), st.data())
async def test_however_the_wire_is_cut(
    parts: list[tuple[bytes, Told]], data: st.DataObject
) -> None:
    client = Client()
    parser = ListeningParser(client)  # type: ignore[arg-type]

    def listener(subject: str, body: bytes, headers: bytes, reply: str) -> None:
        client.told.append(("7", subject.encode(), reply.encode(), headers, body))

    parser.listeners[b"7"] = listener
    wire = b"".join(wire for wire, _ in parts)
    cuts = data.draw(st.lists(st.integers(0, len(wire)), max_size=8).map(sorted))
    for begin, end in zip([0, *cuts], [*cuts, len(wire)], strict=True):
        await parser.parse(wire[begin:end])
    assert client.told == [told for _, told in parts]


async def test_after_a_reset_nothing_of_the_old_connection_is_left() -> None:
    client = Client()
    parser = ListeningParser(client)  # type: ignore[arg-type]

    async def on_error(_: str) -> None:
        parser.reset()  # as when the client connects anew

    client._process_err = on_error  # type: ignore[method-assign]
    await parser.parse(b"-ERR 'Stale Connection'\r\nMSG a 8 5\r\nab")
    await parser.parse(b"PING\r\n")
    assert client.told == [("ping", b"", b"", b"", b"")]


async def test_a_fault_in_a_listener_costs_one_message() -> None:
    parser = ListeningParser(Client())  # type: ignore[arg-type]
    heard: list[bytes] = []

    def listener(subject: str, body: bytes, headers: bytes, reply: str) -> None:
        if body == b"bad":
            raise ValueError(subject)
        heard.append(body)

    parser.listeners[b"7"] = listener
    await parser.parse(b"".join(b"MSG a 7 3\r\n%s\r\n" % body for body in (b"one", b"bad", b"two")))
    assert heard == [b"one", b"two"]
