"""Control process <-> engine worker: the messages, and how they are framed.

The two are separate processes so that a busy interpreter lock in the engine never delays
the bus. They talk over one Unix stream socket: a 4-byte big-endian length, then msgpack.

    control -> worker   Register  Load  SwapIn  SwapOut  Forget  Verify  Tokenize
                        Submit  Cancel  Shutdown
    worker -> control   Ready  Registered  LoadProgress  Loaded  Arriving  SwappedIn
                        SwapInCancelled  SwappedOut  Unloaded  Forgotten  Verified  Corrupted
                        OpFailed  TokenizeAnswered
                        Begun  Produced  Embedded  Done  Broke   (of a request; the last two end it)

The worker answers every Register, Load, SwapOut and Forget exactly once, every SwapIn with Arriving
and then exactly one of SwappedIn, SwapInCancelled and OpFailed (or with OpFailed alone), every
Verify with Verified, Corrupted or OpFailed, every Tokenize with TokenizeAnswered (in the order in
which they came, but beside all else), and every Submit with exactly one Done or Broke.
Nothing of a model is Produced or Embedded before its SwappedIn.
"""

from typing import Literal, TypeAlias

import msgspec

from schemas.requests import Request
from schemas.state import ModelFacts, ModelSpec, SwapTrace
from schemas.stream import ErrorCode, FinishReason, PromptTold, TokenLogprobs
from schemas.tokenize import TokenizeAnswer, TokenizeAsk

MAX_FRAME_BYTES = 64 * 2**20


# -- control -> worker -------------------------------------------------------------------


class Register(msgspec.Struct, frozen=True, tag=True):
    spec: ModelSpec


class Load(msgspec.Struct, frozen=True, tag=True):
    model: str


class SwapIn(msgspec.Struct, frozen=True, tag=True):
    model: str


class SwapOut(msgspec.Struct, frozen=True, tag=True):
    """Drop the model's pages, or call off a swap-in that is under way.

    With ``preempt`` its requests are suspended where they are, and go on after the next swap-in;
    without, control has drained the model first, and the worker refuses while requests run.
    """

    model: str
    preempt: bool = False


class Forget(msgspec.Struct, frozen=True, tag=True):
    """Drop the model's host image, and the model: it is registered no more. Not on the device."""

    model: str


class Verify(msgspec.Struct, frozen=True, tag=True):
    """Compare every page of the model's weights with what was loaded."""

    model: str


class Tokenize(msgspec.Struct, frozen=True, tag=True):
    ticket: int
    ask: TokenizeAsk


class Submit(msgspec.Struct, frozen=True, tag=True):
    request: Request


class Cancel(msgspec.Struct, frozen=True, tag=True):
    request_id: str


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    pass


ToWorker: TypeAlias = (
    Register | Load | SwapIn | SwapOut | Forget | Verify | Tokenize | Submit | Cancel | Shutdown
)


# -- worker -> control -------------------------------------------------------------------


class Memory(msgspec.Struct, frozen=True):
    """Bytes in use after what a message tells."""

    device_bytes: int  # pages of weights and KV reserves
    host_bytes: int  # host images
    cached_bytes: dict[str, int]  # model -> of its weights, still on the device though swapped out


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The worker is up and its page pool exists."""

    device: str  # "cpu" or "cuda"
    device_name: str
    page_bytes: int
    budget_bytes: int
    host_budget_bytes: int
    ceiling_gb_per_s: float  # raw copy, host memory to device memory


class Registered(msgspec.Struct, frozen=True, tag=True):
    model: str
    facts: ModelFacts


class LoadProgress(msgspec.Struct, frozen=True, tag=True):
    model: str
    done_bytes: int
    total_bytes: int


class Loaded(msgspec.Struct, frozen=True, tag=True):
    model: str
    num_bytes: int
    load_s: float
    memory: Memory


class Unloaded(msgspec.Struct, frozen=True, tag=True):
    """The worker dropped this host image to make room for another. Nobody asked for it."""

    model: str
    num_bytes: int


class Forgotten(msgspec.Struct, frozen=True, tag=True):
    """``num_bytes``: of the host image that was dropped, if there was one."""

    model: str
    num_bytes: int
    memory: Memory


class Arriving(msgspec.Struct, frozen=True, tag=True):
    """The model's pages are mapped and its bytes are on their way: requests may come."""

    model: str


class SwappedIn(msgspec.Struct, frozen=True, tag=True):
    """All bytes are there, and verified as far as the settings ask for."""

    model: str
    trace: SwapTrace
    memory: Memory


class SwapInCancelled(msgspec.Struct, frozen=True, tag=True):
    """A SwapOut came first; its SwappedOut follows."""

    model: str
    trace: SwapTrace


class SwappedOut(msgspec.Struct, frozen=True, tag=True):
    """``num_suspended`` requests of the model wait in the worker for its next swap-in."""

    model: str
    trace: SwapTrace
    memory: Memory
    num_suspended: int = 0


class Verified(msgspec.Struct, frozen=True, tag=True):
    model: str
    num_pages: int
    num_bytes: int
    verify_s: float


class Corrupted(msgspec.Struct, frozen=True, tag=True):
    """The model's weights are not what was loaded: it was swapped out and unloaded.

    Where a swap-in was under way, its OpFailed follows; where not, this is all, and the model
    is cold.
    """

    model: str
    check: Literal["page", "canary"]
    reason: str
    memory: Memory


class OpFailed(msgspec.Struct, frozen=True, tag=True):
    """Nothing changed; ``reason`` names the cause and what to do."""

    model: str
    op: Literal["register", "load", "swap_in", "swap_out", "unload", "verify"]
    reason: str


class TokenizeAnswered(msgspec.Struct, frozen=True, tag=True):
    ticket: int
    answer: TokenizeAnswer


class Begun(msgspec.Struct, frozen=True, tag=True):
    """Admitted to the batch; prefill starts. ``at`` is unix seconds."""

    request_id: str
    prompt_tokens: int
    at: float


class Produced(msgspec.Struct, frozen=True, omit_defaults=True, tag=True):
    request_id: str
    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()  # of each of token_ids, where the request asks
    prompt: PromptTold | None = None  # where index is 0


class Embedded(msgspec.Struct, frozen=True, tag=True):
    """Vectors of consecutive inputs; see `schemas.stream.Vectors`."""

    request_id: str
    index: int
    dimensions: int
    data: bytes


class Done(msgspec.Struct, frozen=True, tag=True):
    request_id: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    prefill_s: float
    decode_s: float
    text: str = ""
    cached_tokens: int = 0


class Broke(msgspec.Struct, frozen=True, tag=True):
    request_id: str
    code: ErrorCode
    message: str


FromWorker: TypeAlias = (
    Ready
    | Registered
    | LoadProgress
    | Loaded
    | Unloaded
    | Forgotten
    | Arriving
    | SwappedIn
    | SwapInCancelled
    | SwappedOut
    | Verified
    | Corrupted
    | OpFailed
    | TokenizeAnswered
    | Begun
    | Produced
    | Embedded
    | Done
    | Broke
)

_encoder = msgspec.msgpack.Encoder()
to_worker_decoder = msgspec.msgpack.Decoder(ToWorker)
from_worker_decoder = msgspec.msgpack.Decoder(FromWorker)


def frame(message: ToWorker | FromWorker) -> bytes:
    """``message`` as it goes over the socket."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"{type(message).__name__} of {len(body)} bytes is over {MAX_FRAME_BYTES}")
    return len(body).to_bytes(4, "big") + body


class FrameReader:
    """Cuts a byte stream back into frame bodies. Feed it whatever the socket gave."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        self._buffer += data
        bodies = []
        while len(self._buffer) >= 4:
            size = int.from_bytes(self._buffer[:4], "big")
            if size > MAX_FRAME_BYTES:
                raise ValueError(f"frame of {size} bytes is over {MAX_FRAME_BYTES}")
            if len(self._buffer) < 4 + size:
                break
            bodies.append(bytes(self._buffer[4 : 4 + size]))
            del self._buffer[: 4 + size]
        return bodies
