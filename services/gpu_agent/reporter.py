"""What the agent tells the world: events, residency records, spans.

Telling never fails: where the bus takes nothing more (it is away, and the client's memory for
that is full), the loss is logged. Whoever reports has state to move on.
"""

import logging

from opentelemetry.context import Context

from schemas import names
from schemas.events import AgentEvent, kind_of
from schemas.state import AgentStatus, ResidencyRecord, SwapTrace
from services import telemetry
from services.bus import Bucket, Bus, BusError, Writer

log = logging.getLogger(__name__)


class Reporter:
    """The agent's voice on the bus. Residency is written while `residency_writer` runs."""

    def __init__(self, bus: Bus, gpu: str) -> None:
        self._bus = bus
        self._gpu = gpu
        self._bucket = Bucket(bus, names.BUCKET_RESIDENCY, ResidencyRecord)
        self.residency_writer = Writer(self._bucket)

    async def event(self, event: AgentEvent) -> None:
        model = getattr(event, "model", "")
        try:
            await self._bus.publish(names.event_subject(kind_of(event), self._gpu, model), event)
        except BusError as error:
            log.error("lost the event %s: %s", event, error)

    async def status(self, status: AgentStatus) -> None:
        try:
            await self._bus.publish(names.status_subject(self._gpu), status)
        except BusError as error:
            log.warning("status not sent: %s", error)

    def residency(self, record: ResidencyRecord) -> None:
        """Have ``record`` written to HS_RESIDENCY soon."""
        self.residency_writer.put(names.replica_key(self._gpu, record.model), record)

    def forget_residency(self, model: str) -> None:
        """Have its record deleted soon."""
        self.residency_writer.delete(names.replica_key(self._gpu, model))

    async def clear_residency(self) -> None:
        """Forget what an earlier run of this agent left."""
        for key, record in (await self._bucket.items()).items():
            if record.gpu == self._gpu:
                await self._bucket.delete(key)

    # -- spans, made after the fact from measured times (unix seconds) ---------------------

    def span(
        self,
        name: str,
        context: Context | None,
        start: float,
        end: float,
        model: str,
        **attributes: str | int | float,
    ) -> None:
        span = telemetry.tracer.start_span(
            name,
            context=context,
            start_time=telemetry.nanoseconds(start),
            attributes={
                telemetry.ATTR_MODEL: model,
                telemetry.ATTR_GPU: self._gpu,
                **{f"hotswap.{key}": value for key, value in attributes.items()},
            },
        )
        span.end(telemetry.nanoseconds(end))

    def swap_span(self, name: str, context: Context | None, model: str, trace: SwapTrace) -> None:
        self.span(
            name,
            context,
            trace.started_at,
            trace.started_at + trace.total_s,
            model,
            num_bytes=trace.num_bytes,
            gb_per_s=trace.gb_per_s,
            share_of_ceiling=trace.share_of_ceiling,
            kept_bytes=trace.kept_bytes,
            decision_s=trace.decision_s,
            drain_s=trace.drain_s,
            map_s=trace.map_s,
            first_layer_s=trace.first_layer_s,
            copy_s=trace.copy_s,
            verify_s=trace.verify_s,
            suspend_s=trace.suspend_s,
            kv_bytes=trace.kv_bytes,
        )
