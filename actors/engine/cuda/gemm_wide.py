"""The experts' two matrix products over the pairs that stand here, read through ``index`` (see ``route.py``).

A slot's pairs are cut into tiles of ``BM`` rows. Which tiles there are is worked out by every program from the slots'
counts, so the host knows nothing of them: programs take ``(tile, columns)`` in turn, slot by slot and in a slot all
tiles before the next columns, so that those who read the same weights do it at the same time. Between the products,
in ``inner``, the slots' pairs follow each other.

Weights may come as a tensor descriptor (``described``): then the copy engine brings them, and a tile's gate and other
half are one block in shared memory, so that the matrix units read its rows once for both.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from actors.engine.cuda.gemm import _codes, _find, _homes, _origins, _rows, _tiles
from actors.engine.cuda.overlap import begin_in_turn

# Kinds of gate, see ``expand``.
SILU, CLAMPED = 1, 2


class Shape(NamedTuple):
    """Tile sizes of a product and how a program runs it; ``halves``: of few rows a tile is half as high."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    per_processor: int  # programs resident on one
    halves: bool = False


@triton.jit
def _weights(
    weight, number, first, at, N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, SPAN: tl.constexpr,
    BK: tl.constexpr, TRANSPOSED: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """``[BK, SPAN]`` from row ``at`` on, of slot ``number``: as many columns from each of ``PARTS`` equal parts.

    In a part from its column ``first`` on. Zeros beyond.
    """
    SHARE: tl.constexpr = SPAN // PARTS
    if DESCRIBED:
        if TRANSPOSED:
            tile = tl.reshape(weight.load([number, at, 0, first]), [BK, SPAN])
        else:
            tile = tl.trans(tl.reshape(weight.load([number, 0, first, at]), [SPAN, BK]))
    else:
        k = at + tl.arange(0, BK)
        beside = tl.arange(0, SPAN)
        within = first + beside % SHARE
        column = within + beside // SHARE * (N // PARTS)
        own = weight + number.to(tl.int64) * (N * K)
        pointers = own + (k[:, None] * N + column[None, :] if TRANSPOSED else column[None, :] * K + k[:, None])
        if (K % BK == 0) & (N // PARTS % SHARE == 0):
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(within < N // PARTS)[None, :] & (k < K)[:, None], other=0)
    return tile


@triton.jit
def _expand_tile(
    hidden, received, weight, bias, inner, index, me, number, block, pair, left, place, capacity, max_rows,
    limit, alpha,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, GATE: tl.constexpr, TRANSPOSED: tl.constexpr,
    DESCRIBED: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = N // 2 if GATE > 0 else N
    SPAN: tl.constexpr = 2 * BN if GATE > 0 else BN
    PARTS: tl.constexpr = 2 if GATE == 1 else 1
    row, real, code = _codes(index, number, capacity, pair, left, BM)
    start = _origins(code, hidden, received, me, max_rows, K, TOP_K)
    first = block * (SPAN // PARTS)
    total = tl.zeros([BM, SPAN], tl.float32)
    for at in range(0, K, BK):
        a = _rows(start, real, at + tl.arange(0, BK), K, K % BK == 0)
        b = _weights(weight, number, first, at, N, K, PARTS, SPAN, BK, TRANSPOSED, DESCRIBED)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    column = block * BN + tl.arange(0, BN)
    inside = column < WIDTH
    if BIASED:
        beside = tl.arange(0, SPAN)
        within = first + beside % (SPAN // PARTS)
        own = within + beside // (SPAN // PARTS) * (N // PARTS)
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
    there = inner + (place + row).to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(there, total.to(inner.dtype.element_ty), mask=real[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["layer"])
def expand(
    hidden, received, weight, bias, inner, count, index, members, local, turn, computed,
    layer, num_slots, capacity, max_rows, limit, alpha,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr, GATE: tl.constexpr,
    TRANSPOSED: tl.constexpr, DESCRIBED: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, HALVES: tl.constexpr, OVERLAP: tl.constexpr,
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
    columns: tl.constexpr = (WIDTH + BN - 1) // BN
    for work in range(tl.program_id(0), tl.max(ends, 0) * columns, tl.num_programs(0)):
        number, block, pair, left, place = _find(work, columns, slot, pairs, before, ends, BM)
        if HALVES:
            if left <= BM // 2:
                _expand_tile(
                    hidden, received, weight, bias, inner, index, me, number, block, pair, left, place, capacity,
                    max_rows, limit, alpha, N, K, TOP_K, GATE, TRANSPOSED, DESCRIBED, BIASED, PRECISION,
                    BM // 2, BN, BK,
                )  # fmt: skip
            else:
                _expand_tile(
                    hidden, received, weight, bias, inner, index, me, number, block, pair, left, place, capacity,
                    max_rows, limit, alpha, N, K, TOP_K, GATE, TRANSPOSED, DESCRIBED, BIASED, PRECISION, BM, BN, BK,
                )  # fmt: skip
        else:
            _expand_tile(
                hidden, received, weight, bias, inner, index, me, number, block, pair, left, place, capacity,
                max_rows, limit, alpha, N, K, TOP_K, GATE, TRANSPOSED, DESCRIBED, BIASED, PRECISION, BM, BN, BK,
            )  # fmt: skip


@triton.jit
def _contract_tile(
    inner, rows, weight, bias, results, index, windows, here, number, block, pair, left, place, capacity, max_rows,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, TRANSPOSED: tl.constexpr, DESCRIBED: tl.constexpr,
    BIASED: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, BM)
    start = inner + (place + row).to(tl.int64) * K
    total = tl.zeros([BM, BN], tl.float32)
    for at in range(0, K, BK):
        a = rows.load([place, at]) if ROWS else _rows(start, row < left, at + tl.arange(0, BK), K, K % BK == 0)
        b = _weights(weight, number, block * BN, at, N, K, 1, BN, BK, TRANSPOSED, DESCRIBED)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    column = block * BN + tl.arange(0, BN)
    inside = column < N
    if BIASED:
        total += tl.load(bias + number * N + column, mask=inside, other=0).to(tl.float32)[None, :]
    row, real, code = _codes(index, number, capacity, pair, left, BM)
    home = _homes(code, real, results, windows, here, max_rows, N, TOP_K)
    tl.store(home[:, None] + column[None, :], total.to(results.dtype.element_ty), mask=real[:, None] & inside[None, :])


@triton.jit
def contract(
    inner, rows, weight, bias, results, count, index, members, windows,
    num_slots, capacity, max_rows,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
    TRANSPOSED: tl.constexpr, DESCRIBED: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, HALVES: tl.constexpr, ROWS: tl.constexpr,
    FLAT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The product of ``inner [pairs, K]`` with the slots' second weights ``[slots, N, K]``; each pair's row goes
    to its place among the ``results`` of the rank where its token is at home."""
    begin_in_turn(OVERLAP)
    here = tl.load(windows + tl.load(members + 1))
    slot, pairs, before, ends = _tiles(count, num_slots, BM, SLOTS)
    columns: tl.constexpr = (N + BN - 1) // BN
    for work in tl.range(tl.program_id(0), tl.max(ends, 0) * columns, tl.num_programs(0), flatten=FLAT):
        number, block, pair, left, place = _find(work, columns, slot, pairs, before, ends, BM)
        if HALVES:
            if left <= BM // 2:
                _contract_tile(
                    inner, rows, weight, bias, results, index, windows, here, number, block, pair, left, place,
                    capacity, max_rows, N, K, TOP_K, TRANSPOSED, DESCRIBED, BIASED, PRECISION, BM // 2, BN, BK, False,
                )  # fmt: skip
            else:
                _contract_tile(
                    inner, rows, weight, bias, results, index, windows, here, number, block, pair, left, place,
                    capacity, max_rows, N, K, TOP_K, TRANSPOSED, DESCRIBED, BIASED, PRECISION, BM, BN, BK, ROWS,
                )  # fmt: skip
        else:
            _contract_tile(
                inner, rows, weight, bias, results, index, windows, here, number, block, pair, left, place,
                capacity, max_rows, N, K, TOP_K, TRANSPOSED, DESCRIBED, BIASED, PRECISION, BM, BN, BK, ROWS,
            )  # fmt: skip


def described(weight: torch.Tensor, parts: int, span: int, depth: int, transposed: bool) -> TensorDescriptor | None:
    """``weight [slots, N, K]`` (``[slots, K, N]`` if ``transposed``) for ``_weights`` to load ``[depth, span]`` of it.

    The columns come from ``parts`` equal parts of ``N``. None where the copy engine can't: it wants whole rows of 16
    bytes.
    """
    slots, columns, depths = weight.shape[0], weight.shape[1], weight.shape[2]
    if transposed:
        columns, depths = depths, columns
    sizes = [depths, parts, columns // parts] if transposed else [parts, columns // parts, depths]
    block = [depth, parts, span // parts] if transposed else [parts, span // parts, depth]
    if any(stride * weight.element_size() % 16 for stride in (sizes[2], sizes[1] * sizes[2])):
        return None
    return TensorDescriptor.from_tensor(weight.view(slots, *sizes), [1, *block])
