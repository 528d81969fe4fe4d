"""Products of one row, as a decode of one request has them: nothing but reading weights.

Each program has a few output columns, and asks for their weights before the input is there: it starts early (see
``overlap.py``), and they come to its registers while the kernels before it still work. What comes before the product, a
sum and an RMS norm of the row, every program does for itself: for one row that takes less time than a kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from actors.engine.cuda.elementwise import rounded
from actors.engine.cuda.overlap import await_previous, late, launch, let_next_start

# Weights that a thread keeps, of 16 bits: half of its registers. Columns of a program.
_KEPT, COLUMNS = 128, 8
MAX_WIDTH = 16384


class Row(NamedTuple):
    """A row ``[1, width]`` still to be made: ``x``, plus ``delta`` if there is one, normalised if there is a ``norm``.

    ``norm [width]`` with ``epsilon`` and ``round_before_scale`` as ``rms_norm`` has them.
    """

    x: torch.Tensor
    delta: torch.Tensor | None = None
    norm: torch.Tensor | None = None
    epsilon: float = 0.0
    round_before_scale: bool = True


@triton.jit
def load_columns(weight_pointer, column, outputs, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """``[columns, BLOCK]`` of ``weight [outputs, WIDTH]``; zeros beyond."""
    k = tl.arange(0, BLOCK)[None, :]
    inside = (column < outputs)[:, None]
    if BLOCK > WIDTH:
        inside = inside & (k < WIDTH)
    return tl.load(weight_pointer + column.to(tl.int64)[:, None] * WIDTH + k, inside, 0.0)


@triton.jit
def load_row(  # type: ignore[no-untyped-def]
    x_pointer, delta_pointer, norm, total_pointer, normed_pointer, epsilon, first,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr, ROUND_BEFORE_SCALE: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """The row, ``[BLOCK]`` in float32, rounded as if each step had been a kernel; who is ``first`` stores the sum.

    And, to KEEP it, the normalised row. ``norm [BLOCK]`` is the norm's weight.
    """
    k = tl.arange(0, BLOCK)
    inside = k < WIDTH
    dtype = x_pointer.dtype.element_ty
    x = tl.load(x_pointer + k, inside, 0.0).to(tl.float32)
    if ADD:
        x = rounded(x + tl.load(delta_pointer + k, inside, 0.0).to(tl.float32), dtype)
        if first:
            tl.store(total_pointer + k, x.to(dtype), inside)
    if NORM:
        x *= tl.rsqrt(tl.sum(x * x, 0) / WIDTH + epsilon)
        if ROUND_BEFORE_SCALE:
            x = rounded(x, dtype)
        x = rounded(x * norm.to(tl.float32), dtype)
        if KEEP and first:
            tl.store(normed_pointer + k, x.to(dtype), inside)
    return x


@triton.jit
def _one_row(  # type: ignore[no-untyped-def]
    x_pointer, delta_pointer, norm_pointer, total_pointer, weight_pointer, bias_pointer, output_pointer,
    epsilon, outputs,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr,
    ROUND_BEFORE_SCALE: tl.constexpr, BIAS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    program = tl.program_id(0)
    column = program * COLUMNS + tl.arange(0, COLUMNS)
    weight = load_columns(weight_pointer, column, outputs, WIDTH, BLOCK)
    k = tl.arange(0, BLOCK)
    norm = tl.load(norm_pointer + k, k < WIDTH, 0.0) if NORM else 0.0
    await_previous(OVERLAP)
    weight = late(weight, OVERLAP)
    x = load_row(
        x_pointer, delta_pointer, norm, total_pointer, total_pointer, epsilon, program == 0,
        WIDTH, BLOCK, ADD, NORM, ROUND_BEFORE_SCALE, False,
    )  # fmt: skip
    result = tl.sum(weight.to(tl.float32) * x[None, :], 1)
    if BIAS:
        result += tl.load(bias_pointer + column, column < outputs, 0.0).to(tl.float32)
    tl.store(output_pointer + column, result.to(output_pointer.dtype.element_ty), column < outputs)


def warps(columns: int, block: int) -> int:
    return max(1, columns * block // (32 * _KEPT))


class OneRow:
    """``row [1, in] -> [1, out]`` with ``weight [out, in]`` and ``bias [out]`` or None; sums in float32.

    Gives the product and, where the row is a sum, that sum.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, columns: int = COLUMNS) -> None:
        self.weight, self.bias, self.columns = weight, bias, columns

    def __call__(self, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
        x, (outputs, width) = row.x, self.weight.shape
        block = triton.next_power_of_2(width)
        output = torch.empty(1, outputs, dtype=x.dtype, device=x.device)
        total = x if row.delta is None else torch.empty_like(x)
        _one_row[(triton.cdiv(outputs, self.columns),)](
            x, x if row.delta is None else row.delta, x if row.norm is None else row.norm, total,
            self.weight, self.weight if self.bias is None else self.bias, output, row.epsilon, outputs,
            WIDTH=width, BLOCK=block, COLUMNS=self.columns, ADD=row.delta is not None, NORM=row.norm is not None,
            ROUND_BEFORE_SCALE=row.round_before_scale, BIAS=self.bias is not None,
            num_warps=warps(self.columns, block), **launch(x.device, 1),
        )  # fmt: skip
        return output, total
