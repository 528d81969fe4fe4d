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

# Weights that a program keeps, and a thread: of 16 bits they take half of the latter's registers, of 8 bits a quarter
# beside as many of the row. Half or twice as many of 16 bits were slower on an H100 with the sizes of Qwen3-30B-A3B
# (2026-11-25).
_KEPT, _KEPT_BY_THREAD = 2**14, 2**7
# Columns of a program, at most.
_COLUMNS = 8
# The most elements of a row, which stands in registers too: this leaves a program two columns.
_MAX_WIDTH = 8192


class Row(NamedTuple):
    """One row still to be made: ``x [..., width]``, plus ``delta`` if there is one, normalised if there is a ``norm``.

    ``x`` and ``delta`` are contiguous; ``norm [width]``, ``epsilon`` and ``round_before_scale`` are those of
    ``rms_norm``.
    """

    x: torch.Tensor
    delta: torch.Tensor | None = None
    norm: torch.Tensor | None = None
    epsilon: float = 0.0
    round_before_scale: bool = True


@triton.jit
def load_columns(weight_pointer, column, outputs, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """``[columns, BLOCK]`` of ``weight [outputs, WIDTH]``; zeros beyond.

    A thread takes them by eight, as it does the 16-bit row: one loaded otherwise would go through shared memory.
    """
    k = tl.max_contiguous(tl.arange(0, BLOCK), 8)[None, :]
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

    And, to KEEP it, the row itself. ``norm [BLOCK]`` is the norm's weight.
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
def _multiply_row(  # type: ignore[no-untyped-def]
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


def share(block: int, most: int) -> tuple[int, int]:
    """Columns of ``block`` weights that a program takes, ``most`` or fewer, and its warps; both powers of two."""
    columns = min(most, _KEPT // block)
    return columns, max(1, columns * block // (32 * _KEPT_BY_THREAD))


def suits_row(dtype: torch.dtype, width: int) -> bool:
    """Whether one row ``[width]`` can be multiplied here: not in float32, nor if it is too wide."""
    return dtype in (torch.bfloat16, torch.float16) and width <= _MAX_WIDTH


def multiply_row(row: Row, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The product ``[1, out]`` of ``row`` with ``weight [out, in]``, plus ``bias [out]``, and the row before its norm.

    All of one 16-bit dtype; sums in float32.
    """
    x, (outputs, width) = row.x, weight.shape
    block = triton.next_power_of_2(width)
    columns, warps = share(block, _COLUMNS)
    output = torch.empty(1, outputs, dtype=x.dtype, device=x.device)
    total = x if row.delta is None else torch.empty_like(x)
    _multiply_row[(triton.cdiv(outputs, columns),)](
        x, x if row.delta is None else row.delta, x if row.norm is None else row.norm, total,
        weight, weight if bias is None else bias, output, row.epsilon, outputs,
        WIDTH=width, BLOCK=block, COLUMNS=columns, ADD=row.delta is not None, NORM=row.norm is not None,
        ROUND_BEFORE_SCALE=row.round_before_scale, BIAS=bias is not None,
        num_warps=warps, **launch(x.device, 1),
    )  # fmt: skip
    return output, total
