"""The angles of a rotary embedding, by position, from a table made once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from actors.engine.cuda.trial import Trial, attempt

# Positions whose angles are computed at once, in float32.
_AT_ONCE = 8192


class Angles:
    """Takes the place of a rotary embedding: ``table [2, positions, width]`` has its cosines and its sines."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table

    def __call__(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of ``position_ids [1, T]``, integers below ``positions``: ``[1, T, width]`` each, contiguous."""
        cosines, sines = self.table.index_select(1, position_ids[0])
        return cosines[None], sines[None]


def tabulate(rotary: Any, positions: int, trial: Trial) -> Angles | None:
    """The angles that ``rotary`` gives for ``0 .. positions - 1``; None if they depend on anything but the position.

    Some change with the largest position of a batch. So batches are tried that have low positions only, or high ones
    besides.
    """

    def angles(of: torch.Tensor) -> torch.Tensor:
        x = torch.empty(1, len(of), 1, dtype=trial.model.dtype, device=trial.device)
        cosines, sines = rotary(x, of[None])
        if cosines.shape != sines.shape or cosines.dtype != sines.dtype or cosines.shape[:2] != (1, len(of)):
            raise ValueError
        return torch.cat([cosines, sines])

    every = torch.arange(positions, dtype=torch.int32, device=trial.device)
    table = attempt(lambda: torch.cat([angles(of) for of in every.split(_AT_ONCE)], 1))
    if table is None:
        return None
    for of in _batches(every, trial):
        own = attempt(partial(angles, of))
        if own is None or not torch.equal(own, table.index_select(1, of)):
            return None
    return Angles(table)


def _batches(every: torch.Tensor, trial: Trial) -> Iterator[torch.Tensor]:
    """Positions at random, up to each power of two by themselves and with the last position beside them."""
    most = 1
    while most // 2 < len(every):
        low = trial.integers(min(most, len(every)), 7)[0]
        yield low[:1]
        yield low
        yield torch.cat([low, every[-1:]])
        most *= 2
