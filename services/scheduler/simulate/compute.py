"""The engine of one GPU as a fluid: when each prompt is read and each answer ends.

Nothing is simulated token by token. Two clocks stand for all the work:

- *rounds*: in one decode round every decoding sequence of the GPU gets one token. It takes
  ``R = sum over models with rows of (fixed + per_row * rows)``, so a sequence that has n tokens
  to go ends n rounds from now, whatever n rounds will take. One heap holds all ends.
- *prefill seconds*: prompts are read one after another, first come first served. While one is
  read, a chunk of it (``c`` seconds) and a decode round take turns::

      | chunk c | round R | chunk c | round R |       rounds per second: 1 / (R + c)
                                                      prefill seconds per second: c / (R + c)

Between changes both clocks run at constant speed: `advance` moves them, `next_s` says when the
next prompt or sequence is done.
"""

import heapq
import math
from collections import deque

from services.scheduler.simulate.cost import CostModel
from services.scheduler.simulate.workload import ModelSize

_NEARLY = 1e-6  # rounds or prefill seconds that rounding errors may leave; a round is > 1 ms


class Sequence:
    """One request, from its arrival on. Times are simulated seconds."""

    __slots__ = (
        "at_s",
        "attempt",
        "end_round",
        "first_s",
        "index",
        "input_tokens",
        "is_decoding",
        "lane",
        "output_tokens",
        "prefill_left_s",
        "request_id",
        "rounds_left",
        "started_s",
        "tenant",
    )

    def __init__(
        self,
        index: int,
        request_id: str,
        at_s: float,
        input_tokens: int,
        output_tokens: int,
        tenant: str = "",
    ) -> None:
        self.index = index
        self.request_id = request_id
        self.at_s = at_s
        self.input_tokens = input_tokens
        self.output_tokens = output_tokens
        self.tenant = tenant
        self.attempt = 0
        self.started_s = 0.0
        self.first_s = 0.0  # its first token left; 0: not yet
        self.reset(0.0)
        self.lane: Lane | None = None

    def reset(self, prefill_s: float) -> None:
        """Nothing of it is computed yet."""
        self.prefill_left_s = prefill_s
        self.rounds_left = float(max(0, self.output_tokens - 1))
        self.end_round = 0.0
        self.is_decoding = False

    @property
    def tokens(self) -> int:
        """KV positions it needs when it ends."""
        return self.input_tokens + self.output_tokens

    @property
    def kept_tokens(self) -> int:
        """KV positions that it has filled by now, while it does not compute."""
        if self.prefill_left_s > 0:
            return 0
        return self.tokens - int(self.rounds_left)


class Lane:
    """What of one model the engine holds. ``rows``: its sequences, in order of their start."""

    __slots__ = ("model", "num_decoding", "rows", "size")

    def __init__(self, model: str, size: ModelSize) -> None:
        self.model = model
        self.size = size
        self.rows: dict[Sequence, None] = {}
        self.num_decoding = 0


class Compute:
    """The two clocks of one GPU. Call `advance` before anything else."""

    __slots__ = (
        "_at_s",
        "_chunk_s",
        "_cost",
        "_ends",
        "_left_s",
        "_num_ends",
        "_num_models",
        "_num_rows",
        "_prompts",
        "_rounds",
        "_turn_s",
        "idle_since_s",
    )

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self.idle_since_s = 0.0  # while there is nothing to do
        self._at_s = 0.0
        self._rounds = 0.0
        self._num_models = 0  # that have decoding rows
        self._num_rows = 0
        self._ends: list[tuple[float, int, Sequence]] = []  # some are stale: see `_is_stale`
        self._num_ends = 0
        self._prompts: deque[Sequence] = deque()  # the first one is being read
        self._left_s = 0.0  # prefill seconds of the first one
        self._chunk_s = 0.0  # c; 0: no prompt is read
        self._turn_s = 0.0  # c + R; 0: nothing to do

    def advance(self, now: float) -> None:
        """Let time pass until ``now``."""
        turn_s = self._turn_s
        if turn_s:
            turns = (now - self._at_s) / turn_s
            self._rounds += turns  # those without rows hurt nobody
            self._left_s -= turns * self._chunk_s
            self.idle_since_s = now
        self._at_s = now

    def next_s(self) -> float:
        """When the next prompt or sequence is done, if nothing changes; inf: there is none."""
        ends = self._ends
        while ends and _is_stale(ends[0]):
            heapq.heappop(ends)
        wait = ends[0][0] - self._rounds if ends else math.inf  # in turns
        if self._chunk_s:
            wait = min(wait, self._left_s / self._chunk_s)
        return self._at_s + max(0.0, wait) * self._turn_s if self._turn_s else math.inf

    def step_left_s(self) -> float:
        """Until the step that is under way ends: the rest of a chunk, or half a model's round."""
        if self._chunk_s:
            return min(self._left_s, self._chunk_s)
        return self._turn_s / self._num_models / 2 if self._num_models else 0.0

    def pop_prompt(self) -> Sequence | None:
        """The sequence whose prompt is just read, if any; it does not decode yet."""
        if not self._prompts or self._left_s > _NEARLY:
            return None
        sequence = self._prompts.popleft()
        sequence.prefill_left_s = 0.0
        self._read_next()
        return sequence

    def pop_end(self) -> Sequence | None:
        """A sequence whose last token is out by now, if any; taken out of its lane."""
        ends = self._ends
        while ends:
            if _is_stale(ends[0]):
                heapq.heappop(ends)
            elif ends[0][0] <= self._rounds + _NEARLY:
                sequence = heapq.heappop(ends)[2]
                self._stop(sequence)
                sequence.rounds_left = 0.0
                return sequence
            else:
                break
        return None

    def add(self, sequence: Sequence) -> None:
        """Begin with it, or go on where it was suspended."""
        if sequence.prefill_left_s > 0:
            self._prompts.append(sequence)
            if len(self._prompts) == 1:
                self._read_next()
        else:
            self.decode(sequence)

    def decode(self, sequence: Sequence) -> None:
        """Its prompt is read: it takes part in rounds."""
        sequence.is_decoding = True
        sequence.end_round = self._rounds + sequence.rounds_left
        self._num_ends += 1
        heapq.heappush(self._ends, (sequence.end_round, self._num_ends, sequence))
        lane = sequence.lane
        assert lane is not None
        self._num_models += lane.num_decoding == 0
        lane.num_decoding += 1
        self._num_rows += 1
        self._set_turn()

    def suspend(self, lane: Lane) -> None:
        """Stop all sequences of ``lane``; they keep their tokens."""
        for sequence in lane.rows:
            if sequence.is_decoding:
                sequence.rounds_left = max(0.0, sequence.end_round - self._rounds)
                self._stop(sequence)
        if any(sequence.lane is lane for sequence in self._prompts):
            first = self._prompts[0]
            first.prefill_left_s = max(_NEARLY, self._left_s)
            self._prompts = deque(s for s in self._prompts if s.lane is not lane)
            self._read_next()

    def _read_next(self) -> None:
        """The first prompt is another one."""
        first = self._prompts[0] if self._prompts else None
        self._left_s = first.prefill_left_s if first else 0.0
        self._chunk_s = self._cost.chunk_s(first.input_tokens) if first else 0.0
        self._set_turn()

    def _set_turn(self) -> None:
        round_s = self._cost.decode_s(self._num_models, self._num_rows)
        self._turn_s = self._chunk_s + round_s

    def _stop(self, sequence: Sequence) -> None:
        lane = sequence.lane
        assert lane is not None
        sequence.is_decoding = False
        lane.num_decoding -= 1
        self._num_models -= lane.num_decoding == 0
        self._num_rows -= 1
        self._set_turn()


def _is_stale(entry: tuple[float, int, Sequence]) -> bool:
    """Its sequence was suspended since. One that goes on has a new end, in its own entry."""
    return not entry[2].is_decoding or entry[2].end_round != entry[0]
