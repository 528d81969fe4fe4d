"""The experts' two matrix products over the pairs that stand here, read through ``index`` (see ``route.py``).

A slot's pairs are cut into tiles of ``BM`` rows. Which tiles there are is worked out by every program from the slots'
counts, so the host knows nothing of them: programs take ``(tile, columns)`` in turn, slot by slot and in a slot all
tiles before the next columns, so that those who read the same weights do it at the same time. Between the products,
in ``inner``, the slots' pairs follow each other. A tile's gate and other half are one block of weights, so that the
matrix units read its rows once for both.

What is ``DESCRIBED`` comes by tensor descriptor: then the copy engine brings it, and programs have their threads for
the products. It can't gather rows, so the first product has only its weights so.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from actors.engine.cuda.overlap import begin_in_turn

# Kinds of gate, see ``expand``.
SILU, CLAMPED = 1, 2


class Shape(NamedTuple):
    """Tile sizes of a product and how a program runs it; ``described``: what can comes by tensor descriptor."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    per_processor: int  # programs resident on one
    described: bool = False


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
def _weights(
    weight, number, first, at, N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, SPAN: tl.constexpr,
    BK: tl.constexpr, TRANSPOSED: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """``[BK, SPAN]`` from row ``at`` on, of slot ``number``: as many columns from each of ``PARTS`` equal parts.

    In a part from its column ``first`` on. Zeros beyond. A slot's weights are ``[N, K]``, or ``[K, N]`` if transposed.
    """
    # One way out: a return inside of two ifs does not end the function.
    SHARE: tl.constexpr = SPAN // PARTS
    if DESCRIBED:
        if TRANSPOSED:
            tile = tl.reshape(weight.load([number, at, 0, first]), [BK, SPAN])
        else:
            tile = tl.trans(tl.reshape(weight.load([number, 0, first, at]), [SPAN, BK]))
    else:
        k = at + tl.arange(0, BK)
        within, column = _columns(first, N, PARTS, SPAN)
        own = weight + number.to(tl.int64) * (N * K)
        pointers = own + (k[:, None] * N + column[None, :] if TRANSPOSED else column[None, :] * K + k[:, None])
        if (K % BK == 0) & (N // PARTS % SHARE == 0):
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(within < N // PARTS)[None, :] & (k < K)[:, None], other=0)
    return tile


@triton.jit
def _columns(first, N: tl.constexpr, PARTS: tl.constexpr, SPAN: tl.constexpr):
    """Where the ``SPAN`` columns of a block stand: each in its part, and among all ``N``."""
    SHARE: tl.constexpr = SPAN // PARTS
    beside = tl.arange(0, SPAN)
    within = first + beside % SHARE
    return within, within + beside // SHARE * (N // PARTS)


@triton.jit(do_not_specialize=["layer"])
def expand(
    hidden, received, weight, bias, inner, count, index, members, local, turn, computed,
    layer, num_slots, capacity, max_rows, limit, alpha,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr, GATE: tl.constexpr,
    TRANSPOSED: tl.constexpr, DESCRIBED: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The product of the pairs' rows with their slots' first weights ``[slots, N, K]`` into ``inner``.

    Rows are this rank's ``hidden [rows, K]`` or stand in ``received [max_ranks, max_rows, K]``.
    ``GATE`` says what becomes of the columns: 0: ``inner`` is ``[pairs, N]``; 1: the first half is a gate, ``inner
    [pairs, N / 2]`` gets its SiLU times the second half; 2: even columns are the gate, odd ones the other half, and
    both are clamped to ``limit``, as GPT-OSS has it. ``BN`` counts the columns of ``inner``. Also begins the turn in
    which results are exchanged, and adds to ``computed``.
    """
    begin_in_turn(OVERLAP)
    slot, pairs, before, ends = _tiles(count, num_slots, BM, SLOTS)
    if tl.program_id(0) == 0:
        tl.store(computed, tl.load(computed) + tl.sum(pairs, 0))
        tl.store(turn, tl.load(turn) + 1 - tl.load(local + layer))
    me = tl.load(members + 1)
    WIDTH: tl.constexpr = N // 2 if GATE > 0 else N
    SPAN: tl.constexpr = 2 * BN if GATE > 0 else BN
    PARTS: tl.constexpr = 2 if GATE == 1 else 1
    blocks: tl.constexpr = (WIDTH + BN - 1) // BN
    for work in range(tl.program_id(0), tl.max(ends, 0) * blocks, tl.num_programs(0)):
        number, block, pair, left, place = _find(work, blocks, slot, pairs, before, ends, BM)
        row, real, code = _codes(index, number, capacity, pair, left, BM)
        start = _origins(code, hidden, received, me, max_rows, K, TOP_K)
        first = block * (SPAN // PARTS)
        total = tl.zeros([BM, SPAN], tl.float32)
        for at in range(0, K, BK):
            a = _rows(start, real, at + tl.arange(0, BK), K, K % BK == 0)
            b = _weights(weight, number, first, at, N, K, PARTS, SPAN, BK, TRANSPOSED, DESCRIBED)
            total = tl.dot(a, b, total, input_precision=PRECISION)
        if BIASED:
            within, own = _columns(first, N, PARTS, SPAN)
            total += tl.load(bias + number * N + own, mask=within < N // PARTS, other=0).to(tl.float32)[None, :]
        if GATE == 1:
            gate, other = tl.split(tl.permute(tl.reshape(total, [BM, 2, BN]), [0, 2, 1]))
            # A square root is one instruction where a division is ten, and nothing hides them.
            root = tl.rsqrt(1 + tl.exp(-gate))
            total = gate * root * (root * other)
        if GATE == 2:
            gate, other = tl.split(tl.reshape(total, [BM, BN, 2]))
            gate = tl.minimum(gate, limit)
            other = tl.minimum(tl.maximum(other, -limit), limit)
            root = tl.rsqrt(1 + tl.exp(-alpha * gate))
            total = gate * root * (root * (other + 1))
        column = block * BN + tl.arange(0, BN)
        there = inner + (place + row).to(tl.int64)[:, None] * WIDTH + column[None, :]
        tl.store(there, total.to(inner.dtype.element_ty), mask=real[:, None] & (column < WIDTH)[None, :])


@triton.jit
def contract(
    inner, weight, bias, results, count, index, members, windows,
    num_slots, capacity, max_rows,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
    TRANSPOSED: tl.constexpr, DESCRIBED: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The product of ``inner [pairs, K]`` with the slots' second weights ``[slots, N, K]``; each pair's row goes
    to its place among the ``results`` of the rank where its token is at home. ``DESCRIBED`` are both or neither."""
    begin_in_turn(OVERLAP)
    here = tl.load(windows + tl.load(members + 1))
    slot, pairs, before, ends = _tiles(count, num_slots, BM, SLOTS)
    blocks: tl.constexpr = (N + BN - 1) // BN
    # Flattened, the next tile's reads are under way while this one's results are written.
    for work in tl.range(tl.program_id(0), tl.max(ends, 0) * blocks, tl.num_programs(0), flatten=DESCRIBED):
        number, block, pair, left, place = _find(work, blocks, slot, pairs, before, ends, BM)
        total = tl.zeros([BM, BN], tl.float32)
        row = tl.arange(0, BM)
        if not DESCRIBED:
            start = inner + (place + row).to(tl.int64) * K
        for at in range(0, K, BK):
            if DESCRIBED:  # also rows of the next slot, whose results nobody keeps
                a = inner.load([place, at])
            else:
                a = _rows(start, row < left, at + tl.arange(0, BK), K, K % BK == 0)
            b = _weights(weight, number, block * BN, at, N, K, 1, BN, BK, TRANSPOSED, DESCRIBED)
            total = tl.dot(a, b, total, input_precision=PRECISION)
        column = block * BN + tl.arange(0, BN)
        inside = column < N
        if BIASED:
            total += tl.load(bias + number * N + column, mask=inside, other=0).to(tl.float32)[None, :]
        row, real, code = _codes(index, number, capacity, pair, left, BM)
        home = _homes(code, real, results, windows, here, max_rows, N, TOP_K)
        tl.store(
            home[:, None] + column[None, :],
            total.to(results.dtype.element_ty),
            mask=real[:, None] & inside[None, :],
        )


def described_rows(rows: torch.Tensor, shape: Shape) -> TensorDescriptor | None:
    """``rows [n, K]``, contiguous, for ``contract`` to load; None where the copy engine can't read them."""
    if rows.shape[1] * rows.element_size() % 16:
        return None
    return TensorDescriptor.from_tensor(rows, [shape.rows, shape.depth])


def described_weights(weight: torch.Tensor, gate: int, shape: Shape, transposed: bool) -> TensorDescriptor | None:
    """``weight [slots, N, K]`` (``[slots, K, N]`` if ``transposed``) for ``_weights`` to load; likewise.

    ``gate`` is that of ``expand``, 0 for ``contract``. Its rows must be whole multiples of 16 bytes.
    """
    parts, share = 2 if gate == SILU else 1, shape.columns * (2 if gate == CLAMPED else 1)
    slots, columns, depths = weight.shape
    if transposed:
        columns, depths = depths, columns
    sizes = [depths, parts, columns // parts] if transposed else [parts, columns // parts, depths]
    block = [shape.depth, parts, share] if transposed else [parts, share, shape.depth]
    if sizes[2] * weight.element_size() % 16:
        return None
    return TensorDescriptor.from_tensor(weight.view(slots, *sizes), [1, *block])


def shape(dtype: torch.dtype, rows: float, product: str) -> Shape:
    """Tiles for a product (``"expand"`` or ``"contract"``) in which a slot has about this many rows.

    In float32 there is one shape, so that a row's result does not depend on what else is computed.
    """
    if dtype == torch.float32:
        return Shape(16, 32, 32, 4, 2, 4)
    return next(candidate for limit, candidate in _SHAPES[product] if rows <= limit)


# Measured on one H100 in bfloat16 (scripts/bench/cuda_experts.py, 2026-11-25 and 2026-11-27).
_SHAPES = {
    "expand": [
        (24, Shape(16, 32, 128, 4, 4, 3)),
        (64, Shape(64, 64, 64, 4, 3, 3, True)),
        (float("inf"), Shape(128, 128, 64, 8, 3, 1, True)),
    ],
    "contract": [
        (24, Shape(16, 64, 128, 4, 4, 3)),
        (64, Shape(64, 128, 64, 4, 4, 2)),
        (float("inf"), Shape(128, 128, 64, 4, 3, 2, True)),
    ],
}
