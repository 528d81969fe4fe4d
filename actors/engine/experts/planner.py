"""Decides which expert stands in which slot: at the first start, after every change of members, and by load. Pure.

Every layer is planned for itself, since a step waits for the busiest rank in every layer:

1. Ranks that stay keep what they hold, in the slots where it stands.
2. Experts that nobody holds any more go to slots with room, else in place of replicas on the ranks that stay, spread
   evenly.
3. All other room is filled with replicas: of the experts with the most tokens per copy, heaviest first, each on the
   least loaded ranks. This greedy order is that of EPLB, DeepSeek's expert-parallel load balancer
   (https://github.com/deepseek-ai/EPLB; DeepSeek-V3 report, arXiv:2412.19437, section 3.4), which plans every
   arrangement anew.
   Neighbours get different experts, so that the copies of one are far apart: whichever ranks go, a node's or the
   last ones, others hold most of theirs.
4. Single changes improve that (balance.py): on joining ranks at no cost; on staying ranks only when a load was
   measured, and only as far as the changes pay.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import msgspec
import numpy as np

from actors.engine.experts.balance import better, improve, rank_tokens
from actors.engine.experts.map import EMPTY_SLOT, ExpertMap

# In groups larger than this, shortcuts: experts' numbers of copies are first adjusted all at once, as single changes
# take too long, and ranks are ordered in blocks of this size.
MANY_RANKS = 256

# Loads smaller than this part of the largest count as none.
NOTHING = 1e-12

# The members of an epoch by global rank, and what they hold: member i is rank index i of the map.
Layout = tuple[tuple[int, ...], ExpertMap]


class Shape(msgspec.Struct, frozen=True):
    """``num_slots`` is per rank and layer; 0 means those of the map before, else as few as suffice."""

    num_layers: int
    num_experts: int
    num_slots: int = 0


class Move(msgspec.Struct, frozen=True):
    """``rank`` (global) must load ``expert`` into ``slot`` of ``layer``.

    A slot that ``was_free`` can be filled while the old epoch serves; the others hold experts that it uses.
    """

    rank: int
    layer: int
    slot: int
    expert: int
    was_free: bool


def plan(shape: Shape, ranks: Sequence[int], before: Layout | None = None, load: np.ndarray | None = None) -> ExpertMap:
    """The expert map for the members ``ranks``, in their order.

    ``before`` is the layout of the epoch that serves now; ``load`` the tokens measured per expert, float
    ``[layers, experts]`` (None: all alike). The same arguments give the same map. In it

    - every expert stands somewhere, none twice on a rank, and a slot is empty only where its rank holds all experts;
    - an expert that stays on a rank keeps its slot. New ones take the rank's empty slots first, then those of
      replicas, then (by load only) those of experts that move to other ranks;
    - without ``load``, a rank that stays loads only experts that would be lost, and fills slots that were empty;
    - with ``load``, it also loads what pays for itself, see ``balance.improve``.

    Raises ValueError on ranks, a layout or a load that do not fit, and when the slots cannot hold all experts.
    """
    ranks = tuple(ranks)
    num_slots = _checked_slots(shape, ranks, before)
    weights = _checked_load(shape, load)
    if not shape.num_layers:
        return ExpertMap(num_experts=shape.num_experts, slots=())
    old = np.full((shape.num_layers, len(ranks), num_slots), EMPTY_SLOT, dtype=np.int32)
    index_before = {rank: index for index, rank in enumerate(before[0])} if before else {}
    staying = np.array([rank in index_before for rank in ranks])
    if before and staying.any():
        old[:, staying] = before[1].array()[:, [index_before[rank] for rank in ranks if rank in index_before]]
    layers = []
    for layer in range(shape.num_layers):
        was = np.zeros((shape.num_experts, len(ranks)), dtype=bool)
        rank_index, slot = np.nonzero(old[layer] != EMPTY_SLOT)
        was[old[layer, rank_index, slot], rank_index] = True
        # A layer that saw no tokens tells nothing.
        known = load is not None and bool(weights[layer].any())
        tokens = weights[layer] if known or load is None else np.ones(shape.num_experts)
        holds = _settle(was, tokens, num_slots, layer)
        holds[:, ~staying] = _spread(holds[:, ~staying], was.sum(axis=1))
        if known and len(ranks) > MANY_RANKS:
            holds = better(holds, _recounted(holds, tokens, layer), tokens, was, staying)
        holds = improve(holds, tokens, was, staying, movable=known)
        layers.append(_rows(holds, was, old[layer]))
    return ExpertMap(num_experts=shape.num_experts, slots=tuple(layers))


def moves(before: Layout | None, after: Layout) -> list[Move]:
    """What each member of ``after`` must load, by rank, layer and slot; a rank that is new loads all it holds.

    Raises ValueError when the layouts differ in layers or slots.
    """
    ranks, new = after
    old = np.full((new.num_layers, new.num_ranks, new.num_slots), EMPTY_SLOT, dtype=np.int32)
    if before is not None and new.num_layers:
        index_before = {rank: index for index, rank in enumerate(before[0])}
        now = [index for index, rank in enumerate(ranks) if rank in index_before]
        slots = before[1].array()
        if (slots.shape[0], slots.shape[2]) != (old.shape[0], old.shape[2]):
            raise ValueError(
                f"maps of {slots.shape[0]} layers with {slots.shape[2]} slots and of {old.shape[0]} with "
                f"{old.shape[2]}: slots are fixed at launch, compare maps of one deployment"
            )
        old[:, now] = slots[:, [index_before[ranks[index]] for index in now]]
    wanted = new.array()
    places = np.argwhere((wanted != old) & (wanted != EMPTY_SLOT)).tolist()
    return [
        Move(ranks[index], layer, slot, int(wanted[layer, index, slot]), bool(old[layer, index, slot] == EMPTY_SLOT))
        for layer, index, slot in sorted(places, key=lambda place: (place[1], place[0], place[2]))
    ]


def imbalance(expert_map: ExpertMap, load: np.ndarray) -> float:
    """How much longer the experts take than if all ranks had equal shares: 1.0 is perfect.

    The busiest rank's expected tokens, summed over the layers, over the mean rank's: every layer waits for its own
    busiest rank. ``load`` is float ``[layers, experts]``. Raises ValueError when it does not fit the map.
    """
    weights = _checked_load(Shape(expert_map.num_layers, expert_map.num_experts), load)
    if not weights.any():
        return 1.0
    tokens = [rank_tokens(held, layer) for held, layer in zip(expert_map.holds(), weights, strict=True)]
    return float(np.max(tokens, axis=1).sum() / np.mean(tokens, axis=1).sum())


def _checked_slots(shape: Shape, ranks: tuple[int, ...], before: Layout | None) -> int:
    if not ranks or len(set(ranks)) != len(ranks):
        raise ValueError(f"ranks {list(ranks)} cannot form a group; name each member once, and at least one")
    if not shape.num_layers:
        return 0
    needed = -(-shape.num_experts // len(ranks))
    num_slots = shape.num_slots or (before[1].num_slots if before else needed)
    if before:
        old = before[1]
        if (old.num_layers, old.num_experts, old.num_slots) != (shape.num_layers, shape.num_experts, num_slots):
            raise ValueError(
                f"the map before has {old.num_layers} layers, {old.num_experts} experts, {old.num_slots} slots, the "
                f"one to plan {shape.num_layers}, {shape.num_experts}, {num_slots}; they are fixed at launch"
            )
        if len(before[0]) != old.num_ranks:
            raise ValueError(
                f"{len(before[0])} ranks were named for a map before of {old.num_ranks}; name the members in its order"
            )
    if num_slots < needed:
        raise ValueError(
            f"{len(ranks)} ranks with {num_slots} expert slots each cannot hold {shape.num_experts} experts; "
            f"set expert_slots to {needed} or more, or use more ranks"
        )
    return num_slots


def _checked_load(shape: Shape, load: np.ndarray | None) -> np.ndarray:
    """``load`` with its largest entry scaled to 1; ones where there is none."""
    if load is None:
        return np.ones((shape.num_layers, shape.num_experts))
    weights = np.asarray(load, dtype=np.float64)
    if weights.shape != (shape.num_layers, shape.num_experts):
        raise ValueError(
            f"an expert load of shape {weights.shape} for {shape.num_layers} layers of {shape.num_experts} experts; "
            f"give one number per layer and expert"
        )
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise ValueError("the expert load has entries that are negative or not finite; give numbers of tokens")
    # Only proportions matter; an average that decays ends where floats underflow.
    weights = weights / (weights.max(initial=0.0) or 1.0)
    return np.where(weights < NOTHING, 0.0, weights)


def _settle(was: np.ndarray, load: np.ndarray, num_slots: int, layer: int) -> np.ndarray:
    """Who holds what when all experts stand somewhere and all room is used: bool ``[experts, ranks]``.

    ``was`` is what staying ranks hold; nothing of it is given up but replicas whose slot a lost expert needs.
    """
    holds = was.copy()
    full = min(num_slots, len(load))
    room = full - holds.sum(axis=0)
    copies = holds.sum(axis=1)
    lost = sorted(np.flatnonzero(copies == 0).tolist(), key=lambda expert: -load[expert])
    housed, evicting = lost[: int(room.sum())], lost[int(room.sum()) :]
    if room.any():
        _fill(holds, load, room, housed, _order(holds, layer))
    if evicting:
        _evict(holds, load, evicting, (holds & ~was).sum(axis=0))
    return holds


def _order(holds: np.ndarray, layer: int) -> list[int]:
    """Which of equally loaded experts is copied first: one of each rank in turn, beginning elsewhere in each layer."""
    num_experts, num_ranks = holds.shape
    holder = np.argmax(holds, axis=1)
    nth = np.cumsum(holds, axis=0)[np.arange(num_experts), holder]
    rotated = (np.arange(num_experts) - layer) % num_experts
    order = np.empty(num_experts, dtype=np.int64)
    order[np.lexsort((rotated, (holder - layer) % num_ranks, nth))] = np.arange(num_experts)
    return order.tolist()


def _fill(holds: np.ndarray, load: np.ndarray, room: np.ndarray, lost: list[int], order: list[int]) -> None:
    """Uses all ``room [ranks]``: each of the ``lost`` gets a copy, all else goes to the most tokens per copy."""
    added = _added_copies(holds, load, room, lost, order)
    share = load / np.maximum(holds.sum(axis=1) + added, 1)
    tokens = (holds * share[:, None]).sum(axis=0)
    queue = [(tokens[rank], 0, rank) for rank in np.flatnonzero(room).tolist()]
    heapq.heapify(queue)
    left = room.tolist()
    for expert in sorted(np.flatnonzero(added).tolist(), key=lambda expert: (-share[expert], order[expert])):
        chosen: list[tuple[float, int, int]] = []
        passed: list[tuple[float, int, int]] = []
        while queue and len(chosen) < added[expert]:
            entry = heapq.heappop(queue)
            (passed if holds[expert, entry[2]] else chosen).append(entry)
        for carried, used, rank in chosen:
            holds[expert, rank] = True
            left[rank] -= 1
            if left[rank]:
                passed.append((carried + share[expert], used + 1, rank))
        for entry in passed:
            heapq.heappush(queue, entry)
    # Ranks left with room hold all that was to be copied: they get what else has the most tokens per copy.
    copies = holds.sum(axis=1)
    for _, _, rank in sorted(queue, key=lambda entry: entry[2]):
        for _ in range(left[rank]):
            absent = np.flatnonzero(~holds[:, rank]).tolist()
            expert = min(absent, key=lambda expert: (-load[expert] / copies[expert], copies[expert], order[expert]))
            holds[expert, rank] = True
            copies[expert] += 1


def _added_copies(
    holds: np.ndarray, load: np.ndarray, room: np.ndarray, lost: list[int], order: list[int]
) -> np.ndarray:
    """How many copies each expert gets, int64 ``[experts]``: one if lost; the rest one by one to the neediest."""
    added = np.zeros(len(load), dtype=np.int64)
    added[lost] = 1
    most = (~holds[:, room > 0]).sum(axis=1).tolist()
    copies = (holds.sum(axis=1) + added).tolist()
    tokens = load.tolist()
    queue = [
        (-tokens[expert] / copies[expert], copies[expert], order[expert], expert)
        for expert in range(len(tokens))
        if copies[expert] and most[expert] > added[expert]
    ]
    heapq.heapify(queue)
    count = added.tolist()
    for _ in range(int(room.sum()) - len(lost)):
        if not queue:
            break
        *_, expert = queue[0]
        count[expert] += 1
        copies[expert] += 1
        if count[expert] < most[expert]:
            entry = (-tokens[expert] / copies[expert], copies[expert], order[expert], expert)
            heapq.heapreplace(queue, entry)
        else:
            heapq.heappop(queue)
    return np.array(count, dtype=np.int64)


def _spread(holds: np.ndarray, standing: np.ndarray) -> np.ndarray:
    """``holds [experts, joiners]`` with the joiners in an order that spreads every expert's copies evenly over it.

    ``standing [experts]`` are the copies on ranks that stay.
    """
    num_joiners = holds.shape[1]
    per_copy = 1 / np.maximum(holds.sum(axis=1) + standing, 1)
    passed = standing * per_copy
    parts = holds * per_copy[:, None]
    order: list[int] = []
    # Large groups are ordered block by block, each a cross-section of all joiners.
    blocks = -(-num_joiners // MANY_RANKS)
    for block in range(blocks):
        members = np.arange(block, num_joiners, blocks)
        held = [np.flatnonzero(row) for row in holds[:, members].T]
        part = parts[:, members]
        # Of each joiner's experts, the parts of their copies that stand on earlier ranks, summed.
        seen = (part * passed[:, None]).sum(axis=0)
        for _ in range(len(members)):
            chosen = int(np.argmin(seen))
            order.append(int(members[chosen]))
            seen += part[held[chosen]].sum(axis=0)
            seen[chosen] = np.inf
        passed += part.sum(axis=1)
    return holds[:, order]


def _recounted(holds: np.ndarray, load: np.ndarray, layer: int) -> np.ndarray:
    """``holds`` with as many copies of each expert as its load asks for; it must leave no room."""
    order = _order(holds, layer)
    full = holds.sum(axis=0)
    wanted = _added_copies(np.zeros_like(holds), load, full, list(range(len(load))), order)
    tokens = rank_tokens(holds, load)
    kept = holds.copy()
    for expert in np.flatnonzero(holds.sum(axis=1) > wanted):
        holders = np.flatnonzero(kept[expert])
        surplus = holders[np.argsort(-tokens[holders], kind="stable")][: len(holders) - wanted[expert]]
        kept[expert, surplus] = False
        tokens[surplus] -= load[expert] / len(holders)
    _fill(kept, load, full - kept.sum(axis=0), [], order)
    return kept


def _evict(holds: np.ndarray, load: np.ndarray, lost: list[int], taken: np.ndarray) -> None:
    """Puts each of the ``lost`` in place of a replica, on the rank that loads the fewest: so far ``taken [ranks]``.

    There always is one: the slots can hold all experts and are full, so while one is lost another stands twice.
    """
    copies = holds.sum(axis=1)
    tokens = rank_tokens(holds, load)
    for expert in lost:
        spare = holds & (copies > 1)[:, None]
        able = np.flatnonzero(spare.any(axis=0))
        rank = int(able[np.lexsort((tokens[able], taken[able]))[0]])
        candidates = np.flatnonzero(spare[:, rank])
        # Give up the copy with the fewest tokens; among such, one whose other holders have taken many already.
        relief = (holds[candidates] * taken).sum(axis=1) / copies[candidates]
        dropped = candidates[np.lexsort((-relief, load[candidates] / copies[candidates]))[0]]
        holds[dropped, rank] = False
        holds[expert, rank] = True
        copies[dropped] -= 1
        copies[expert] = 1
        taken[rank] += 1
        tokens[rank] += load[expert]


def _rows(holds: np.ndarray, was: np.ndarray, old: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """One layer of the map: who stays where it was, then the new ones in the order that ``plan`` promises."""
    rows = np.where((old != EMPTY_SLOT) & holds[old, np.arange(len(old))[:, None]], old, EMPTY_SLOT)
    gained = holds & ~was
    copies_before = was.sum(axis=1)
    ranks, experts = np.nonzero(gained.T)
    borders = np.searchsorted(ranks, np.arange(len(old) + 1))
    for rank in np.unique(ranks).tolist():
        new = experts[borders[rank] : borders[rank + 1]]
        free = np.flatnonzero(rows[rank] == EMPTY_SLOT)
        former = old[rank, free]
        # 0: was empty, 1: held a replica, 2: held the only copy among those that stay.
        kind = np.where(former == EMPTY_SLOT, 0, np.where(copies_before[former] > 1, 1, 2))
        rows[rank, free[np.argsort(kind, kind="stable")][: len(new)]] = new
    return tuple(map(tuple, rows.tolist()))
