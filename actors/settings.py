"""What the manager needs to know to make and keep a group; derived from the application's configuration."""

from __future__ import annotations

from dataclasses import dataclass

from actors.engine.config import EngineConfig
from placement.request import Request


@dataclass(frozen=True)
class GroupSettings:
    """``placement`` is the request for the first size; other sizes replace its ``data_parallel_size``.

    ``max_size`` None means no bound of our own. A group that breaks more than ``max_restarts`` times within ten
    minutes is given up. Environment variables whose names start with one of ``env_prefixes`` are copied to the ranks.
    ``placement_groups`` (hex id to local rank) were made by the caller, to be used instead of our own.
    Within ``switch_timeout_s`` all ranks must have changed epochs once they are told to.
    ``drain_timeout_s`` is how long the running requests of a leaving rank may stay there. Experts are re-placed when
    the busiest rank has more than ``rebalance_threshold`` times the mean load (None: only when asked to), measured
    over ``rebalance_interval_s``. Times are in seconds.
    """

    engine: EngineConfig
    placement: Request
    min_size: int
    max_size: int | None
    placement_timeout_s: float
    start_timeout_s: float
    lease_s: float
    max_restarts: int
    env_prefixes: tuple[str, ...]
    placement_groups: dict[str, int] | None = None
    switch_timeout_s: float = 30.0
    drain_timeout_s: float = 30.0
    rebalance_threshold: float | None = None
    rebalance_interval_s: float = 60.0


@dataclass(frozen=True)
class Memo:
    """What a manager's successor must know and can't see: the ``declared`` size it acted on last, the ``wanted`` one.

    0: none yet.
    """

    declared: int = 0
    wanted: int = 0
