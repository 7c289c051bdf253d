"""Exporters: the span file is always there, OTLP/HTTP where an endpoint is configured."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from services.ops.trace_view import read_spans

# A process of its own: OpenTelemetry's provider can be set once.
PROGRAM = """
import sys
from pathlib import Path
from services import telemetry

telemetry.set_up("api", span_folder=Path(sys.argv[1]), otlp_endpoint=sys.argv[2], log_level="info")
with telemetry.tracer.start_as_current_span("a span", attributes={"hotswap.model": "m"}):
    pass
telemetry.shut_down()
"""


class Collector(ThreadingHTTPServer):
    """An OTLP/HTTP collector that keeps what it gets."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[tuple[str, ExportTraceServiceRequest]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    server = Collector()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def export(folder: Path, endpoint: str) -> None:
    subprocess.run([sys.executable, "-c", PROGRAM, str(folder), endpoint], check=True, timeout=60)


def test_spans_reach_a_collector_and_the_file(tmp_path: Path, collector: Collector) -> None:
    export(tmp_path, collector.url)
    ((path, request),) = collector.requests
    assert path == "/v1/traces"
    (resource,) = request.resource_spans
    service = {a.key: a.value.string_value for a in resource.resource.attributes}
    assert service["service.name"] == "hotswap-api"
    (sent,) = resource.scope_spans[0].spans
    assert sent.name == "a span"
    (written,) = read_spans(tmp_path)
    assert written.name == "a span"
    assert written.trace_id == sent.trace_id.hex()
    assert written.attributes == {"hotswap.model": "m"}


def test_without_an_endpoint_only_the_file_is_written(tmp_path: Path, collector: Collector) -> None:
    export(tmp_path, "")
    assert not collector.requests
    (line,) = (tmp_path / "api.jsonl").read_text().splitlines()
    assert json.loads(line)["name"] == "a span"
