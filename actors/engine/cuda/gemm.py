"""The experts' two matrix products over the pairs that stand here, read through ``index`` (see ``route.py``).

A slot's pairs are cut into tiles of ``BM`` rows. Which tiles there are is worked out by every program from the slots'
counts, so the host knows nothing of them: programs take ``(tile, columns)`` in turn, slot by slot and in a slot all
tiles before the next columns, so that those who read the same weights do it at the same time. Between the products,
in ``inner``, the slots' pairs follow each other.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from actors.engine.cuda.overlap import begin_in_turn

# Kinds of gate, see ``expand``.
SILU, CLAMPED = 1, 2


class Shape(NamedTuple):
    """Tile sizes of a product and how a program runs it."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    per_processor: int  # programs resident on one


@triton.jit
def _tiles(count, num_slots, BM: tl.constexpr, SLOTS: tl.constexpr):
    """By slot, ``[SLOTS]``: how many pairs, those of the slots before, and likewise the tiles up to its last."""
    slot = tl.arange(0, SLOTS)
    pairs = tl.load(count + slot, mask=slot < num_slots, other=0)
    return slot, pairs, tl.cumsum(pairs, 0) - pairs, tl.cumsum((pairs + BM - 1) // BM, 0)


@triton.jit
def _find(work, columns, slot, pairs, before, ends, BM: tl.constexpr):
    """Of a piece of work: the slot, the block of columns, its first pair, how many are left, its place in ``inner``."""
    number = tl.sum((ends <= work // columns).to(tl.int32), 0)
    mine = slot == number
    start = tl.max(tl.where(slot < number, ends, 0), 0)
    tiles = tl.sum(tl.where(mine, ends, 0), 0) - start
    rest = work - start * columns
    pair = rest % tiles * BM
    left = tl.sum(tl.where(mine, pairs, 0), 0) - pair
    return number, rest // tiles, pair, left, tl.sum(tl.where(mine, before, 0), 0) + pair


@triton.jit
def _codes(index, number, capacity, pair, left, BM: tl.constexpr):
    """Of a tile, ``[BM]`` each: its rows, which of them are pairs, and those pairs' codes (see ``route.py``)."""
    row = tl.arange(0, BM)
    real = row < left
    return row, real, tl.load(index + number.to(tl.int64) * capacity + pair + row, mask=real, other=0)


@triton.jit
def _origins(code, hidden, received, me, max_rows, K: tl.constexpr, TOP_K: tl.constexpr):
    """Where the pairs' rows begin: in ``hidden [rows, K]`` this rank's, in ``received`` the others'."""
    source = code // (max_rows * TOP_K)
    token = (code // TOP_K).to(tl.int64)
    own = hidden + (token - source.to(tl.int64) * max_rows) * K
    return tl.where(source == me, own, received + token * K)


@triton.jit
def _homes(code, real, results, windows, here, max_rows, N: tl.constexpr, TOP_K: tl.constexpr):
    """Where the pairs' results begin in the windows of the ranks where their tokens are at home."""
    source = code // (max_rows * TOP_K)
    # Offsets from the own window, not addresses: only these keep the compiler's word that stores may be wide.
    offset = (tl.load(windows + source, mask=real, other=0) - here) // (
        results.dtype.element_ty.primitive_bitwidth // 8
    )
    return results + tl.multiple_of(offset, 16) + (code - source * (max_rows * TOP_K)).to(tl.int64) * N


@triton.jit
def _rows(starts, real, k, K: tl.constexpr, EVEN: tl.constexpr):
    """``[rows, k]`` of the rows that begin at ``starts``; zeros where they are not ``real``."""
    mask = real[:, None] if EVEN else real[:, None] & (k < K)[None, :]
    return tl.load(starts[:, None] + k[None, :], mask=mask, other=0)


@triton.jit
def _weights(weight, column, inside, k, N: tl.constexpr, K: tl.constexpr, TRANSPOSED: tl.constexpr, EVEN: tl.constexpr):
    """``[k, column]`` of a slot's weights, which are ``[N, K]``, or ``[K, N]`` if transposed."""
    pointers = weight + (k[:, None] * N + column[None, :] if TRANSPOSED else column[None, :] * K + k[:, None])
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=inside[None, :] & (k < K)[:, None], other=0)


@triton.jit(do_not_specialize=["layer"])
def expand(
    hidden, received, weight, bias, inner, count, index, members, local, turn, computed,
    layer, num_slots, capacity, max_rows, limit, alpha,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr, GATE: tl.constexpr,
    TRANSPOSED: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The product of the pairs' rows with their slots' first weights ``[slots, N, K]`` into ``inner``.

    Rows are this rank's ``hidden [rows, K]`` or stand in ``received [max_ranks, max_rows, K]``.
    ``GATE`` says what becomes of the columns: 0: ``inner`` is ``[pairs, N]``; 1: the first half is a gate, ``inner
    [pairs, N / 2]`` gets its SiLU times the second half; 2: even columns are the gate, odd ones the other half, and
    both are clamped to ``limit``, as GPT-OSS has it. Also begins the turn in which results are exchanged, and adds to
    ``computed``.
    """
    begin_in_turn(OVERLAP)
    slot, pairs, before, ends = _tiles(count, num_slots, BM, SLOTS)
    if tl.program_id(0) == 0:
        tl.store(computed, tl.load(computed) + tl.sum(pairs, 0))
        tl.store(turn, tl.load(turn) + 1 - tl.load(local + layer))
    me = tl.load(members + 1)
    WIDTH: tl.constexpr = N // 2 if GATE > 0 else N
    EVEN: tl.constexpr = (K % BK == 0) & (WIDTH % BN == 0)
    columns: tl.constexpr = (WIDTH + BN - 1) // BN
    for work in range(tl.program_id(0), tl.max(ends, 0) * columns, tl.num_programs(0)):
        number, block, pair, left, place = _find(work, columns, slot, pairs, before, ends, BM)
        row, real, code = _codes(index, number, capacity, pair, left, BM)
        start = _origins(code, hidden, received, me, max_rows, K, TOP_K)
        k = tl.arange(0, BK)
        column = block * BN + tl.arange(0, BN)
        inside = column < WIDTH
        first, second = column, WIDTH + column
        if GATE == 2:
            first, second = 2 * column, 2 * column + 1
        weights = weight + number.to(tl.int64) * (N * K)
        total = tl.zeros([BM, BN], tl.float32)
        gated = tl.zeros([BM, BN], tl.float32)
        for at in range(0, K, BK):
            a = _rows(start, real, at + k, K, K % BK == 0)
            b = _weights(weights, first, inside, at + k, N, K, TRANSPOSED, EVEN)
            total = tl.dot(a, b, total, input_precision=PRECISION)
            if GATE > 0:
                c = _weights(weights, second, inside, at + k, N, K, TRANSPOSED, EVEN)
                gated = tl.dot(a, c, gated, input_precision=PRECISION)
        if BIASED:
            total += tl.load(bias + number * N + first, mask=inside, other=0).to(tl.float32)[None, :]
            if GATE > 0:
                gated += tl.load(bias + number * N + second, mask=inside, other=0).to(tl.float32)[None, :]
        if GATE == 1:
            total = total / (1 + tl.exp(-total)) * gated
        if GATE == 2:
            total = tl.minimum(total, limit)
            gated = tl.minimum(tl.maximum(gated, -limit), limit)
            total = total / (1 + tl.exp(-alpha * total)) * (gated + 1)
        there = inner + (place + row).to(tl.int64)[:, None] * WIDTH + column[None, :]
        tl.store(there, total.to(inner.dtype.element_ty), mask=real[:, None] & inside[None, :])


@triton.jit
def contract(
    inner, weight, bias, results, count, index, members, windows,
    num_slots, capacity, max_rows,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
    TRANSPOSED: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The product of ``inner [pairs, K]`` with the slots' second weights ``[slots, N, K]``; each pair's row goes
    to its place among the ``results`` of the rank where its token is at home."""
    begin_in_turn(OVERLAP)
    here = tl.load(windows + tl.load(members + 1))
    slot, pairs, before, ends = _tiles(count, num_slots, BM, SLOTS)
    EVEN: tl.constexpr = (K % BK == 0) & (N % BN == 0)
    columns: tl.constexpr = (N + BN - 1) // BN
    for work in range(tl.program_id(0), tl.max(ends, 0) * columns, tl.num_programs(0)):
        number, block, pair, left, place = _find(work, columns, slot, pairs, before, ends, BM)
        row, real, code = _codes(index, number, capacity, pair, left, BM)
        k = tl.arange(0, BK)
        column = block * BN + tl.arange(0, BN)
        inside = column < N
        start = inner + (place + row).to(tl.int64) * K
        weights = weight + number.to(tl.int64) * (N * K)
        total = tl.zeros([BM, BN], tl.float32)
        for at in range(0, K, BK):
            a = _rows(start, real, at + k, K, K % BK == 0)
            b = _weights(weights, column, inside, at + k, N, K, TRANSPOSED, EVEN)
            total = tl.dot(a, b, total, input_precision=PRECISION)
        if BIASED:
            total += tl.load(bias + number * N + column, mask=inside, other=0).to(tl.float32)[None, :]
        home = _homes(code, real, results, windows, here, max_rows, N, TOP_K)
        tl.store(
            home[:, None] + column[None, :],
            total.to(results.dtype.element_ty),
            mask=real[:, None] & inside[None, :],
        )


def shape(dtype: torch.dtype, rows: float, product: str) -> Shape:
    """Tiles for a product (``"expand"`` or ``"contract"``) in which a slot has about this many rows.

    In float32 there is one shape, so that a row's result does not depend on what else is computed.
    """
    if dtype == torch.float32:
        return Shape(16, 32, 32, 4, 2, 4)
    for limit, candidate in _SHAPES[product]:
        if rows <= limit:
            return candidate
    return _SHAPES[product][-1][1]


# Measured on one H100 in bfloat16 (scripts/bench/cuda_experts.py, 2026-11-25). Both products need tiles of as many
# rows.
_SHAPES = {
    "expand": [
        (24, Shape(16, 32, 128, 4, 4, 3)),
        (64, Shape(64, 64, 128, 4, 3, 1)),
        (256, Shape(128, 128, 64, 8, 4, 1)),
        (float("inf"), Shape(128, 128, 64, 8, 3, 1)),
    ],
    "contract": [
        (24, Shape(16, 64, 128, 4, 4, 3)),
        (64, Shape(64, 128, 64, 4, 4, 2)),
        (256, Shape(128, 256, 64, 8, 4, 1)),
        (float("inf"), Shape(128, 256, 64, 8, 3, 1)),
    ],
}
