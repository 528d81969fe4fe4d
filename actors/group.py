"""The expert-parallel group as its manager knows it, and as front-ends watch it."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from actors.engine.experts.planner import Layout
from actors.membership import NO_EPOCH, Epoch

logger = logging.getLogger(__name__)


@dataclass
class Group:
    """``version`` grows with each change. ``phase`` is ``idle``; while the group is made, a phase of that transition;
    ``serving``, also while it is resized; ``restarting`` (a rank ended); and, with ``cause``, ``failed`` (it could not
    be made) and ``lost`` (it broke too often). ``layout`` says which expert stands where.
    """

    phase: str = "idle"
    cause: str = ""
    detail: str = ""
    version: int = 0
    epoch: Epoch = NO_EPOCH
    layout: Layout | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def set(self, phase: str, detail: str = "", cause: str = "") -> None:
        self.phase, self.detail, self.cause = phase, detail, cause
        self.touch()
        logger.info("%s %s", phase, detail or cause)

    def touch(self) -> None:
        """Something that front-ends watch has changed."""
        self.version += 1
        self.changed.set()
        self.changed = asyncio.Event()
