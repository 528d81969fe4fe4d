"""The experts of a single row that all stand on its own rank: their two products, and nothing around them.

Where no row leaves its rank there is nobody to wait for, and with one row nothing to sort: which slots its experts
stand in, every program reads for itself, and who has a few output columns has them of all pairs, so it sums them too.
Weights are as in ``gemv.py``; ``table``, ``members`` and ``chosen`` as in ``route.py``.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from actors.engine.cuda.one_row import load_columns
from actors.engine.cuda.overlap import await_previous, fetch_ahead, late, let_next_start


@triton.jit
def _slots(ids, real, slots, first_slot, num_slots, EXPERTS: tl.constexpr):
    """By pair: the slot of this rank where its expert stands, or -1; ``slots`` is this rank's and layer's table.

    Also whether the ids are known, if this is a ``real`` row.
    """
    known = (ids >= 0) & (ids < EXPERTS) & real
    slot = tl.load(slots + ids, mask=known, other=-1) - first_slot
    return tl.where(known & (slot >= 0) & (slot < num_slots), slot, -1), known


@triton.jit(do_not_specialize=["layer"])
def expand(
    hidden, weight, bias, inner, ids, own_rows, table, members, chosen, computed,
    layer, num_slots,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, EXPERTS: tl.constexpr, MAX_RANKS: tl.constexpr,
    BIASED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """``inner [top_k, N / 2]`` of ``hidden [1, K]`` and its experts ``ids [1, top_k]``; see ``gemm.expand``.

    ``BN`` columns of weights give half as many. Counts in ``chosen`` and ``computed``.
    """
    me, real = tl.load(members + 1), tl.load(own_rows) > 0
    slots, first_slot = table + (layer * MAX_RANKS + me) * (EXPERTS + 1), me * num_slots
    if OVERLAP:
        # Long out of the cache: the last step has read it, and all weights since.
        fetch_ahead(slots + tl.minimum(tl.arange(0, triton.next_power_of_2(EXPERTS // 32 + 2)) * 32, EXPERTS))
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()  # ``contract`` reads what the kernel before this one wrote
    WIDTH: tl.constexpr = N // 2
    SHARE: tl.constexpr = BN // 2
    columns: tl.constexpr = (WIDTH + SHARE - 1) // SHARE
    for work in range(tl.program_id(0), TOP_K * columns, tl.num_programs(0)):
        pair = work // columns
        expert = tl.load(ids + pair).to(tl.int32)
        slot, _known = _slots(expert, real, slots, first_slot, num_slots, EXPERTS)
        if slot >= 0:
            beside = tl.arange(0, BN)  # gates and other halves in turn
            own = beside % 2 * WIDTH + work % columns * SHARE + beside // 2
            b = load_columns(weight + slot.to(tl.int64) * (N * K), own, N, K, BK)
            tl.debug_barrier()  # so that all reads of weights are under way before one is waited for
            k = tl.arange(0, BK)
            row = tl.load(hidden + k, k < K, 0.0).to(tl.float32)
            total = tl.sum(b.to(tl.float32) * row[None, :], 1)
            if BIASED:
                total += tl.load(bias + slot * N + own, mask=own < N, other=0).to(tl.float32)
            total, gated = tl.split(tl.reshape(total, [SHARE, 2]))
            total = total / (1 + tl.exp(-total)) * gated
            column = work % columns * SHARE + tl.arange(0, SHARE)
            tl.store(inner + pair * WIDTH + column, total.to(inner.dtype.element_ty), mask=column < WIDTH)
    if tl.program_id(0) == tl.num_programs(0) - 1:  # which has no more work than others, or less
        pairs = tl.arange(0, triton.next_power_of_2(TOP_K))
        experts = tl.load(ids + pairs, mask=pairs < TOP_K, other=-1).to(tl.int32)
        their, known = _slots(experts, real, slots, first_slot, num_slots, EXPERTS)
        tl.atomic_add(chosen + layer * EXPERTS + experts, 1, mask=known, sem="relaxed")
        tl.store(computed, tl.load(computed) + tl.sum((their >= 0).to(tl.int32), 0))


@triton.jit(do_not_specialize=["layer"])
def contract(
    inner, weight, bias, ids, factors, output, own_rows, table, members,
    layer, num_slots,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, EXPERTS: tl.constexpr, MAX_RANKS: tl.constexpr,
    BIASED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """``output [1, N]``: what ``expand`` put into ``inner``, by the slots' second weights, times ``factors``.

    These are ``[1, top_k]``; sums are in float32. A program has ``BN`` columns.
    """
    let_next_start(OVERLAP)
    pair = tl.arange(0, triton.next_power_of_2(TOP_K))
    expert = tl.load(ids + pair, mask=pair < TOP_K, other=-1).to(tl.int32)
    me = tl.load(members + 1)
    slots = table + (layer * MAX_RANKS + me) * (EXPERTS + 1)
    slot, _known = _slots(expert, tl.load(own_rows) > 0, slots, me * num_slots, num_slots, EXPERTS)
    here = slot >= 0
    factor = tl.load(factors + pair, mask=here, other=0).to(tl.float32)
    column, k = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    inside = here[:, None, None] & (column < N)[None, :, None] & (k < K)[None, None, :]
    place = slot.to(tl.int64)[:, None, None] * (N * K) + (column[:, None] * K + k[None, :])[None, :, :]
    b = tl.load(weight + place, inside, 0.0)
    await_previous(OVERLAP)
    b = late(b, OVERLAP)
    a = tl.load(inner + (pair[:, None] * K + k[None, :]), here[:, None] & (k < K)[None, :], 0.0).to(tl.float32)
    # Over the pairs first: those a thread has by itself.
    total = tl.sum(tl.sum(b.to(tl.float32) * (a * factor[:, None])[:, None, :], 0), 1)
    if BIASED:
        mask = here[:, None] & (column < N)[None, :]
        beside = tl.load(bias + slot[:, None] * N + column[None, :], mask, 0).to(tl.float32)
        total += tl.sum(beside * factor[:, None], 0)
    tl.store(output + column, total.to(output.dtype.element_ty), mask=column < N)
