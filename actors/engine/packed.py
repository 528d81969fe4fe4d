"""Linear layers on CPU: weights in oneDNN's blocked layout, and projections of the same input as one product.

torch's own float32 product reads a plain weight badly when there are few rows, which is what decoding has. Packing
costs the sharing of memory-mapped pages between the ranks of a node, and pays for it in every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

# The number of rows the layout is chosen for; it serves any number. Measured best over 1 to 256 rows.
_ROWS = 32
# Fewer rows are slower than this many (by a fifth), so they are padded.
_FEWEST = 5


def packable(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this build of torch and this processor have packed products of ``dtype``."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PackedLinear:
    """``x [..., rows, in] -> [..., rows, out]``. Weight ``[out, in]`` and bias (``[out]`` or None) are copied."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
        self._bias = None if bias is None else bias.clone()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.shape[-2]
        if rows < _FEWEST:
            x = torch.nn.functional.pad(x, (0, 0, 0, _FEWEST - rows))
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return output.narrow(-2, 0, rows)


def pack(groups: Iterable[Sequence[torch.nn.Linear]]) -> None:
    """Replace the linear layers' weights by packed ones, those of a group by one.

    The layers of a group are called in this order and with the same tensor (each may be called otherwise; then it
    computes for nothing what the others would use). Their ``weight`` and ``bias`` become meta tensors.
    """
    for group in groups:
        weight = torch.cat([layer.weight for layer in group])
        bias = None
        if any(layer.bias is not None for layer in group):
            bias = torch.cat([weight.new_zeros(len(x.weight)) if x.bias is None else x.bias for x in group])
        joined = _Joined(PackedLinear(weight, bias), [layer.out_features for layer in group])
        for position, layer in enumerate(group):
            setattr(layer, "forward", joined.member(position))  # noqa: B010
            layer.weight = torch.nn.Parameter(layer.weight.to("meta"), requires_grad=False)
            if layer.bias is not None:
                layer.bias = torch.nn.Parameter(layer.bias.to("meta"), requires_grad=False)


class _Joined:
    """The first member called with a tensor computes for all; the others find their part."""

    def __init__(self, linear: PackedLinear, sizes: list[int]) -> None:
        self._linear = linear
        self._sizes = sizes
        self._input: torch.Tensor | None = None
        self._outputs: tuple[torch.Tensor, ...] = ()

    def member(self, position: int) -> Callable[[torch.Tensor], torch.Tensor]:
        if len(self._sizes) == 1:
            return self._linear
        last = position == len(self._sizes) - 1

        def forward(x: torch.Tensor) -> torch.Tensor:
            if x is not self._input:
                self._input, self._outputs = x, self._linear(x).split(self._sizes, -1)
            output = self._outputs[position]
            if last:
                self._input, self._outputs = None, ()
            return output

        return forward
