"""What ``gemm.py`` does, pair by pair: for steps of so few that each has about an expert to itself.

A program takes a pair and a few columns at a time, and asks for all of their weights at once. So nothing passes
through shared memory and no tile has empty rows; more programs fit on a multiprocessor, with more reads under way.
Weights are ``[slots, N, K]``, of 16 bits or in FP8, and the gate is SiLU. FP8's scales come in the place of a bias, as
in ``fp8.py``. The columns of a program have the same, but for the gate, so they multiply its row rather than its
weights, of which there are more; that is in float32, too.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from actors.engine.cuda.fp8 import _BLOCK
from actors.engine.cuda.gemm import _homes, _origins
from actors.engine.cuda.one_row import load_columns
from actors.engine.cuda.overlap import await_previous, begin_in_turn, late, let_next_start


@triton.jit
def _ends(count, num_slots, SLOTS: tl.constexpr):
    """By slot, ``[SLOTS]``: how many pairs there are up to its last."""
    slot = tl.arange(0, SLOTS)
    return tl.cumsum(tl.load(count + slot, mask=slot < num_slots, other=0, cache_modifier=".cg"), 0)


@triton.jit
def _find(place, ends, SLOTS: tl.constexpr):
    """The slot of the pair at ``place`` among all, and which of the slot's it is."""
    both = tl.max(tl.where(ends <= place, ends * SLOTS + tl.arange(0, SLOTS) + 1, 0), 0)
    return both % SLOTS, place - both // SLOTS


@triton.jit
def _row(start, K: tl.constexpr, BK: tl.constexpr):
    """``[1, BK]``, float32, of the row that begins at ``start [1]``."""
    k = tl.arange(0, BK)
    return tl.load(start[:, None] + k[None, :], (k < K)[None, :], 0.0).to(tl.float32)


@triton.jit
def _scales(scale, row, K: tl.constexpr, BK: tl.constexpr):
    """``[BK / 128]`` of ``scale [rows, K / 128]``."""
    block = tl.arange(0, BK // _BLOCK)
    return tl.load(scale + row * (K // _BLOCK) + block, block < K // _BLOCK, 0.0)


@triton.jit
def _scaled(a, scales, BK: tl.constexpr):
    """``a [1, BK]`` times ``scales [BK / 128]``, block by block."""
    return tl.reshape(tl.reshape(a, [BK // _BLOCK, _BLOCK]) * scales[:, None], [1, BK])


@triton.jit(do_not_specialize=["layer"])
def expand(
    hidden, received, weight, beside, inner, count, index, members, local, turn, computed,
    layer, num_slots, capacity, max_rows,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
    BIASED: tl.constexpr, SCALED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """As in ``gemm.py``: ``inner [pairs, N / 2]``. ``BN`` columns of weights give half as many of these.

    ``beside`` has the biases if ``BIASED``, the scales if ``SCALED``.
    """
    begin_in_turn(OVERLAP)
    ends = _ends(count, num_slots, SLOTS)
    pairs = tl.max(ends, 0)
    if tl.program_id(0) == 0:
        tl.store(computed, tl.load(computed) + pairs)
        tl.store(turn, tl.load(turn) + 1 - tl.load(local + layer))
    me = tl.load(members + 1)
    WIDTH: tl.constexpr = N // 2
    SHARE: tl.constexpr = BN // 2
    columns: tl.constexpr = (WIDTH + SHARE - 1) // SHARE
    for work in range(tl.program_id(0), pairs * columns, tl.num_programs(0)):
        place = work // columns
        number, pair = _find(place, ends, SLOTS)
        column = work % columns * SHARE + tl.arange(0, SHARE)
        inside = column < WIDTH
        turn_of = tl.arange(0, BN)  # gates and other halves in turn
        own = turn_of % 2 * WIDTH + work % columns * SHARE + turn_of // 2
        b = load_columns(weight + number.to(tl.int64) * (N * K), own, N, K, BK)
        code = tl.load(index + number.to(tl.int64) * capacity + pair + tl.zeros([1], tl.int32), cache_modifier=".cg")
        if SCALED:
            block = number * (N // _BLOCK) + work % columns * SHARE // _BLOCK
            scales, others = _scales(beside, block, K, BK), _scales(beside, block + WIDTH // _BLOCK, K, BK)
        tl.debug_barrier()  # so that all reads of weights are under way before one is waited for
        a = _row(_origins(code, hidden, received, me, max_rows, K, TOP_K), K, BK)
        if SCALED:
            a = tl.where((turn_of % 2 == 0)[:, None], _scaled(a, scales, BK), _scaled(a, others, BK))
        total = tl.sum(b.to(tl.float32) * a, 1)
        if BIASED:
            total += tl.load(beside + number * N + own, mask=own < N, other=0).to(tl.float32)
        total, gated = tl.split(tl.reshape(total, [SHARE, 2]))
        total = total / (1 + tl.exp(-total)) * gated
        tl.store(inner + place.to(tl.int64) * WIDTH + column, total.to(inner.dtype.element_ty), mask=inside)


@triton.jit
def contract(
    inner, weight, beside, results, count, index, members, windows,
    num_slots, capacity, max_rows,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
    BIASED: tl.constexpr, SCALED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """As in ``gemm.py``, over the pairs that ``expand`` put into ``inner``."""
    # ``expand`` lets this start when all before it is complete, the dispatch too: ``count`` and ``index`` are good.
    let_next_start(OVERLAP)
    ends = _ends(count, num_slots, SLOTS)
    pairs = tl.max(ends, 0)
    columns: tl.constexpr = (N + BN - 1) // BN
    for work in range(tl.program_id(0), pairs * columns, tl.num_programs(0)):
        place = work // columns
        number, pair = _find(place, ends, SLOTS)
        column = work % columns * BN + tl.arange(0, BN)
        inside = column < N
        b = load_columns(weight + number.to(tl.int64) * (N * K), column, N, K, BK)
        code = tl.load(index + number.to(tl.int64) * capacity + pair + tl.zeros([1], tl.int32), cache_modifier=".cg")
        if SCALED:
            scales = _scales(beside, number * (N // _BLOCK) + work % columns * BN // _BLOCK, K, BK)
        here = tl.load(windows + tl.load(members + 1))
        home = _homes(code, code >= 0, results, windows, here, max_rows, N, TOP_K)
        await_previous(OVERLAP)
        b = late(b, OVERLAP)
        a = _row(inner + (place.to(tl.int64) + tl.zeros([1], tl.int64)) * K, K, BK)
        if SCALED:
            a = _scaled(a, scales, BK)
        total = tl.sum(b.to(tl.float32) * a, 1)
        if BIASED:
            total += tl.load(beside + number * N + column, mask=inside, other=0).to(tl.float32)
        tl.store(home + column, total.to(results.dtype.element_ty), mask=inside)
    await_previous(OVERLAP)  # who had nothing to do must not seem complete before the others are
