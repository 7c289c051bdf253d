"""What a stream still holds on some subjects, read from some time on, without a consumer; and what
comes after that, with one (`follow`).

The server hands out stored messages in batches (NATS ADR-31), so there is nothing to make before
and nothing to clean up after. The user needs ``$JS.API.DIRECT.GET.<stream>``.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import msgspec

from services.bus.connection import Bus, BusError, BusUnavailable, Hook, RawMessage

_BATCH = 256
_PATIENCE_S = 5.0
_CATCH_UP_S = 60.0
_NOTHING = ("404", "408")  # no such message
_END_OF_BATCH = "204"


def seconds(stamp: str) -> float:
    """A time stamp of the server (nanoseconds, RFC 3339) as unix seconds."""
    return datetime.fromisoformat(stamp).timestamp()


async def read(
    bus: Bus, stream: str, subject: str, since: float = 0.0, size: int = _BATCH
) -> AsyncIterator[RawMessage]:
    """The messages of ``stream`` on ``subject`` (wildcards allowed) since then (unix seconds),
    oldest first, up to the newest one. ``size``: so many are asked for at a time.

    Raises BusUnavailable, and BusError where the stream does not exist or refuses.
    """
    start: dict[str, Any] = {"start_time": datetime.fromtimestamp(since, UTC).isoformat()}
    while True:
        batch = await _batch(bus, stream, {"next_by_subj": subject, "batch": size, **start})
        for raw in batch:
            yield raw
        if len(batch) < size:
            return
        start = {"seq": int(batch[-1].headers["Nats-Sequence"]) + 1}


async def follow(
    bus: Bus, stream: str, subject: str, on_raw: Callable[[RawMessage], Awaitable[None]]
) -> Hook:
    """Call ``on_raw`` with what ``stream`` holds on ``subject``, then with what comes. Returns its
    undo.

    Returns once what was there has been delivered. Goes on after reconnects, from where it was.
    The user needs ``$JS.API.CONSUMER.CREATE.<stream>``. Raises BusError, TimeoutError.
    """
    unsubscribe: Hook | None = None
    last_seq = 0

    async def arm() -> None:
        nonlocal unsubscribe
        if unsubscribe:
            await unsubscribe()
        caught_up = asyncio.Event()

        async def on_message(raw: RawMessage) -> None:
            nonlocal last_seq
            if "Status" in raw.headers:
                return
            # $JS.ACK...<stream seq>.<consumer seq>.<time>.<pending>
            tail = raw.reply.split(".")
            seq = int(tail[-4])
            try:
                if seq > last_seq:
                    last_seq = seq
                    await on_raw(raw)
            finally:
                if tail[-1] == "0":
                    caught_up.set()

        inbox = bus.new_inbox(f"follow.{stream}")
        unsubscribe = await bus.subscribe_raw(inbox, on_message)
        config = {
            "deliver_subject": inbox,
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": last_seq + 1,
            "filter_subject": subject,
            "ack_policy": "none",
            "mem_storage": True,
            "num_replicas": 1,
        }
        info = await bus.jetstream(
            f"CONSUMER.CREATE.{stream}", {"stream_name": stream, "config": config}
        )
        # Delivery starts at once, so what the server counts here may have come already.
        if info["num_pending"] + info["delivered"]["consumer_seq"]:
            await asyncio.wait_for(caught_up.wait(), _CATCH_UP_S)

    undo = bus.on_reconnect(arm)

    async def stop() -> None:
        undo()
        if unsubscribe:
            await unsubscribe()

    try:
        await arm()
    except BaseException:
        await stop()
        raise
    return stop


async def _batch(bus: Bus, stream: str, question: dict[str, Any]) -> list[RawMessage]:
    answers: asyncio.Queue[RawMessage] = asyncio.Queue()
    inbox = bus.new_inbox(f"history.{stream}")
    unsubscribe = await bus.subscribe_raw(inbox, answers.put)
    found: list[RawMessage] = []
    try:
        api = f"$JS.API.DIRECT.GET.{stream}"
        await bus.publish_raw(api, msgspec.json.encode(question), reply=inbox)
        while True:
            raw = await asyncio.wait_for(answers.get(), _PATIENCE_S)
            status = raw.headers.get("Status", "")
            if status == _END_OF_BATCH or status in _NOTHING:
                return found
            if status:
                words = raw.headers.get("Description", "no such stream")
                raise BusError(f"{api}: {words} (status {status})")
            subject = raw.headers["Nats-Subject"]
            found.append(RawMessage(subject, "", raw.data, raw.headers))
    except TimeoutError as error:
        raise BusUnavailable(f"stream {stream}: the NATS server did not answer") from error
    finally:
        await unsubscribe()
