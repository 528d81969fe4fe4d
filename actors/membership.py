"""Membership is data: an epoch says who belongs to the expert-parallel group.

Every message on the data plane carries the number of the epoch it was sent in; a message from an older epoch is
dropped by whoever receives it.
"""

from __future__ import annotations

import msgspec


class Member(msgspec.Struct, frozen=True):
    """One DP rank as others reach it.

    ``rank`` is the global rank, ``address`` the ZMQ endpoint its engine bound (``tcp://ip:port``), ``node_id`` the
    Ray node it runs on.
    """

    rank: int
    address: str
    node_id: str


class Epoch(msgspec.Struct, frozen=True):
    """A version of the membership. ``members`` are ordered by rank; numbers start at 1 and only grow."""

    number: int
    members: tuple[Member, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(member.rank for member in self.members)

    @property
    def founder(self) -> int:
        """The rank that hosts the rendezvous of the epoch's process group: the lowest, whatever ranks have left."""
        return min(self.ranks)


NO_EPOCH = Epoch(number=0, members=())
