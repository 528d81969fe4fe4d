"""Attention of sequences with one new token each: flash decoding, a sequence's tokens split over several programs.

The query heads of one KV head form one small matrix. A sequence's programs leave partial results, and whoever
comes last adds them up, in their order, so that the result does not depend on who that was. (Dao et al.,
"Flash-Decoding for long-context inference", 2023.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from actors.engine.cuda.attend_tile import LOG2E, Tiles, attend_tile, finish, precision
from actors.engine.cuda.paged import inner_contiguous, power

MAX_SPLITS = 32
MAX_GROUP = 128


@triton.jit
def combine(  # type: ignore[no-untyped-def]
    partial,
    sums,
    place,
    splits,
    active,
    GROUP: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    G: tl.constexpr,
    VD: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """What the programs of a sequence and KV head left, in the order of their tokens: as ``attend_tile`` gives it."""
    members, v = tl.arange(0, G), tl.arange(0, VD)
    peak = tl.full([G], float("-inf"), tl.float32)
    total = tl.zeros([G], tl.float32)
    result = tl.zeros([G, VD], tl.float32)
    for first in tl.range(0, active, UNROLL):
        for step in tl.static_range(UNROLL):  # so that many loads are under way
            slot = (place * splits + first + step) * GROUP + members
            there = (members < GROUP) & (first + step < active)
            own = tl.load(sums + slot * 2, mask=there, other=float("-inf"), cache_modifier=".cg")
            weight = tl.load(sums + slot * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
            part_at = partial + slot[:, None] * VALUE_WIDTH + v[None, :]
            part_mask = there[:, None] & (v < VALUE_WIDTH)[None, :]
            part = tl.load(part_at, mask=part_mask, other=0.0, cache_modifier=".cg")
            higher = tl.maximum(peak, own)
            shrink, grow = tl.exp2(peak - higher), tl.exp2(own - higher)
            peak = higher
            total = total * shrink + weight * grow
            result = result * shrink[:, None] + part * grow[:, None]
    return peak, total, result


@triton.jit(do_not_specialize=["splits", "window"])
def _decode(  # type: ignore[no-untyped-def]
    query,
    keys,
    values,
    tables,
    lengths,
    sinks,
    out,
    partial,
    sums,
    arrivals,
    scale,
    window,
    splits,
    q_row,
    q_head,
    table_row,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    UNROLL: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    KD: tl.constexpr,
    VD: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    split, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence)
    low = 0
    if window is not None:
        low = tl.maximum(length - window, 0)
    base = low // N * N
    share = tl.maximum(tl.cdiv(tl.cdiv(length - base, splits), N), 1) * N
    active = tl.cdiv(length - base, share)  # 0 for padding
    if split >= tl.maximum(active, 1):
        return

    members, k, v = tl.arange(0, M), tl.arange(0, KD), tl.arange(0, VD)
    heads = head * GROUP + members
    real = members < GROUP
    row = sequence.to(tl.int64)
    q_mask = real[:, None] & (k < KEY_WIDTH)[None, :]
    q = tl.load(query + row * q_row + heads[:, None] * q_head + k[None, :], mask=q_mask, other=0.0)
    position = tl.full([M], 0, tl.int32) + length - 1
    peak = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    result = tl.zeros([M, VD], tl.float32)
    begin = base + split * share
    end = tl.minimum(begin + share, length)
    table = tables + sequence * table_row
    for first in tl.range(begin, end, N, num_stages=STAGES):
        peak, total, result = attend_tile(
            q, keys, values, table, head, first, low, length, position, window, scale, peak, total, result,
            KV_HEADS, KEY_WIDTH, VALUE_WIDTH, PAGE, N, KD, VD, True, PRECISION,
        )  # fmt: skip

    out_at = out + (row * KV_HEADS * GROUP + heads[:, None]) * VALUE_WIDTH + v[None, :]
    out_mask = real[:, None] & (v < VALUE_WIDTH)[None, :]
    if active <= 1:
        tl.store(out_at, finish(peak, total, result, sinks, heads, real).to(out.dtype.element_ty), mask=out_mask)
        return

    place = sequence * KV_HEADS + head
    slot = (place * splits + split) * GROUP + members
    tl.store(partial + slot[:, None] * VALUE_WIDTH + v[None, :], result, mask=out_mask)
    tl.store(sums + slot * 2, peak, mask=real)
    tl.store(sums + slot * 2 + 1, total, mask=real)
    tl.debug_barrier()  # all threads' stores, then one thread's release
    if tl.atomic_add(arrivals + place, 1, sem="acq_rel") < active - 1:
        return
    tl.store(arrivals + place, 0)  # for the next layer
    peak, total, result = combine(partial, sums, place, splits, active, GROUP, VALUE_WIDTH, G, VD, UNROLL)
    all_heads, all_real = head * GROUP + tl.arange(0, G), tl.arange(0, G) < GROUP
    result = finish(peak, total, result, sinks, all_heads, all_real).to(out.dtype.element_ty)
    all_at = out + (row * KV_HEADS * GROUP + all_heads[:, None]) * VALUE_WIDTH + v[None, :]
    tl.store(all_at, result, mask=all_real[:, None] & (v < VALUE_WIDTH)[None, :])


def decode_tiles(dtype: torch.dtype, group: int, width: int) -> Tiles:
    rows = power(group)
    if dtype == torch.float32:
        return Tiles(rows, 32 if width <= 128 else 16, 4, 1)
    return Tiles(rows, 32, 4, 5 if width <= 128 else 3)


def decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
    scaling: float,
    window: int | None,
    sinks: torch.Tensor | None,
    splits: int,
    arrivals: torch.Tensor,
    tiles: Tiles | None = None,
) -> None:
    """One query row per sequence: ``query [S, heads, key_width]`` to ``out [S, heads, value_width]``, contiguous.

    ``tables [S or more, blocks]`` and ``lengths [S or more]``, int32, as in ``StepInputs``; a length of 0 gives zeros.
    ``splits`` (1 to 32) programs share a sequence; with more than one ``arrivals`` is int32, zeros, ``S * kv_heads``
    or more, and left as it was. Raises ValueError with more than 128 query heads on a KV head.
    """
    query = inner_contiguous(query)
    count, heads, key_width = query.shape
    _, kv_heads, page, value_width = values.shape
    group = heads // kv_heads
    if group > MAX_GROUP:
        raise ValueError(f"{group} query heads share a KV head, but the decode kernel takes {MAX_GROUP} at most")
    if not count:
        return
    padded = power(key_width), power(value_width)
    tiles = tiles or decode_tiles(query.dtype, group, max(padded))
    members = triton.next_power_of_2(group)
    shared = count * splits * heads if splits > 1 else 0
    partial = torch.empty(shared * value_width, dtype=torch.float32, device=query.device)
    sums = torch.empty(shared * 2, dtype=torch.float32, device=query.device)
    _decode[(splits, kv_heads, count)](
        query, keys, values, tables, lengths, sinks, out, partial, sums, arrivals,
        scaling * LOG2E, window, splits, query.stride(0), query.stride(1), tables.stride(0),
        KV_HEADS=kv_heads, GROUP=group, KEY_WIDTH=key_width, VALUE_WIDTH=value_width, PAGE=page,
        UNROLL=max(1, min(16, 16384 // (members * padded[1]))), G=members, M=tiles.rows, N=tiles.tokens,
        KD=padded[0], VD=padded[1], STAGES=tiles.stages, PRECISION=precision(query.dtype), num_warps=tiles.warps,
    )  # fmt: skip
