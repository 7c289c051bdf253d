"""The paged KV cache: what is written is what is read, and nothing else is touched."""

import random

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from services.gpu_agent.engine.kv import KVStore, Span
from services.gpu_agent.skeleton import KVGeometry
from tests.unit.engine_kit import FakePool

HEADS, DIM, LAYERS = 3, 8, 2
GEOMETRY = KVGeometry(LAYERS, HEADS, DIM, torch.float32, (None, None))


def make_store(
    page_tokens: int, num_pages: int = 4, spare_bytes: int = 0
) -> tuple[KVStore, FakePool]:
    pool = FakePool(GEOMETRY.bytes_per_token * page_tokens + spare_bytes, num_pages)
    return KVStore(pool, GEOMETRY), pool  # type: ignore[arg-type]


def places(store: KVStore, blocks: list[int]) -> NDArray[np.int64]:
    return np.concatenate([store.places(block) for block in blocks])


@pytest.mark.parametrize(
    ("page_tokens", "spare_bytes", "block"),
    [(1, 0, 1), (5, 4, 5), (16, 100, 16), (24, 0, 12), (17, 8, 1), (32, 12, 16)],
)
def test_no_token_of_a_page_is_lost(page_tokens: int, spare_bytes: int, block: int) -> None:
    store, _ = make_store(page_tokens, spare_bytes=spare_bytes)
    assert store.block_tokens == block
    assert store.block_tokens * store.blocks_per_page == page_tokens
    assert store.block_bytes * store.blocks_per_page == page_tokens * GEOMETRY.bytes_per_token


def test_a_block_is_contiguous_and_nobody_elses() -> None:
    store, pool = make_store(32, spare_bytes=12)
    assert store.blocks_per_page == 2
    pool.memory.zero_()
    for block in range(2 * pool.num_pages):
        store.block_view(block).view(torch.float32).fill_(block + 1.0)
    for block in range(2 * pool.num_pages):
        for plane in store.planes:
            read = plane.index_select(0, torch.from_numpy(store.places(block)))
            assert bool((read == block + 1.0).all())
    spare = pool.memory.view(pool.num_pages, -1)[:, -3:]
    assert bool((spare == 0).all()), "bytes past the last block were written"


def test_a_token_larger_than_a_page_is_refused() -> None:
    pool = FakePool(64, 4)
    with pytest.raises(ValueError, match="larger pages"):
        KVStore(pool, GEOMETRY)  # type: ignore[arg-type]


def _fresh(spans: list[Span]) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (len(spans), HEADS, spans[0].end - spans[0].start, DIM)
    return torch.randn(shape), torch.randn(shape)


@pytest.mark.parametrize(("page_tokens", "spare_bytes"), [(1, 0), (5, 4), (16, 100), (7, 36)])
def test_rows_read_back_what_they_wrote_right_aligned(page_tokens: int, spare_bytes: int) -> None:
    torch.manual_seed(1)
    pages = random.Random(1).sample(range(1, 500, 2), -(-160 // page_tokens))
    store, pool = make_store(page_tokens, max(pages) + 2, spare_bytes)
    free = [
        page * store.blocks_per_page + n for page in pages for n in range(store.blocks_per_page)
    ]
    rows_of = [
        places(store, [free.pop() for _ in range(-(-n // store.block_tokens))])
        for n in (40, 20, 30)
    ]
    written: list[list[list[torch.Tensor]]] = [[[], []] for _ in rows_of]  # row, layer -> K|V

    def step(spans: list[Span], rows: list[int]) -> None:
        view = store.view(spans)
        length = max(span.end for span in spans)
        assert view.get_mask_sizes(spans[0].end - spans[0].start, 0) == (length, 0)
        for layer in range(LAYERS):
            key, value = _fresh(spans)
            all_keys, all_values = view.update(key, value, layer)
            assert all_keys.shape == all_values.shape == (len(spans), HEADS, length, DIM)
            for at, (row, span) in enumerate(zip(rows, spans, strict=True)):
                written[row][layer].append(torch.cat((key[at], value[at]), dim=-1))
                whole = torch.cat(written[row][layer], dim=1)
                read = torch.cat((all_keys[at], all_values[at]), dim=-1)
                assert torch.equal(read[:, length - span.end :], whole)
                assert not read.isnan().any(), "padding must be finite"

    for row, (chunks, owned) in enumerate(zip([[20, 9], [3], [8, 8, 8]], rows_of, strict=True)):
        start = 0
        for size in chunks:
            step([Span(owned, start, start + size)], [row])
            start += size
    for n in range(6):
        step(
            [Span(b, s + n, s + n + 1) for b, s in zip(rows_of, (29, 3, 24), strict=True)],
            [0, 1, 2],
        )

    others = [p for p in range(pool.num_pages) if p not in pages]
    assert pool.memory.view(pool.num_pages, -1)[others].isnan().all(), "a foreign page was written"


def test_positions_and_mask_of_uneven_rows() -> None:
    store, _ = make_store(16)
    long, short = store.places(0), store.places(1)
    view = store.view([Span(long, 4, 5), Span(short, 1, 2)])
    assert view.position_ids.tolist() == [[4], [1]]
    assert view.attention_mask is not None
    assert view.attention_mask.tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert (view.get_seq_length(), view.get_query_offset(1)) == (4, 4)
    assert store.view([Span(long, 4, 5), Span(short, 4, 5)]).attention_mask is None
    assert store.view([Span(long, 0, 3)]).position_ids.tolist() == [[0, 1, 2]]


def test_rows_that_can_not_be_one_forward_pass_are_refused() -> None:
    store, _ = make_store(16)
    blocks = [store.places(0), store.places(1)]
    with pytest.raises(ValueError, match="different numbers of new tokens"):
        store.view([Span(blocks[0], 0, 3), Span(blocks[1], 1, 2)])
    with pytest.raises(ValueError, match="without cached tokens"):
        store.view([Span(blocks[0], 4, 5), Span(blocks[1], 0, 1)])
