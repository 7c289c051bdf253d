"""OpenTelemetry set-up and the span names, in one place.

One request that needed a swap is one trace:

    POST /v1/chat/completions            api
    |- scheduler.switch                  scheduler   demand seen -> model resident
    |  |- agent.swap_out                 agent       the victim's drain and unmap
    |  `- agent.swap_in                  agent       map and copy; bytes and GB/s
    |- request.queue_wait                agent       admitted by the api -> pulled
    |- request.prefill                   agent
    `- request.decode                    agent

Exporters: a span file per service (one JSON object a line), and OTLP/HTTP where an endpoint
is configured.
"""

import logging
import os
from pathlib import Path

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

SPAN_SWITCH = "scheduler.switch"
SPAN_LOAD = "agent.load"
SPAN_SWAP_IN = "agent.swap_in"
SPAN_SWAP_OUT = "agent.swap_out"
SPAN_QUEUE_WAIT = "request.queue_wait"
SPAN_PREFILL = "request.prefill"
SPAN_DECODE = "request.decode"

ATTR_REQUEST = "hotswap.request_id"
ATTR_MODEL = "hotswap.model"
ATTR_GPU = "hotswap.gpu"

_EXPORT_DELAY_MS = 250

tracer = trace.get_tracer("hotswap")


def _one_line(span: ReadableSpan) -> str:
    return str(span.to_json(indent=None)) + "\n"


def set_up(service: str, *, span_folder: Path | None, otlp_endpoint: str, log_level: str) -> None:
    """Configure logging and tracing for this process. Call once, before anything else."""
    logging.basicConfig(
        level=log_level.upper(),
        format=f"%(asctime)s %(levelname)-7s {service}: %(message)s",
        datefmt="%H:%M:%S",
    )
    provider = TracerProvider(resource=Resource.create({"service.name": f"hotswap-{service}"}))
    if span_folder:
        span_folder.mkdir(parents=True, exist_ok=True)
        out = (span_folder / f"{service}.jsonl").open("a", buffering=1)
        exporter = ConsoleSpanExporter(out=out, formatter=_one_line)
        provider.add_span_processor(
            BatchSpanProcessor(exporter, schedule_delay_millis=_EXPORT_DELAY_MS)
        )
    endpoint = otlp_endpoint or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")
    if endpoint:
        # Imported here: it brings in requests and protobuf, which cost start-up time.
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        otlp = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces")
        provider.add_span_processor(BatchSpanProcessor(otlp))
    trace.set_tracer_provider(provider)


def shut_down() -> None:
    """Export what is still buffered."""
    provider = trace.get_tracer_provider()
    if isinstance(provider, TracerProvider):
        provider.shutdown()


def nanoseconds(at: float) -> int:
    """Unix seconds as the integer nanoseconds that span times take."""
    return int(at * 1e9)
