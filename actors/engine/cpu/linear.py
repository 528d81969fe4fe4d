"""Linear layers on CPU: projections of the same input as one product, compiled for few rows and packed for more.

A step of decoding reads every weight for a handful of rows, so what counts is the speed of memory: a plain loop reads
at it, oneDNN's products at about half of it, whatever the layout. From a few rows on arithmetic counts, and oneDNN's
blocked layout is best. So both are kept: the weight as it was given (for a dense layer pages of the checkpoint, which
the ranks of a node share) and a packed copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from actors.engine.cpu import kernels

# The number of rows the layout is chosen for; it serves any number. Measured best over 1 to 256 rows.
_ROWS = 32
# Fewer rows are slower than this many in a packed product (by a fifth), so they are padded.
_FEWEST = 5
# Up to this many rows one compiled thread beats packed products on one thread; it reads as fast as two can.
_FEW_OF_ONE_THREAD, _FEW_OF_MORE = 4, 1


class Linear:
    """``x [..., in] -> [..., out]``, where the weights ``[out_i, in]`` stand one below the other.

    Biases are ``[out_i]`` or None. Weights must not change afterwards.
    """

    def __init__(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None] = ()) -> None:
        self.sizes = [len(weight) for weight in weights]
        self._out = sum(self.sizes)
        joined = torch.cat(list(weights)) if len(weights) > 1 else weights[0].contiguous()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(joined, _ROWS)
        self._bias = None
        if any(bias is not None for bias in biases):
            parts = zip(self.sizes, biases, strict=True)
            self._bias = torch.cat([joined.new_zeros(size) if bias is None else bias for size, bias in parts])
        self._few = 0
        if joined.dtype == torch.float32:
            self._few = _FEW_OF_ONE_THREAD if torch.get_num_threads() == 1 else _FEW_OF_MORE
            self._weights = [weight.contiguous().numpy() for weight in weights]
            self._bias_array = kernels.NONE if self._bias is None else self._bias.numpy()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // x.shape[-1]
        if rows <= self._few:
            return self._compute_few(x, rows)
        flat = x.reshape(rows, x.shape[-1])
        if rows < _FEWEST:
            flat = torch.nn.functional.pad(flat, (0, 0, 0, _FEWEST - rows))
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(flat, self._packed, self._bias, "none", [], "")
        return output.narrow(0, 0, rows).view(*x.shape[:-1], self._out)

    def _compute_few(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        output = torch.empty(*x.shape[:-1], self._out)
        source, target = x.reshape(rows, x.shape[-1]).contiguous().numpy(), output.view(rows, self._out).numpy()
        offset = 0
        for weight in self._weights:
            kernels.few_rows(weight, source, self._bias_array, target, offset)
            offset += len(weight)
        return output


def join(groups: Iterable[Sequence[torch.nn.Linear]]) -> dict[tuple[torch.nn.Linear, ...], Linear]:
    """Let the linear layers of each group compute as one; gives what computes for each group.

    The layers of a group are called in this order and with the same tensor (each may be called otherwise; then it
    computes for nothing what the others would use).
    """
    joined = {}
    for group in groups:
        linear = Linear([layer.weight.detach() for layer in group], [layer.bias for layer in group])
        turns = _Turns(linear)
        for position, layer in enumerate(group):
            setattr(layer, "forward", turns.of(position))  # noqa: B010
        joined[tuple(group)] = linear
    return joined


class _Turns:
    """The first member called with a tensor computes for all; the others find their part."""

    def __init__(self, linear: Linear) -> None:
        self._linear = linear
        self._input: torch.Tensor | None = None
        self._outputs: tuple[torch.Tensor, ...] = ()

    def of(self, position: int) -> Callable[[torch.Tensor], torch.Tensor]:
        sizes = self._linear.sizes
        if len(sizes) == 1:
            return self._linear
        last = position == len(sizes) - 1

        def forward(x: torch.Tensor) -> torch.Tensor:
            if x is not self._input:
                self._input, self._outputs = x, self._linear(x).split(sizes, -1)
            output = self._outputs[position]
            if last:
                self._input, self._outputs = None, ()
            return output

        return forward
