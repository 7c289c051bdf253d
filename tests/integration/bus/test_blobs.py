"""Files in a stream, and streams that are followed, on a real nats-server that dies."""

from collections.abc import AsyncIterator

import pytest

from schemas import names
from schemas.stream import Failed
from services.bus import Bus, BusError, blobs, declare, history
from services.bus.connection import RawMessage
from services.bus.topology import result_stream
from tests.integration.bus.kit import Box, Parties
from tests.integration.nats_process import NatsServer

SUBJECT = names.file_subject("file-1")
RESULTS = names.result_subject("batch_1")


async def parts(*sizes: int) -> AsyncIterator[bytes]:
    for i, size in enumerate(sizes):
        yield bytes([i]) * size


async def whole(bus: Bus) -> bytes:
    return b"".join([chunk async for chunk in blobs.read(bus, names.STREAM_FILES, SUBJECT)])


async def test_a_file_is_what_was_written_whatever_its_parts(
    nats_server: NatsServer, party: Parties, api: Bus
) -> None:
    sizes = (1, 0, blobs.CHUNK_BYTES, 10, 9 * blobs.CHUNK_BYTES + 5, 3)
    assert await blobs.write(api, SUBJECT, parts(*sizes)) == sum(sizes)
    expected = b"".join([part async for part in parts(*sizes)])
    assert await whole(api) == expected
    nats_server.restart()
    again = await party("api")
    assert await whole(again) == expected
    await blobs.remove(again, names.STREAM_FILES, SUBJECT)
    assert await whole(again) == b""
    await blobs.remove(again, names.STREAM_FILES, SUBJECT)


async def test_a_full_stream_says_so(api: Bus, party: Parties) -> None:
    admin = await party("admin")
    config = await admin.jetstream(f"STREAM.INFO.{names.STREAM_FILES}")
    small = config["config"] | {"max_bytes": 3 * blobs.CHUNK_BYTES}
    await admin.jetstream(f"STREAM.UPDATE.{names.STREAM_FILES}", small)
    with pytest.raises(blobs.NoRoom, match="no room"):
        await blobs.write(api, SUBJECT, parts(4 * blobs.CHUNK_BYTES))


async def test_a_stream_is_followed_from_its_beginning_and_on_after_a_restart(
    nats_server: NatsServer, party: Parties, api: Bus, agent: Bus
) -> None:
    async def say(number: int) -> None:
        chunk = Failed("r", number, "cancelled", "x")
        await agent.publish(names.result_subject("batch_1", number), chunk)
        await agent.publish(names.result_subject("batch_2", number), chunk)
        await agent.flush()

    for number in (1, 2):
        await say(number)
    box: Box[RawMessage] = Box()
    stop = await history.follow(api, names.STREAM_RESULTS, RESULTS, box.put)
    assert [raw.subject[-1] for raw in box.all] == ["1", "2"]
    await say(3)
    await box.count(3)
    nats_server.restart()
    agent = await party("agent")
    await say(4)
    await box.count(4)
    assert [raw.subject for raw in box.all] == [
        names.result_subject("batch_1", number) for number in (1, 2, 3, 4)
    ]
    await stop()


async def test_an_answer_to_a_stream_is_heard_by_somebody(api: Bus, agent: Bus) -> None:
    """An agent takes "no responders" for a client that has left."""
    answers: Box[RawMessage] = Box()
    inbox = agent.new_inbox("gone")
    await agent.subscribe_raw(inbox, answers.put)
    chunk = Failed("r", 1, "cancelled", "x")
    await agent.publish(names.result_subject("batch_1", 1), chunk, reply=inbox)
    await answers.count(1)
    await agent.publish("_INBOX_api.nobody", chunk, reply=inbox)
    await answers.count(2)
    assert [raw.headers.get("Status") for raw in answers.all] == [None, "503"]


async def test_a_server_of_an_earlier_version_is_told_what_to_do(party: Parties) -> None:
    admin = await party("admin")
    old = result_stream() | {"name": names.STREAM_REQUESTS, "subjects": ["hs.v1.requests.>"]}
    await admin.jetstream(f"STREAM.CREATE.{names.STREAM_REQUESTS}", old)
    with pytest.raises(BusError, match="restart nats-server"):
        await declare(admin)
