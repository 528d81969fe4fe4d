"""The pool of KV blocks against a plain model of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from actors.engine.blocks import BlockPool, OutOfBlocks, digest, root


def names(tokens: list[int], size: int = 2, salt: bytes = b"") -> list[bytes]:
    chain, parent = [], root(salt)
    for start in range(0, len(tokens) - size + 1, size):
        parent = digest(parent, tokens[start : start + size])
        chain.append(parent)
    return chain


@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=8))
def test_digests_are_equal_exactly_where_all_tokens_so_far_are(left: list[int], right: list[int]) -> None:
    for index, (a, b) in enumerate(zip(names(left), names(right), strict=False)):
        end = 2 * (index + 1)
        assert (a == b) == (left[:end] == right[:end])


def test_salts_separate_sequences() -> None:
    assert set(names([1, 2, 3, 4], salt=b"a")).isdisjoint(names([1, 2, 3, 4], salt=b"b"))


def test_content_outlives_its_user_until_the_block_is_needed() -> None:
    pool = BlockPool(total=3, block_size=2)
    chain = names([1, 2, 3, 4])
    mine = pool.acquire((), 2)
    for block, name in zip(mine, chain, strict=True):
        pool.publish(block, name)
    pool.release(mine)
    assert (pool.used, pool.free) == (0, 3)
    assert pool.lookup(chain) == mine
    # The block that holds nothing goes first, then the end of the sequence, then its beginning.
    assert pool.acquire((), 1) == [({0, 1, 2} - set(mine)).pop()]
    assert pool.lookup(chain) == mine
    pool.acquire((), 1)
    assert pool.lookup(chain) == mine[:1]


def test_a_block_taken_over_is_not_free() -> None:
    pool = BlockPool(total=2, block_size=2)
    first = pool.acquire((), 1)
    pool.publish(first[0], names([1, 2])[0])
    second = pool.acquire(pool.lookup(names([1, 2])), 1)
    assert second[0] == first[0] and pool.references(first[0]) == 2
    pool.release(first)
    with pytest.raises(OutOfBlocks, match="1 fresh blocks asked for, 0 of 2 free"):
        pool.acquire((), 1)
    pool.release(second)
    assert pool.used == 0


def test_reset_forgets_content_and_keeps_users() -> None:
    pool = BlockPool(total=2, block_size=2)
    mine = pool.acquire((), 1)
    pool.publish(mine[0], names([1, 2])[0])
    pool.reset()
    assert pool.lookup(names([1, 2])) == [] and pool.used == 1
    pool.release(mine)
    assert pool.free == 2


class Pool(RuleBasedStateMachine):
    """Sequences come, publish, end; the model knows who holds what and which name was given to which block."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(total=6, block_size=2)
        self.held: list[tuple[list[bytes], list[int], int]] = []  # chain, blocks, how many taken over
        self.content: dict[int, bytes] = {}

    @rule(tokens=st.lists(st.integers(0, 1), max_size=6), extra=st.integers(0, 2))
    def acquire(self, tokens: list[int], extra: int) -> None:
        chain = names(tokens)
        cached = self.pool.lookup(chain)
        assert [self.content[block] for block in cached] == chain[: len(cached)]
        fresh = len(chain) - len(cached) + extra
        in_use = {block for _, blocks, _ in self.held for block in blocks}
        fits = len(in_use | set(cached)) + fresh <= self.pool.total
        assert self.pool.can_acquire(cached, fresh) == fits
        if not fits:
            with pytest.raises(OutOfBlocks):
                self.pool.acquire(cached, fresh)
            return
        blocks = self.pool.acquire(cached, fresh)
        assert blocks[: len(cached)] == cached and len(blocks) == len(cached) + fresh
        assert in_use.isdisjoint(blocks[len(cached) :]) and set(cached).isdisjoint(blocks[len(cached) :])
        for block in blocks[len(cached) :]:
            self.content.pop(block, None)
        self.held.append((chain, blocks, len(cached)))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        chain, blocks, _ = data.draw(st.sampled_from(self.held))
        for block, name in zip(blocks, chain, strict=False):
            self.content[block] = name
            self.pool.publish(block, name)
        assert len(self.pool.lookup(chain)) == len(chain)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1))
        self.pool.release(self.held.pop(index)[1])

    @rule()
    def reset(self) -> None:
        self.pool.reset()

    @invariant()
    def references_are_users(self) -> None:
        users = [block for _, blocks, _ in self.held for block in blocks]
        assert [self.pool.references(block) for block in range(self.pool.total)] == [
            users.count(block) for block in range(self.pool.total)
        ]
        assert self.pool.used == len(set(users)) == self.pool.total - self.pool.free


TestPool = Pool.TestCase
