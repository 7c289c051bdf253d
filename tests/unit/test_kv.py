"""The paged KV cache: what is written is what is read, and nothing else is touched."""

import random

import pytest
import torch

from services.gpu_agent.engine.kv import Blocks, KVStore, OutOfBlocks, Span
from services.gpu_agent.skeleton import KVGeometry
from tests.unit.engine_kit import FakePool

HEADS, DIM, LAYERS = 3, 8, 2
GEOMETRY = KVGeometry(LAYERS, HEADS, DIM, torch.float32, (None, None))


def make_store(
    page_tokens: int, pages: list[int], spare_bytes: int = 0
) -> tuple[KVStore, FakePool]:
    pool = FakePool(GEOMETRY.bytes_per_token * page_tokens + spare_bytes, max(pages) + 2)
    return KVStore(pool, GEOMETRY, pages), pool  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("page_tokens", "spare_bytes", "block"),
    [(1, 0, 1), (5, 4, 5), (16, 100, 16), (24, 0, 12), (17, 8, 1), (32, 12, 16)],
)
def test_no_token_of_a_page_is_lost(page_tokens: int, spare_bytes: int, block: int) -> None:
    store, _ = make_store(page_tokens, [1, 3], spare_bytes)
    assert store.block_tokens == block
    assert store.num_tokens == store.num_free_tokens == 2 * page_tokens


def test_blocks_are_taken_and_given_back() -> None:
    store, _ = make_store(16, [4, 0, 2])
    first, second = store.take(17), store.take(1)
    assert (first.num_tokens, second.num_tokens) == (32, 16)
    assert not set(first.slots.tolist()) & set(second.slots.tolist())
    assert not store.can_take(1)
    with pytest.raises(OutOfBlocks, match="1 tokens of KV cache wanted, 0 free of 48"):
        store.take(1)
    store.give(first)
    assert store.num_free_tokens == 32
    with pytest.raises(ValueError, match="given twice"):
        store.give(first)


def test_a_token_larger_than_a_page_is_refused() -> None:
    pool = FakePool(64, 4)
    with pytest.raises(ValueError, match="larger pages"):
        KVStore(pool, GEOMETRY, [0])  # type: ignore[arg-type]


def _fresh(spans: list[Span]) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (len(spans), HEADS, spans[0].end - spans[0].start, DIM)
    return torch.randn(shape), torch.randn(shape)


@pytest.mark.parametrize(("page_tokens", "spare_bytes"), [(1, 0), (5, 4), (16, 100), (7, 36)])
def test_rows_read_back_what_they_wrote_right_aligned(page_tokens: int, spare_bytes: int) -> None:
    torch.manual_seed(1)
    pages = random.Random(1).sample(range(1, 500, 2), -(-160 // page_tokens))
    store, pool = make_store(page_tokens, pages, spare_bytes)
    blocks = [store.take(n) for n in (40, 20, 30)]
    written: list[list[list[torch.Tensor]]] = [[[], []] for _ in blocks]  # row, layer -> K|V

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

    for row, (chunks, owned) in enumerate(zip([[20, 9], [3], [8, 8, 8]], blocks, strict=True)):
        start = 0
        for size in chunks:
            step([Span(owned, start, start + size)], [row])
            start += size
    for n in range(6):
        step(
            [Span(b, s + n, s + n + 1) for b, s in zip(blocks, (29, 3, 24), strict=True)], [0, 1, 2]
        )

    others = [p for p in range(pool.num_pages) if p not in pages]
    assert pool.memory.view(pool.num_pages, -1)[others].isnan().all(), "a foreign page was written"


def test_positions_and_mask_of_uneven_rows() -> None:
    store, _ = make_store(16, [0, 1, 2])
    long, short = store.take(16), store.take(16)
    view = store.view([Span(long, 4, 5), Span(short, 1, 2)])
    assert view.position_ids.tolist() == [[4], [1]]
    assert view.attention_mask is not None
    assert view.attention_mask.tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert (view.get_seq_length(), view.get_query_offset(1)) == (4, 4)
    assert store.view([Span(long, 4, 5), Span(short, 4, 5)]).attention_mask is None
    assert store.view([Span(long, 0, 3)]).position_ids.tolist() == [[0, 1, 2]]


def test_rows_that_can_not_be_one_forward_pass_are_refused() -> None:
    store, _ = make_store(16, [0, 1])
    blocks: list[Blocks] = [store.take(16), store.take(16)]
    with pytest.raises(ValueError, match="different numbers of new tokens"):
        store.view([Span(blocks[0], 0, 3), Span(blocks[1], 1, 2)])
    with pytest.raises(ValueError, match="without cached tokens"):
        store.view([Span(blocks[0], 4, 5), Span(blocks[1], 0, 1)])
