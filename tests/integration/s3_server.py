"""A small S3: folders below a root are buckets. Lists, and gives whole objects or ranges of them.

    python -m tests.integration.s3_server ROOT      prints its port, serves on loopback

Any signature will do, none will not. A file ``.deadly`` in the root is the number of bytes of
objects after which the server dies in the middle of an answer.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

DEADLY: Final = ".deadly"


@contextmanager
def running(root: Path) -> Iterator[str]:
    """A server process over ``root``; gives its URL."""
    command = [sys.executable, "-m", "tests.integration.s3_server", str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        finally:
            server.kill()


def _etag(file: Path) -> str:
    status = file.stat()
    return f'"{status.st_mtime_ns:x}-{status.st_size:x}"'


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path
    num_sent = 0

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        file = self.root / bucket / key
        if "Authorization" not in self.headers:
            self._refuse(403, "AccessDenied")
        elif not (self.root / bucket).is_dir():
            self._refuse(404, "NoSuchBucket")
        elif not key:
            self._list(bucket, parse_qs(url.query).get("prefix", [""])[0])
        elif not file.is_file():
            self._refuse(404, "NoSuchKey")
        elif self.headers.get("If-Match", _etag(file)) != _etag(file):
            self._refuse(412, "PreconditionFailed")
        else:
            self._give(file)

    def _list(self, bucket: str, prefix: str) -> None:
        folder = self.root / bucket / prefix
        files = [file for file in sorted(folder.glob("*")) if file.is_file()]
        entries = "".join(
            f"<Contents><Key>{escape(prefix + file.name)}</Key><Size>{file.stat().st_size}</Size>"
            f"<ETag>{escape(_etag(file))}</ETag></Contents>"
            for file in files
        )
        self._send(200, f"<ListBucketResult>{entries}</ListBucketResult>".encode())

    def _give(self, file: Path) -> None:
        data = file.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None:
            return self._send(200, data, ETag=_etag(file))
        first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
        if first > last:
            return self._refuse(416, "InvalidRange")
        where = f"bytes {first}-{last}/{len(data)}"
        return self._send(206, data[first : last + 1], ETag=_etag(file), Content_Range=where)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode())

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        deadly = self.root / DEADLY
        if deadly.exists():
            self.wfile.write(body[: len(body) // 2])
            type(self).num_sent += len(body)
            if self.num_sent > int(deadly.read_text()):
                os._exit(1)
            body = body[len(body) // 2 :]
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    """Serve until killed."""
    _Handler.root = Path(sys.argv[1])
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        print(server.server_port, flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
