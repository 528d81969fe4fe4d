"""RMS norm, with the residual sum before it, and SiLU times its partner: one kernel each, one program per row or tile.

Intermediate results are rounded to the tensors' dtype where the models' own operators round them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from actors.engine.cuda.overlap import begin, launch

# One program holds a row of a norm in its registers.
MAX_NORM_WIDTH = 16384
_TILE = 1024


@triton.jit
def rounded(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 ``x`` as ``dtype`` would keep it, in float32."""
    return x.to(dtype).to(tl.float32)


@triton.jit
def _norm(  # type: ignore[no-untyped-def]
    x_pointer, x_stride, delta_pointer, delta_stride, weight_pointer, total_pointer, output_pointer, output_stride,
    epsilon, width,
    ADD: tl.constexpr, ROUND_BEFORE_SCALE: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    dtype = output_pointer.dtype.element_ty
    weight = tl.load(weight_pointer + column, inside, 0.0).to(tl.float32)
    x = tl.load(x_pointer + row * x_stride + column, inside, 0.0).to(tl.float32)
    if ADD:
        x = rounded(x + tl.load(delta_pointer + row * delta_stride + column, inside, 0.0).to(tl.float32), dtype)
        tl.store(total_pointer + row * width + column, x.to(dtype), inside)
    x *= tl.rsqrt(tl.sum(x * x, 0) / width + epsilon)
    if ROUND_BEFORE_SCALE:
        x = rounded(x, dtype)
    tl.store(output_pointer + row * output_stride + column, (x * weight).to(dtype), inside)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, round_before_scale: bool = True, inplace: bool = False
) -> torch.Tensor:
    """``x [..., w]`` normalised over its last axis and multiplied by ``weight [w]``, of one dtype; computes in float32.

    ``round_before_scale``: whether the normalised values are rounded to the dtype before the multiplication, as most
    models do. ``inplace`` overwrites ``x``, whose rows may then be parts of wider ones.
    """
    rows = x.reshape(-1, x.shape[-1]) if not inplace else x
    output = x if inplace else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_norm(rows, None, weight, epsilon, round_before_scale, None, output.view(rows.shape))
    return output


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, epsilon: float, round_before_scale: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x + delta``, both ``[..., w]``, and the norm of that sum (see ``rms_norm``): two contiguous tensors."""
    total, output = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    width = x.shape[-1]
    _launch_norm(
        x.reshape(-1, width), delta.reshape(-1, width), weight, epsilon, round_before_scale, total,
        output.view(-1, width),
    )  # fmt: skip
    return total, output


def _launch_norm(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    round_before_scale: bool,
    total: torch.Tensor | None,
    output: torch.Tensor,
) -> None:
    count, width = x.shape
    if count == 0:
        return
    block = triton.next_power_of_2(width)
    _norm[(count,)](
        x, x.stride(0), x if delta is None else delta, 0 if delta is None else delta.stride(0), weight,
        x if total is None else total, output, output.stride(0), epsilon, width,
        ADD=delta is not None, ROUND_BEFORE_SCALE=round_before_scale, BLOCK=block,
        num_warps=min(16, max(1, block // 256)), **launch(x.device, count),
    )  # fmt: skip


@triton.jit
def _silu(x_pointer, output_pointer, width, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    dtype = output_pointer.dtype.element_ty
    gate = tl.load(x_pointer + row * 2 * width + column, inside, 0.0).to(tl.float32)
    up = tl.load(x_pointer + row * 2 * width + width + column, inside, 0.0).to(tl.float32)
    output = rounded(gate / (1.0 + tl.exp(-gate)), dtype) * up
    tl.store(output_pointer + row * width + column, output.to(dtype), inside)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """``[..., 2 * w] -> [..., w]``: SiLU of the first half times the second. Contiguous; computes in float32."""
    width = x.shape[-1] // 2
    output = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    count = output.numel() // width
    if count:
        block = min(_TILE, triton.next_power_of_2(width))
        _silu[(count, triton.cdiv(width, block))](x, output, width, BLOCK=block, num_warps=4, **launch(x.device, count))
    return output
