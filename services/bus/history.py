"""What a stream still holds on some subjects, read from some time on, without a consumer.

The server hands out stored messages in batches (NATS ADR-31), so there is nothing to make before
and nothing to clean up after. The user needs ``$JS.API.DIRECT.GET.<stream>``.
"""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import msgspec

from services.bus.connection import Bus, BusError, BusUnavailable, RawMessage

_BATCH = 256
_PATIENCE_S = 5.0
_NOTHING = ("404", "408")  # no such message
_END_OF_BATCH = "204"


def seconds(stamp: str) -> float:
    """A time stamp of the server (nanoseconds, RFC 3339) as unix seconds."""
    return datetime.fromisoformat(stamp).timestamp()


async def read(bus: Bus, stream: str, subject: str, since: float) -> AsyncIterator[RawMessage]:
    """The messages of ``stream`` on ``subject`` (wildcards allowed) since then (unix seconds),
    oldest first, up to the newest one.

    Raises BusUnavailable, and BusError where the stream does not exist or refuses.
    """
    start: dict[str, Any] = {"start_time": datetime.fromtimestamp(since, UTC).isoformat()}
    while True:
        batch = await _batch(bus, stream, {"next_by_subj": subject, "batch": _BATCH, **start})
        for raw in batch:
            yield raw
        if len(batch) < _BATCH:
            return
        start = {"seq": int(batch[-1].headers["Nats-Sequence"]) + 1}


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
