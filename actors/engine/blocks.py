"""Blocks of the paged KV cache: who uses which, and what content each one holds.

A block has room for the keys and values of ``block_size`` consecutive tokens of one sequence, in every layer. What
stands in it depends on the tokens of the block and on all tokens before it, so a full block is named by a digest
chained over its predecessors (``digest``): equal digest, equal content. A block that nobody uses any more keeps its
content and its name until it is needed for something else, least recently used first; until then a request that
begins with the same tokens takes it over instead of computing it (prefix caching).

Every operation costs O(1) per block it touches.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

DIGEST_BYTES = 16


def root(salt: bytes = b"") -> bytes:
    """The parent of a sequence's first block. Sequences of different salts share nothing."""
    return blake2b(salt, digest_size=DIGEST_BYTES).digest()


def digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a full block with ``tokens`` (each in ``0 .. 2**32 - 1``) that follows the block named ``parent``."""
    return blake2b(parent + array("I", tokens).tobytes(), digest_size=DIGEST_BYTES).digest()


class OutOfBlocks(Exception):
    """More blocks were asked for than are free; nothing was allocated."""


class BlockPool:
    """All ``total`` KV blocks of a rank, numbered ``0 .. total - 1``, with their reference counts and names.

    ``hits`` of ``queries`` looked-up full blocks were found in the cache and taken by a request.
    """

    def __init__(self, total: int, block_size: int) -> None:
        if total < 1 or block_size < 1:
            raise ValueError(f"{total} KV blocks of {block_size} tokens: both must be at least 1")
        self.total = total
        self.block_size = block_size
        self.hits = 0
        self.queries = 0
        self._references = [0] * total
        self._digest_of: list[bytes | None] = [None] * total
        self._block_of: dict[bytes, int] = {}
        # First in is next out. Blocks without a name go to the front, since nobody can ask for their content.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(total))

    @property
    def free(self) -> int:
        """Blocks that nobody uses, whether or not they still hold cached content."""
        return len(self._free)

    @property
    def used(self) -> int:
        return self.total - len(self._free)

    def references(self, block: int) -> int:
        """How many requests use ``block``."""
        return self._references[block]

    def blocks_for(self, tokens: int) -> int:
        """How many blocks ``tokens`` tokens fill, the last one perhaps in part."""
        return -(-tokens // self.block_size)

    def lookup(self, digests: Iterable[bytes]) -> list[int]:
        """The cached blocks of the longest prefix of ``digests``. They are the caller's only after ``acquire``."""
        found = []
        for name in digests:
            block = self._block_of.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def can_acquire(self, cached: Sequence[int], fresh: int) -> bool:
        """Whether ``acquire`` would succeed."""
        idle = sum(self._references[block] == 0 for block in cached)
        return idle + fresh <= len(self._free)

    def acquire(self, cached: Sequence[int], fresh: int) -> list[int]:
        """One more reference to each of ``cached`` (from ``lookup``) and ``fresh`` new blocks, in this order.

        Raises ``OutOfBlocks`` when there are not that many.
        """
        if not self.can_acquire(cached, fresh):
            raise OutOfBlocks(f"{fresh} fresh blocks asked for, {len(self._free)} of {self.total} free")
        for block in cached:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1
        blocks = list(cached)
        for _ in range(fresh):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Give one reference to each of a sequence's ``blocks`` back.

        The end of the sequence is reused before its beginning, which more requests may have in common.
        """
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._digest_of[block] is None:
                    self._free.move_to_end(block, last=False)

    def publish(self, block: int, name: bytes) -> None:
        """``block``, in use, is full and computed: from now on ``lookup`` finds it by ``name``.

        If another block already has that name, that one stays the one to be found.
        """
        if self._digest_of[block] is None and name not in self._block_of:
            self._digest_of[block] = name
            self._block_of[name] = block

    def withdraw(self, blocks: Iterable[int]) -> None:
        """``lookup`` finds these blocks no more; who uses them goes on doing so."""
        for block in blocks:
            self._forget(block)

    def reset(self) -> None:
        """Forget all cached content."""
        self.withdraw(range(self.total))

    def _forget(self, block: int) -> None:
        name = self._digest_of[block]
        if name is not None:
            del self._block_of[name]
            self._digest_of[block] = None
