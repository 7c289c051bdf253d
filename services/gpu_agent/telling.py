"""What the api, and everybody, is told about requests in flight: chunks, first tokens, spans.

Every chunk is published with a reply subject of ours: where nobody listens any more (the api
died, or gave up), the server answers "no responders" there.
"""

import logging
import time
from dataclasses import dataclass, field

from schemas.events import FirstTokenSent
from schemas.requests import EmbedRequest, GenerateRequest, Request
from schemas.stream import Chunk, Finished, RequestTiming, Started, Tokens
from services import telemetry
from services.bus import Bus, BusError, Delivery
from services.gpu_agent import ipc
from services.gpu_agent.replicas import Replica
from services.gpu_agent.reporter import Reporter

log = logging.getLogger(__name__)

_MOST_HELD = 4096  # tokens of a batch request that are told as one; with all that is told of each,
_MOST_HELD_WITH_LOGPROBS = 256  # of so many, a message stays below 1 MB


@dataclass(eq=False)
class InFlight:
    """One request that this agent has pulled. ``begun_at``, ``pulled_at``: unix seconds."""

    delivery: Delivery
    replica: Replica
    attempt: int
    pulled_at: float
    is_submitted: bool = False  # the worker has it; until then it waits in line
    is_suspended: bool = False  # it waits in the worker until its model is back on the device
    is_announced: bool = False  # the api was told: only then is the swap's trace known
    begun_at: float = 0.0
    prompt_tokens: int = 0
    num_tokens: int = 0
    held: list[Tokens] = field(default_factory=list)  # of class batch: not told yet

    @property
    def request(self) -> Request:
        return self.delivery.request

    @property
    def num_prefix(self) -> int:
        """Tokens that an earlier attempt computed."""
        request = self.request
        return len(request.prefix_token_ids) if isinstance(request, GenerateRequest) else 0

    @property
    def is_running(self) -> bool:
        """The worker works on it."""
        return self.is_submitted and not self.is_suspended


class Telling:
    """The agent's voice in requests. ``gone_inbox``: below it the server says who is gone."""

    def __init__(self, bus: Bus, gpu: str, reporter: Reporter, gone_inbox: str) -> None:
        self._bus = bus
        self._gpu = gpu
        self._reporter = reporter
        self._gone_inbox = gone_inbox

    async def publish(self, request: Request, chunk: Chunk) -> None:
        """To the request's own subject. A full or closed bus loses it; state moves on all the
        same: the api runs again what came to it with gaps.
        """
        reply = f"{self._gone_inbox}.{request.request_id}"
        try:
            await self._bus.publish(request.reply_to, chunk, reply=reply)
        except BusError as error:
            log.warning("lost a chunk of request %s: %s", request.request_id, error)

    async def tokens(self, flight: InFlight, chunk: Tokens) -> None:
        """Tell them now; those of a batch request when it ends, or when they are many."""
        if flight.request.klass != "batch":
            await self.publish(flight.request, chunk)
            return
        flight.held.append(chunk)
        most = _MOST_HELD_WITH_LOGPROBS if chunk.logprobs else _MOST_HELD
        if sum(len(one.token_ids) for one in flight.held) >= most:
            await self.tell_held(flight)

    async def tell_held(self, flight: InFlight) -> None:
        """Tell what was held back, as one."""
        if held := flight.held:
            flight.held = []
            await self.publish(flight.request, _joined(held))

    async def announce(self, flight: InFlight) -> None:
        """Tell the api that ``flight`` has begun, once; with the swap-in that it waited for."""
        if flight.is_announced:
            return
        flight.is_announced = True
        request, replica = flight.request, flight.replica
        start = replica.start_kind(request.created_at)
        swap = None if start == "warm" else replica.last_swap_in
        await self.publish(
            request, Started(request.request_id, self._gpu, flight.attempt, start, swap)
        )

    async def first_token(self, flight: InFlight) -> None:
        """A token of ``flight``, or a vector, leaves: tell, where it is the first one since the
        swap-in.
        """
        replica, swap = flight.replica, flight.replica.last_swap_in
        if not replica.awaits_first_token or swap is None:
            return
        replica.awaits_first_token = False
        now = time.time()
        began = swap.started_at
        await self._reporter.event(
            FirstTokenSent(
                gpu=self._gpu,
                model=replica.spec.name,
                generation=replica.generation,
                at=now,
                request_id=flight.request.request_id,
                prompt_tokens=flight.prompt_tokens,
                first_token_s=now - began,
                swap_s=swap.total_s,
            )
        )

    def finished(self, flight: InFlight, done: ipc.Done) -> Finished:
        """The last chunk of ``flight``; its prefill and decode become spans."""
        prefilled_at = flight.begun_at + done.prefill_s
        if flight.begun_at:
            self.span(flight, telemetry.SPAN_PREFILL, flight.begun_at, prefilled_at)
            if not isinstance(flight.request, EmbedRequest):
                self.span(flight, telemetry.SPAN_DECODE, prefilled_at, prefilled_at + done.decode_s)
        timing = RequestTiming(
            queue_wait_s=flight.pulled_at - flight.request.created_at,
            prefill_s=done.prefill_s,
            decode_s=done.decode_s,
        )
        return Finished(
            done.request_id,
            flight.attempt,
            done.finish_reason,
            done.prompt_tokens,
            done.completion_tokens,
            timing,
            done.text,
            done.cached_tokens,
        )

    def span(self, flight: InFlight, name: str, start: float, end: float) -> None:
        """Record a span from measured times, unix seconds."""
        self._reporter.span(
            name,
            flight.delivery.context,
            start,
            end,
            flight.request.model,
            request_id=flight.request.request_id,
            attempt=flight.attempt,
        )


def _joined(chunks: list[Tokens]) -> Tokens:
    """Consecutive chunks of one attempt as one."""
    first = chunks[0]
    return Tokens(
        first.request_id,
        first.attempt,
        first.index,
        tuple(token for chunk in chunks for token in chunk.token_ids),
        "".join(chunk.text for chunk in chunks),
        tuple(one for chunk in chunks for one in chunk.logprobs),
    )
