"""Linear layers of the same input that compute as one product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch


class Joint(Protocol):
    """``x [..., in] -> [..., sum(sizes)]``: several layers' outputs side by side."""

    sizes: list[int]

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


def take_turns(layers: Sequence[torch.nn.Linear], joint: Joint) -> None:
    """Gives ``layers`` forwards that find their part of what ``joint`` computes for all of them.

    The first that is called with a tensor computes. They are called in this order and with the same tensor (one may be
    called otherwise; then it computes for nothing what the others would use).
    """
    turns = _Turns(joint)
    for position, layer in enumerate(layers):
        setattr(layer, "forward", turns.of(position))  # noqa: B010


class _Turns:
    def __init__(self, joint: Joint) -> None:
        self._joint = joint
        self._input: torch.Tensor | None = None
        self._outputs: tuple[torch.Tensor, ...] = ()

    def of(self, position: int) -> Callable[[torch.Tensor], torch.Tensor]:
        sizes = self._joint.sizes
        if len(sizes) == 1:
            return self._joint
        last = position == len(sizes) - 1

        def forward(x: torch.Tensor) -> torch.Tensor:
            if x is not self._input:
                self._input, self._outputs = x, self._joint(x).split(sizes, -1)
            output = self._outputs[position]
            if last:
                self._input, self._outputs = None, ()
            return output

        return forward
