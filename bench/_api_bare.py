"""The measure of `bench.api`: a bare ASGI app on the api's own server, with no bus and no model.

    python -m bench._api_bare EVENTS

EVENTS is a file that the api once answered with: server-sent events. Each request gets them again,
one send per event. The first ones wait until as many requests are here as the query string says.
"""

import asyncio
import sys
from pathlib import Path
from typing import Any

import uvloop

from services.api.service import Server, listen
from services.settings import ApiSettings

_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream")],
}


class Bare:
    """No framework: an ASGI callable."""

    def __init__(self, events: list[bytes]) -> None:
        self._events = events
        self._waiting = 0
        self._gate = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        gate = self._gate
        self._waiting += 1
        if self._waiting == int(scope["query_string"] or b"1"):
            self._waiting, self._gate = 0, asyncio.Event()
            gate.set()
        await gate.wait()
        await send(_START)
        for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _main(events: bytes) -> None:
    listener = listen("127.0.0.1", 0)
    print(listener.getsockname()[1], flush=True)
    whole = events.split(b"\n\n")[:-1]
    app = Bare([event + b"\n\n" for event in whole])
    await Server(app, ApiSettings()).serve(sockets=[listener])


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_main(Path(sys.argv[1]).read_bytes()))
