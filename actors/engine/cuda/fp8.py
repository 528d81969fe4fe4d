"""The experts' two products with weights in FP8 and a scale per block; ``gemm.py`` has them for unquantised ones.

Weights are read as they are stored, half the bytes, and become the activations' type in registers, which is exact; a
block's scale multiplies its partial sum, in float32, so nothing is rounded that the dequantised product does not round.
The weights are the left operand, the rows the right one (so results are computed transposed): the tensor cores of an
H100 take only their left operand from registers, and it has at least 64 rows, which there are in a weight but not
always in a batch.

Every tile makes its block of weights anew. Where a slot has many tiles, that costs more than it saves: then one kernel
widens a layer's weights, for ``gemm.py``.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from actors.engine.cuda.gemm import Shape, _codes, _find, _homes, _origins, _tiles

BLOCK = 128
"""Rows and columns of a weight that share a scale."""
_BLOCK = tl.constexpr(BLOCK)

# Rows per slot from which weights are widened. With the sizes of Qwen3-30B-A3B it pays from about 120 on an H200, where
# it takes 464 us a layer (scripts/bench/cuda_fp8.py, 2026-11-30); on an H100, by its bandwidth, from about 170.
_WIDENED = 160


@triton.jit
def _product(total, weight, scale, x, PRECISION: tl.constexpr):
    """``total [columns, rows]`` plus part of a block of weights ``[columns, k]`` times ``x [rows, k]``."""
    part = tl.dot(tl.load(weight).to(x.dtype), tl.trans(x), input_precision=PRECISION)
    return total + part * tl.load(scale)


@triton.jit(do_not_specialize=["layer"])
def expand(
    hidden, received, weight, scale, inner, count, index, members, local, turn, computed,
    layer, num_slots, capacity, max_rows, limit, alpha,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr, GATE: tl.constexpr,
    TRANSPOSED: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``gemm.expand`` with a SiLU gate: ``inner [pairs, N / 2]``, for ``weight [slots, N, K]`` in FP8.

    In the place of a bias stands ``scale``, float32 ``[slots, N / 128, K / 128]``; what of the arguments speaks of
    other gates, layouts and biases is not looked at (see ``suits``). ``K`` and ``N / 2`` are multiples of 128, which
    ``BN`` and ``BK`` divide.
    """
    slot, pairs, before, ends = _tiles(count, num_slots, BM, SLOTS)
    if tl.program_id(0) == 0:
        tl.store(computed, tl.load(computed) + tl.sum(pairs, 0))
        tl.store(turn, tl.load(turn) + 1 - tl.load(local + layer))
    me = tl.load(members + 1)
    WIDTH: tl.constexpr = N // 2
    columns: tl.constexpr = WIDTH // BN
    for work in range(tl.program_id(0), tl.max(ends, 0) * columns, tl.num_programs(0)):
        number, block, pair, left, place = _find(work, columns, slot, pairs, before, ends, BM)
        row, real, code = _codes(index, number, capacity, pair, left, BM)
        start = _origins(code, hidden, received, me, max_rows, K, TOP_K)
        k = tl.arange(0, BK)
        column = block * BN + tl.arange(0, BN)
        first = weight + number.to(tl.int64) * (N * K) + column[:, None] * K + k[None, :]
        scales = scale + (number * (N // _BLOCK) + block * BN // _BLOCK) * (K // _BLOCK)
        total = tl.zeros([BN, BM], tl.float32)
        gated = tl.zeros([BN, BM], tl.float32)
        second, second_scales = first + WIDTH * K, scales + WIDTH // _BLOCK * (K // _BLOCK)
        for at in range(0, K, BK):
            x = tl.load(start[:, None] + (at + k)[None, :], mask=real[:, None], other=0)
            total = _product(total, first + at, scales + at // _BLOCK, x, PRECISION)
            gated = _product(gated, second + at, second_scales + at // _BLOCK, x, PRECISION)
        total = tl.trans(total / (1 + tl.exp(-total)) * gated)
        there = inner + (place + row).to(tl.int64)[:, None] * WIDTH + column[None, :]
        tl.store(there, total.to(inner.dtype.element_ty), mask=real[:, None])


@triton.jit
def contract(
    inner, weight, scale, results, count, index, members, windows,
    num_slots, capacity, max_rows,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
    TRANSPOSED: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``gemm.contract`` for ``weight [slots, N, K]`` in FP8, ``scale`` as in ``expand``; ``N`` and ``K`` likewise."""
    here = tl.load(windows + tl.load(members + 1))
    slot, pairs, before, ends = _tiles(count, num_slots, BM, SLOTS)
    columns: tl.constexpr = N // BN
    for work in range(tl.program_id(0), tl.max(ends, 0) * columns, tl.num_programs(0)):
        number, block, pair, left, place = _find(work, columns, slot, pairs, before, ends, BM)
        row, real, code = _codes(index, number, capacity, pair, left, BM)
        k = tl.arange(0, BK)
        column = block * BN + tl.arange(0, BN)
        start = inner + (place + row).to(tl.int64) * K
        weights = weight + number.to(tl.int64) * (N * K) + column[:, None] * K + k[None, :]
        scales = scale + (number * (N // _BLOCK) + block * BN // _BLOCK) * (K // _BLOCK)
        total = tl.zeros([BN, BM], tl.float32)
        for at in range(0, K, BK):
            x = tl.load(start[:, None] + (at + k)[None, :], mask=real[:, None], other=0)
            total = _product(total, weights + at, scales + at // _BLOCK, x, PRECISION)
        home = _homes(code, real, results, windows, here, max_rows, N, TOP_K)
        tl.store(home[:, None] + column[None, :], tl.trans(total).to(results.dtype.element_ty), mask=real[:, None])


@triton.jit
def widen(weight, scale, wide, K: tl.constexpr):
    """Into ``wide [rows, K]`` the products of ``weight [rows, K]`` with ``scale [rows / 128, K / 128]``, rounded once.

    Each program has the block of its number. Its threads take numbers by eight, as they leave them: so nothing passes
    through shared memory.
    """
    block = tl.program_id(0)
    row = (block // (K // _BLOCK)).to(tl.int64) * _BLOCK + tl.arange(0, _BLOCK)
    column = block % (K // _BLOCK) * _BLOCK + tl.max_contiguous(tl.arange(0, _BLOCK), 8)
    there = row[:, None] * K + column[None, :]
    numbers = tl.load(weight + there).to(tl.float32) * tl.load(scale + block)
    tl.store(wide + there, numbers.to(wide.dtype.element_ty))


def widened(weight: torch.Tensor, scale: torch.Tensor, room: torch.Tensor, slots: int) -> torch.Tensor:
    """``weight [n, N, K]`` as numbers of ``room``'s dtype, where that begins; only the first ``slots`` are written."""
    wide = room[: weight.numel()].view(weight.shape)
    widen[(slots * scale[0].numel(),)](weight, scale, wide, K=weight.shape[2], num_warps=8)
    return wide


def widens(dtype: torch.dtype, rows: float) -> bool:
    """Whether weights are widened where a slot has about this many rows; not in float32, see ``shape``."""
    return dtype != torch.float32 and rows >= _WIDENED


def shape(dtype: torch.dtype, rows: float, product: str) -> Shape:
    """Tiles for either product where a slot has about this many rows; in float32 always the same, as ``gemm.shape``."""
    if dtype == torch.float32:
        return Shape(16, 64, 32, 4, 2, 4)
    return next(candidate for limit, candidate in _SHAPES if rows <= limit)


_SHAPES = [
    (24, Shape(16, 64, 128, 4, 3, 3)),
    (256, Shape(64, 64, 128, 4, 3, 2)),
    (float("inf"), Shape(128, 128, 64, 8, 3, 1)),
]


def suits(module: Any) -> bool:
    """Whether these kernels can compute an experts module: plain gate, no bias, sizes that are whole blocks."""
    if module.is_transposed or module.has_bias or not module.has_gate:
        return False
    _, hidden, inner = module.down_proj.shape
    sample = torch.linspace(-4, 4, 64).view(2, 32)
    first, second = sample.chunk(2, dim=-1)
    plain = torch.nn.functional.silu(first) * second
    own = module._apply_gate(sample)
    return hidden % BLOCK == inner % BLOCK == 0 and own.shape == plain.shape and torch.allclose(own, plain)
