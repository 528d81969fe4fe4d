"""An expert map as one rank uses it."""

from __future__ import annotations

import copy

import numpy as np

from actors.engine.experts.map import EMPTY_SLOT, ExpertMap


class Routing:
    """Where rows go, seen from member ``rank_index``; made beside the steps, so that adopting it takes no time.

    ``table`` is ``ExpertMap.routes()``; ``local[layer]`` says that every rank holds every expert of the layer, so that
    no row leaves its rank. Raises ValueError on a bad map.
    """

    def __init__(self, expert_map: ExpertMap, rank_index: int) -> None:
        expert_map.validate()
        self.map = expert_map
        self.rank_index = rank_index
        self.num_ranks = expert_map.num_ranks
        self.num_slots = expert_map.num_slots
        self.table = expert_map.routes()
        sources = np.arange(self.num_ranks)[None, :, None]
        executing = self.table[:, :, :-1] // max(1, self.num_slots)
        self.local: list[bool] = (executing == sources).all(axis=(1, 2)).tolist()

    def alone(self) -> Routing:
        """For steps of this rank by itself: every row goes to some expert that stands here, whichever it asked for."""
        other = copy.copy(self)
        other.num_ranks, other.rank_index = 1, 0
        other.local = [True] * len(self.local)
        other.table = np.full((len(self.local), 1, self.map.num_experts + 1), EMPTY_SLOT, dtype=np.int32)
        for layer, row in enumerate(self.own_slots):
            filled = [slot for slot, expert in enumerate(row) if expert != EMPTY_SLOT]
            for expert in range(self.map.num_experts if filled else 0):
                other.table[layer, 0, expert] = filled[expert % len(filled)]
        return other

    @property
    def own_slots(self) -> tuple[tuple[int, ...], ...]:
        """``[layer][slot]`` of this rank."""
        return self.map.of_rank(self.rank_index)
