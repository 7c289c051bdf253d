"""Blocks of KV pages: taken, shared, known by what they hold, borrowed and given back."""

import random

import pytest

from services.gpu_agent.engine.blocks import Blocks, OutOfBlocks


class Pool:
    """Pages to borrow."""

    def __init__(self, *pages: int) -> None:
        self.pages = list(pages)

    def blocks(self, per_page: int, *reserve: int) -> Blocks:
        blocks = Blocks(
            per_page,
            borrow=lambda: self.pages.pop() if self.pages else None,
            give_back=self.pages.append,
            num_borrowable=lambda: len(self.pages),
        )
        blocks.attach(reserve)
        return blocks


def test_blocks_are_taken_until_there_are_none() -> None:
    blocks = Pool().blocks(3, 4, 0)
    assert blocks.can_take(6)
    assert not blocks.can_take(7)
    taken = [blocks.take() for _ in range(6)]
    assert sorted(taken) == [0, 1, 2, 12, 13, 14]
    with pytest.raises(OutOfBlocks):
        blocks.take()
    blocks.release(13)
    assert blocks.take() == 13
    with pytest.raises(ValueError, match="not used"):
        blocks.release(7)
    blocks.validate()


def test_a_full_block_is_found_by_its_key_until_it_is_taken_for_something_else() -> None:
    blocks = Pool().blocks(2, 0)
    first = blocks.take()
    blocks.publish(first, b"a")
    assert blocks.share(b"a") == first
    assert blocks.share(b"b") is None
    blocks.release(first)
    blocks.release(first)
    assert blocks.num_used == 0
    assert blocks.share(b"a") == first, "free, but it holds what it held"
    blocks.release(first)
    other = blocks.take()
    assert other != first, "a block that holds nothing goes first"
    assert blocks.take() == first
    assert blocks.share(b"a") is None
    blocks.validate()


def test_of_two_equal_blocks_the_first_stays_known() -> None:
    blocks = Pool().blocks(4, 0)
    one, two = blocks.take(), blocks.take()
    blocks.publish(one, b"a")
    blocks.publish(two, b"a")
    assert blocks.holds(one, b"a")
    assert not blocks.holds(two, b"a")
    blocks.release(two)
    blocks.release(one)
    blocks.validate()


def test_the_least_recently_freed_block_loses_its_content_first() -> None:
    blocks = Pool().blocks(3, 0)
    taken = [blocks.take() for _ in range(3)]
    for block, key in zip(taken, (b"a", b"b", b"c"), strict=True):
        blocks.publish(block, key)
    for block in (taken[1], taken[2], taken[0]):
        blocks.release(block)
    blocks.take()
    assert [blocks.share(key) is not None for key in (b"a", b"b", b"c")] == [True, False, True]


def test_pages_are_borrowed_when_the_reserve_is_used_up_and_go_back_when_unused() -> None:
    pool = Pool(7, 9)
    blocks = pool.blocks(2, 0)
    assert blocks.can_take(6)
    own, borrowed = [blocks.take(), blocks.take()], [blocks.take(), blocks.take(), blocks.take()]
    assert pool.pages == []
    assert blocks.num_borrowed_pages == 2
    blocks.publish(borrowed[0], b"a")
    blocks.release(borrowed[0])
    assert blocks.num_borrowed_pages == 2
    blocks.release(borrowed[1])
    assert pool.pages == [9]
    assert blocks.share(b"a") is None, "a page that went back holds nothing of ours"
    blocks.release(borrowed[2])
    for block in own:
        blocks.release(block)
    assert sorted(pool.pages) == [7, 9]
    blocks.validate()


def test_nothing_is_left_after_the_model_has_gone() -> None:
    pool = Pool(5)
    blocks = pool.blocks(1, 0)
    one, two = blocks.take(), blocks.take()
    with pytest.raises(ValueError, match="still used"):
        blocks.detach()
    blocks.publish(one, b"a")
    blocks.release(one)
    blocks.release(two)
    blocks.detach()
    assert (blocks.num_free, blocks.num_borrowed_pages, pool.pages) == (0, 0, [5])
    blocks.attach([8])
    assert blocks.share(b"a") is None
    with pytest.raises(ValueError, match="already"):
        blocks.attach([9])


def test_the_books_balance_whatever_happens() -> None:
    chance = random.Random(3)
    pool = Pool(*range(10, 14))
    blocks = pool.blocks(3, 0, 1, 2)
    used: list[int] = []
    for _ in range(3000):
        match chance.choice(("take", "take", "share", "publish", "release", "release")):
            case "take":
                if blocks.can_take(1):
                    used.append(blocks.take())
                else:
                    with pytest.raises(OutOfBlocks):
                        blocks.take()
            case "share":
                if (block := blocks.share(b"%d" % chance.randrange(12))) is not None:
                    used.append(block)
            case "publish" if used:
                blocks.publish(chance.choice(used), b"%d" % chance.randrange(12))
            case "release" if used:
                blocks.release(used.pop(chance.randrange(len(used))))
        blocks.validate()
        assert len(pool.pages) + blocks.num_borrowed_pages == 4
    for block in used:
        blocks.release(block)
    assert (blocks.num_used, blocks.num_borrowed_pages) == (0, 0)
