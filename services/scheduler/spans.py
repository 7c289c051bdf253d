"""The scheduler's part of a request's trace: one span per model that had to be brought in.

The span hangs below the request that waited longest, starts with the first command that is
given for it and ends when its model is resident. The agent's load, swap-out and swap-in
spans hang below this one, because commands carry its context.

The first decision for it is told in its attributes, later ones as its events.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import propagate, trace

from schemas.commands import Command, Register, SwapOut, Unload
from schemas.events import (
    CommandFailed,
    DecisionMade,
    RequestEnded,
    RequestStarted,
    RequestWithdrawn,
    SwapInCompleted,
)
from services import telemetry
from services.bus.connection import headers_of
from services.scheduler.inputs import Input

_MOST_REMEMBERED = 50_000
_TRACE_HEADER = b"\r\ntraceparent:"
_MOST_OPEN = 1_000  # spans of waiters whose end nobody told us must not pile up


class SwitchSpans:
    """Open spans by request id. ``remember`` every demand, ``observe`` every input."""

    def __init__(self) -> None:
        # The headers as they came: few requests need a switch, and reading them takes longer
        # than all else that is done for a demand.
        self._headers: OrderedDict[str, bytes] = OrderedDict()
        # request id -> (the model it waits for, as far as known, and its span)
        self._open: OrderedDict[str, tuple[str, trace.Span]] = OrderedDict()
        self._explained: set[str] = set()  # of these requests

    def remember(self, request_id: str, headers: bytes) -> None:
        """The trace context that came with a demand, if any: its header block."""
        if _TRACE_HEADER in headers:
            self._headers[request_id] = headers
            if len(self._headers) > _MOST_REMEMBERED:
                self._headers.popitem(last=False)

    @contextmanager
    def around(self, command: Command, now: float) -> Iterator[None]:
        """Make the span of the command's waiter current, so that its headers carry it."""
        request_id = "" if isinstance(command, Register | Unload) else command.request_id
        if not request_id:
            yield
            return
        if request_id not in self._open:
            headers = headers_of(self._headers.get(request_id, b""))
            span = telemetry.tracer.start_span(
                telemetry.SPAN_SWITCH,
                context=propagate.extract(headers),
                start_time=telemetry.nanoseconds(now),
                attributes={
                    telemetry.ATTR_REQUEST: request_id,
                    telemetry.ATTR_GPU: command.gpu,
                    "hotswap.epoch": command.epoch,
                },
            )
            self._open[request_id] = ("", span)
            while len(self._open) > _MOST_OPEN:
                self._end(next(iter(self._open)), now, "nobody told how it ended")
        _, span = self._open[request_id]
        if not isinstance(command, SwapOut):
            span.set_attribute(telemetry.ATTR_MODEL, command.model)
            self._open[request_id] = (command.model, span)
        with trace.use_span(span, end_on_exit=False):
            yield

    def explain(self, decision: DecisionMade) -> None:
        """Say in the span of the request that it was made for, if it has one, what was decided."""
        request_id = decision.request_id
        if request_id not in self._open:
            return
        _, span = self._open[request_id]
        facts: dict[str, str | int | float] = {
            "hotswap.action": decision.action,
            "hotswap.reason": decision.reason,
            "hotswap.victims": ", ".join(f"{v.model} ({v.how})" for v in decision.victims),
            "hotswap.candidates": decision.num_candidates,
            "hotswap.urgency": decision.urgency,
        }
        if decision.predicted_wait_s is not None:
            facts["hotswap.predicted_wait_s"] = decision.predicted_wait_s
        if request_id in self._explained:
            at = telemetry.nanoseconds(decision.at)
            span.add_event("decision", facts, timestamp=at)
        else:
            self._explained.add(request_id)
            span.set_attributes(facts)

    def observe(self, event: Input, now: float) -> None:
        """End the spans whose model came in, failed, or is not waited for any more."""
        match event:
            case SwapInCompleted():
                self._end_model(event.model, now)
            case CommandFailed():
                self._end_model(event.model, now, event.reason)
            case RequestStarted():  # while its model arrives, as a rule
                self._headers.pop(event.request_id, None)
            case RequestEnded() | RequestWithdrawn():
                self._headers.pop(event.request_id, None)
                if event.request_id in self._open:
                    self._end(event.request_id, now)
            case _:
                pass

    def close(self, now: float) -> None:
        """End what is open: another leader goes on with it."""
        for request_id in list(self._open):
            self._end(request_id, now, "this scheduler leads no more")

    def _end_model(self, model: str, now: float, error: str = "") -> None:
        for request_id, (waiting_for, _) in list(self._open.items()):
            if waiting_for == model:
                self._end(request_id, now, error)

    def _end(self, request_id: str, now: float, error: str = "") -> None:
        _, span = self._open.pop(request_id)
        self._explained.discard(request_id)
        if error:
            span.set_status(trace.Status(trace.StatusCode.ERROR, error))
        span.end(telemetry.nanoseconds(now))
