"""Decode steps of fixed shapes, recorded once and replayed.

On a GPU, launching a step's hundreds of kernels one by one takes longer than a small batch's
kernels take themselves.

A recording is for so many rows and so many columns of context; smaller steps are padded to it:

    rows      r0 r1 r2 r0       3 rows in a recording for 4: the first one again, same values
    columns   - - - t0 t1 q     3 tokens in a recording for 6: aligned right, masked

What it reads is in buffers that stay: token ids, positions, places in the cache, the mask. Weights
and KV pages never change their addresses, so a recording outlives all swaps of its model.

Every recording is tried against the ordinary step before it is used. A model that can not be
recorded, or answers otherwise, goes on with ordinary steps, and the log says so.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import torch

from services.gpu_agent.engine.kv import KVStore, PagedCache, Span
from services.gpu_agent.engine.packed import has_bias

logger = logging.getLogger(__name__)

# Gives a function that does again what it was given, into the same memory.
Recorder: TypeAlias = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]

MIN_COLUMNS: Final = 256
MAX_RECORDINGS: Final = 32  # of one model: row and column counts are powers of two
# Rounding differs with the padding; anything else is a wrong mask or a wrong place.
TOLERANCE: Final = 0.05  # of the spread of the logits


@dataclass(frozen=True)
class _Recording:
    view: PagedCache
    ids: torch.Tensor  # int64 (rows, 1)
    positions: torch.Tensor  # int64 (rows, 1)
    mask: torch.Tensor  # bool (rows, 1, 1, columns)
    replay: Callable[[], torch.Tensor]  # logits (rows, vocabulary)


class DecodeGraphs:
    """One model's recordings. ``module``: see `can_record`; ``recorder``: of its device."""

    def __init__(self, module: Any, store: KVStore, recorder: Recorder) -> None:
        self._module = module
        self._store = store
        self._recorder = recorder
        self._recordings: dict[tuple[int, int], _Recording] = {}
        self._is_broken = False

    def step(
        self, spans: Sequence[Span], new_ids: Sequence[int], ordinary: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """Logits (rows, vocabulary) of one decode step over ``spans``.

        ``ordinary`` computes them without a recording; it is called where there is none yet.
        """
        if self._is_broken:
            return ordinary()
        rows, columns = _padded(len(spans), max(span.end for span in spans))
        recording = self._recordings.get((rows, columns))
        if recording is None:
            return self._begin(rows, columns, spans, new_ids, ordinary)
        return self._replay(recording, spans, new_ids)

    def _begin(
        self,
        rows: int,
        columns: int,
        spans: Sequence[Span],
        new_ids: Sequence[int],
        ordinary: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """Record for these sizes, and try it: the answer is the ordinary step's."""
        if len(self._recordings) >= MAX_RECORDINGS:
            return ordinary()
        expected = ordinary()
        try:
            recording = self._record(rows, columns, spans, new_ids)
            found = self._replay(recording, spans, new_ids)
            spread = (expected.float() - expected.float().mean(-1, keepdim=True)).std(-1)
            worst = ((found - expected).float().abs().amax(-1) / spread).max().item()
        except Exception:  # whatever a model does that can not be recorded
            logger.warning("decode steps can not be recorded: going on without", exc_info=True)
            worst = 0.0
            self._is_broken = True
        if not worst <= TOLERANCE:
            logger.warning("a recorded decode step is off by %.2g: going on without", worst)
            self._is_broken = True
        if self._is_broken:
            self._recordings.clear()
        else:
            self._recordings[rows, columns] = recording
        return expected

    def _record(
        self, rows: int, columns: int, spans: Sequence[Span], new_ids: Sequence[int]
    ) -> _Recording:
        device = self._store.device
        read_at = torch.zeros(rows * columns, dtype=torch.int64, device=device)
        write_at = torch.zeros(rows, dtype=torch.int64, device=device)
        view = PagedCache(self._store, write_at, read_at, rows, columns, num_new=1)
        ids = torch.zeros((rows, 1), dtype=torch.int64, device=device)
        positions = torch.zeros((rows, 1), dtype=torch.int64, device=device)
        mask = torch.zeros((rows, 1, 1, columns), dtype=torch.bool, device=device)

        def run() -> torch.Tensor:
            result = self._module(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=view,
                use_cache=True,
                logits_to_keep=1,
            )
            logits: torch.Tensor = result.logits[:, -1]
            return logits

        blank = _Recording(view, ids, positions, mask, run)
        self._fill(blank, spans, new_ids)  # recording runs it, and must not write anywhere else
        return _Recording(view, ids, positions, mask, self._recorder(run))

    def _replay(
        self, recording: _Recording, spans: Sequence[Span], new_ids: Sequence[int]
    ) -> torch.Tensor:
        self._fill(recording, spans, new_ids)
        return recording.replay()[: len(spans)]

    def _fill(self, recording: _Recording, spans: Sequence[Span], new_ids: Sequence[int]) -> None:
        rows, columns = recording.mask.shape[0], recording.mask.shape[3]
        read = np.empty((rows, columns), dtype=np.int64)
        seen = np.zeros((rows, 1, 1, columns), dtype=np.bool_)
        numbers = np.empty((3, rows, 1), dtype=np.int64)  # ids, positions, where to write
        for row in range(rows):
            which = row if row < len(spans) else 0
            span = spans[which]
            read[row, : columns - span.end] = span.places[0]
            read[row, columns - span.end :] = span.places[: span.end]
            seen[row, 0, 0, columns - span.end :] = True
            numbers[:, row, 0] = new_ids[which], span.start, span.places[span.start]
        assert recording.view.read_at is not None
        recording.view.read_at.copy_(torch.from_numpy(read.reshape(-1)))
        recording.mask.copy_(torch.from_numpy(seen))
        recording.ids.copy_(torch.from_numpy(numbers[0]))
        recording.positions.copy_(torch.from_numpy(numbers[1]))
        recording.view.write_at.copy_(torch.from_numpy(numbers[2, :, 0]))


def _padded(rows: int, columns: int) -> tuple[int, int]:
    return 1 << (rows - 1).bit_length(), max(MIN_COLUMNS, 1 << (columns - 1).bit_length())


def can_record(module: Any, store: KVStore) -> bool:
    """Whether one mask of given columns is all that ``module`` needs to know of its context: no
    window, no bias by distance, and attention behind transformers' common interface.
    """
    has_window = any(window is not None for window in store.geometry.sliding_windows)
    return not has_window and not has_bias(module)


def record_cuda(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """``run`` as a CUDA graph (torch.cuda.CUDAGraph). All share one pool of torch's memory: they
    run one after the other.
    """
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):  # libraries make their workspaces at first use
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=_shared_pool()):
        logits = run()

    def replay() -> torch.Tensor:
        graph.replay()
        return logits

    return replay


_pools: list[Any] = []


def _shared_pool() -> Any:
    if not _pools:
        _pools.append(torch.cuda.graph_pool_handle())
    return _pools[0]
