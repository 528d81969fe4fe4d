"""What a former manager of the same deployment left running."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from actors.engine.experts.planner import Layout
from actors.engine_actor import Description
from actors.engines import Engine
from actors.membership import NO_EPOCH, Epoch
from actors.settings import Memo
from actors.siblings import Siblings
from actors.sockets import Keys

# An engine answers between two steps.
ANSWER_S = 15.0


@dataclass(frozen=True)
class Legacy:
    """All engines that answer, and the newest epoch among them; ``layout``, ``keys`` and ``memo`` only if ``whole``."""

    engines: list[Engine]
    epoch: Epoch
    words: list[Description]

    @classmethod
    async def find(cls, siblings: Siblings) -> Legacy:
        """Asks all engines where they stand, which makes them drop whatever they had prepared; ends the silent ones."""
        found: list[tuple[ActorHandle, Description]] = []
        for handle in siblings.engines():
            try:
                found.append((handle, await asyncio.wait_for(handle.describe.remote(), ANSWER_S)))
            except (RayError, asyncio.TimeoutError):
                ray.kill(handle)
        epoch = max((word.epoch for _, word in found), key=lambda epoch: epoch.number, default=NO_EPOCH)
        engines = [Engine(word.rank, handle, word.group, word.ready) for handle, word in found]
        words = [word for _, word in found if word.epoch == epoch and word.rank in epoch.ranks]
        return cls(engines, epoch, words)

    @property
    def whole(self) -> bool:
        """Whether every member of the epoch is there, and in it."""
        return self.epoch.number > 0 and len(self.words) == len(self.epoch.members)

    @property
    def strangers(self) -> list[Engine]:
        """Engines that are no members."""
        return [engine for engine in self.engines if engine.rank not in self.epoch.ranks]

    @property
    def layout(self) -> Layout:
        expert_map = self.words[0].expert_map
        assert expert_map is not None
        return self.epoch.ranks, expert_map

    @property
    def keys(self) -> Keys:
        return self.words[0].keys

    @property
    def memo(self) -> Memo:
        return self.words[0].memo
