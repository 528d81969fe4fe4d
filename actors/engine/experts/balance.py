"""Improves one layer's arrangement of experts by single changes. Pure."""

from __future__ import annotations

import numpy as np

from actors.engine.experts.map import shares

# A layer whose busiest rank has at most this much more than the mean is left as it is.
SETTLED = 0.02
# What loading one expert per rank (on average over the ranks, in one layer) must take off the layer's max/mean.
PRICE = 0.02
# Bounds on the search, so that planning for thousands of ranks ends: partners tried for the busiest rank, candidates
# evaluated exactly, changes in a row that bring nothing yet, and changes in a layer (fewer in large groups, where
# each takes longer).
PARTNERS = 16
EXACT = 4
CHANGES = 1024
CHANGES_BY_RANKS = 2**17
PATIENCE = 32


def rank_tokens(holds: np.ndarray, load: np.ndarray) -> np.ndarray:
    """Tokens that each rank is expected to compute in one layer, float64 ``[ranks]``.

    ``holds`` is bool ``[experts, ranks]``, ``load`` float ``[experts]``.
    """
    return np.asarray((shares(holds, np.arange(len(load))) * load[:, None]).sum(axis=0))


def improve(holds: np.ndarray, load: np.ndarray, was: np.ndarray, staying: np.ndarray, *, movable: bool) -> np.ndarray:
    """A better arrangement than ``holds``, or the same: bool ``[experts, ranks]``, as many experts on each rank.

    ``was [experts, ranks]`` is what ranks hold now, ``staying [ranks]`` says who serves now; unless ``movable`` those
    ranks' experts stand still. A change is one of three: the busiest rank swaps an expert with another rank; one of
    its experts gets a copy on another rank in place of a replica there; or it gives up a replica for a copy of some
    other expert. The change that lowers the sum of squares of the ranks' tokens most, per expert that a staying rank
    has to load for it, is made; and so on.

    The rule that ends it: of all arrangements passed, the one with the least
    ``max / mean of the ranks' tokens + PRICE * (experts that staying ranks load) / ranks`` is taken. So the result is
    never worse than ``holds``, and an expert loaded per rank must take 2 % off the layer's time.
    """
    num_ranks = holds.shape[1]
    free = np.ones(num_ranks, dtype=bool) if movable else ~staying
    mean = float(load.sum()) / num_ranks
    if num_ranks == 1 or not free.any() or not mean or holds.all():
        return holds
    state = _State(holds.copy(), load / mean, staying[None, :] & ~was, free)
    best, best_holds, waited = state.score(), holds, 0
    for _ in range(min(CHANGES, CHANGES_BY_RANKS // num_ranks)):
        if state.tokens.max() <= 1 + SETTLED or not state.change():
            break
        waited += 1
        if state.score() < best - 1e-9:
            best, best_holds, waited = state.score(), state.holds.copy(), 0
        elif waited == PATIENCE:
            break
    return best_holds


def better(holds: np.ndarray, other: np.ndarray, load: np.ndarray, was: np.ndarray, staying: np.ndarray) -> np.ndarray:
    """``other`` if it is the better of the two by the rule of ``improve``, else ``holds``."""
    free = np.ones(holds.shape[1], dtype=bool)
    mean = float(load.sum()) / holds.shape[1]
    scores = [_State(each, load / mean, staying[None, :] & ~was, free).score() for each in (holds, other)]
    return other if scores[1] < scores[0] - 1e-9 else holds


class _State:
    """One layer, arranged as ``holds`` says; ``load`` in units of a mean rank's tokens.

    ``loads [experts, ranks]`` is where an expert would have to be loaded by a rank that stays, ``free [ranks]`` who
    may change what it holds. A change toggles two experts on one rank or on two.
    """

    def __init__(self, holds: np.ndarray, load: np.ndarray, loads: np.ndarray, free: np.ndarray) -> None:
        self.holds = holds
        self.load = load
        self.loads = loads
        self.free = free
        self.tokens = rank_tokens(holds, load)
        self.loaded = int((holds & loads).sum())

    def score(self) -> float:
        return float(self.tokens.max()) + PRICE * self.loaded / len(self.tokens)

    def change(self) -> bool:
        """Makes the best change that helps the busiest rank; False if none does."""
        busiest = int(np.argmax(self.tokens))
        self.copies = self.holds.sum(axis=1)
        self.share = self.load / self.copies
        # Tokens of all the ranks that hold an expert, summed.
        self.around = (self.holds * self.tokens).sum(axis=1)
        # What an expert's holders are relieved of, each, when it gets another copy, and burdened with if it loses one.
        self.relief = self.share / (self.copies + 1)
        self.burden = self.share / np.maximum(self.copies - 1, 1)
        # The least loaded ranks that may change, [n], and what they hold, [n, experts of a rank].
        order = np.argsort(self.tokens, kind="stable")
        partners = order[self.free[order] & (order != busiest)][:PARTNERS]
        theirs = np.nonzero(self.holds[:, partners].T)[1].reshape(len(partners), int(self.holds[:, 0].sum()))
        found = [self._relieve(busiest, partners, theirs)]
        if self.free[busiest]:
            found += [self._swap(busiest, partners, theirs), self._replace(busiest)]
        first, second, here, there = np.concatenate(found, axis=1)
        if not len(first):
            return False
        both = np.concatenate([first, second])
        then = self.holds[both]
        now = then.copy()
        many = np.arange(len(both))
        for ranks in (np.tile(here, 2), np.tile(there, 2)):
            real = ranks >= 0
            now[many[real], ranks[real]] ^= True
        parts = shares(np.concatenate([now, then]), np.tile(both, 2)) * np.tile(self.load[both], 2)[:, None]
        parts = parts.reshape(2, 2, len(first), -1)
        tokens = self.tokens + (parts[0] - parts[1]).sum(axis=0)
        gain = (self.tokens**2).sum() - (tokens**2).sum(axis=1)
        new = (now & self.loads[both]).sum(axis=1) - (then & self.loads[both]).sum(axis=1)
        loaded = new.reshape(2, -1).sum(axis=0)
        best = int(np.argmax(gain / (1 + np.maximum(loaded, 0))))
        if gain[best] < 1e-6:
            return False
        self.holds[first[best]] = now[best]
        self.holds[second[best]] = now[best + len(first)]
        self.tokens = tokens[best]
        self.loaded += int(loaded[best])
        return True

    def _swap(self, busiest: int, partners: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        """The busiest rank's experts against other ranks'."""
        mine = np.flatnonzero(self.holds[:, busiest])
        x, y, q = mine[:, None, None], theirs[None], partners[None, :, None]
        moved = self.share[x] - self.share[y]
        change = 2 * moved * (self.tokens[q] - self.tokens[busiest] + moved)
        cost = self.loads[x, q].astype(np.int64) + self.loads[y, busiest]
        change = np.where(self.holds[x, q] | self.holds[y, busiest], np.inf, change / (1 + cost))
        i, j, k = _least(change)
        return np.stack([mine[i], theirs[j, k], np.full(len(i), busiest), partners[j]])

    def _relieve(self, busiest: int, partners: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        """A copy of one of the busiest rank's experts in place of a replica on another rank."""
        mine = np.flatnonzero(self.holds[:, busiest])
        x, z, q = mine[:, None, None], theirs[None], partners[None, :, None]
        there = self.share[x] - self.relief[x] - self.share[z]
        change = (
            self.copies[x] * self.relief[x] ** 2
            - 2 * self.relief[x] * self.around[x]
            + there * (2 * self.tokens[q] + there)
            + self.burden[z] * (2 * (self.around[z] - self.tokens[q]) + self.share[z])
        )
        change = np.where(self.holds[x, q] | (self.copies[z] < 2), np.inf, change / (1 + self.loads[x, q]))
        i, j, k = _least(change)
        return np.stack([mine[i], theirs[j, k], partners[j], np.full(len(i), -1)])

    def _replace(self, busiest: int) -> np.ndarray:
        """Copies of other experts in place of the busiest rank's replicas."""
        mine = np.flatnonzero(self.holds[:, busiest] & (self.copies > 1))
        absent = np.flatnonzero(~self.holds[:, busiest])
        x, y = mine[:, None], absent[None]
        here = self.share[y] - self.relief[y] - self.share[x]
        change = (
            self.copies[y] * self.relief[y] ** 2
            - 2 * self.relief[y] * self.around[y]
            + here * (2 * self.tokens[busiest] + here)
            + self.burden[x] * (2 * (self.around[x] - self.tokens[busiest]) + self.share[x])
        )
        i, j = _least(change / (1 + self.loads[y, busiest]))
        return np.stack([mine[i], absent[j], np.full(len(i), busiest), np.full(len(i), -1)])


def _least(change: np.ndarray) -> tuple[np.ndarray, ...]:
    """Indices of the ``EXACT`` least finite entries."""
    flat = change.reshape(-1)
    if not len(flat):
        return tuple(np.empty(0, dtype=np.int64) for _ in change.shape)
    least = np.argsort(flat, kind="stable")[:EXACT] if len(flat) <= 4 * EXACT else np.argpartition(flat, EXACT)[:EXACT]
    return np.unravel_index(np.sort(least[np.isfinite(flat[least])]), change.shape)
