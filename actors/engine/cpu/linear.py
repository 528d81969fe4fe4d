"""Linear layers on CPU: projections of the same input as one product.

float32 weights stand in our panels, others in oneDNN's blocked layout; both are copies, in the order in which a product
reads them. The weights as they were given remain pages of the checkpoint, which cost no memory once they are not read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from actors.engine.cpu.panels import Panels
from actors.engine.turns import take_turns

# The number of rows oneDNN's layout is chosen for; it serves any number. Measured best over 1 to 256 rows.
_ROWS = 32
# Fewer rows are slower than this many in oneDNN's product (by a fifth), so they are padded.
_FEWEST = 5


class Linear:
    """``x [..., in] -> [..., out]``, where the weights ``[out_i, in]`` stand one below the other.

    Biases are ``[out_i]`` or None. All are copied.
    """

    def __init__(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None] = ()) -> None:
        self.sizes = [len(weight) for weight in weights]
        weight = torch.cat(list(weights)) if len(weights) > 1 else weights[0]
        bias = None
        if any(bias is not None for bias in biases):
            parts = zip(self.sizes, biases, strict=True)
            bias = torch.cat([weight.new_zeros(size) if bias is None else bias for size, bias in parts])
        make = _InPanels if weight.dtype == torch.float32 else _InBlocks
        self._product: _Product = make(weight, bias)

    @property
    def panels(self) -> Panels | None:
        """The weights, if they are float32."""
        return self._product.panels if isinstance(self._product, _InPanels) else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._product.of(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], sum(self.sizes))


class _Product(Protocol):
    def of(self, x: torch.Tensor) -> torch.Tensor:
        """``x [n, in] -> [n, out]``"""


class _InPanels:
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.panels = Panels(1, *weight.shape)
        self.panels.fill(0, weight, bias)

    def of(self, x: torch.Tensor) -> torch.Tensor:
        return self.panels.multiply(x, [(0, len(x), 0)])


class _InBlocks:
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._blocks, self._bias = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS), bias

    def of(self, x: torch.Tensor) -> torch.Tensor:
        rows = len(x)
        if rows < _FEWEST:
            x = torch.nn.functional.pad(x, (0, 0, 0, _FEWEST - rows))
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._blocks, self._bias, "none", [], "")
        return output.narrow(0, 0, rows)


def join(groups: Iterable[Sequence[torch.nn.Linear]]) -> dict[tuple[torch.nn.Linear, ...], Linear]:
    """Let the linear layers of each group compute as one; gives what computes for each group.

    The layers of a group are called in this order and with the same tensor (each may be called otherwise; then it
    computes for nothing what the others would use).
    """
    joined = {}
    for group in groups:
        linear = Linear([layer.weight.detach() for layer in group], [layer.bias for layer in group])
        take_turns(group, linear)
        joined[tuple(group)] = linear
    return joined
