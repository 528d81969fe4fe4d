"""A batch the model raised on, taken apart."""

from __future__ import annotations

from actors import wire
from actors.engine.batch import Batch, Sampled, Slice


class Salvage:
    """A batch the model raised on, run one slice a step; ``results`` are those of its sampling slices so far."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.results: list[Sampled | wire.Failure] = []
        self._left: list[Slice] = list(batch.slices)

    def next(self) -> Batch:
        return Batch((self._left.pop(0),))

    def take(self, results: list[Sampled | wire.Failure]) -> None:
        self.results += results

    @property
    def done(self) -> bool:
        return not self._left
