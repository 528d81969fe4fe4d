"""Which expert stands in which physical slot of which rank. Pure: plain Python and numpy, no torch."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

EMPTY_SLOT = -1


class ExpertMap(msgspec.Struct, frozen=True):
    """``slots[layer][rank_index][slot]`` is an expert id, or -1 for a slot that holds none.

    Layers count the MoE layers only; a rank's index is its position among the members of the epoch. An expert may
    stand in several slots of a layer (replicas), but not twice on one rank.
    """

    num_experts: int
    slots: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def num_layers(self) -> int:
        return len(self.slots)

    @property
    def num_ranks(self) -> int:
        return len(self.slots[0]) if self.slots else 0

    @property
    def num_slots(self) -> int:
        return len(self.slots[0][0]) if self.slots else 0

    def of_rank(self, rank_index: int) -> tuple[tuple[int, ...], ...]:
        """``[layer][slot]`` of one rank."""
        return tuple(layer[rank_index] for layer in self.slots)

    def validate(self) -> None:
        """Raise ValueError unless the map is rectangular, in range, complete, and free of repeats within a rank."""
        for layer, ranks in enumerate(self.slots):
            if len(ranks) != self.num_ranks:
                raise ValueError(
                    f"layer {layer} of the expert map has {len(ranks)} ranks, layer 0 has {self.num_ranks}"
                )
            held: set[int] = set()
            for rank_index, row in enumerate(ranks):
                where = f"layer {layer}, rank index {rank_index} of the expert map"
                if len(row) != self.num_slots:
                    raise ValueError(f"{where} has {len(row)} slots, expected {self.num_slots}")
                experts = [expert for expert in row if expert != EMPTY_SLOT]
                if wrong := [expert for expert in experts if not 0 <= expert < self.num_experts]:
                    raise ValueError(f"{where} names experts {wrong}; ids are 0 to {self.num_experts - 1}")
                if len(set(experts)) != len(experts):
                    raise ValueError(f"{where} holds an expert twice: {row}; spread replicas over ranks")
                held.update(experts)
            if len(held) != self.num_experts:
                missing = sorted(set(range(self.num_experts)) - held)
                raise ValueError(
                    f"layer {layer} of the expert map lacks experts {missing}; give each at least one slot"
                )

    def routes(self) -> np.ndarray:
        """Where each source rank sends each expert's rows: int32 ``[layers, ranks, num_experts + 1]``.

        An entry is a global slot, ``rank_index * num_slots + slot``. A rank uses its own copy where it has one; else
        source ranks take an expert's copies in turn. Column -1 (no expert) holds -1. Every rank computes the same
        table, so all agree on every row's destination without talking.
        """
        table = np.full((self.num_layers, self.num_ranks, self.num_experts + 1), EMPTY_SLOT, dtype=np.int32)
        for layer, ranks in enumerate(self.slots):
            copies: list[list[int]] = [[] for _ in range(self.num_experts)]
            for rank_index, row in enumerate(ranks):
                for slot, expert in enumerate(row):
                    if expert != EMPTY_SLOT:
                        copies[expert].append(rank_index * self.num_slots + slot)
            for expert, places in enumerate(copies):
                for source in range(self.num_ranks):
                    own = [place for place in places if place // self.num_slots == source]
                    table[layer, source, expert] = own[0] if own else places[source % len(places)]
        return table


def balanced(num_layers: int, num_experts: int, num_ranks: int, num_slots: int = 0) -> ExpertMap:
    """Each expert once, ranks' shares differing by at most one; spare slots stay empty.

    ``num_slots`` per rank and layer; 0 means as few as suffice. The larger shares rotate over the ranks from layer
    to layer. Raises ValueError when the slots cannot hold all experts.
    """
    needed = -(-num_experts // num_ranks) if num_layers else 0
    num_slots = num_slots or needed
    if num_slots < needed:
        raise ValueError(
            f"{num_ranks} ranks with {num_slots} expert slots each cannot hold {num_experts} experts; "
            f"set expert_slots to {needed} or more, or use more ranks"
        )
    share, larger = divmod(num_experts, num_ranks)
    layers = []
    for layer in range(num_layers):
        ranks: list[tuple[int, ...]] = []
        expert = 0
        for rank_index in range(num_ranks):
            count = share + ((rank_index - layer) % num_ranks < larger)
            ranks.append(_padded(range(expert, expert + count), num_slots))
            expert += count
        layers.append(tuple(ranks))
    return ExpertMap(num_experts=num_experts, slots=tuple(layers))


def _padded(experts: Sequence[int], num_slots: int) -> tuple[int, ...]:
    return (*experts, *[EMPTY_SLOT] * (num_slots - len(experts)))
