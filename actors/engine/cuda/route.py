"""Where rows go, and how they get there: the kernels before and after a layer's matrix products.

Everything that depends on the membership is read from device memory, so a captured graph outlives an epoch:

* ``members [2]``: how many ranks there are, and which of them this one is; ``windows [ranks]``: the addresses of their
  windows (see ``window.py``); ``pad [1]``: where in each window this epoch's flags stand, in bytes.
* ``table [layers, max_ranks, experts + 1]``: the global slot to which a rank sends an expert's rows, -1 for none;
  ``local [layers]``: 1 where no row leaves its rank, so that nobody is waited for.
* ``broken [1]``: the pad of the epoch whose waits the host broke off. It stands in host memory, which the host writes
  without asking the driver: that may be waiting itself, for room to launch what comes behind a wait.
* ``turn [1]``: how many exchanges there have been in this epoch. A flag is up when it has reached the present turn.

A *pair* is a row and one of its experts: ``(source * max_rows + row) * top_k + k``. ``count [slots]`` is how many pairs
stand in each slot of this rank, ``index [slots, capacity]`` which. ``combine`` leaves the counts at zero.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from actors.engine.cuda.overlap import begin, begin_in_turn, fetch_ahead

# A wait looks at its flag so often before it looks whether the host breaks off.
_LOOKS = tl.constexpr(256)


@triton.jit
def _flag(windows, rank, pad, kind, source, MAX_RANKS: tl.constexpr):
    """In the window of ``rank``: what ``source`` raises there; ``kind`` 0: rows have come, 1: results have."""
    address = tl.load(windows + rank) + tl.load(pad) + (kind * MAX_RANKS + source) * 4
    return address.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def _raise(windows, pad, kind, members, turn, MAX_RANKS: tl.constexpr):
    """Tells all peers that what this program, or one it has heard of, wrote into their windows is complete."""
    size, me = tl.load(members), tl.load(members + 1)
    tl.debug_barrier()
    for peer in range(size):
        if peer != me:
            tl.atomic_xchg(_flag(windows, peer, pad, kind, me, MAX_RANKS), turn, sem="release", scope="sys")


@triton.jit
def _arrived(windows, pad, broken, kind, members, source, turn, void, MAX_RANKS: tl.constexpr):
    """Waits until ``source`` has raised its flag: True. Or until a host breaks off: False, and the step is void."""
    size, me = tl.load(members), tl.load(members + 1)
    flag = _flag(windows, me, pad, kind, source, MAX_RANKS)
    abort = _flag(windows, me, pad, 2, 0, MAX_RANKS)
    behind = tl.load(flag, volatile=True) - turn
    epoch, looks = tl.load(pad), behind * 0
    while behind < 0:
        behind = tl.load(flag, volatile=True) - turn
        looks += 1
        # The host's word is far away.
        if tl.load(broken, mask=looks % _LOOKS == 0, other=-1, volatile=True) == epoch:
            for rank in range(size):
                tl.atomic_xchg(_flag(windows, rank, pad, 2, 0, MAX_RANKS), 1, sem="relaxed", scope="sys")
        if tl.load(abort, volatile=True) != 0:
            behind = 0
    # The loads above order nothing; this does. Rows that came before the host broke off are nobody's any more: their
    # rank is in another epoch, where late results would overwrite those it waits for.
    arrived = (tl.atomic_add(flag, 0, sem="acquire", scope="sys") - turn >= 0) & (tl.load(abort, volatile=True) == 0)
    if not arrived:
        tl.store(void, 1)
    return arrived


@triton.jit
def _fetch_tables(table, size, turn, count, num_slots, EXPERTS: tl.constexpr):
    """Asks for the small things that a layer's kernels read: since the last step, weights pushed them out."""
    line = tl.arange(0, triton.next_power_of_2(EXPERTS // 32 + 2)) * 32
    for rank in range(size):
        fetch_ahead(table + rank * (EXPERTS + 1) + tl.minimum(line, EXPERTS))
    for first in range(0, num_slots, 32):
        fetch_ahead(count + first + tl.arange(0, 1))
    fetch_ahead(turn + tl.arange(0, 1))


@triton.jit
def _place(
    ids, chosen, slots, first_slot, num_slots, count, index, capacity, rows, first_pair,
    TOP_K: tl.constexpr, EXPERTS: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Enters those pairs of one source into ``index`` that stand here. All programs share the work."""
    for start in range(tl.program_id(0) * BLOCK, rows * TOP_K, tl.num_programs(0) * BLOCK):
        pair = start + tl.arange(0, BLOCK)
        expert = tl.load(ids + pair, mask=pair < rows * TOP_K, other=-1).to(tl.int32)
        known = (expert >= 0) & (expert < EXPERTS)
        if OWN:
            tl.atomic_add(chosen + expert, 1, mask=known, sem="relaxed")
        slot = tl.load(slots + expert, mask=known, other=-1) - first_slot
        here = known & (slot >= 0) & (slot < num_slots)
        place = tl.atomic_add(count + slot, 1, mask=here, sem="relaxed")
        tl.store(index + slot.to(tl.int64) * capacity + place, first_pair + pair, mask=here)


@triton.jit(do_not_specialize=["layer"])
def dispatch(
    hidden, ids, received, own_rows, chosen, table, local, members, windows, pad, broken, turn, arrived, count, index,
    void, layer, num_slots, capacity, max_rows, ids_at, counts_at,
    TOP_K: tl.constexpr, HIDDEN: tl.constexpr, EXPERTS: tl.constexpr, MAX_RANKS: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, EAGER: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Pushes this rank's rows to all peers and enters all ranks' pairs that stand here into ``index``.

    ``hidden [rows, H]``, ``ids [rows, k]``, of which the first ``own_rows`` count. Adds to ``chosen`` (int64
    ``[layers, experts]``). The programs wait for peers, so all of them must be resident at once; ``arrived`` counts
    them and must be zero.
    """
    # What no kernel changes within a step is read before this one's turn.
    rows = tl.load(own_rows)
    size, me = tl.load(members), tl.load(members + 1)
    alone = tl.load(local + layer) != 0
    here = tl.load(windows + me)
    if OVERLAP:
        _fetch_tables(table + layer * MAX_RANKS * (EXPERTS + 1), size, turn, count, num_slots, EXPERTS)
    if EAGER:
        begin(OVERLAP)
    else:
        begin_in_turn(OVERLAP)
    now = tl.load(turn) + 1
    if not alone:
        # Once the host has broken off, peers may be at something else already.
        if tl.load(_flag(windows, me, pad, 2, 0, MAX_RANKS), volatile=True) == 0:
            column = tl.arange(0, WIDTH)
            k = tl.arange(0, triton.next_power_of_2(TOP_K))
            for row in range(tl.program_id(0), rows, tl.num_programs(0)):
                at = me.to(tl.int64) * max_rows + row
                experts = tl.load(ids + row * TOP_K + k, mask=k < TOP_K, other=-1).to(tl.int32)
                values = tl.load(hidden + tl.cast(row, tl.int64) * HIDDEN + column, mask=column < HIDDEN)
                for peer in range(size):
                    if peer != me:
                        window = tl.load(windows + peer)
                        # An offset, not an address: only this keeps the compiler's word that stores may be wide.
                        offset = (window - here) // (hidden.dtype.element_ty.primitive_bitwidth // 8)
                        there = received + tl.multiple_of(offset, 16) + at * HIDDEN
                        tl.store(there + column, values, mask=column < HIDDEN)
                        their_ids = (window + ids_at).to(tl.pointer_type(tl.int32), bitcast=True)
                        tl.store(their_ids + at * TOP_K + k, experts, mask=k < TOP_K)
            tl.debug_barrier()
            if tl.atomic_add(arrived, 1, sem="acq_rel", scope="sys") == tl.num_programs(0) - 1:
                for peer in range(size):
                    if peer != me:
                        counts = (tl.load(windows + peer) + counts_at).to(tl.pointer_type(tl.int32), bitcast=True)
                        tl.store(counts + me, rows)
                _raise(windows, pad, 0, members, now, MAX_RANKS)
        else:
            tl.store(void, 1)
    first_slot = me * num_slots
    slots = table + layer * MAX_RANKS * (EXPERTS + 1)
    _place(
        ids, chosen + layer * EXPERTS, slots + me * (EXPERTS + 1), first_slot, num_slots, count, index, capacity, rows,
        me * max_rows * TOP_K, TOP_K, EXPERTS, True, BLOCK,
    )  # fmt: skip
    if not alone:
        for step in range(1, size):
            source = (me + step) % size
            if _arrived(windows, pad, broken, 0, members, source, now, void, MAX_RANKS):
                theirs = tl.load((here + counts_at).to(tl.pointer_type(tl.int32), bitcast=True) + source)
                their_ids = (here + ids_at).to(tl.pointer_type(tl.int32), bitcast=True)
                _place(
                    their_ids + source.to(tl.int64) * max_rows * TOP_K, chosen, slots + source * (EXPERTS + 1),
                    first_slot, num_slots, count, index, capacity, theirs, source * max_rows * TOP_K,
                    TOP_K, EXPERTS, False, BLOCK,
                )  # fmt: skip


@triton.jit(do_not_specialize=["layer", "rows"])
def combine(
    ids, weights, results, output, own_rows, table, local, members, windows, pad, broken, turn, arrived, count, void,
    layer, rows, num_slots,
    TOP_K: tl.constexpr, HIDDEN: tl.constexpr, EXPERTS: tl.constexpr, MAX_RANKS: tl.constexpr, SLOTS: tl.constexpr,
    WIDTH: tl.constexpr, EAGER: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """``output [rows, H]``: each row's results, weighted and summed in float32 in the order of k; zeros beyond
    ``own_rows`` and for experts that stand nowhere.

    Waits for the results that peers write into ``results [max_rows * k, H]``, and tells them that this rank's have
    been written by the kernel before.
    """
    size, me = tl.load(members), tl.load(members + 1)
    alone, real = tl.load(local + layer) != 0, tl.load(own_rows)
    if OVERLAP:
        _fetch_tables(table + layer * MAX_RANKS * (EXPERTS + 1), size, turn, count, num_slots, EXPERTS)
    if EAGER:
        begin(OVERLAP)
    else:
        begin_in_turn(OVERLAP)
    if tl.program_id(0) == 0:
        slot = tl.arange(0, SLOTS)
        tl.store(count + slot, 0, mask=slot < num_slots)
        tl.store(arrived, 0)
    if not alone:
        now = tl.load(turn)
        if tl.program_id(0) == 0:
            _raise(windows, pad, 1, members, now, MAX_RANKS)
        for peer in range(size):
            if peer != me:
                _arrived(windows, pad, broken, 1, members, peer, now, void, MAX_RANKS)
    slots = table + (layer * MAX_RANKS + me) * (EXPERTS + 1)
    parts: tl.constexpr = (HIDDEN + WIDTH - 1) // WIDTH
    for item in range(tl.program_id(0), rows * parts, tl.num_programs(0)):
        row = item // parts
        column = item % parts * WIDTH + tl.arange(0, WIDTH)
        total = tl.zeros([WIDTH], tl.float32)
        if row < real:
            for k in tl.static_range(TOP_K):
                pair = row * TOP_K + k
                expert = tl.load(ids + pair).to(tl.int32)
                known = (expert >= 0) & (expert < EXPERTS)
                stands = tl.load(slots + expert, mask=known, other=-1) >= 0
                value = tl.load(results + pair.to(tl.int64) * HIDDEN + column, mask=(column < HIDDEN) & stands, other=0)
                total += tl.load(weights + pair).to(tl.float32) * value.to(tl.float32)
        tl.store(output + row.to(tl.int64) * HIDDEN + column, total.to(output.dtype.element_ty), mask=column < HIDDEN)
