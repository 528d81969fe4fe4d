"""The ranks' loads, gathered into snapshots that do not mix steps.

All ranks of a group step together, and a rank reports its load only when it changed, stamped (wave, step). A rank
that reported step s has completed the sync of s, so every rank sent whatever it had to say of step s-1 before. Hence:
until a step has been reported by all ranks, or is old enough that nothing of it can still be on its way, a snapshot
shows the group as it stood before that step. Two reports per rank are enough for that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from actors.wire import Load, Stats


class _Report(NamedTuple):
    stamp: tuple[int, int, int]  # (epoch, wave, step)
    load: Load


class LoadTable:
    """Loads of the current epoch's ranks. ``settle_s`` is how long, in seconds, a step may still be reported."""

    def __init__(self, settle_s: float) -> None:
        self._settle_s = settle_s
        self._reports: dict[int, list[_Report]] = {}  # at most two per rank, oldest first
        self._newest: tuple[int, int, int] = (0, 0, 0)
        self._newest_since = float("-inf")

    def resize(self, ranks: Iterable[int], kept: Iterable[int]) -> None:
        """The group is ``ranks`` now; the loads of ``kept``, which were in it before, stay until they report anew."""
        kept = set(kept)
        self._reports = {rank: self._reports.get(rank, []) if rank in kept else [] for rank in ranks}

    def report(self, stats: Stats, now: float) -> bool:
        """Take a report at time ``now`` (seconds). False if the rank has reported a later step already."""
        stamp = (stats.epoch, stats.wave, stats.step)
        reports = self._reports[stats.rank]
        if reports and stamp < reports[-1].stamp:
            return False
        load = Load(stats.rank, stats.wave, stats.step, stats.waiting, stats.running, stats.kv_used, stats.kv_total)
        earlier = [r for r in reports if r.stamp < stamp]
        self._reports[stats.rank] = [*earlier[-1:], _Report(stamp, load)]
        if stamp > self._newest:
            self._newest, self._newest_since = stamp, now
        return True

    def settled(self, now: float) -> bool:
        """Whether a snapshot at ``now`` would show all that was reported."""
        return now - self._newest_since >= self._settle_s or all(
            reports and reports[-1].stamp == self._newest for reports in self._reports.values()
        )

    def snapshot(self, now: float) -> list[Load]:
        """Loads in order of rank; a rank that never reported is left out."""
        settled = self.settled(now)
        loads = []
        for _, reports in sorted(self._reports.items()):
            shown = reports if settled else [r for r in reports if r.stamp < self._newest] or reports[:1]
            loads += [r.load for r in shown[-1:]]
        return loads
