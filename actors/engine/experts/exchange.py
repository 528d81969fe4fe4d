"""How the ranks of one epoch exchange rows: the interface, and the exchange of a group of one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch


class PeerLost(RuntimeError):
    """A collective broke: a peer died, hung past the timeout, or the group was closed. The exchange is unusable."""


class Exchange(Protocol):
    """Collectives of one epoch. All ranks call the same methods in the same order.

    ``offer`` and ``gather`` are the two halves of a ``sync``, between which a rank may do what concerns nobody else;
    ``awaited`` is asked between them only.

    ``rank_index`` is this rank's position among the members, ``size`` their number. Every method may raise
    ``PeerLost``; afterwards only ``close`` may be called.
    """

    rank_index: int
    size: int

    def sync(self, vector: Sequence[int]) -> list[list[int]]:
        """Give all ranks' vectors (of equal length, 64-bit integers) in order of rank index."""

    def offer(self, vector: Sequence[int]) -> None:
        """Begin a sync: tell the others this rank's vector."""

    def awaited(self) -> list[int]:
        """File descriptors that can be read once an answer is there: those of the members that have not answered.

        None when it is time to ``gather``, also because somebody has kept silent too long.
        """

    def gather(self) -> list[list[int]]:
        """End a sync: what ``sync`` gives."""

    def heard(self, rank_indexes: Iterable[int]) -> bool:
        """Whether all of these have begun the collective to come. Does not wait; a lost member has not."""

    def dispatch(self, rows: torch.Tensor, tokens_per_rank: Sequence[int]) -> torch.Tensor:
        """Gather all ranks' rows: ``[tokens_per_rank[rank_index], W]`` in, ``[sum(tokens_per_rank), W]`` out."""

    def combine(self, rows: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> torch.Tensor:
        """All-to-all: the first ``send[0]`` rows go to rank index 0, and so on; ``[sum(receive), W]`` in rank order."""

    def close(self) -> None:
        """Drop the group without waiting for peers, who see a lost peer. May be called twice."""


class SoloExchange:
    """A group of one rank: nothing to exchange."""

    rank_index = 0
    size = 1

    def __init__(self) -> None:
        self._vector: list[int] = []

    def sync(self, vector: Sequence[int]) -> list[list[int]]:
        return [list(vector)]

    def offer(self, vector: Sequence[int]) -> None:
        self._vector = list(vector)

    def awaited(self) -> list[int]:
        return []

    def gather(self) -> list[list[int]]:
        return [self._vector]

    def heard(self, rank_indexes: Iterable[int]) -> bool:
        return True

    def dispatch(self, rows: torch.Tensor, tokens_per_rank: Sequence[int]) -> torch.Tensor:
        return rows

    def combine(self, rows: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> torch.Tensor:
        return rows

    def close(self) -> None:
        pass
