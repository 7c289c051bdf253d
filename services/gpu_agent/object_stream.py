"""Objects to memory: many ranges at once, each to an address of its own.

runai-model-streamer does it, without a copy of ours in between and without the interpreter lock.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

import torch

from services.gpu_agent.headers import BadCheckpoint
from services.gpu_agent.object_store import Store, explained, needed, session

_MAX_IN_FLIGHT: Final = 2  # submissions: one arrives while the next is on its way already
_PROGRESS_S: Final = 0.1
_STALLED_S: Final = 120.0


@dataclass(frozen=True)
class Range:
    """Bytes of ``uri``, from ``start`` on, and where they go: ``target`` is uint8, 1-D.

    ``arrived`` is called once they are there.
    """

    uri: str
    start: int
    target: torch.Tensor
    arrived: Callable[[], None]


def stream(batches: Iterable[Sequence[Range]], on_progress: Callable[[], None]) -> None:
    """Read all ranges. A batch, none of them empty, is asked for when it is its turn, so that its
    targets can be made then.

    ``on_progress`` is called several times a second, and like ``arrived`` in this thread. Raises
    BadCheckpoint, and what the callbacks raise; no target is written to after that.
    """
    with _Streamer() as streamer:
        told_at = time.monotonic()
        waiting = iter(batches)
        while True:
            while streamer.num_in_flight < _MAX_IN_FLIGHT and (batch := next(waiting, None)):
                streamer.submit(batch)
            if not streamer.num_in_flight:
                return
            if (read := streamer.next_arrival()) is not None:
                read.arrived()
            if time.monotonic() - told_at >= _PROGRESS_S:
                told_at = time.monotonic()
                on_progress()


class _Streamer:
    """runai-model-streamer's lowest call, as of 0.17: ``runai_request``.

    It takes ranges with absolute destinations, and a read under way can not be called off. So
    targets are held here until they have arrived, or ``runai_end`` has waited for the others.
    """

    def __init__(self) -> None:
        self._native = needed("runai_model_streamer.libstreamer.libstreamer")
        self._in_flight: dict[int, list[list[Range]]] = {}  # submission -> ranges by file
        self._moved_at = time.monotonic()

    def __enter__(self) -> "_Streamer":
        self._streamer = self._native.runai_start()
        try:
            with explained("the streamer's credentials"):
                keys = _credentials(self._native.S3Credentials)
                self._native.runai_set_credentials(self._streamer, keys)
        except BaseException:
            self._native.runai_end(self._streamer)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._native.runai_end(self._streamer)

    @property
    def num_in_flight(self) -> int:
        """Submissions of which something is still to arrive."""
        return len(self._in_flight)

    def submit(self, batch: Sequence[Range]) -> None:
        """Have all of ``batch`` read. Raises BadCheckpoint."""
        files = [list(ranges) for _, ranges in groupby(sorted(batch, key=_uri), key=_uri)]
        flat = [one for ranges in files for one in ranges]
        try:
            number = self._native.runai_request(
                self._streamer,
                [ranges[0].uri for ranges in files],
                [len(ranges) for ranges in files],
                [one.start for one in flat],
                [one.target.numel() for one in flat],
                [one.target.data_ptr() for one in flat],
            )
        except ValueError as error:
            raise BadCheckpoint(f"{flat[0].uri} can not be read: {error}") from error
        self._in_flight[number] = files

    def next_arrival(self) -> Range | None:
        """A range that is there now; None if none came within a moment. Raises BadCheckpoint."""
        try:
            response = self._native.runai_response(self._streamer, int(_PROGRESS_S * 1000))
        except TimeoutError:
            if time.monotonic() - self._moved_at < _STALLED_S:
                return None
            uri = next(iter(self._in_flight.values()))[0][0].uri
            raise BadCheckpoint(f"{uri}: nothing arrived for {_STALLED_S:.0f} s") from None
        if response is None:
            raise BadCheckpoint("the object store's reader was shut down")
        code, number, file, index, is_done = response
        self._moved_at = time.monotonic()
        read: Range = self._in_flight[number][file][index]
        if code != 0:
            cause = self._native.runai_response_str(code).decode()
            raise BadCheckpoint(
                f"{read.uri} can not be read at byte {read.start}: {cause}{_diagnosis(read.uri)}"
            )
        if is_done:
            del self._in_flight[number]
        return read


def _uri(one: Range) -> str:
    return one.uri


def _diagnosis(uri: str) -> str:
    """What may have gone wrong with an object, as the streamer tells little."""
    folder, _, name = uri.rpartition("/")
    try:
        return "" if name in Store(folder).versions() else ": there is no such object any more"
    except BadCheckpoint as error:
        return f": {error}"


def _credentials(kind: Any) -> Any:
    """For the streamer, ``kind``: what boto3 found, so that both are the same user."""
    boto = session()
    found = boto.get_credentials()
    frozen = found.get_frozen_credentials() if found else None
    return kind(
        access_key_id=frozen.access_key if frozen else None,
        secret_access_key=frozen.secret_key if frozen else None,
        session_token=frozen.token if frozen else None,
        region_name=boto.region_name or "us-east-1",
    )
