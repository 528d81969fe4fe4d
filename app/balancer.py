"""Chooses a rank for each request: a pure object that takes views, submits and outputs, and answers with ranks.

The score of a rank is ``waiting * 4 + running``, lowest first. It is built from the rank's last published load and
from this client's own requests that this load does not cover yet:

* a request counts as waiting from its submit until one of its outputs is seen: only then it is known that the rank
  has admitted it;
* from then on it counts as running until a load arrives that was taken at the output's (wave, step) or later;
* a request that ended counts no more.

So a fresh snapshot never erases a submit that the rank had not received when the snapshot was taken. A request that
waits in a rank's queue may for a while count twice (in the load, and here); it does so on every rank alike.

Above 64 ranks a scan per request would cost more than it gains: the better of two ranks drawn at random comes close to
the best (Mitzenmacher, "The power of two choices in randomized load balancing", 2001).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from actors.membership import Member
from actors.wire import Load, View

WAITING_WEIGHT = 4
SCAN_LIMIT = 64


@dataclass
class _Rank:
    member: Member
    load: Load
    offered: bool = False
    leaving: bool = False
    unseen: set[str] = field(default_factory=set)  # submitted, no output yet
    seen: dict[str, tuple[int, int]] = field(default_factory=dict)  # (wave, step) of the first output

    @property
    def open(self) -> bool:
        """Whether it may be given something new."""
        return self.offered and not self.leaving

    @property
    def score(self) -> int:
        return (self.load.waiting + len(self.unseen)) * WAITING_WEIGHT + self.load.running + len(self.seen)

    def cover(self) -> None:
        taken = (self.load.wave, self.load.step)
        self.seen = {request: shown for request, shown in self.seen.items() if shown > taken}


class UnknownRank(LookupError):
    """The request named a rank that the group does not have."""


class Balancer:
    """Internal load balancing of one client over all ranks of the group.

    ``offset`` is where this client's scan starts, so that clients of equal knowledge do not all choose the same rank;
    ``draw(n)`` returns a random integer in [0, n).
    """

    def __init__(self, offset: int, draw: Callable[[int], int] | None = None) -> None:
        self.epoch = 0
        self._offset = offset
        self._draw = draw or random.Random(offset).randrange
        self._ranks: dict[int, _Rank] = {}
        self._rank_of: dict[str, int] = {}

    @property
    def ranks(self) -> tuple[int, ...]:
        """The members of the current epoch, in order."""
        return tuple(self._ranks)

    @property
    def loads(self) -> list[Load]:
        """The last load of each member, in order of rank."""
        return [rank.load for rank in self._ranks.values()]

    @property
    def leaving(self) -> tuple[int, ...]:
        """Members that get nothing new, in order."""
        return tuple(number for number, rank in self._ranks.items() if rank.leaving)

    def observe(self, view: View) -> bool:
        """Takes a published view; returns False, and changes nothing, when it is of an older epoch.

        A rank that left in a newer epoch is therefore never revived by a late view. Within an epoch a load is
        replaced only by one taken later. Ranks that the view calls leaving get nothing new until a view (of a scaling
        that was rolled back, say) does so no more; what they run stays theirs.
        """
        if view.epoch < self.epoch:
            return False
        if view.epoch > self.epoch:
            self._change_members(view)
        for number, rank in self._ranks.items():
            rank.leaving = number in view.leaving
        for load in view.loads:
            loaded = self._ranks.get(load.rank)
            if loaded is not None and (load.wave, load.step) >= (loaded.load.wave, loaded.load.step):
                loaded.load = load
                loaded.cover()
        return True

    def offer(self, rank: int) -> None:
        """This rank can be reached: it may be chosen from now on."""
        if rank in self._ranks:
            self._ranks[rank].offered = True

    def withhold(self, rank: int) -> None:
        """This rank does not answer: it is not chosen until offered again. What it runs stays counted."""
        if rank in self._ranks:
            self._ranks[rank].offered = False

    def assign(self, request_id: str, rank: int | None = None) -> int | None:
        """Chooses a rank for a request (the named one if it names one) and counts the request there.

        A named rank that is leaving can't be had any more, which is not the request's fault: another is chosen, as for
        a request whose named rank left while it ran. Returns None when no rank that it may use is offered yet. Raises
        UnknownRank for a rank that is no member.
        """
        if rank is not None and rank not in self._ranks:
            raise UnknownRank(f"rank {rank} is not in the group; its ranks are {list(self._ranks)}")
        if rank is None or self._ranks[rank].leaving:
            rank = self._choose()
        elif not self._ranks[rank].offered:
            rank = None
        if rank is not None:
            self._ranks[rank].unseen.add(request_id)
            self._rank_of[request_id] = rank
        return rank

    def seen(self, request_id: str, wave: int, step: int) -> None:
        """The first output of a request came, from ``step`` of ``wave`` of its rank."""
        rank = self._ranks.get(self._rank_of.get(request_id, -1))
        if rank is not None and request_id in rank.unseen:
            rank.unseen.discard(request_id)
            if (wave, step) > (rank.load.wave, rank.load.step):
                rank.seen[request_id] = (wave, step)

    def ended(self, request_id: str) -> None:
        """The request finished, was aborted, or moves to another rank."""
        rank = self._ranks.get(self._rank_of.pop(request_id, -1))
        if rank is not None:
            rank.unseen.discard(request_id)
            rank.seen.pop(request_id, None)

    def _change_members(self, view: View) -> None:
        before = self._ranks
        self.epoch = view.epoch
        self._ranks = {}
        for member in sorted(view.members, key=lambda member: member.rank):
            old = before.get(member.rank)
            # The same number at another address is another engine: nothing known of the old one holds.
            kept = old if old is not None and old.member == member else None
            self._ranks[member.rank] = kept or _Rank(member, _no_load(member.rank))
        self._rank_of = {
            request: number
            for request, number in self._rank_of.items()
            if number in self._ranks and self._ranks[number] is before[number]
        }

    def _choose(self) -> int | None:
        offered = [number for number, rank in self._ranks.items() if rank.open]
        count = len(offered)
        if count == 0:
            return None
        if count > SCAN_LIMIT:
            first, second = self._draw(count), self._draw(count - 1)
            offered = [offered[first], offered[second + (second >= first)]]
        else:
            start = self._offset % count
            offered = offered[start:] + offered[:start]
        return min(offered, key=lambda number: self._ranks[number].score)


def _no_load(rank: int) -> Load:
    return Load(rank=rank, wave=-1, step=-1, waiting=0, running=0, kv_used=0, kv_total=0)
