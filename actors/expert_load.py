"""How often each expert was chosen lately, by the whole group."""

from __future__ import annotations

import logging

import numpy as np
from ray.exceptions import RayError

from actors.engine.experts import planner as experts
from actors.engines import Engine, EngineSet
from actors.group import Group

logger = logging.getLogger(__name__)


class LoadWindow:
    """Tokens per MoE layer and expert since the window before the present one began.

    Ranks count for ever; the difference of two readings is what was chosen in between. ``tokens`` covers the last full
    window and the present one, so that it is neither empty right after a turn nor much older than two windows.
    """

    def __init__(self, engines: EngineSet, group: Group) -> None:
        self._engines = engines
        self._group = group
        self._read: dict[int, tuple[Engine, np.ndarray]] = {}
        self._last: np.ndarray | None = None
        self._present: np.ndarray | None = None

    async def read(self) -> np.ndarray | None:
        """Float ``[layers, experts]`` as of now; None when no token was routed."""
        for engine in [engine for engine in self._engines if engine.rank in self._group.epoch.ranks]:
            try:
                chosen = np.asarray(await engine.handle.chosen.remote(), dtype=np.float64)
            except RayError as error:
                logger.warning("dp_rank_%d does not say what its tokens chose: %s", engine.rank, error)
                continue
            former, before = self._read.get(engine.rank, (None, None))
            self._read[engine.rank] = (engine, chosen)
            if former is engine and before is not None:
                chosen = chosen - before
            self._present = chosen if self._present is None else self._present + chosen
        tokens = self._present if self._last is None or self._present is None else self._last + self._present
        return tokens if tokens is not None and tokens.any() else None

    def turn(self) -> None:
        """Begins the next window."""
        self._last, self._present = self._present, None

    def clear(self) -> None:
        """Another group's tokens tell nothing."""
        self._read, self._last, self._present = {}, None, None


def imbalance(layout: experts.Layout | None, tokens: np.ndarray | None) -> float | None:
    """The busiest rank's share of the expert rows over the mean, by layer; None when nothing was measured."""
    if layout is None or tokens is None or not layout[1].num_layers:
        return None
    return round(experts.imbalance(layout[1], tokens), 4)
