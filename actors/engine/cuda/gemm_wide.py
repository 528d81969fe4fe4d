"""Trial: the products of ``gemm.py`` for many rows, weights by descriptors, last tiles of half the rows."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from actors.engine.cuda.gemm import _codes, _find, _homes, _origins, _rows, _tiles, _weights


@triton.jit
def _part_expand(
    hidden, received, weight, table, inner, index, me, number, block, pair, left, place, capacity, max_rows,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = N // 2
    row, real, code = _codes(index, number, capacity, pair, left, BM)
    start = _origins(code, hidden, received, me, max_rows, K, TOP_K)
    k = tl.arange(0, BK)
    column = block * BN + tl.arange(0, BN)
    weights = weight + number.to(tl.int64) * (N * K)
    total = tl.zeros([BM, BN], tl.float32)
    gated = tl.zeros([BM, BN], tl.float32)
    at_row = number * N + block * BN
    for at in range(0, K, BK):
        a = _rows(start, real, at + k, K, True)
        if TMA:
            b = table.load([at_row, at]).T
            c = table.load([at_row + WIDTH, at]).T
        else:
            b = _weights(weights, column, column < WIDTH, at + k, N, K, False, True)
            c = _weights(weights, WIDTH + column, column < WIDTH, at + k, N, K, False, True)
        total = tl.dot(a, b, total)
        gated = tl.dot(a, c, gated)
    total = total / (1 + tl.exp(-total)) * gated
    there = inner + (place + row).to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(there, total.to(inner.dtype.element_ty), mask=real[:, None])


@triton.jit(do_not_specialize=["layer"])
def expand(
    hidden, received, weight, table, inner, count, index, members, local, turn, computed,
    layer, num_slots, capacity, max_rows,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    slot, pairs, before, ends = _tiles(count, num_slots, BM, SLOTS)
    if tl.program_id(0) == 0:
        tl.store(computed, tl.load(computed) + tl.sum(pairs, 0))
        tl.store(turn, tl.load(turn) + 1 - tl.load(local + layer))
    me = tl.load(members + 1)
    columns: tl.constexpr = (N // 2 + BN - 1) // BN
    for work in range(tl.program_id(0), tl.max(ends, 0) * columns, tl.num_programs(0)):
        number, block, pair, left, place = _find(work, columns, slot, pairs, before, ends, BM)
        if HALF:
            if left <= BM // 2:
                _part_expand(
                    hidden, received, weight, table, inner, index, me, number, block, pair, left, place, capacity,
                    max_rows, N, K, TOP_K, BM // 2, BN, BK, TMA,
                )  # fmt: skip
            else:
                _part_expand(
                    hidden, received, weight, table, inner, index, me, number, block, pair, left, place, capacity,
                    max_rows, N, K, TOP_K, BM, BN, BK, TMA,
                )  # fmt: skip
        else:
            _part_expand(
                hidden, received, weight, table, inner, index, me, number, block, pair, left, place, capacity,
                max_rows, N, K, TOP_K, BM, BN, BK, TMA,
            )  # fmt: skip


@triton.jit
def _part_contract(
    inner, rows, weight, table, results, index, windows, here, number, block, pair, left, place, capacity, max_rows,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, real, code = _codes(index, number, capacity, pair, left, BM)
    k = tl.arange(0, BK)
    column = block * BN + tl.arange(0, BN)
    start = inner + (place + row).to(tl.int64) * K
    weights = weight + number.to(tl.int64) * (N * K)
    total = tl.zeros([BM, BN], tl.float32)
    at_row = number * N + block * BN
    for at in range(0, K, BK):
        a = rows.load([place, at]) if ROWS else _rows(start, real, at + k, K, True)
        b = table.load([at_row, at]).T if TMA else _weights(weights, column, column < N, at + k, N, K, False, True)
        total = tl.dot(a, b, total)
    home = _homes(code, real, results, windows, here, max_rows, N, TOP_K)
    tl.store(home[:, None] + column[None, :], total.to(results.dtype.element_ty), mask=real[:, None])


@triton.jit
def contract(
    inner, rows, weight, table, results, count, index, members, windows,
    num_slots, capacity, max_rows,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
    FLAT: tl.constexpr,
):  # fmt: skip
    here = tl.load(windows + tl.load(members + 1))
    slot, pairs, before, ends = _tiles(count, num_slots, BM, SLOTS)
    columns: tl.constexpr = (N + BN - 1) // BN
    for work in tl.range(tl.program_id(0), tl.max(ends, 0) * columns, tl.num_programs(0), flatten=FLAT):
        number, block, pair, left, place = _find(work, columns, slot, pairs, before, ends, BM)
        if HALF:
            if left <= BM // 2:
                _part_contract(
                    inner, rows, weight, table, results, index, windows, here, number, block, pair, left, place,
                    capacity, max_rows, N, K, TOP_K, BM // 2, BN, BK, TMA, False,
                )  # fmt: skip
            else:
                _part_contract(
                    inner, rows, weight, table, results, index, windows, here, number, block, pair, left, place,
                    capacity, max_rows, N, K, TOP_K, BM, BN, BK, TMA, ROWS,
                )  # fmt: skip
        else:
            _part_contract(
                inner, rows, weight, table, results, index, windows, here, number, block, pair, left, place,
                capacity, max_rows, N, K, TOP_K, BM, BN, BK, TMA, ROWS,
            )  # fmt: skip
