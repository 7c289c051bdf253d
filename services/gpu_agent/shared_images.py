"""One copy of each host image for all engine workers of one user on one machine.

An image lies in a memory file: it has no name, so the kernel frees it when its last holder is
gone, however that ended. Whoever has it hands the descriptor to whoever asks, so it outlives the
worker that filled it.

    worker 1                              folder                         worker 2
    1. locks KEY          ------>         KEY.lock       <------   1. waits for the lock
    2. asks all sockets: nobody has it
    3. makes the file, fills it, seals it
    4. maps it read-only, offers it on    <pid>-<random>.sock
    5. unlocks KEY                                                 2. asks all sockets: got it
                                                                   3. maps it read-only, checks
                                                                      every page, offers it

Nobody can harm another's copy: the file is sealed once it is filled, and all hold it by mappings
that can only be read (see host_image.py).

What is broken elsewhere costs memory, not service: a peer that hangs, offers rubbish or damaged
bytes, or holds a lock for too long is logged and passed over, and the worker loads a copy of its
own.
"""

import fcntl
import hashlib
import logging
import os
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final

from services.gpu_agent.checkpoint import Checkpoint
from services.gpu_agent.checksums import Corruption
from services.gpu_agent.host_image import HostImage, Layout, fill_file, is_sealed

logger = logging.getLogger(__name__)

_KEY_BYTES: Final = 64  # hexadecimal SHA-256
_ASK_S: Final = 5.0  # for one peer's answer; it may be busy importing with the interpreter lock
_ANSWER_S: Final = 1.0  # for an asking peer's question, which it sends at once
_START_S: Final = 10.0  # for others that start at the same time
_LOAD_S: Final = 900.0  # for another worker that loads the same image
_POLL_S: Final = 0.05


def image_key(checkpoint: Checkpoint, layout: Layout, page_bytes: int) -> str:
    """What images with equal bytes and checksums have in common: 64 hexadecimal digits.

    That is the files as they were when their headers were read, the packing, and the pages'
    size, by which checksums are taken.
    """
    files = sorted((str(file), stamp) for file, stamp in checkpoint.files.items())
    return hashlib.sha256(repr((1, files, layout, page_bytes)).encode()).hexdigest()


class ImageExchange:
    """One worker's part in sharing images by way of ``folder``, which is made if need be.

    All methods may be called from any thread. A daemon thread answers the other workers.
    Raises OSError where the folder can not be used, PermissionError where others could use it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise PermissionError(
                f"{folder} is open to other users, who must not see models: give it to this user "
                "with mode 0700, or set share_images = false"
            )
        self._folder = folder
        self._guard = threading.Lock()
        self._offers: dict[str, list[int]] = {}  # key -> a descriptor per image that is held
        self._closed = threading.Event()
        self._socket = folder / f"{os.getpid()}-{secrets.token_hex(4)}.sock"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            # Under the lock, no socket is between bind and listen: one that refuses is dead.
            with _locked(folder / "start.lock", _START_S) as is_ours:
                if is_ours:
                    _remove_stale(folder)
                with _address(self._socket) as address:
                    self._listener.bind(address)
                self._listener.listen()
        except BaseException:
            self._listener.close()
            raise
        self._thread = threading.Thread(target=self._serve, name="images", daemon=True)
        self._thread.start()

    def obtain(self, key: str, layout: Layout, fill: Callable[[HostImage], None]) -> HostImage:
        """The image of ``key`` (see ``image_key``), read-only, filled by one worker of all.

        ``fill(image)`` runs if nobody has it: it writes to the given image, sets its checksums,
        and keeps neither. What it raises comes out of here, and the next one who asks fills.
        Waits while another worker fills. Goes on being offered until ``HostImage.free``.
        Raises OSError where the system has no memory files, or not that much memory.
        """
        with _locked(self._folder / f"{key}.lock", _LOAD_S) as is_ours:
            if not is_ours:
                logger.warning(
                    "host image %s: another worker has been loading it for %d s; this one loads "
                    "a copy of its own",
                    key[:12],
                    _LOAD_S,
                )
            image = self._borrowed(key, layout)
            if image is None:
                file = fill_file(f"hotswap-{key[:12]}", layout, fill)
                image = self._held(key, layout, file)
            return image

    def close(self) -> None:
        """Stop offering. Images that are held stay usable. Idempotent."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join()
        self._listener.close()
        self._socket.unlink(missing_ok=True)
        with self._guard:
            for files in self._offers.values():
                for file in files:
                    os.close(file)
            self._offers.clear()

    # -- what this worker holds ------------------------------------------------------------

    def _held(self, key: str, layout: Layout, file: int) -> HostImage:
        """An image over ``file``, which is offered and closed with it."""
        try:
            image = HostImage.over(file, layout, partial(self._withdraw, key, file))
        except BaseException:
            os.close(file)
            raise
        with self._guard:
            self._offers.setdefault(key, []).append(file)
        return image

    def _withdraw(self, key: str, file: int) -> None:
        with self._guard:
            files = self._offers.get(key, [])
            if file in files:  # else closed by close()
                files.remove(file)
                os.close(file)
            if not files:
                self._offers.pop(key, None)

    def _own(self, key: str) -> int | None:
        """A new descriptor: the one that is held may be closed by another thread any time."""
        with self._guard:
            files = self._offers.get(key)
            return os.dup(files[-1]) if files else None

    # -- between workers -------------------------------------------------------------------

    def _borrowed(self, key: str, layout: Layout) -> HostImage | None:
        """The image from whoever has it, this worker first; every page of it is checked."""
        peers = sorted(peer for peer in self._folder.glob("*.sock") if peer != self._socket)
        for holder in (self._socket, *peers):
            file = self._own(key) if holder == self._socket else _ask(holder, key)
            if file is None:
                continue
            if not is_sealed(file, layout):
                logger.warning("worker at %s offers no host image for %s", holder, key[:12])
                os.close(file)
                continue
            image = self._held(key, layout, file)
            try:
                if image.checksums is not None:
                    # Else faulty memory would go round, and loading anew would never mend it.
                    image.checksums.check_all(image.tensor, f"of the host image at {holder}")
                return image
            except Corruption as error:
                logger.warning("%s", error)
                image.free()
        return None

    def _serve(self) -> None:
        while not self._closed.is_set():
            try:
                with self._listener.accept()[0] as peer:
                    self._answer(peer)
            except OSError as error:
                if not self._closed.wait(_POLL_S):  # no spinning where descriptors ran out
                    logger.warning("could not answer a worker about host images: %s", error)

    def _answer(self, peer: socket.socket) -> None:
        if not _is_same_user(peer):
            return
        peer.settimeout(_ANSWER_S)
        key = peer.recv(_KEY_BYTES).decode("ascii", "replace")
        if not key:  # it only wanted to know whether somebody listens
            return
        file = self._own(key)
        if file is None:
            peer.send(b"-")
            return
        try:
            socket.send_fds(peer, [b"+"], [file])
        finally:
            os.close(file)


def _ask(path: Path, key: str) -> int | None:
    """A descriptor of ``key`` from the worker at ``path``; None if there is none to be had."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer, _address(path) as address:
        peer.settimeout(_ASK_S)
        try:
            peer.connect(address)
            if not _is_same_user(peer):
                return None
            peer.send(key.encode())
            # Not socket.recv_fds: Python 3.11's drops the flags.
            room = socket.CMSG_LEN(struct.calcsize("i"))
            _, ancillary, _, _ = peer.recvmsg(1, room, socket.MSG_CMSG_CLOEXEC)
        except (ConnectionError, FileNotFoundError):
            return None  # died, or just left
        except OSError as error:
            logger.warning("worker at %s does not share host images: %s", path, error)
            return None
        for _level, _kind, descriptor in ancillary:
            return int.from_bytes(descriptor, sys.byteorder)
        return None


def _is_same_user(peer: socket.socket) -> bool:
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _pid, uid, _gid = struct.unpack("3i", credentials)
    return bool(uid == os.geteuid())


@contextmanager
def _address(path: Path) -> Iterator[str]:
    """A name for the socket at ``path`` that is short enough: a socket's has 107 bytes."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


# -- the folder ------------------------------------------------------------------------------


@contextmanager
def _locked(path: Path, patience_s: float) -> Iterator[bool]:
    """Hold the lock file at ``path``; False where others hold it for all of ``patience_s``.

    The kernel lets go of it when its holder dies. The file stays then, until somebody
    locks it again.
    """
    give_up_at = time.monotonic() + patience_s
    lock = _try_lock(path)
    while lock is None and time.monotonic() < give_up_at:
        time.sleep(_POLL_S)
        lock = _try_lock(path)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            path.unlink(missing_ok=True)
            os.close(lock)


def _try_lock(path: Path) -> int | None:
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its last holder may have removed it after it was opened here; then it locks nobody out.
        if os.path.samestat(os.fstat(lock), path.stat()):
            return lock
    os.close(lock)
    return None


def _remove_stale(folder: Path) -> None:
    """Remove what killed workers left in ``folder``."""
    for path in folder.glob("*.sock"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
            peer.settimeout(_ANSWER_S)
            try:
                with _address(path) as address:
                    peer.connect(address)
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
            except OSError:
                pass  # hung, perhaps, but alive
    for path in folder.glob("*.lock"):
        with _locked(path, 0.0):
            pass
