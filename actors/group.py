"""The expert-parallel group as its manager knows it, and as front-ends watch it."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from actors.engine.experts.planner import Layout
from actors.membership import NO_EPOCH, Epoch
from actors.sockets import Keys
from actors.transition import Operation

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
        if (phase, detail, cause) == (self.phase, self.detail, self.cause):
            return
        self.phase, self.detail, self.cause = phase, detail, cause
        self.touch()
        logger.info("%s %s", phase, detail or cause)

    def touch(self) -> None:
        """Something that front-ends watch has changed."""
        self.version += 1
        self.changed.set()
        self.changed = asyncio.Event()


@dataclass(frozen=True)
class Contact:
    """What a front-end needs to reach the group."""

    keys: Keys
    router: str
    publisher: str


@dataclass
class Totals:
    """Of all operations since this manager began; ``pause_s_max`` in seconds."""

    operations: dict[str, int] = field(default_factory=lambda: {"done": 0, "rolled_back": 0})
    experts_moved: int = 0
    pause_s_max: float = 0.0

    def add(self, operation: Operation) -> None:
        if operation.error:
            self.operations["rolled_back"] += 1
            return
        self.operations["done"] += 1
        self.experts_moved += operation.experts_moved
        self.pause_s_max = max(self.pause_s_max, operation.pause_s)
