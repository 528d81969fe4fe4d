"""Which expert stands in which physical slot of which rank. Pure: plain Python and numpy, no torch."""

from __future__ import annotations

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

    def array(self) -> np.ndarray:
        """``slots`` as int32 ``[layers, ranks, slots]``."""
        return np.array(self.slots, dtype=np.int32).reshape(self.num_layers, self.num_ranks, self.num_slots)

    def holds(self) -> np.ndarray:
        """Who holds what: bool ``[layers, experts, ranks]``."""
        slots = self.array()
        table = np.zeros((self.num_layers, self.num_experts, self.num_ranks), dtype=bool)
        layer, rank, slot = np.nonzero(slots != EMPTY_SLOT)
        table[layer, slots[layer, rank, slot], rank] = True
        return table

    def routes(self) -> np.ndarray:
        """Where each source rank sends each expert's rows: int32 ``[layers, ranks, num_experts + 1]``.

        An entry is a global slot, ``rank_index * num_slots + slot``. A rank uses its own copy where it has one; the
        others take the copies in turn, beginning with a copy that differs from expert to expert. Column -1 (no
        expert) holds -1. Every rank computes the same table, so all agree on every row's destination without
        talking.
        """
        table = np.full((self.num_layers, self.num_ranks, self.num_experts + 1), EMPTY_SLOT, dtype=np.int32)
        starts = _starts(np.arange(self.num_experts))[:, None]
        for layer, rows in enumerate(self.array()):
            places = np.full((self.num_experts, self.num_ranks), EMPTY_SLOT, dtype=np.int32)
            rank, slot = np.nonzero(rows != EMPTY_SLOT)
            places[rows[rank, slot], rank] = rank * self.num_slots + slot
            held = places != EMPTY_SLOT
            copies = held.sum(axis=1)[:, None]
            turn = (np.cumsum(~held, axis=1) - 1 + starts) % copies
            # All copies' places, expert by expert, and where each expert's begin.
            first = np.cumsum(copies)[:, None] - copies
            table[layer, :, :-1] = np.where(held, places, places[held][first + turn]).T
        return table


def shares(holds: np.ndarray, experts: np.ndarray) -> np.ndarray:
    """The share of an expert's rows that each rank computes under ``ExpertMap.routes``: float64 ``[n, ranks]``.

    ``holds [n, ranks]`` says who holds the experts whose ids are ``experts [n]``; every source rank has equally many
    rows. A row of zeros where nobody holds the expert.
    """
    num_ranks = holds.shape[1]
    copies = np.maximum(holds.sum(axis=1), 1)[:, None]
    turns, rest = np.divmod(num_ranks - copies, copies)
    # Own rows, whole turns of the others', and one more for the copies with which the last, short turn begins.
    extra = (np.cumsum(holds, axis=1) - 1 - _starts(experts)[:, None]) % copies < rest
    return np.asarray(np.where(holds, (1 + turns + extra) / num_ranks, 0.0))


def _starts(experts: np.ndarray) -> np.ndarray:
    """With which copy, modulo their number, the turns of an expert begin: int64 ``[n]``.

    Scattered (Knuth's multiplicative hash), since ids in one rank's slots often have a stride, and all their last,
    short turns would begin with the same rank.
    """
    return (experts.astype(np.int64) * 2654435761 % 2**32) >> 16
